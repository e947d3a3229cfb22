// The narrow types: every value there and back, and what is rounded where to. The random numbers of
// stochastic rounding.
#include <cmath>
#include <limits>

#include "../dtypes.h"
#include "../random.h"
#include "check.h"

using namespace ema_fused;

namespace {

// The value of a float with this many exponent and mantissa bits, by its definition.
double value_of(std::uint32_t bits, int exponent_bits, int mantissa_bits, int bias) {
  const std::uint32_t mantissa = bits & ((1u << mantissa_bits) - 1u);
  const auto exponent = static_cast<int>((bits >> mantissa_bits) & ((1u << exponent_bits) - 1u));
  const bool is_negative = (bits >> (mantissa_bits + exponent_bits)) != 0u;
  const double magnitude =
      exponent == 0 ? std::ldexp(mantissa, 1 - bias - mantissa_bits)
                    : std::ldexp((1u << mantissa_bits) + mantissa, exponent - bias - mantissa_bits);
  return is_negative ? -magnitude : magnitude;
}

void check_16_bits() {
  for (std::uint32_t bits = 0; bits < 0x10000u; ++bits) {
    const Float16 half{static_cast<std::uint16_t>(bits)};
    const BFloat16 brain{static_cast<std::uint16_t>(bits)};
    const float from_half = widen(half);
    const float from_brain = widen(brain);
    if (std::isnan(from_half)) {
      CHECK((bits & 0x7fffu) > 0x7c00u);
      CHECK(std::isnan(widen(narrow_to_float16(from_half))));
      CHECK(std::isnan(widen(narrow_to_float16(from_half, 0xffffu))));
    } else {
      CHECK(narrow_to_float16(from_half).bits == bits);
      // What needs no rounding is not rounded, whatever the random bits.
      CHECK(narrow_to_float16(from_half, 0u).bits == bits);
      CHECK(narrow_to_float16(from_half, 0xffffu).bits == bits);
      const bool is_infinite = (bits & 0x7fffu) == 0x7c00u;
      CHECK(is_infinite ? std::isinf(from_half) && (from_half < 0) == (bits > 0x8000u)
                        : static_cast<double>(from_half) == value_of(bits, 5, 10, 15));
    }
    if (std::isnan(from_brain)) {
      CHECK(std::isnan(widen(narrow_to_bfloat16(from_brain))));
      CHECK(std::isnan(widen(narrow_to_bfloat16(from_brain, 0xffffu))));
    } else {
      CHECK(narrow_to_bfloat16(from_brain).bits == bits);
      CHECK(narrow_to_bfloat16(from_brain, 0u).bits == bits);
      CHECK(narrow_to_bfloat16(from_brain, 0xffffu).bits == bits);
    }
  }
}

void check_8_bits() {
  for (std::uint32_t bits = 0; bits < 0x100u; ++bits) {
    const float e4m3 = widen(Float8E4M3{static_cast<std::uint8_t>(bits)});
    if ((bits & 0x7fu) == 0x7fu) {
      CHECK(std::isnan(e4m3));
    } else {
      CHECK(static_cast<double>(e4m3) == value_of(bits, 4, 3, 7));
    }
    CHECK(std::signbit(e4m3) == (bits >= 0x80u));
    const float e5m2 = widen(Float8E5M2{static_cast<std::uint8_t>(bits)});
    if ((bits & 0x7fu) > 0x7cu) {
      CHECK(std::isnan(e5m2));
    } else if ((bits & 0x7fu) == 0x7cu) {
      CHECK(std::isinf(e5m2) && (e5m2 < 0) == (bits >= 0x80u));
    } else {
      CHECK(static_cast<double>(e5m2) == value_of(bits, 5, 2, 15));
    }
  }
}

void check_nearest() {
  CHECK(narrow_to_float16(1.0f + 0.00048828125f).bits == 0x3c00u);   // half way: to even
  CHECK(narrow_to_float16(1.0f + 0.00146484375f).bits == 0x3c02u);   // half way: to even
  CHECK(narrow_to_float16(65519.0f).bits == 0x7bffu);                // the largest that rounds down
  CHECK(narrow_to_float16(65520.0f).bits == 0x7c00u);                // to infinity
  CHECK(narrow_to_float16(2.9802322387695312e-8f).bits == 0x0000u);  // half the least subnormal
  CHECK(narrow_to_float16(4.5e-8f).bits == 0x0001u);
  CHECK(narrow_to_bfloat16(1.00390625f).bits == 0x3f80u);  // half way: to even
  CHECK(narrow_to_bfloat16(1.01171875f).bits == 0x3f82u);  // half way: to even
}

// Over all 16-bit random numbers the mean of what `value` is rounded to must be `value`, and no
// result may be farther off than its two neighbours.
template <typename Narrow>
void check_unbiased(float value, double last_place, double tolerance, const Narrow& narrow) {
  double sum = 0.0;
  for (std::uint32_t random = 0; random < 0x10000u; ++random) {
    const double rounded = widen(narrow(value, random));
    CHECK(std::abs(rounded - static_cast<double>(value)) < last_place);
    sum += rounded;
  }
  CHECK(std::abs(sum / 0x10000 - static_cast<double>(value)) <= tolerance * last_place);
}

void check_stochastic() {
  const auto to_bfloat16 = [](float v, std::uint32_t r) { return narrow_to_bfloat16(v, r); };
  const auto to_float16 = [](float v, std::uint32_t r) { return narrow_to_float16(v, r); };
  Random random(5);
  for (int i = 0; i < 40; ++i) {
    const double sign = random.below(2) == 0 ? 1.0 : -1.0;
    const int exponent = static_cast<int>(random.below(24)) - 14;
    const auto value = static_cast<float>(sign * std::ldexp(random.between(1.0, 2.0), exponent));
    check_unbiased(value, std::ldexp(1.0, exponent - 7), 0.0, to_bfloat16);
    // 13 bits are dropped, and the other three of the random bits with them: exact all the same.
    check_unbiased(value, std::ldexp(1.0, exponent - 10), 0.0, to_float16);
    // Subnormal: what is dropped is told apart in 2^-16 of the last place.
    const auto tiny = static_cast<float>(sign * std::ldexp(random.between(0.0, 1.0), -14));
    check_unbiased(tiny, std::ldexp(1.0, -24), std::ldexp(1.0, -16), to_float16);
  }
  CHECK(narrow_to_float16(65535.0f, 0u).bits == 0x7bffu);
  CHECK(narrow_to_float16(65535.0f, 0xffffu).bits == 0x7c00u);
  CHECK(narrow_to_float16(1e30f, 0u).bits == 0x7c00u);
  const float infinity = std::numeric_limits<float>::infinity();
  CHECK(narrow_to_bfloat16(-infinity, 0xffffu).bits == 0xff80u);
}

bool is(const RandomWords& found, std::uint32_t a, std::uint32_t b, std::uint32_t c,
        std::uint32_t d) {
  return found.words[0] == a && found.words[1] == b && found.words[2] == c && found.words[3] == d;
}

// The known answers that the authors of Philox publish with it.
void check_philox() {
  const std::uint32_t ones = 0xffffffffu;
  CHECK(is(philox({{0, 0, 0, 0}}, 0), 0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u));
  CHECK(is(philox({{ones, ones, ones, ones}}, 0xffffffffffffffffu), 0x408f276du, 0x41c83b0eu,
           0xa20bc7c6u, 0x6d5451fdu));
  CHECK(is(philox({{0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u}}, 0x299f31d0a4093822u),
           0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u));
  const RandomWords words{{0x11112222u, 0x33334444u, 0x55556666u, 0x77778888u}};
  const std::uint32_t halves[] = {0x2222, 0x1111, 0x4444, 0x3333, 0x6666, 0x5555, 0x8888, 0x7777};
  for (std::uint32_t lane = 0; lane < kElementsARandomBlock; ++lane) {
    CHECK(random_half(words, lane) == halves[lane]);
  }
}

}  // namespace

int main() {
  check_16_bits();
  check_8_bits();
  check_nearest();
  check_stochastic();
  check_philox();
  return 0;
}
