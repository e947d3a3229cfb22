// One launch for a whole plan.
//
// The table lies in device memory rather than in the kernel's arguments: arguments hold a few
// thousand bytes, which is why other multi-tensor kernels need tens of launches for a large model.
// A grid as large as the device can hold at once keeps every multiprocessor busy to the end
// whatever the sizes of the tensors are. Limits: fewer than 2^32 pairs; elementwise operations
// only.
#include <cuda_runtime.h>

#include <algorithm>

#include "dispatch.h"
#include "update_cuda.cuh"
#include "update_cuda_kernel.cuh"
#include "uploaded_memory.cuh"

namespace ema_fused::cuda {

DeviceReport devices() {
  DeviceReport report;
  const cudaError_t code = cudaGetDeviceCount(&report.count);
  if (code != cudaSuccess) {
    report.count = 0;
    report.why_none = cudaGetErrorString(code);
    cudaGetLastError();  // the error is reported here, not by somebody's next call
  } else if (report.count == 0) {
    report.why_none = "no CUDA device is visible";
  }
  return report;
}

std::string why_not_on(int device) {
  try {
    const DeviceGuard guard(device);
    const BesideCaptures beside;
    cudaFuncAttributes attributes;
    const auto kernel = kernels<Operation::kCopy, Arithmetic::kLerp>().update;
    check(cudaFuncGetAttributes(&attributes, kernel), "the kernels have no code for this device");
  } catch (const Error& error) {
    cudaGetLastError();
    return error.what();
  }
  return {};
}

struct DeviceTable::State {
  explicit State(int on) : device(on), entries(on), weights(on) {}

  int device;
  std::int64_t blocks = 0;
  std::int64_t heads = 0;
  UploadedMemory entries;
  UploadedMemory weights;
  std::vector<double> uploaded_weights;
};

DeviceTable::DeviceTable(int device) : state_(std::make_unique<State>(device)) {
  int multiprocessors = 0;
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
        "cudaDeviceGetAttribute");
  state_->blocks = static_cast<std::int64_t>(multiprocessors) * kBlocksPerMultiprocessor;
}

DeviceTable::~DeviceTable() = default;

std::int64_t DeviceTable::blocks() const { return state_->blocks; }

void DeviceTable::upload(const ChunkTable& table) {
  state_->entries.upload(table.entries.data(), table.entries.size() * sizeof(Chunk));
  state_->heads = table.heads;
}

std::int64_t DeviceTable::partials() const {
  return std::clamp<std::int64_t>(state_->heads, 1, state_->blocks) * kThreads;
}

void DeviceTable::run(const Launch& launch, const std::vector<double>& weights,
                      const Partials& partials, void* stream) {
  State& state = *state_;
  const bool measures = partials.sums != nullptr && launch.operation == Operation::kAverage;
  if (state.heads == 0 && !measures) {
    return;
  }
  const DeviceGuard guard(state.device);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  Launch on_device = launch;
  if (!weights.empty()) {
    if (weights != state.uploaded_weights) {
      state.uploaded_weights.clear();  // until they are there
      state.weights.upload(weights.data(), weights.size() * sizeof(double));
      state.uploaded_weights = weights;
    }
    on_device.weights = static_cast<const double*>(state.weights.use_on(cuda_stream));
  }
  const auto* entries = static_cast<const Chunk*>(state.entries.use_on(cuda_stream));
  const Kernels kernel = for_launch(launch, [](auto operation, auto arithmetic) {
    return kernels<operation.value, arithmetic.value>();
  });
  if (measures) {
    // As many threads as there are parts, though the table may have changed since they were
    // counted: any grid does all the work, and every part is written.
    const auto grid = static_cast<unsigned>(partials.count / kThreads);
    kernel.measured<<<grid, kThreads, 0, cuda_stream>>>(entries, state.heads, on_device, partials);
  } else {
    const auto grid = static_cast<unsigned>(std::min(state.heads, state.blocks));
    kernel.update<<<grid, kThreads, 0, cuda_stream>>>(entries, state.heads, on_device);
  }
  check(cudaGetLastError(), "launching the update");
}

}  // namespace ema_fused::cuda
