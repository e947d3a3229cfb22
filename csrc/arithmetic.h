// What an update does to one element, defined once for host and device.
//
// Four ways of writing (1 - w) * a + w * s are in use, and differ in the last bits:
//   lerp      torch.lerp: the product is formed on the side of the nearer end
//   axpby     averaged.mul_(1 - w).add_(source, alpha=w)
//   delta     averaged.add_(source - averaged, alpha=w)
//   products  averaged * (1 - w) + source * w
// A drop-in uses the one of the system it replaces. A fifth, stochastic, is lerp with 16-bit
// averages rounded at random (random.h). Products and sums are contracted here and
// nowhere else (the build switches the compiler's own contraction off), as torch's kernels do where
// the processor has a fused multiply-add.
#pragma once

#include "dtypes.h"
#include "macros.h"

namespace ema_fused {

enum class Operation : std::uint8_t { kAverage = 0, kCopy = 1, kSwap = 2 };
enum class Arithmetic : std::uint8_t {
  kLerp = 0,
  kAxpby = 1,
  kDelta = 2,
  kProducts = 3,
  kStochastic = 4
};

// x * y + z, rounded once where the hardware can, or where a test stands in for hardware that can.
template <typename Compute>
EMA_FUSED_HD Compute multiply_add(Compute x, Compute y, Compute z) {
#if defined(__CUDA_ARCH__) || defined(__FMA__) || defined(__ARM_FEATURE_FMA) || \
    defined(EMA_FUSED_EMULATED_FMA)
  if constexpr (sizeof(Compute) == sizeof(double)) {
    return __builtin_fma(x, y, z);
  } else {
    return __builtin_fmaf(x, y, z);
  }
#else
  return x * y + z;
#endif
}

// x + sign * y of two tensors; `sign` is 1 or -1. Of complex numbers torch forms that product too.
template <typename Compute>
EMA_FUSED_HD Compute sum_of(Compute x, Compute y, typename WeightOf<Compute>::Type sign) {
  if constexpr (kIsComplex<Compute>) {
    return multiply_add(sign, y, x);
  } else {
    return sign > 0 ? x + y : x - y;
  }
}

// What all functors are, but for those that say otherwise.
struct FunctorTraits {
  static constexpr bool kReadsAveraged = true;
  static constexpr bool kWritesSource = false;
  static constexpr bool kRandom = false;      // else it is called with 16 random bits an element
  static constexpr bool kHasTwoEnds = false;  // else `from_averaged` says from which it goes
};

template <typename A, typename S>
struct Lerp : FunctorTraits {
  static constexpr bool kHasTwoEnds = true;
  using Compute = ComputeType<A, S>;
  using Weight = typename WeightOf<Compute>::Type;
  Weight coefficient;
  bool from_averaged;

  EMA_FUSED_HD explicit Lerp(double weight) {
    const Weight w = static_cast<Weight>(weight);
    from_averaged = (w < Weight(0) ? -w : w) < Weight(0.5);
    // -(1 - w), which is -0 at w = 1, as where torch writes it as a subtraction. For complex
    // numbers it writes w - 1.
    const Weight from_source = kIsComplex<Compute> ? w - Weight(1) : -(Weight(1) - w);
    coefficient = from_averaged ? w : from_source;
  }
  EMA_FUSED_HD Compute mean(const A& averaged, const S& source) const {
    const Compute a = to_compute<Compute>(averaged);
    const Compute s = to_compute<Compute>(source);
    return multiply_add(coefficient, s - a, from_averaged ? a : s);
  }
  EMA_FUSED_HD void operator()(A& averaged, S& source) const {
    averaged = from_compute<A>(mean(averaged, source));
  }
};

// Of a 16-bit average.
template <typename A, typename S>
struct RandomlyRoundedLerp : Lerp<A, S> {
  static constexpr bool kRandom = true;
  using Lerp<A, S>::Lerp;
  EMA_FUSED_HD void operator()(A& averaged, S& source, std::uint32_t random) const {
    averaged = from_compute<A>(this->mean(averaged, source), random);
  }
};

template <typename A, typename S>
using StochasticLerp = std::conditional_t<kIs16Bits<A>, RandomlyRoundedLerp<A, S>, Lerp<A, S>>;

template <typename A, typename S>
struct Axpby : FunctorTraits {
  using Compute = ComputeType<A, S>;
  using Weight = typename WeightOf<Compute>::Type;
  Weight keep;
  Weight take;

  // 1 - w in double, as Python computes it.
  EMA_FUSED_HD explicit Axpby(double weight)
      : keep(static_cast<Weight>(1.0 - weight)), take(static_cast<Weight>(weight)) {}
  EMA_FUSED_HD void operator()(A& averaged, S& source) const {
    // mul_ writes its product back into the averaged tensor, so it is rounded to that type.
    const A kept = from_compute<A>(to_compute<Compute>(averaged) * keep);
    averaged =
        from_compute<A>(multiply_add(take, to_compute<Compute>(source), to_compute<Compute>(kept)));
  }
};

template <typename A, typename S>
struct Delta : FunctorTraits {
  using Compute = ComputeType<A, S>;
  using Weight = typename WeightOf<Compute>::Type;
  Weight take;

  EMA_FUSED_HD explicit Delta(double weight) : take(static_cast<Weight>(weight)) {}
  EMA_FUSED_HD void operator()(A& averaged, S& source) const {
    const Compute a = to_compute<Compute>(averaged);
    Compute difference = sum_of(to_compute<Compute>(source), a, Weight(-1));
    if constexpr (std::is_same_v<A, S>) {
      // The difference is a tensor of its own there, rounded to the common type.
      difference = to_compute<Compute>(from_compute<A>(difference));
    }
    averaged = from_compute<A>(multiply_add(take, difference, a));
  }
};

template <typename A, typename S>
struct Products : FunctorTraits {
  using Compute = ComputeType<A, S>;
  using Weight = typename WeightOf<Compute>::Type;
  Weight keep;
  Weight take;

  // 1 - w in double, as Python computes it.
  EMA_FUSED_HD explicit Products(double weight)
      : keep(static_cast<Weight>(1.0 - weight)), take(static_cast<Weight>(weight)) {}
  EMA_FUSED_HD void operator()(A& averaged, S& source) const {
    // Both products are tensors of their own there, rounded to the averaged type.
    const Compute kept = to_compute<Compute>(averaged) * keep;
    const Compute taken = to_compute<Compute>(source) * take;
    averaged = from_compute<A>(sum_of(to_compute<Compute>(from_compute<A>(kept)),
                                      to_compute<Compute>(from_compute<A>(taken)), Weight(1)));
  }
};

template <typename A, typename S>
struct Copy : FunctorTraits {
  static constexpr bool kReadsAveraged = false;
  EMA_FUSED_HD explicit Copy(double) {}
  EMA_FUSED_HD void operator()(A& averaged, S& source) const {
    if constexpr (std::is_same_v<A, S>) {
      averaged = source;
    } else {
      averaged = from_compute<A>(to_compute<ComputeType<A, S>>(source));
    }
  }
};

template <typename A, typename S>
struct Swap : FunctorTraits {
  static_assert(std::is_same_v<A, S>, "a swap would lose bits between two types");
  static constexpr bool kWritesSource = true;
  EMA_FUSED_HD explicit Swap(double) {}
  EMA_FUSED_HD void operator()(A& averaged, S& source) const {
    const A held = averaged;
    averaged = source;
    source = held;
  }
};

}  // namespace ema_fused
