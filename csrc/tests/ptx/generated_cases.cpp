#include "generated_cases.h"

#include <limits>
#include <map>

#include "../../update_cuda_kernel.cuh"
#include "../cases.h"

namespace ema_fused::testing::ptx {
namespace {

// The tested tensors of some cases, in a device's memory.
class Tensors {
 public:
  Tensors(std::vector<Case>& cases, bool writes_source, DeviceMemory& memory) : memory_(memory) {
    for (Case& one : cases) {
      add(one.source, one.count, writes_source ? Rights::kReadAndWrite : Rights::kRead);
      for (const Copies& averaged : one.averaged) {
        add(averaged, one.count, Rights::kReadAndWrite);
      }
    }
  }

  void* address_of(const Copies& copies) const { return there_.at(&copies).data; }
  void copy_back() const {
    for (const auto& [copies, there] : there_) {
      std::memcpy(copies->tested->data(), there.data, there.bytes);
    }
  }

 private:
  struct There {
    std::uint8_t* data;
    std::size_t bytes;
  };

  void add(const Copies& copies, std::int64_t count, Rights rights) {
    const std::uint8_t* const here = copies.tested->data();
    const auto bytes = static_cast<std::size_t>(count * item_size(copies.tested->dtype()));
    const std::size_t shift = reinterpret_cast<std::uintptr_t>(here) % 64;
    std::uint8_t* const there = memory_.allocate(bytes, shift, rights);
    std::memcpy(there, here, bytes);
    there_[&copies] = {there, bytes};
  }

  DeviceMemory& memory_;
  std::map<const Copies*, There> there_;
};

// With all it points to in the memory that kernels see.
Launch moved(Launch launch, std::size_t pairs, DeviceMemory& memory) {
  const auto move = [&](auto*& pointer, std::size_t count) {
    pointer = pointer == nullptr ? nullptr : memory.hold(pointer, count);
  };
  move(launch.weights, pairs);
  move(launch.found_inf, 1);
  move(launch.step_at, 1);
  for (Weight& weight : launch.weight) {
    const auto* bytes = static_cast<const std::uint8_t*>(weight.at);
    move(bytes, weight.is_float64 ? sizeof(double) : sizeof(float));
    weight.at = bytes;
  }
  return launch;
}

}  // namespace

void check_generated_cases(KernelsUnderTest& kernels, DeviceMemory& memory, std::uint64_t seeds) {
  const auto run = [&](std::int64_t chunk_elements, const Grid& grid) {
    return [&, chunk_elements, grid](std::vector<Case>& cases, const Launch& launch,
                                     double* distances, Random&) {
      memory.clear();
      const Tensors tensors(cases, launch.operation == Operation::kSwap, memory);
      const auto pairs =
          pairs_of(cases, [&](const Copies& copies) { return tensors.address_of(copies); });
      const ChunkTable table = build_chunks(pairs, chunk_elements);
      Parameters parameters{memory.hold(table.entries.data(), table.entries.size()), table.heads,
                            moved(launch, pairs.size(), memory), Partials{}};
      if (distances != nullptr) {
        const std::int64_t parts = std::int64_t{grid.blocks} * grid.threads;
        const auto count = static_cast<std::size_t>(kMaxAverages * parts);
        auto* const sums = reinterpret_cast<double*>(
            memory.allocate(count * sizeof(double), 0, Rights::kReadAndWrite));
        std::fill_n(sums, count, std::numeric_limits<double>::quiet_NaN());
        parameters.partials = {sums, kMaxAverages, parts};
      }
      kernels.run(parameters, grid, memory);
      if (distances != nullptr) {
        add_up(parameters.partials, distances);
      }
      tensors.copy_back();
    };
  };
  for (std::uint64_t seed = 0; seed < seeds; ++seed) {
    Random random(seed);
    const auto chunk_elements = static_cast<std::int64_t>(1 + random.below(5000));
    const Grid grid{static_cast<u32>(1 + random.below(9)), cuda::kThreads};
    check_kernel(kernels.operation(), kernels.arithmetic(),
                 {run(chunk_elements, grid), &update_chunks_on_host}, random);
  }
  if (kernels.operation() == Operation::kAverage) {
    check_large(kernels.arithmetic(),
                {run(kLeastChunkElementsCuda, {3, cuda::kThreads}), &update_chunks_on_host});
  }
}

}  // namespace ema_fused::testing::ptx
