// Compiled several times, with EMA_FUSED_ISA naming both the namespace and the flags.
#include <algorithm>

#include "dispatch.h"
#include "update_cpu.h"

#ifndef EMA_FUSED_ISA
#error "EMA_FUSED_ISA must name the instruction set this file is compiled for"
#endif

// The two sides of a pair may be equal but never overlap otherwise (drop_repeated_pairs), so no
// iteration depends on another.
#if defined(__clang__)
#define EMA_FUSED_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define EMA_FUSED_INDEPENDENT _Pragma("GCC ivdep")
#else
#define EMA_FUSED_INDEPENDENT
#endif

namespace ema_fused::EMA_FUSED_ISA {
namespace {

// Random bits are made ahead for this many elements, which a core's first cache holds.
constexpr std::int64_t kElementsATile = 2048;

// One entry as a plain loop, which the compiler vectorises.
struct Loop {
  const Chunk& chunk;
  const Launch& launch;

  template <typename Types>
  EMA_FUSED_HD void operator()(Types) const {
    using Functor = typename Types::Functor;
    auto* const averaged = static_cast<typename Types::Averaged*>(chunk.averaged);
    auto* const source = static_cast<typename Types::Source*>(chunk.source);
    const Functor functor(weight_of(launch, chunk));
    const std::int64_t count = chunk.count;
    if constexpr (Functor::kRandom) {
      const RandomKey key = random_key_of(launch, chunk.number);
      // A CPU's chunks begin where a random block does.
      static_assert(kChunkElementsCpu % kElementsARandomBlock == 0);
      static_assert(kElementsATile % kElementsARandomBlock == 0);
      for (std::int64_t begin = 0; begin < count; begin += kElementsATile) {
        const std::int64_t end = std::min(begin + kElementsATile, count);
        std::uint32_t words[kElementsATile / 2];
        const auto block = static_cast<std::uint64_t>(chunk.first + begin) / kElementsARandomBlock;
        fill(words, key, block, (end - begin + kElementsARandomBlock - 1) / kElementsARandomBlock);
        // The low half of a word is the first on every machine that this is built for.
        const auto* const random = reinterpret_cast<const std::uint16_t*>(words);
        EMA_FUSED_INDEPENDENT
        for (std::int64_t i = begin; i < end; ++i) {
          functor(averaged[i], source[i], random[i - begin]);
        }
      }
    } else {
      EMA_FUSED_INDEPENDENT
      for (std::int64_t i = 0; i < count; ++i) {
        functor(averaged[i], source[i]);
      }
    }
  }

 private:
  // The bits of `blocks` blocks, four words each.
  EMA_FUSED_HD static void fill(std::uint32_t* words, const RandomKey& key, std::uint64_t block,
                                std::int64_t blocks) {
    EMA_FUSED_INDEPENDENT
    for (std::int64_t b = 0; b < blocks; ++b) {
      const RandomWords made = random_block(key, block + static_cast<std::uint64_t>(b));
      words[4 * b] = made.words[0];
      words[4 * b + 1] = made.words[1];
      words[4 * b + 2] = made.words[2];
      words[4 * b + 3] = made.words[3];
    }
  }
};

}  // namespace

void update_chunks(const ChunkTable& table, std::int64_t begin, std::int64_t end,
                   const Launch& launch) {
  if (is_skipped(launch)) {
    return;
  }
  const Chunk* const entries = table.entries.data();
  for_launch(launch, [&](auto operation, auto arithmetic) {
    for (std::int64_t i = begin; i < end; ++i) {
      // One average after the other: a chunk of the source stays in the cache meanwhile.
      std::int64_t entry = i;
      do {
        const Chunk& chunk = entries[entry];
        dispatch<operation.value, arithmetic.value>(chunk, Loop{chunk, launch});
        entry = chunk.next;
      } while (entry != 0);
    }
  });
}

}  // namespace ema_fused::EMA_FUSED_ISA
