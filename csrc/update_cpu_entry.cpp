// One entry as a plain loop, which the compiler vectorises. Compiled for each operation and
// arithmetic, which EMA_FUSED_OPERATION and EMA_FUSED_ARITHMETIC name.
#include <algorithm>

#include "dispatch.h"
#include "update_cpu_isa.h"

namespace ema_fused::EMA_FUSED_ISA {
namespace {

// `random`: nothing, or the bits of each element.
template <typename Functor, typename A, typename S, typename... Random>
EMA_FUSED_HD void loop(const Functor functor, A* averaged, S* source, std::int64_t count,
                       const Random*... random) {
  EMA_FUSED_INDEPENDENT
  for (std::int64_t i = 0; i < count; ++i) {
    functor(averaged[i], source[i], random[i]...);
  }
}

// Out of line, so that a widened source shares the loop of those that have its type.
template <typename Functor, typename A, typename S, typename... Random>
__attribute__((noinline)) void update_elements(double weight, A* averaged, S* source,
                                               std::int64_t count, const Random*... random) {
  Functor functor(weight);
  if constexpr (Functor::kHasTwoEnds) {
    // A loop for each end. A choice within one loop costs time, and gcc, which moves it out by
    // itself, leaves some of the loops without vectors then.
    if (functor.from_averaged) {
      functor.from_averaged = true;
      loop(functor, averaged, source, count, random...);
      return;
    }
    functor.from_averaged = false;
  }
  loop(functor, averaged, source, count, random...);
}

struct Loop {
  static constexpr bool kServesComplex = true;
  const Chunk& chunk;
  const Launch& launch;

  template <typename Types>
  EMA_FUSED_HD void operator()(Types) const {
    using S = typename Types::Source;
    using Functor = typename Types::Functor;
    auto* const averaged = static_cast<typename Types::Averaged*>(chunk.averaged);
    const double weight = weight_of(launch, chunk);
    if constexpr (!Widening<S>::kWidens && !Functor::kRandom) {
      update_elements<Functor>(weight, averaged, static_cast<S*>(chunk.source), chunk.count);
    } else {
      for (std::int64_t begin = 0; begin < chunk.count; begin += kElementsATile) {
        const std::int64_t count = std::min(kElementsATile, chunk.count - begin);
        if constexpr (Widening<S>::kWidens) {
          using Element = typename Widening<S>::Element;
          Element tile[kElementsATile];
          update_tile<Functor>(weight, averaged + begin,
                               widen_elements(chunk.source, chunk.source_dtype, begin, count, tile),
                               begin, count);
        } else {
          update_tile<Functor>(weight, averaged + begin, static_cast<S*>(chunk.source) + begin,
                               begin, count);
        }
      }
    }
  }

 private:
  // The elements [begin, begin + count) of the chunk.
  template <typename Functor, typename A, typename S>
  EMA_FUSED_HD void update_tile(double weight, A* averaged, S* source,
                                [[maybe_unused]] std::int64_t begin, std::int64_t count) const {
    if constexpr (Functor::kRandom) {
      // A CPU's chunks begin where a random block does.
      static_assert(kChunkElementsCpu % kElementsARandomBlock == 0);
      static_assert(kElementsATile % kElementsARandomBlock == 0);
      std::uint32_t words[kElementsATile / 2];
      random_blocks(words, random_key_of(launch, chunk.number),
                    static_cast<std::uint64_t>(chunk.first + begin) / kElementsARandomBlock,
                    (count + kElementsARandomBlock - 1) / kElementsARandomBlock);
      // The low half of a word is the first on every machine that this is built for.
      update_elements<Functor>(weight, averaged, source, count,
                               reinterpret_cast<const std::uint16_t*>(words));
    } else {
      update_elements<Functor>(weight, averaged, source, count);
    }
  }
};

}  // namespace

template <Operation kOperation, Arithmetic kArithmetic>
void update_entry(const Chunk& chunk, const Launch& launch) {
  dispatch<kOperation, kArithmetic>(chunk, Loop{chunk, launch});
}

template void update_entry<Operation::EMA_FUSED_OPERATION, Arithmetic::EMA_FUSED_ARITHMETIC>(
    const Chunk& chunk, const Launch& launch);

}  // namespace ema_fused::EMA_FUSED_ISA
