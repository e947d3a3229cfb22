// Elements of any type in the type that a pair computes in.
#include "update_cpu_isa.h"

namespace ema_fused::EMA_FUSED_ISA {
namespace {

template <typename T, typename Compute>
Compute* widened(void* elements, std::int64_t begin, std::int64_t count, Compute* tile) {
  auto* const from = static_cast<T*>(elements) + begin;
  if constexpr (std::is_same_v<T, Compute>) {
    return from;
  } else {
    EMA_FUSED_INDEPENDENT
    for (std::int64_t i = 0; i < count; ++i) {
      tile[i] = to_compute<Compute>(from[i]);
    }
    return tile;
  }
}

}  // namespace

template <typename Compute>
Compute* widen_elements(void* elements, DType dtype, std::int64_t begin, std::int64_t count,
                        Compute* tile) {
  switch (dtype) {
    case DType::kFloat64:
      if constexpr (std::is_same_v<Compute, double>) {
        return widened<double>(elements, begin, count, tile);
      }
      break;
    case DType::kFloat32:
      return widened<float>(elements, begin, count, tile);
    case DType::kBFloat16:
      return widened<BFloat16>(elements, begin, count, tile);
    case DType::kFloat16:
      return widened<Float16>(elements, begin, count, tile);
    case DType::kFloat8E4M3:
      return widened<Float8E4M3>(elements, begin, count, tile);
    case DType::kFloat8E5M2:
      return widened<Float8E5M2>(elements, begin, count, tile);
    case DType::kComplex64:
    case DType::kComplex128:
    case DType::kBytes:
      break;
  }
  return tile;  // bytes are no numbers, and float32 doesn't hold a float64
}

template float* widen_elements(void* elements, DType dtype, std::int64_t begin, std::int64_t count,
                               float* tile);
template double* widen_elements(void* elements, DType dtype, std::int64_t begin, std::int64_t count,
                                double* tile);

}  // namespace ema_fused::EMA_FUSED_ISA
