// From the codes of a chunk to the types of its update: the one switch that the CPU and the CUDA
// loops share. `run` is called with a Types, which names what to do.
#pragma once

#include <type_traits>

#include "arithmetic.h"
#include "chunk_table.h"
#include "macros.h"
#include "random.h"

namespace ema_fused {

// kVectors: whether this combination is worth a loop of vectors on a GPU. What models have is:
// equal types, a float32 average of something narrower, a 16-bit average of float32. The others go
// element by element, in the same launch: each such loop would take compilers time, and nobody
// would run it.
template <typename A, typename S, typename F, bool kVectors>
struct Types {
  using Averaged = A;
  using Source = S;
  using Functor = F;
  static constexpr bool kHasVectors = kVectors;
};

template <typename A, typename S>
constexpr bool kWorthVectors =
    std::is_same_v<A, S> || (std::is_same_v<A, float> && sizeof(S) <= 2) ||
    (std::is_same_v<S, float> && sizeof(A) == 2);

template <template <typename, typename> class Functor, bool kVectors, typename A, typename Run>
EMA_FUSED_HD void with_source(DType source, Run&& run) {
  switch (source) {
    case DType::kFloat64:
      return run(Types < A, double, Functor<A, double>, kVectors&& kWorthVectors < A, double >> {});
    case DType::kFloat32:
      return run(Types < A, float, Functor<A, float>, kVectors&& kWorthVectors < A, float >> {});
    case DType::kBFloat16:
      return run(Types < A, BFloat16, Functor<A, BFloat16>, kVectors && kWorthVectors < A,
                 BFloat16 >> {});
    case DType::kFloat16:
      return run(Types < A, Float16, Functor<A, Float16>, kVectors && kWorthVectors < A,
                 Float16 >> {});
    case DType::kFloat8E4M3:
      return run(Types < A, Float8E4M3, Functor<A, Float8E4M3>, kVectors && kWorthVectors < A,
                 Float8E4M3 >> {});
    case DType::kFloat8E5M2:
      return run(Types < A, Float8E5M2, Functor<A, Float8E5M2>, kVectors && kWorthVectors < A,
                 Float8E5M2 >> {});
    case DType::kBytes:
      return;
  }
}

template <template <typename, typename> class Functor, bool kVectors, typename Run>
EMA_FUSED_HD void with_types(const Chunk& chunk, Run&& run) {
  switch (chunk.averaged_dtype) {
    case DType::kFloat64:
      return with_source<Functor, kVectors, double>(chunk.source_dtype, run);
    case DType::kFloat32:
      return with_source<Functor, kVectors, float>(chunk.source_dtype, run);
    case DType::kBFloat16:
      return with_source<Functor, kVectors, BFloat16>(chunk.source_dtype, run);
    case DType::kFloat16:
      return with_source<Functor, kVectors, Float16>(chunk.source_dtype, run);
    case DType::kFloat8E4M3:
    case DType::kFloat8E5M2:
    case DType::kBytes:
      return;
  }
}

// Equal types are copied and swapped as bits: by size alone, so that seven types need four loops.
template <template <typename, typename> class Functor, typename Run>
EMA_FUSED_HD void with_size(const Chunk& chunk, Run&& run) {
  switch (item_size(chunk.averaged_dtype)) {
    case 8:
      return run(
          Types<std::uint64_t, std::uint64_t, Functor<std::uint64_t, std::uint64_t>, true>{});
    case 4:
      return run(
          Types<std::uint32_t, std::uint32_t, Functor<std::uint32_t, std::uint32_t>, true>{});
    case 2:
      return run(
          Types<std::uint16_t, std::uint16_t, Functor<std::uint16_t, std::uint16_t>, true>{});
    default:
      return run(Types<std::uint8_t, std::uint8_t, Functor<std::uint8_t, std::uint8_t>, true>{});
  }
}

template <bool kVectors, typename Run>
EMA_FUSED_HD void with_copy(const Chunk& chunk, Run&& run) {
  if (chunk.averaged_dtype == chunk.source_dtype) {
    return with_size<Copy>(chunk, run);
  }
  return with_types<Copy, kVectors>(chunk, run);
}

// kOperation and kArithmetic are fixed for a launch, so they are template parameters; the types
// differ from chunk to chunk, so they are switched on.
template <Operation kOperation, Arithmetic kArithmetic, typename Run>
EMA_FUSED_HD void dispatch(const Chunk& chunk, Run&& run) {
  if constexpr (kOperation == Operation::kCopy) {
    return with_copy<true>(chunk, run);
  } else if constexpr (kOperation == Operation::kSwap) {
    return with_size<Swap>(chunk, run);
  } else {
    if (chunk.only_copy) {
      // Converted copies among averages are a model's few buffers.
      return with_copy<false>(chunk, run);
    }
    if constexpr (kArithmetic == Arithmetic::kLerp) {
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
