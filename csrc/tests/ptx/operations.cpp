#include "operations.h"

namespace ema_fused::testing::ptx {

u16 round_to_float16(f32 value) {
  if (std::isnan(value)) {
    return 0x7fff;
  }
  const u16 sign = std::signbit(value) ? 0x8000 : 0;
  const f64 magnitude = std::fabs(value);
  if (magnitude >= 65520.0) {
    return sign | 0x7c00;
  }
  const int exponent = magnitude < 0x1p-14 ? -14 : std::ilogb(magnitude);
  // In units of the last place: at most 2048, whose carry is the next exponent.
  const auto units = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  return static_cast<u16>(sign | (((exponent + 14) << 10) + units));
}

f32 widen_float16(u16 bits) {
  const int exponent = (bits >> 10) & 0x1f;
  const int mantissa = bits & 0x3ff;
  f32 magnitude = std::ldexp(static_cast<f32>(mantissa + 1024), exponent - 25);
  if (exponent == 0) {
    magnitude = std::ldexp(static_cast<f32>(mantissa), -24);
  } else if (exponent == 0x1f) {
    magnitude = mantissa == 0 ? HUGE_VALF : NAN;
  }
  return std::copysign(magnitude, (bits & 0x8000) != 0 ? -1.0f : 1.0f);
}

s32 truncate_to_s32(f32 value) {
  if (std::isnan(value)) {
    return 0;
  }
  return static_cast<s32>(std::clamp(std::trunc(static_cast<f64>(value)), -0x1p31, 0x1p31 - 1.0));
}

u16 truncate_to_float16(f32 value) {
  const u16 nearest = round_to_float16(value);
  // Of one sign, so that the bits are in the order of the numbers.
  const bool is_beyond = std::fabs(widen_float16(nearest)) > std::fabs(value);
  return static_cast<u16>(nearest - (is_beyond ? 1 : 0));
}

f32 truncate_to_float32(f64 value) {
  const auto nearest = static_cast<f32>(value);
  return std::fabs(f64{nearest}) > std::fabs(value) ? std::nextafter(nearest, 0.0f) : nearest;
}

}  // namespace ema_fused::testing::ptx
