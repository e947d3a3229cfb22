// The random bits of stochastic rounding: Philox4x32-10, a function of a key and a counter (Salmon
// et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"). An element's bits depend on the
// seed, the step, its pair and its place in the tensor, and on nothing else: not on the device, the
// number of threads or the cutting into chunks.
#pragma once

#include <cstdint>

#include "macros.h"

namespace ema_fused {

struct RandomKey {
  std::uint64_t seed;
  std::uint32_t step;
  std::uint32_t pair;
};

struct RandomWords {
  std::uint32_t words[4];
};

constexpr int kPhiloxRounds = 10;
constexpr std::uint32_t kPhiloxFactor0 = 0xd2511f53u;
constexpr std::uint32_t kPhiloxFactor1 = 0xcd9e8d57u;

// The two keys of a round.
struct PhiloxKeys {
  std::uint32_t key0;
  std::uint32_t key1;

  EMA_FUSED_HD explicit PhiloxKeys(std::uint64_t seed)
      : key0(static_cast<std::uint32_t>(seed)), key1(static_cast<std::uint32_t>(seed >> 32)) {}
  EMA_FUSED_HD void advance() {
    key0 += 0x9e3779b9u;
    key1 += 0xbb67ae85u;
  }
};

EMA_FUSED_HD RandomWords philox(RandomWords counter, std::uint64_t seed) {
  PhiloxKeys keys(seed);
  std::uint32_t c0 = counter.words[0];
  std::uint32_t c1 = counter.words[1];
  std::uint32_t c2 = counter.words[2];
  std::uint32_t c3 = counter.words[3];
  EMA_FUSED_UNROLL
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const std::uint64_t product0 = static_cast<std::uint64_t>(kPhiloxFactor0) * c0;
    const std::uint64_t product1 = static_cast<std::uint64_t>(kPhiloxFactor1) * c2;
    c0 = static_cast<std::uint32_t>(product1 >> 32) ^ c1 ^ keys.key0;
    c1 = static_cast<std::uint32_t>(product1);
    c2 = static_cast<std::uint32_t>(product0 >> 32) ^ c3 ^ keys.key1;
    c3 = static_cast<std::uint32_t>(product0);
    keys.advance();
  }
  return {{c0, c1, c2, c3}};
}

// One call serves eight elements, with 16 bits each.
constexpr std::uint32_t kElementsARandomBlock = 8;

// The bits of elements [8 * block, 8 * block + 8) of a tensor.
EMA_FUSED_HD RandomWords random_block(const RandomKey& key, std::uint64_t block) {
  return philox({{static_cast<std::uint32_t>(block), static_cast<std::uint32_t>(block >> 32),
                  key.pair, key.step}},
                key.seed);
}

EMA_FUSED_HD std::uint32_t random_half(const RandomWords& block, std::uint32_t lane) {
  // Selected, not indexed: an array with a run-time index would be put into local memory.
  const std::uint32_t low = (lane & 2u) != 0u ? block.words[1] : block.words[0];
  const std::uint32_t high = (lane & 2u) != 0u ? block.words[3] : block.words[2];
  const std::uint32_t word = (lane & 4u) != 0u ? high : low;
  return (word >> (16u * (lane & 1u))) & 0xffffu;
}

}  // namespace ema_fused
