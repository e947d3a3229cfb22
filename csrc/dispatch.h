// From the codes of a chunk to the types of its update: the one switch that the CPU and the CUDA
// loops share. `run` is called as run(averaged*, source*, operation_functor).
#pragma once

#include <type_traits>

#include "arithmetic.h"
#include "chunk_table.h"
#include "macros.h"

namespace ema_fused {

template <template <typename, typename> class Functor, typename A, typename Run>
EMA_FUSED_HD void with_source(const Chunk& chunk, double weight, Run&& run) {
  A* averaged = static_cast<A*>(chunk.averaged);
  switch (chunk.source_dtype) {
    case DType::kFloat64:
      return run(averaged, static_cast<double*>(chunk.source), Functor<A, double>(weight));
    case DType::kFloat32:
      return run(averaged, static_cast<float*>(chunk.source), Functor<A, float>(weight));
    case DType::kBFloat16:
      return run(averaged, static_cast<BFloat16*>(chunk.source), Functor<A, BFloat16>(weight));
    case DType::kFloat16:
      return run(averaged, static_cast<Float16*>(chunk.source), Functor<A, Float16>(weight));
    case DType::kBytes:
      return;
  }
}

template <template <typename, typename> class Functor, typename Run>
EMA_FUSED_HD void with_types(const Chunk& chunk, double weight, Run&& run) {
  switch (chunk.averaged_dtype) {
    case DType::kFloat64:
      return with_source<Functor, double>(chunk, weight, run);
    case DType::kFloat32:
      return with_source<Functor, float>(chunk, weight, run);
    case DType::kBFloat16:
      return with_source<Functor, BFloat16>(chunk, weight, run);
    case DType::kFloat16:
      return with_source<Functor, Float16>(chunk, weight, run);
    case DType::kBytes:
      return;
  }
}

// Equal types are copied and swapped as bits: by size alone, so that four types need three loops.
template <template <typename, typename> class Functor, typename Run>
EMA_FUSED_HD void with_size(const Chunk& chunk, Run&& run) {
  switch (item_size(chunk.averaged_dtype)) {
    case 8:
      return run(static_cast<std::uint64_t*>(chunk.averaged),
                 static_cast<std::uint64_t*>(chunk.source),
                 Functor<std::uint64_t, std::uint64_t>(0.0));
    case 4:
      return run(static_cast<std::uint32_t*>(chunk.averaged),
                 static_cast<std::uint32_t*>(chunk.source),
                 Functor<std::uint32_t, std::uint32_t>(0.0));
    case 2:
      return run(static_cast<std::uint16_t*>(chunk.averaged),
                 static_cast<std::uint16_t*>(chunk.source),
                 Functor<std::uint16_t, std::uint16_t>(0.0));
    default:
      return run(static_cast<std::uint8_t*>(chunk.averaged),
                 static_cast<std::uint8_t*>(chunk.source),
                 Functor<std::uint8_t, std::uint8_t>(0.0));
  }
}

template <typename Run>
EMA_FUSED_HD void with_copy(const Chunk& chunk, Run&& run) {
  if (chunk.averaged_dtype == chunk.source_dtype) {
    return with_size<Copy>(chunk, run);
  }
  return with_types<Copy>(chunk, 0.0, run);
}

// kOperation and kArithmetic are fixed for a launch, so they are template parameters; the types
// differ from chunk to chunk, so they are switched on.
template <Operation kOperation, Arithmetic kArithmetic, typename Run>
EMA_FUSED_HD void dispatch(const Chunk& chunk, const Launch& launch, Run&& run) {
  if constexpr (kOperation == Operation::kCopy) {
    return with_copy(chunk, run);
  } else if constexpr (kOperation == Operation::kSwap) {
    return with_size<Swap>(chunk, run);
  } else {
    if (chunk.only_copy) {
      return with_copy(chunk, run);
    }
    const double weight = launch.weights != nullptr ? launch.weights[chunk.pair] : launch.weight;
    if constexpr (kArithmetic == Arithmetic::kLerp) {
      return with_types<Lerp>(chunk, weight, run);
    } else if constexpr (kArithmetic == Arithmetic::kAxpby) {
      return with_types<Axpby>(chunk, weight, run);
    } else {
      return with_types<Delta>(chunk, weight, run);
    }
  }
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
    case Arithmetic::kLerp:
      break;
  }
  return call(Constant<Operation::kAverage>{}, Constant<Arithmetic::kLerp>{});
}

}  // namespace ema_fused
