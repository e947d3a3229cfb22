// The element types an update reads and writes, and their conversions. One definition for host and
// device; the 16-bit types are plain structs around their bits, so nothing here needs a GPU header
// on the host.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "complex_numbers.h"
#include "macros.h"

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#endif

namespace ema_fused {

// kBytes stands for every other type: such tensors are copied and swapped bit for bit, counted in
// bytes, and never averaged. The 8-bit floats are sources only. Complex numbers pair with their own
// type and have kernels on the CPU only.
enum class DType : std::uint8_t {
  kFloat64 = 0,
  kFloat32 = 1,
  kBFloat16 = 2,
  kFloat16 = 3,
  kBytes = 4,
  kFloat8E4M3 = 5,  // torch.float8_e4m3fn: no infinity
  kFloat8E5M2 = 6,
  kComplex64 = 7,
  kComplex128 = 8
};

EMA_FUSED_HD constexpr bool is_complex(DType dtype) {
  return dtype == DType::kComplex64 || dtype == DType::kComplex128;
}

EMA_FUSED_HD constexpr bool can_be_averaged(DType dtype) {
  return dtype < DType::kBytes || is_complex(dtype);
}

struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};
struct Float8E4M3 {
  std::uint8_t bits;
};
struct Float8E5M2 {
  std::uint8_t bits;
};

template <typename T>
constexpr bool kIs16Bits = std::is_same_v<T, BFloat16> || std::is_same_v<T, Float16>;

EMA_FUSED_HD constexpr std::int64_t item_size(DType dtype) {
  switch (dtype) {
    case DType::kComplex128:
      return 16;
    case DType::kFloat64:
    case DType::kComplex64:
      return 8;
    case DType::kFloat32:
      return 4;
    case DType::kBFloat16:
    case DType::kFloat16:
      return 2;
    case DType::kBytes:
    case DType::kFloat8E4M3:
    case DType::kFloat8E5M2:
      return 1;
  }
  return 1;
}

// torch's opmath: 16-bit types compute in float32. A pair computes in the wider of its two.
template <typename Averaged, typename Source>
using ComputeType = std::conditional_t<
    kIsComplex<Averaged>, Averaged,
    std::conditional_t<std::is_same_v<Averaged, double> || std::is_same_v<Source, double>, double,
                       float>>;

template <typename To, typename From>
EMA_FUSED_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

EMA_FUSED_HD float widen(BFloat16 value) {
  return bit_cast<float>(static_cast<std::uint32_t>(value.bits) << 16);
}

// Round to nearest, ties to even; a NaN stays a (quiet) NaN.
EMA_FUSED_HD BFloat16 narrow_to_bfloat16(float value) {
  const std::uint32_t bits = bit_cast<std::uint32_t>(value);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return BFloat16{static_cast<std::uint16_t>(is_nan ? 0x7fc0u : rounded)};
}

// The host forms of float16 are branch-free selects on integers, so that a compiler turns them into
// vectors on every instruction set, and never feed a subnormal to the floating-point unit, so that
// they hold with denormals flushed (torch.set_flush_denormal) too.
EMA_FUSED_HD float widen(Float16 value) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(value.bits));
#else
  constexpr std::uint32_t kRebias = (127u - 15u) << 23;
  constexpr std::uint32_t kExponent = 0x1fu << 23;
  const std::uint32_t sign = static_cast<std::uint32_t>(value.bits & 0x8000u) << 16;
  const std::uint32_t magnitude = static_cast<std::uint32_t>(value.bits & 0x7fffu) << 13;
  const std::uint32_t exponent = magnitude & (0x1fu << 23);
  // Inf and NaN need the largest exponent: rebias twice.
  const std::uint32_t normal = magnitude + kRebias + (exponent == kExponent ? kRebias : 0u);
  // A subnormal is its mantissa times 2^-24: give it the exponent of 2^-14 and take 2^-14 away.
  const float lifted = bit_cast<float>(magnitude + (113u << 23)) - bit_cast<float>(113u << 23);
  return bit_cast<float>((exponent == 0u ? bit_cast<std::uint32_t>(lifted) : normal) | sign);
#endif
}

EMA_FUSED_HD Float16 narrow_to_float16(float value) {
#if defined(__CUDA_ARCH__)
  return Float16{__half_as_ushort(__float2half_rn(value))};
#else
  const std::uint32_t bits = bit_cast<std::uint32_t>(value);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  // 2^16 and above: infinity, or NaN.
  const std::uint32_t huge = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  // Below 2^-14 the result is subnormal: adding 0.5 lets the adder round at bit 2^-24.
  const std::uint32_t tiny =
      bit_cast<std::uint32_t>(bit_cast<float>(magnitude) + 0.5f) - bit_cast<std::uint32_t>(0.5f);
  const std::uint32_t odd = (magnitude >> 13) & 1u;
  const std::uint32_t normal = (magnitude - ((127u - 15u) << 23) + 0xfffu + odd) >> 13;
  const std::uint32_t half =
      magnitude >= 0x47800000u ? huge : (magnitude < 0x38800000u ? tiny : normal);
  return Float16{static_cast<std::uint16_t>(half | sign)};
#endif
}

// The upper half of a float16.
EMA_FUSED_HD float widen(Float8E5M2 value) {
  return widen(Float16{static_cast<std::uint16_t>(value.bits << 8)});
}

EMA_FUSED_HD float widen(Float8E4M3 value) {
  constexpr std::uint32_t kRebias = (127u - 7u) << 23;
  const std::uint32_t sign = static_cast<std::uint32_t>(value.bits & 0x80u) << 24;
  const std::uint32_t magnitude = static_cast<std::uint32_t>(value.bits & 0x7fu) << 20;
  // As for float16: a subnormal is its mantissa times 2^-9.
  const float lifted = bit_cast<float>(magnitude + (121u << 23)) - bit_cast<float>(121u << 23);
  const std::uint32_t finite =
      (magnitude >> 23) == 0u ? bit_cast<std::uint32_t>(lifted) : magnitude + kRebias;
  return bit_cast<float>((magnitude == 0x7f00000u ? 0x7fc00000u : finite) | sign);
}

// Rounds down or up at random, up with the probability that makes the mean of the results the
// value itself. `random`: 16 uniform bits.
EMA_FUSED_HD BFloat16 narrow_to_bfloat16(float value, std::uint32_t random) {
  const std::uint32_t bits = bit_cast<std::uint32_t>(value);
  // An infinity stays one: its mantissa is 0 and nothing is carried.
  const std::uint32_t rounded = (bits + random) >> 16;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return BFloat16{static_cast<std::uint16_t>(is_nan ? 0x7fc0u : rounded)};
}

EMA_FUSED_HD Float16 narrow_to_float16(float value, std::uint32_t random) {
  const std::uint32_t bits = bit_cast<std::uint32_t>(value);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  const std::uint32_t huge = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  // Below 2^-14 in units of 2^-40: the result's last place, 2^-24, and 16 bits that are dropped.
  // (Clamped, so that the conversion below is defined for every value.)
  const std::uint32_t below = magnitude < 0x38800000u ? magnitude : 0u;
  const auto units = static_cast<std::int32_t>(bit_cast<float>(below) * 1099511627776.0f);
  const std::uint32_t tiny = (static_cast<std::uint32_t>(units) + random) >> 16;
  const std::uint32_t normal = (magnitude - ((127u - 15u) << 23) + (random >> 3)) >> 13;
  const std::uint32_t half =
      magnitude >= 0x47800000u ? huge : (magnitude < 0x38800000u ? tiny : normal);
  return Float16{static_cast<std::uint16_t>(half | sign)};
}

// to_compute<C>(x): x in the compute type. from_compute<T>(c): c rounded to the element type.
template <typename Compute, typename T>
EMA_FUSED_HD Compute to_compute(T value) {
  if constexpr (std::is_floating_point_v<T> || kIsComplex<T>) {
    return static_cast<Compute>(value);
  } else {
    return static_cast<Compute>(widen(value));
  }
}

template <typename T, typename Compute>
EMA_FUSED_HD T from_compute(Compute value) {
  if constexpr (std::is_floating_point_v<T> || kIsComplex<T>) {
    return static_cast<T>(value);
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    return narrow_to_bfloat16(static_cast<float>(value));
  } else {
    static_assert(std::is_same_v<T, Float16>);
    return narrow_to_float16(static_cast<float>(value));
  }
}

// The same for the 16-bit types, rounded at random.
template <typename T, typename Compute>
EMA_FUSED_HD T from_compute(Compute value, std::uint32_t random) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return narrow_to_bfloat16(static_cast<float>(value), random);
  } else {
    static_assert(std::is_same_v<T, Float16>);
    return narrow_to_float16(static_cast<float>(value), random);
  }
}

}  // namespace ema_fused
