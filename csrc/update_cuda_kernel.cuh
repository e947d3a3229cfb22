// The kernels of each operation and arithmetic, which are compiled one by one so that cores share
// the work.
#pragma once

#include <cstdint>

#include "chunk_table.h"

namespace ema_fused::cuda {

constexpr int kThreads = 256;
// Asks the compiler to keep registers low enough for three blocks a multiprocessor.
constexpr int kBlocksPerMultiprocessor = 3;

// `measured` is a kernel of its own, so that the update that nobody measures stays as it is. Null
// for copies and swaps.
struct Kernels {
  void (*update)(const Chunk* entries, std::int64_t heads, Launch launch);
  void (*measured)(const Chunk* entries, std::int64_t heads, Launch launch, Partials partials);
};

template <Operation kOperation, Arithmetic kArithmetic>
Kernels kernels();

}  // namespace ema_fused::cuda
