// The body of the kernels as the host's compiler makes it, with a fused multiply-add as on a GPU.
#pragma once

#include <cstdint>

#include "../../chunk_table.h"

namespace ema_fused::testing::ptx {

// A launch as its kernel gets it. The last is for kernels that measure; without sums nobody does.
struct Parameters {
  const Chunk* entries;
  std::int64_t heads;
  Launch launch;
  Partials partials;
};

void run_on_host(const Parameters& parameters, std::int64_t blocks, std::uint32_t threads);

// The same as a loop over a table (update_cpu.h); the distance of an average stands at the first of
// its entries.
void update_chunks_on_host(const ChunkTable& table, std::int64_t begin, std::int64_t end,
                           const Launch& launch, double* distances);

}  // namespace ema_fused::testing::ptx
