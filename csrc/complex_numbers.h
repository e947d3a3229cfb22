// Complex numbers, computed as torch's CPU loops compute them: to the bit, but for the sign of a
// zero. (Within one loop torch itself has two forms, one in vectors and one for what is left over.)
//
// A weight is the complex number w + 0i there, and every product has all four of its terms. The two
// with the 0 count where an element is infinite or NaN: both parts are NaN then. Nothing is
// contracted, with or without a fused multiply-add.
#pragma once

#include <type_traits>

#include "macros.h"

namespace ema_fused {

template <typename T>
struct Complex {
  T real;
  T imaginary;
};

template <typename T>
constexpr bool kIsComplex = false;
template <typename T>
constexpr bool kIsComplex<Complex<T>> = true;

template <typename T>
EMA_FUSED_HD Complex<T> operator+(Complex<T> x, Complex<T> y) {
  return {x.real + y.real, x.imaginary + y.imaginary};
}
template <typename T>
EMA_FUSED_HD Complex<T> operator-(Complex<T> x, Complex<T> y) {
  return {x.real - y.real, x.imaginary - y.imaginary};
}
template <typename T>
EMA_FUSED_HD Complex<T> operator*(Complex<T> x, T weight) {
  return {x.real * weight - x.imaginary * T(0), x.real * T(0) + x.imaginary * weight};
}
template <typename T>
EMA_FUSED_HD Complex<T> multiply_add(T weight, Complex<T> x, Complex<T> y) {
  return x * weight + y;
}

// The type of a weight.
template <typename Compute>
struct WeightOf {
  using Type = Compute;
};
template <typename T>
struct WeightOf<Complex<T>> {
  using Type = T;
};

}  // namespace ema_fused
