// Elements that a kernel could get wrong: of any bits, special values, and values that lie exactly
// in the middle of two of a narrower type.
#pragma once

#include "../../dtypes.h"
#include "../check.h"

namespace ema_fused::testing::ptx {

// Fills `count` elements, all in one of several manners, which is drawn.
void fill(std::uint8_t* data, DType dtype, std::int64_t count, Random& random);

// The same bits, or a NaN each of a type whose NaNs have any bits.
bool is_same(const std::uint8_t* a, const std::uint8_t* b, DType dtype);

}  // namespace ema_fused::testing::ptx
