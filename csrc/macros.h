// Markers that let one definition serve the host compiler and nvcc.
#pragma once

#if defined(__CUDACC__)
#define EMA_FUSED_HD __host__ __device__ __forceinline__
#elif defined(EMA_FUSED_OUT_OF_LINE)
// The host tests: quick to compile, and a stack trace shows every function.
#define EMA_FUSED_HD inline
#else
// always_inline: the CPU kernels are compiled once per instruction set, and a function left out of
// line could be merged by the linker into the copy that the processor at hand cannot execute.
#define EMA_FUSED_HD inline __attribute__((always_inline))
#endif

// Full unrolling: an array indexed by a loop counter stays in registers only if the counter is
// known.
#if defined(__CUDACC__)
#define EMA_FUSED_UNROLL _Pragma("unroll")
#else
#define EMA_FUSED_UNROLL
#endif
