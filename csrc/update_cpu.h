// The CPU loop around the arithmetic, compiled once per instruction set and chosen at run time.
#pragma once

#include <cstdint>

#include "chunk_table.h"

namespace ema_fused {

// Updates the chains that begin at entries [begin, end) on the calling thread. `distances`: null,
// or a number for each entry of the table: those of these chains get the squared distance between
// source and average as it was.
using UpdateChunks = void (*)(const ChunkTable& table, std::int64_t begin, std::int64_t end,
                              const Launch& launch, double* distances);

namespace baseline {
void update_chunks(const ChunkTable& table, std::int64_t begin, std::int64_t end,
                   const Launch& launch, double* distances);
}
namespace avx2 {
void update_chunks(const ChunkTable& table, std::int64_t begin, std::int64_t end,
                   const Launch& launch, double* distances);
}
namespace avx512 {
void update_chunks(const ChunkTable& table, std::int64_t begin, std::int64_t end,
                   const Launch& launch, double* distances);
}

struct CpuKernel {
  const char* isa;
  UpdateChunks update_chunks;
};

// The widest instruction set that was compiled, that this processor has, and that torch's own
// variable ATEN_CPU_CAPABILITY (default, avx2, avx512) doesn't forbid: results then follow torch's
// to the bit, which has no fused multiply-add at "default".
CpuKernel cpu_kernel();

}  // namespace ema_fused
