// Compiled several times, with EMA_FUSED_ISA naming both the namespace and the flags.
#include "dispatch.h"
#include "update_cpu.h"

#ifndef EMA_FUSED_ISA
#error "EMA_FUSED_ISA must name the instruction set this file is compiled for"
#endif

namespace ema_fused::EMA_FUSED_ISA {
namespace {

// One chunk as a plain loop, which the compiler vectorises. The two pointers may be equal but never
// overlap otherwise (drop_repeated_pairs), so no iteration depends on another: ivdep.
struct Loop {
  std::int64_t count;

  template <typename A, typename S, typename Functor>
  EMA_FUSED_HD void operator()(A* averaged, S* source, const Functor& functor) const {
#if defined(__clang__)
#pragma clang loop vectorize(assume_safety)
#elif defined(__GNUC__)
#pragma GCC ivdep
#endif
    for (std::int64_t i = 0; i < count; ++i) {
      functor(averaged[i], source[i]);
    }
  }
};

}  // namespace

void update_chunks(const Chunk* chunks, std::int64_t begin, std::int64_t end,
                   const Launch& launch) {
  for_launch(launch, [&](auto operation, auto arithmetic) {
    for (std::int64_t i = begin; i < end; ++i) {
      dispatch<operation.value, arithmetic.value>(chunks[i], launch, Loop{chunks[i].count});
    }
  });
}

}  // namespace ema_fused::EMA_FUSED_ISA
