// The squared distance of one entry: one loop for each type that pairs compute in.
#include <algorithm>

#include "squared_distance.h"
#include "update_cpu_isa.h"

namespace ema_fused::EMA_FUSED_ISA {
namespace {

template <typename Compute>
double distance_in(const Chunk& chunk) {
  // Several sums side by side, which are vectors.
  constexpr std::int64_t kLanes = 16;
  static_assert(kElementsATile % kLanes == 0);
  double lanes[kLanes]{};
  for (std::int64_t begin = 0; begin < chunk.count; begin += kElementsATile) {
    const std::int64_t count = std::min(kElementsATile, chunk.count - begin);
    Compute tile_of_averaged[kElementsATile];
    Compute tile_of_source[kElementsATile];
    const Compute* const averaged =
        widen_elements(chunk.averaged, chunk.averaged_dtype, begin, count, tile_of_averaged);
    const Compute* const source =
        widen_elements(chunk.source, chunk.source_dtype, begin, count, tile_of_source);
    const std::int64_t in_lanes = count / kLanes * kLanes;
    for (std::int64_t i = 0; i < in_lanes; i += kLanes) {
      for (std::int64_t lane = 0; lane < kLanes; ++lane) {
        lanes[lane] = with_square(lanes[lane], averaged[i + lane], source[i + lane]);
      }
    }
    for (std::int64_t i = in_lanes; i < count; ++i) {
      lanes[i - in_lanes] = with_square(lanes[i - in_lanes], averaged[i], source[i]);
    }
  }
  double distance = 0.0;
  for (const double lane : lanes) {
    distance += lane;
  }
  return distance;
}

}  // namespace

double distance_of(const Chunk& chunk) {
  if (chunk.only_copy) {
    return 0.0;
  }
  if (is_complex(chunk.averaged_dtype)) {
    // Real and imaginary parts count alike: a flat run of both.
    Chunk parts = chunk;
    parts.count *= 2;
    parts.averaged_dtype = parts.source_dtype =
        chunk.averaged_dtype == DType::kComplex128 ? DType::kFloat64 : DType::kFloat32;
    return distance_of(parts);
  }
  const bool in_double =
      chunk.averaged_dtype == DType::kFloat64 || chunk.source_dtype == DType::kFloat64;
  return in_double ? distance_in<double>(chunk) : distance_in<float>(chunk);
}

}  // namespace ema_fused::EMA_FUSED_ISA
