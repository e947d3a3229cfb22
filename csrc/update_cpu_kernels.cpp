// Compiled several times, with EMA_FUSED_ISA naming both the namespace and the flags.
#include <algorithm>

#include "dispatch.h"
#include "squared_distance.h"
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

// The squared distance of one entry, in several sums side by side, which are vectors.
struct Measure {
  const Chunk& chunk;
  double& distance;

  template <typename Types>
  EMA_FUSED_HD void operator()(Types) const {
    if constexpr (Types::Functor::kReadsAveraged) {
      const auto* const averaged = static_cast<const typename Types::Averaged*>(chunk.averaged);
      const auto* const source = static_cast<const typename Types::Source*>(chunk.source);
      constexpr std::int64_t kLanes = 16;
      double lanes[kLanes]{};
      const std::int64_t count = chunk.count;
      const std::int64_t in_lanes = count / kLanes * kLanes;
      for (std::int64_t i = 0; i < in_lanes; i += kLanes) {
        for (std::int64_t lane = 0; lane < kLanes; ++lane) {
          lanes[lane] = with_square(lanes[lane], averaged[i + lane], source[i + lane]);
        }
      }
      for (std::int64_t i = in_lanes; i < count; ++i) {
        lanes[i - in_lanes] = with_square(lanes[i - in_lanes], averaged[i], source[i]);
      }
      for (const double lane : lanes) {
        distance += lane;
      }
    }
  }
};

// Once for all arithmetics. The update that comes behind it finds the entry in the cache. Copies
// have no distance.
__attribute__((noinline)) double distance_of(const Chunk& chunk) {
  double distance = 0.0;
  dispatch<Operation::kAverage, Arithmetic::kLerp>(chunk, Measure{chunk, distance});
  return distance;
}

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
                   const Launch& launch, double* distances) {
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
        if (distances != nullptr) {
          distances[entry] = distance_of(chunk);
        }
        dispatch<operation.value, arithmetic.value>(chunk, Loop{chunk, launch});
        entry = chunk.next;
      } while (entry != 0);
    }
  });
}

}  // namespace ema_fused::EMA_FUSED_ISA
