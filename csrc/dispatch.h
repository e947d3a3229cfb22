// From the codes of a chunk to the types of its update: the one switch that the CPU and the CUDA
// loops share. `run` is called with a Types, which names what to do.
#pragma once

#include <type_traits>

#include "arithmetic.h"
#include "chunk_table.h"
#include "macros.h"
#include "random.h"

namespace ema_fused {

// The source of a pair that models hardly have. Each such pair would need loops of its own in every
// kernel, for every instruction set and GPU; instead its source is read by the type that the chunk
// names and widened, which is exact, to the type that the pair computes in. From there on the pair
// is one of an average and a source of that type.
template <typename Compute>
struct Widened {};

template <typename S>
struct Widening {
  static constexpr bool kWidens = false;
  using Element = S;
};
template <typename Compute>
struct Widening<Widened<Compute>> {
  static constexpr bool kWidens = true;
  using Element = Compute;
};

// What models have: equal types, a float32 average of a 16-bit source, a 16-bit average of float32.
// They have loops of their own, on a GPU with vectors.
template <typename A, typename S>
constexpr bool kIsCommon = std::is_same_v<A, S> || (std::is_same_v<A, float> && kIs16Bits<S>) ||
                           (std::is_same_v<S, float> && kIs16Bits<A>);

// How one chunk is updated. S: the type of its source, or Widened. The functor sees the type that
// the source is widened to.
template <typename A, typename S, template <typename, typename> class F>
struct Types {
  using Averaged = A;
  using Source = S;
  using Functor = F<A, typename Widening<S>::Element>;
};

// Equal types are copied by their size alone (with_size), never converted.
template <typename Functor>
constexpr bool kIsCopiedBySize = false;
template <typename T>
constexpr bool kIsCopiedBySize<Copy<T, T>> = true;

// Whether a source of type S is read as what it is. kCommon: whether common pairs are. A float64
// source always is: nothing is wider.
template <template <typename, typename> class F, bool kCommon, typename A, typename S>
constexpr bool kIsDirect =
    (std::is_same_v<S, double> || (kCommon && kIsCommon<A, S>)) && !kIsCopiedBySize<F<A, S>>;

template <template <typename, typename> class F, bool kCommon, typename A, typename Run>
EMA_FUSED_HD void with_source(DType source, Run&& run) {
  switch (source) {
    case DType::kFloat64:
      if constexpr (kIsDirect<F, kCommon, A, double>) {
        return run(Types<A, double, F>{});
      }
      break;
    case DType::kFloat32:
      if constexpr (kIsDirect<F, kCommon, A, float>) {
        return run(Types<A, float, F>{});
      }
      break;
    case DType::kBFloat16:
      if constexpr (kIsDirect<F, kCommon, A, BFloat16>) {
        return run(Types<A, BFloat16, F>{});
      }
      break;
    case DType::kFloat16:
      if constexpr (kIsDirect<F, kCommon, A, Float16>) {
        return run(Types<A, Float16, F>{});
      }
      break;
    case DType::kFloat8E4M3:
    case DType::kFloat8E5M2:
      break;
    case DType::kBytes:
    case DType::kComplex64:
    case DType::kComplex128:
      return;
  }
  return run(Types<A, Widened<ComputeType<A, float>>, F>{});
}

// Complex numbers: only where the loop serves them (Run::kServesComplex), else nothing is done.
template <template <typename, typename> class F, typename T, typename Run>
EMA_FUSED_HD void with_complex(Run&& run) {
  if constexpr (std::decay_t<Run>::kServesComplex && !kIsCopiedBySize<F<Complex<T>, Complex<T>>>) {
    run(Types<Complex<T>, Complex<T>, F>{});
  }
}

template <template <typename, typename> class F, bool kCommon, typename Run>
EMA_FUSED_HD void with_types(const Chunk& chunk, Run&& run) {
  switch (chunk.averaged_dtype) {
    case DType::kFloat64:
      return with_source<F, kCommon, double>(chunk.source_dtype, run);
    case DType::kFloat32:
      return with_source<F, kCommon, float>(chunk.source_dtype, run);
    case DType::kBFloat16:
      return with_source<F, kCommon, BFloat16>(chunk.source_dtype, run);
    case DType::kFloat16:
      return with_source<F, kCommon, Float16>(chunk.source_dtype, run);
    case DType::kComplex64:
      return with_complex<F, float>(run);
    case DType::kComplex128:
      return with_complex<F, double>(run);
    case DType::kFloat8E4M3:
    case DType::kFloat8E5M2:
    case DType::kBytes:
      return;
  }
}

// The size of the largest element.
struct Bits128 {
  std::uint64_t halves[2];
};

// Equal types are copied and swapped as bits: by size alone, so that nine types need five loops.
template <template <typename, typename> class F, typename Run>
EMA_FUSED_HD void with_size(const Chunk& chunk, Run&& run) {
  switch (item_size(chunk.averaged_dtype)) {
    case 16:
      if constexpr (std::decay_t<Run>::kServesComplex) {
        run(Types<Bits128, Bits128, F>{});
      }
      return;
    case 8:
      return run(Types<std::uint64_t, std::uint64_t, F>{});
    case 4:
      return run(Types<std::uint32_t, std::uint32_t, F>{});
    case 2:
      return run(Types<std::uint16_t, std::uint16_t, F>{});
    default:
      return run(Types<std::uint8_t, std::uint8_t, F>{});
  }
}

template <bool kCommon, typename Run>
EMA_FUSED_HD void with_copy(const Chunk& chunk, Run&& run) {
  if (chunk.averaged_dtype == chunk.source_dtype) {
    return with_size<Copy>(chunk, run);
  }
  return with_types<Copy, kCommon>(chunk, run);
}

// kOperation and kArithmetic are fixed for a launch, so they are template parameters; the types
// differ from chunk to chunk, so they are switched on. Chunks that an average only copies are left
// to the caller, who has with_copy() for them.
template <Operation kOperation, Arithmetic kArithmetic, typename Run>
EMA_FUSED_HD void dispatch(const Chunk& chunk, Run&& run) {
  if constexpr (kOperation == Operation::kCopy) {
    return with_copy<true>(chunk, run);
  } else if constexpr (kOperation == Operation::kSwap) {
    return with_size<Swap>(chunk, run);
  } else if constexpr (kArithmetic == Arithmetic::kLerp) {
    return with_types<Lerp, true>(chunk, run);
  } else if constexpr (kArithmetic == Arithmetic::kAxpby) {
    return with_types<Axpby, true>(chunk, run);
  } else if constexpr (kArithmetic == Arithmetic::kDelta) {
    return with_types<Delta, true>(chunk, run);
  } else if constexpr (kArithmetic == Arithmetic::kProducts) {
    return with_types<Products, true>(chunk, run);
  } else {
    return with_types<StochasticLerp, true>(chunk, run);
  }
}

// The weight of one entry's source.
EMA_FUSED_HD double weight_of(const Launch& launch, const Chunk& chunk) {
  if (launch.weights != nullptr) {
    return launch.weights[chunk.pair];
  }
  const Weight& weight = launch.weight[chunk.average];
  if (weight.at == nullptr) {
    return weight.number;
  }
  return weight.is_float64 ? *static_cast<const double*>(weight.at)
                           : static_cast<double>(*static_cast<const float*>(weight.at));
}

EMA_FUSED_HD RandomKey random_key_of(const Launch& launch, std::uint32_t number) {
  const std::int64_t step = launch.step_at != nullptr ? *launch.step_at : launch.step;
  return {launch.seed, static_cast<std::uint32_t>(step), number};
}

// Whether the gradients' overflow flag tells this launch to do nothing.
EMA_FUSED_HD bool is_skipped(const Launch& launch) {
  return launch.found_inf != nullptr && *launch.found_inf != 0.0f;
}

template <auto kValue>
using Constant = std::integral_constant<decltype(kValue), kValue>;

// Turns the launch's run-time operation and arithmetic into types: call(Constant<kOperation>{},
// Constant<kArithmetic>{}).
template <typename Call>
auto for_launch(const Launch& launch, Call&& call) {
  if (launch.operation == Operation::kCopy) {
    return call(Constant<Operation::kCopy>{}, Constant<Arithmetic::kLerp>{});
  }
  if (launch.operation == Operation::kSwap) {
    return call(Constant<Operation::kSwap>{}, Constant<Arithmetic::kLerp>{});
  }
  switch (launch.arithmetic) {
    case Arithmetic::kAxpby:
      return call(Constant<Operation::kAverage>{}, Constant<Arithmetic::kAxpby>{});
    case Arithmetic::kDelta:
      return call(Constant<Operation::kAverage>{}, Constant<Arithmetic::kDelta>{});
    case Arithmetic::kProducts:
      return call(Constant<Operation::kAverage>{}, Constant<Arithmetic::kProducts>{});
    case Arithmetic::kStochastic:
      return call(Constant<Operation::kAverage>{}, Constant<Arithmetic::kStochastic>{});
    case Arithmetic::kLerp:
      break;
  }
  return call(Constant<Operation::kAverage>{}, Constant<Arithmetic::kLerp>{});
}

}  // namespace ema_fused
