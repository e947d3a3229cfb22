#include "values.h"

#include <cmath>
#include <cstring>

namespace ema_fused::testing::ptx {
namespace {

struct Format {
  int exponent_bits;
  int mantissa_bits;
};

// Without exponent bits: of no floating-point numbers.
Format format_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return {11, 52};
    case DType::kFloat32:
      return {8, 23};
    case DType::kBFloat16:
      return {8, 7};
    case DType::kFloat16:
      return {5, 10};
    case DType::kFloat8E4M3:
      return {4, 3};
    case DType::kFloat8E5M2:
      return {5, 2};
    default:
      return {0, 0};
  }
}

std::uint64_t composed(const Format& format, Random& random, std::uint64_t exponent,
                       std::uint64_t mantissa) {
  const std::uint64_t exponents = (std::uint64_t{1} << format.exponent_bits) - 1;
  const std::uint64_t mantissas = (std::uint64_t{1} << format.mantissa_bits) - 1;
  const std::uint64_t sign = random.below(2);
  return ((sign << format.exponent_bits | (exponent & exponents)) << format.mantissa_bits) |
         (mantissa & mantissas);
}

// Zeros, infinities, NaNs, subnormals, the largest, and their neighbours.
std::uint64_t special(const Format& format, Random& random) {
  const std::uint64_t largest = (std::uint64_t{1} << format.exponent_bits) - 1;
  const std::uint64_t bias = largest / 2;
  const std::uint64_t exponents[] = {0,    0,         1,         bias - 15,   bias - 14,
                                     bias, bias + 15, bias + 16, largest - 1, largest};
  const std::uint64_t half = std::uint64_t{1} << (format.mantissa_bits - 1);
  const std::uint64_t mantissas[] = {0, 0, 0, 1, half, half - 1, ~std::uint64_t{0}};
  return composed(format, random, exponents[random.below(10)], mantissas[random.below(7)]);
}

// Half of the last place of what keeps the bits before (a 1 and zeros), or the number beside that.
std::uint64_t tie(const Format& format, Random& random) {
  const std::uint64_t dropped[] = {29, 16, 13, 3, 45, 42, random.below(50)};
  const std::uint64_t bits = dropped[random.below(7)];
  const std::uint64_t bias = (std::uint64_t{1} << (format.exponent_bits - 1)) - 1;
  const std::uint64_t half = bits == 0 ? 1 : (random.bits() << bits | 1ull << (bits - 1));
  const std::uint64_t beside = random.below(3) - 1;
  return composed(format, random, bias + random.below(30) - 25, half + beside);
}

}  // namespace

void fill(std::uint8_t* data, DType dtype, std::int64_t count, Random& random) {
  const Format format = format_of(dtype);
  const std::uint64_t manner = random.below(6);
  const auto size = static_cast<std::size_t>(item_size(dtype));
  const std::uint64_t bias = (std::uint64_t{1} << format.exponent_bits) / 2 - 1;
  for (std::int64_t i = 0; i < count; ++i) {
    std::uint64_t words[2] = {random.bits(), random.bits()};
    if (format.exponent_bits != 0 && manner < 5) {
      const std::uint64_t kind = manner == 0 ? random.below(4) : manner - 1;
      if (kind == 1) {
        words[0] = special(format, random);
      } else if (kind == 2) {
        words[0] = tie(format, random);
      } else if (kind == 3) {
        words[0] = composed(format, random, bias - random.below(4), words[0]);
      }
    }
    std::memcpy(data + static_cast<std::size_t>(i) * size, words, size);
  }
}

bool is_same(const std::uint8_t* a, const std::uint8_t* b, DType dtype) {
  if (std::memcmp(a, b, static_cast<std::size_t>(item_size(dtype))) == 0) {
    return true;
  }
  const auto both_nan = [&](auto of_type) {
    decltype(of_type) x;
    decltype(of_type) y;
    std::memcpy(&x, a, sizeof(x));
    std::memcpy(&y, b, sizeof(y));
    if constexpr (std::is_same_v<decltype(of_type), Float16>) {
      return (x.bits & 0x7fff) > 0x7c00 && (y.bits & 0x7fff) > 0x7c00;
    } else {
      return std::isnan(x) && std::isnan(y);
    }
  };
  return (dtype == DType::kFloat64 && both_nan(double{})) ||
         (dtype == DType::kFloat32 && both_nan(float{})) ||
         (dtype == DType::kFloat16 && both_nan(Float16{}));
}

}  // namespace ema_fused::testing::ptx
