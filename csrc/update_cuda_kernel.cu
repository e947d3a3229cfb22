// Block b takes chains b, b + grid, b + 2 * grid, ...; its threads walk a chunk together
// (chunk_body.h). Compiled for each operation and arithmetic, which EMA_FUSED_OPERATION and
// EMA_FUSED_ARITHMETIC name.
#include "chunk_body.h"
#include "update_cuda_kernel.cuh"

namespace ema_fused::cuda {
namespace {

template <Operation kOperation, Arithmetic kArithmetic>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    update_kernel(const Chunk* __restrict__ entries, std::int64_t heads,
                  const __grid_constant__ Launch launch) {
  Unmeasured measure;
  update_as_thread<kOperation, kArithmetic>(entries, heads, launch, blockIdx.x, gridDim.x,
                                            threadIdx.x, blockDim.x, measure);
}

template <Arithmetic kArithmetic>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    measured_update_kernel(const Chunk* __restrict__ entries, std::int64_t heads,
                           const __grid_constant__ Launch launch,
                           const __grid_constant__ Partials partials) {
  update_measured_as_thread<kArithmetic>(entries, heads, launch, partials, blockIdx.x, gridDim.x,
                                         threadIdx.x, blockDim.x);
}

}  // namespace

template <Operation kOperation, Arithmetic kArithmetic>
Kernels kernels() {
  if constexpr (kOperation == Operation::kAverage) {
    return {update_kernel<kOperation, kArithmetic>, measured_update_kernel<kArithmetic>};
  } else {
    return {update_kernel<kOperation, kArithmetic>, nullptr};
  }
}

template Kernels kernels<Operation::EMA_FUSED_OPERATION, Arithmetic::EMA_FUSED_ARITHMETIC>();

}  // namespace ema_fused::cuda
