// One entry as a plain loop, which the compiler vectorises. Compiled for each operation and
// arithmetic, which EMA_FUSED_OPERATION and EMA_FUSED_ARITHMETIC name.
#include <algorithm>

#include "dispatch.h"
#include "update_cpu_isa.h"

namespace ema_fused::EMA_FUSED_ISA {
namespace {

struct Loop {
  const Chunk& chunk;
  const Launch& launch;

  template <typename Types>
  EMA_FUSED_HD void operator()(Types) const {
    using A = typename Types::Averaged;
    using S = typename Types::Source;
    using Functor = typename Types::Functor;
    using Element = typename Widening<S>::Element;
    auto* const averaged = static_cast<A*>(chunk.averaged);
    const Functor functor(weight_of(launch, chunk));
    if constexpr (!Widening<S>::kWidens && !Functor::kRandom) {
      auto* const source = static_cast<S*>(chunk.source);
      const std::int64_t count = chunk.count;
      EMA_FUSED_INDEPENDENT
      for (std::int64_t i = 0; i < count; ++i) {
        functor(averaged[i], source[i]);
      }
    } else {
      for (std::int64_t begin = 0; begin < chunk.count; begin += kElementsATile) {
        const std::int64_t count = std::min(kElementsATile, chunk.count - begin);
        [[maybe_unused]] Element tile[Widening<S>::kWidens ? kElementsATile : 1];
        Element* source;
        if constexpr (Widening<S>::kWidens) {
          source = widen_elements(chunk.source, chunk.source_dtype, begin, count, tile);
        } else {
          source = static_cast<S*>(chunk.source) + begin;
        }
        update_tile(functor, averaged + begin, source, begin, count);
      }
    }
  }

 private:
  // The elements [begin, begin + count) of the chunk.
  template <typename Functor, typename A, typename S>
  EMA_FUSED_HD void update_tile(const Functor& functor, A* averaged, S* source,
                                [[maybe_unused]] std::int64_t begin, std::int64_t count) const {
    if constexpr (Functor::kRandom) {
      std::uint32_t words[kElementsATile / 2];
      fill(words, begin, count);
      // The low half of a word is the first on every machine that this is built for.
      const auto* const random = reinterpret_cast<const std::uint16_t*>(words);
      EMA_FUSED_INDEPENDENT
      for (std::int64_t i = 0; i < count; ++i) {
        functor(averaged[i], source[i], random[i]);
      }
    } else {
      EMA_FUSED_INDEPENDENT
      for (std::int64_t i = 0; i < count; ++i) {
        functor(averaged[i], source[i]);
      }
    }
  }

  // The random bits of the same elements, half a word each.
  EMA_FUSED_HD void fill(std::uint32_t* words, std::int64_t begin, std::int64_t count) const {
    // A CPU's chunks begin where a random block does.
    static_assert(kChunkElementsCpu % kElementsARandomBlock == 0);
    static_assert(kElementsATile % kElementsARandomBlock == 0);
    const RandomKey key = random_key_of(launch, chunk.number);
    const auto first = static_cast<std::uint64_t>(chunk.first + begin) / kElementsARandomBlock;
    const std::int64_t blocks = (count + kElementsARandomBlock - 1) / kElementsARandomBlock;
    EMA_FUSED_INDEPENDENT
    for (std::int64_t b = 0; b < blocks; ++b) {
      const RandomWords made = random_block(key, first + static_cast<std::uint64_t>(b));
      words[4 * b] = made.words[0];
      words[4 * b + 1] = made.words[1];
      words[4 * b + 2] = made.words[2];
      words[4 * b + 3] = made.words[3];
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
