// The random bits of many elements at once. Each lane of a vector is a counter of its own: of its
// 64 bits the lower half counts, as the instruction that multiplies them reads no other.
#include "random.h"
#include "update_cpu_isa.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#if defined(__GNUC__) && !defined(__clang__)
// gcc 12 warns of its own intrinsics, which begin with a value that nobody reads.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#endif

namespace ema_fused::EMA_FUSED_ISA {
namespace {

#if defined(__AVX512F__)

using Lanes = __m512i;
constexpr std::int64_t kLanes = 8;

Lanes all(std::uint64_t value) { return _mm512_set1_epi64(static_cast<long long>(value)); }
Lanes counted_from(std::uint64_t first) {
  return _mm512_add_epi64(all(first), _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0));
}
Lanes product(Lanes a, Lanes b) { return _mm512_mul_epu32(a, b); }
Lanes upper(Lanes a) { return _mm512_srli_epi64(a, 32); }
Lanes mixed(Lanes a, Lanes b, Lanes c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
Lanes joined(Lanes low, Lanes high) {
  return _mm512_mask_blend_epi32(0xaaaa, low, _mm512_slli_epi64(high, 32));
}
// One lane of the first, one of the second, and so on.
void store_in_turns(std::uint32_t* to, Lanes first, Lanes second) {
  const Lanes front = _mm512_set_epi64(11, 3, 10, 2, 9, 1, 8, 0);
  const Lanes back = _mm512_set_epi64(15, 7, 14, 6, 13, 5, 12, 4);
  _mm512_storeu_si512(to, _mm512_permutex2var_epi64(first, front, second));
  _mm512_storeu_si512(to + 16, _mm512_permutex2var_epi64(first, back, second));
}

#elif defined(__AVX2__)

using Lanes = __m256i;
constexpr std::int64_t kLanes = 4;

Lanes all(std::uint64_t value) { return _mm256_set1_epi64x(static_cast<long long>(value)); }
Lanes counted_from(std::uint64_t first) {
  return _mm256_add_epi64(all(first), _mm256_set_epi64x(3, 2, 1, 0));
}
Lanes product(Lanes a, Lanes b) { return _mm256_mul_epu32(a, b); }
Lanes upper(Lanes a) { return _mm256_srli_epi64(a, 32); }
Lanes mixed(Lanes a, Lanes b, Lanes c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
Lanes joined(Lanes low, Lanes high) {
  return _mm256_blend_epi32(low, _mm256_slli_epi64(high, 32), 0xaa);
}
void store_in_turns(std::uint32_t* to, Lanes first, Lanes second) {
  const Lanes even = _mm256_unpacklo_epi64(first, second);
  const Lanes odd = _mm256_unpackhi_epi64(first, second);
  _mm256_storeu_si256(reinterpret_cast<Lanes*>(to), _mm256_permute2x128_si256(even, odd, 0x20));
  _mm256_storeu_si256(reinterpret_cast<Lanes*>(to + 8), _mm256_permute2x128_si256(even, odd, 0x31));
}

#endif

}  // namespace

void random_blocks(std::uint32_t* words, const RandomKey& key, std::uint64_t first,
                   std::int64_t blocks) {
  std::int64_t b = 0;
#if defined(__AVX512F__) || defined(__AVX2__)
  std::uint64_t round_keys[kPhiloxRounds][2];
  PhiloxKeys keys(key.seed);
  for (auto& of_round : round_keys) {
    of_round[0] = keys.key0;
    of_round[1] = keys.key1;
    keys.advance();
  }
  for (; b + kLanes <= blocks; b += kLanes) {
    const Lanes block = counted_from(first + static_cast<std::uint64_t>(b));
    Lanes c0 = block;
    Lanes c1 = upper(block);
    Lanes c2 = all(key.pair);
    Lanes c3 = all(key.step);
    for (const auto& of_round : round_keys) {
      const Lanes product0 = product(c0, all(kPhiloxFactor0));
      const Lanes product1 = product(c2, all(kPhiloxFactor1));
      c0 = mixed(upper(product1), c1, all(of_round[0]));
      c1 = product1;
      c2 = mixed(upper(product0), c3, all(of_round[1]));
      c3 = product0;
    }
    store_in_turns(words + 4 * b, joined(c0, c1), joined(c2, c3));
  }
#endif
  for (; b < blocks; ++b) {
    const RandomWords made = random_block(key, first + static_cast<std::uint64_t>(b));
    for (int i = 0; i < 4; ++i) {
      words[4 * b + i] = made.words[i];
    }
  }
}

}  // namespace ema_fused::EMA_FUSED_ISA
