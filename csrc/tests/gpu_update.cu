// The kernels on a GPU beside the CPU loop, to the bit: small enough to be run under
// compute-sanitizer. Exit status 77: there is no GPU.
#include <cuda_runtime.h>

#include <cstdio>
#include <limits>
#include <map>

#include "../update_cuda.cuh"
#include "../uploaded_memory.cuh"
#include "cases.h"

using namespace ema_fused;
using namespace ema_fused::testing;

namespace {

// A copy of host memory on the device, an allocation of its own: a stray access is seen at once.
class OnDevice {
 public:
  OnDevice(const void* bytes, std::size_t size) : size_(size) {
    cuda::check(cudaMalloc(&memory_, size), "cudaMalloc");
    cuda::check(cudaMemcpy(memory_, bytes, size, cudaMemcpyHostToDevice), "copying to the device");
  }
  ~OnDevice() { cudaFree(memory_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  std::uint8_t* data() const { return static_cast<std::uint8_t*>(memory_); }
  void copy_back(void* bytes) const {
    cuda::check(cudaMemcpy(bytes, memory_, size_, cudaMemcpyDeviceToHost), "copying back");
  }

 private:
  void* memory_ = nullptr;
  std::size_t size_;
};

// All tested tensors of some cases.
class Tensors {
 public:
  explicit Tensors(std::vector<Case>& cases) {
    for (Case& one : cases) {
      add(one.source);
      for (const Copies& averaged : one.averaged) {
        add(averaged);
      }
    }
  }
  void* address_of(const Copies& copies) const {
    return copies_.at(&copies)->data() + copies.tested->start();
  }
  void copy_back() const {
    for (const auto& [copies, on_device] : copies_) {
      on_device->copy_back(copies->tested->memory().data());
    }
  }

 private:
  void add(const Copies& copies) {
    const std::vector<std::uint8_t>& memory = copies.tested->memory();
    copies_[&copies] = std::make_unique<OnDevice>(memory.data(), memory.size());
  }
  std::map<const Copies*, std::unique_ptr<OnDevice>> copies_;
};

void run_on_gpu(std::vector<Case>& cases, const Launch& on_host, double* distances,
                std::int64_t chunk_elements, cudaStream_t stream) {
  const Tensors tensors(cases);
  const auto pairs =
      pairs_of(cases, [&](const Copies& copies) { return tensors.address_of(copies); });

  Launch launch = on_host;
  std::vector<std::unique_ptr<OnDevice>> scalars;
  const auto there = [&](const auto* scalar) {
    using Scalar = std::remove_pointer_t<decltype(scalar)>;
    if (scalar == nullptr) {
      return scalar;
    }
    scalars.push_back(std::make_unique<OnDevice>(scalar, sizeof(Scalar)));
    return reinterpret_cast<decltype(scalar)>(scalars.back()->data());
  };
  launch.found_inf = there(on_host.found_inf);
  launch.step_at = there(on_host.step_at);
  for (Weight& weight : launch.weight) {
    weight.at = weight.is_float64
                    ? static_cast<const void*>(there(static_cast<const double*>(weight.at)))
                    : there(static_cast<const float*>(weight.at));
  }
  std::vector<double> weights;
  if (on_host.weights != nullptr) {
    weights.assign(on_host.weights, on_host.weights + pairs.size());
  }
  launch.weights = nullptr;

  cuda::DeviceTable table(0);
  // A first table that is replaced at once, as when tensors have moved.
  table.upload(build_chunks({}, chunk_elements));
  table.upload(build_chunks(pairs, chunk_elements));
  // What no thread writes stays a NaN.
  std::vector<double> sums(
      distances == nullptr ? 0 : static_cast<std::size_t>(kMaxAverages * table.partials()),
      std::numeric_limits<double>::quiet_NaN());
  std::unique_ptr<OnDevice> sums_there;
  Partials partials;
  if (distances != nullptr) {
    sums_there = std::make_unique<OnDevice>(sums.data(), sums.size() * sizeof(double));
    partials = {reinterpret_cast<double*>(sums_there->data()), kMaxAverages, table.partials()};
  }
  table.run(launch, weights, partials, stream);
  cuda::check(cudaStreamSynchronize(stream), "the update");
  if (distances != nullptr) {
    sums_there->copy_back(sums.data());
    partials.sums = sums.data();
    add_up(partials, distances);
  }
  tensors.copy_back();
}

}  // namespace

int main(int count, char** arguments) {
  const cuda::DeviceReport devices = cuda::devices();
  if (devices.count == 0) {
    std::printf("no GPU: %s\n", devices.why_none.c_str());
    return 77;
  }
  // A GPU has a fused multiply-add; the widest CPU loop of a machine with a GPU has one too.
  const CpuKernel cpu = cpu_kernel();
  const std::uint64_t seeds = count > 1 ? std::strtoull(arguments[1], nullptr, 10) : 1;
  cudaStream_t stream = nullptr;
  cuda::check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "making a stream");
  const auto run = [&](std::int64_t chunk_elements) {
    return [&, chunk_elements](std::vector<Case>& cases, const Launch& launch, double* distances,
                               Random& random) {
      run_on_gpu(cases, launch, distances, chunk_elements, random.below(2) == 0 ? nullptr : stream);
    };
  };
  for (const std::int64_t chunk_elements : {1000, 3001, 5001}) {
    check_all({run(chunk_elements), cpu.update_chunks}, seeds);
  }
  for (const Arithmetic arithmetic : {Arithmetic::kLerp, Arithmetic::kStochastic}) {
    check_large(arithmetic, {run(kLeastChunkElementsCuda), cpu.update_chunks});
  }
  cuda::check(cudaStreamDestroy(stream), "destroying the stream");
  std::printf("the kernels and the CPU loop (%s) agree to the bit\n", cpu.isa);
  return 0;
}
