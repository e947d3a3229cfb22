// The prepared update of one device: pairs -> chunk table -> one launch.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "chunk_table.h"
#include "python_refs.h"
#include "tensor_watch.h"
#include "turns.h"

namespace ema_fused {

namespace cuda {
class DeviceTable;
}

// Pairs whose memory overlaps so that the result would depend on their order. Becomes the Python
// exception OverlapError(first, second, what).
struct OverlapError {
  std::uint32_t first;
  std::uint32_t second;
  const char* what;
};

// A pair that the native kernels don't serve, and why.
using Refusal = std::pair<std::size_t, std::string>;

// Looks at fresh lists of tensors: which pairs have a kernel, by device. Nothing is kept.
struct Inspection {
  std::vector<Refusal> refusals;
  // (device type as DLPack numbers it, device index, indices of the pairs)
  std::vector<std::tuple<std::int32_t, std::int32_t, std::vector<std::size_t>>> devices;
};
Inspection inspect(PyObject* averaged, PyObject* source);

// Beside the tensors, what a plan needs to know of each pair.
struct PairOptions {
  bool only_copy;
  std::uint8_t average;  // which of several averages
  std::uint32_t number;  // its place in the caller's lists
};

// What one launch is told beside its weight. Addresses are of memory on the plan's device.
struct LaunchOptions {
  std::vector<Weight> weights_by_average;  // empty: one number for all
  std::vector<double> weights_by_pair;     // the same; else one a pair, which counts then
  const float* found_inf = nullptr;
  std::uint64_t seed = 0;
  std::int64_t step = 0;
  const std::int64_t* step_at = nullptr;
  Partials partials;  // of an average: asks for the distance
};

// Whoever shares one with other threads takes a turn for each call.
class Plan {
 public:
  // Every pair must have passed inspect() and be on one device.
  Plan(PyObject* averaged, PyObject* source, std::vector<PairOptions> options,
       Arithmetic arithmetic);
  ~Plan();
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  Turn take_turn() { return Turn(turns_, table_is_stale_); }

  // Lets the tensors go: for plans that are found again by fresh tensors that match them. Then
  // nothing is checked at a launch: it follows matches(), in one go.
  void release() { watch_.release(); }
  bool matches(PyObject* averaged, PyObject* source) const {
    return watch_.matches(averaged, source);
  }

  // True where run() would find every tensor of the planned kind.
  bool ready() { return refresh(); }

  // Checks every pointer, rebuilds the table where tensors have moved, and launches. False, with
  // nothing done, where a tensor's type, shape, strides or device has changed.
  bool run(Operation operation, double weight, const LaunchOptions& options);

  std::int64_t elements() const { return elements_; }
  std::int64_t chunks() const { return chunk_count_; }

  // How many parts an average's squared distance is told in: the `count` of LaunchOptions.partials.
  std::int64_t partials() const;

  // The first pair that can't be averaged and isn't only copied; the first of two dtypes. -1: none.
  std::int64_t no_average() const { return no_average_; }
  std::int64_t no_swap() const { return no_swap_; }

  // The first tensor whose dtype or shape is not what was planned: (its pair or -1, whether it is
  // the source, what was planned).
  std::tuple<std::int64_t, bool, std::string> changed() const;

 private:
  struct CpuTable {
    ChunkTable chunks;
    std::vector<std::int64_t> work_before;  // work before each chain, to split evenly
    std::int64_t work = 0;                  // in picoseconds of one thread
  };

  bool is_cuda() const { return device_.type == dlpack::kCuda; }
  bool refresh();
  std::vector<Pair> pairs() const;
  void build_table();
  void require(Operation operation);
  void run_on_cpu(const Launch& launch, const Partials& partials) const;

  std::size_t size() const { return options_.size(); }
  const TensorFacts& averaged(std::size_t i) const { return watch_.facts()[i]; }
  const TensorFacts& source(std::size_t i) const { return watch_.facts()[size() + i]; }

  Turns turns_;
  TensorWatch watch_;  // all averaged tensors, then all sources
  std::vector<PairOptions> options_;
  Arithmetic arithmetic_;
  dlpack::Device device_{};
  std::int64_t averages_ = 0;
  std::int64_t no_average_ = -1;
  std::int64_t no_swap_ = -1;
  bool table_is_stale_ = true;
  bool swap_is_checked_ = false;
  std::int64_t elements_ = 0;
  std::int64_t chunk_count_ = 0;
  CpuTable cpu_table_;
  std::unique_ptr<cuda::DeviceTable> cuda_table_;
};

}  // namespace ema_fused
