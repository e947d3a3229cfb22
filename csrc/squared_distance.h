// The squared distance between source and averages, measured by the update that reads both of them
// anyway.
//
// Each thread of a GPU has a sum of its own for each average and writes it to a place of its own:
// nobody waits for anybody, and the parts, added up in order, give the same bits at every run.
#pragma once

#include <cstdint>

#include "arithmetic.h"
#include "chunk_table.h"
#include "dtypes.h"
#include "macros.h"

namespace ema_fused {

// The sum with one more element in it. The difference is the one that lerp takes; squares and sums
// are in double, where neither a tiny nor a huge difference is lost and no number of elements is
// too many.
template <typename A, typename S>
EMA_FUSED_HD double with_square(double sum, const A& averaged, const S& source) {
  using Compute = ComputeType<A, S>;
  const double difference = to_compute<Compute>(source) - to_compute<Compute>(averaged);
  return multiply_add(difference, difference, sum);
}

// Of an update whose distance nobody asks for.
struct Unmeasured {
  static constexpr bool kMeasures = false;
};

// What one thread has come across: a sum for each average, one of them in registers.
class MeasuredByThread {
 public:
  static constexpr bool kMeasures = true;

  EMA_FUSED_HD MeasuredByThread(const Partials& partials, std::uint32_t thread)
      : partials_(partials), thread_(thread) {
    for (std::int64_t k = 0; k < partials.averages; ++k) {
      at(k) = 0.0;  // also of averages that this thread never meets
    }
  }

  // What is added from here on belongs to this average.
  EMA_FUSED_HD void turn_to(std::uint8_t average) {
    if (average != average_) {
      at(average_) = sum_;
      sum_ = at(average);
      average_ = average;
    }
  }
  template <typename A, typename S>
  EMA_FUSED_HD void add(const A& averaged, const S& source) {
    sum_ = with_square(sum_, averaged, source);
  }
  EMA_FUSED_HD void finish() { at(average_) = sum_; }

 private:
  EMA_FUSED_HD double& at(std::int64_t average) const {
    return partials_.sums[average * partials_.count + thread_];
  }

  const Partials& partials_;
  std::uint32_t thread_;  // among those of all blocks
  double sum_ = 0.0;
  std::uint8_t average_ = 0;
};

}  // namespace ema_fused
