// One launch for a whole plan.
//
// Block b takes chunks b, b + grid, b + 2 * grid, ...; its threads walk a chunk together
// (chunk_body.h). The table lies in device memory rather than in the kernel's arguments: arguments
// hold a few thousand bytes, which is why other multi-tensor kernels need tens of launches for a
// large model. A grid as large as the device can hold at once keeps every multiprocessor busy to
// the end whatever the sizes of the tensors are. Limits: 2^32 - 1 pairs; elementwise operations
// only.
#include <cuda_runtime.h>

#include "chunk_body.h"
#include "update_cuda.cuh"

namespace ema_fused::cuda {
namespace {

constexpr int kThreads = 256;
// Asks the compiler to keep registers low enough for three blocks a multiprocessor.
constexpr int kBlocksPerMultiprocessor = 3;

void check(cudaError_t code, const char* what) {
  if (code != cudaSuccess) {
    throw Error(std::string(what) + ": " + cudaGetErrorString(code) + " (CUDA error " +
                std::to_string(static_cast<int>(code)) + ")");
  }
}

// Launches go to the device of the tensors, which need not be the caller's current one.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    if (previous_ != device) {
      check(cudaSetDevice(device), "cudaSetDevice");
      changed_ = true;
    }
  }
  ~DeviceGuard() {
    if (changed_) {
      cudaSetDevice(previous_);
    }
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

template <Operation kOperation, Arithmetic kArithmetic>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    update_kernel(const Chunk* __restrict__ chunks, std::int64_t chunk_count, Launch launch) {
  update_as_thread<kOperation, kArithmetic>(chunks, chunk_count, launch, blockIdx.x, gridDim.x,
                                            threadIdx.x, blockDim.x);
}

}  // namespace

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
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, update_kernel<Operation::kCopy, Arithmetic::kLerp>),
          "the kernels have no code for this device");
  } catch (const Error& error) {
    cudaGetLastError();
    return error.what();
  }
  return {};
}

DeviceTable::DeviceTable(int device) : device_(device) {
  int multiprocessors = 0;
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
        "cudaDeviceGetAttribute");
  blocks_ = multiprocessors * kBlocksPerMultiprocessor;
}

DeviceTable::~DeviceTable() {
  // cudaFree waits for the device, so no launch still reads the table. At interpreter exit the
  // context may be gone already; there is nobody left to tell.
  int previous = 0;
  if (chunks_ != nullptr && cudaGetDevice(&previous) == cudaSuccess) {
    cudaSetDevice(device_);
    cudaFree(chunks_);
    cudaSetDevice(previous);
  }
}

void DeviceTable::upload(const std::vector<Chunk>& chunks, void* stream) {
  const DeviceGuard guard(device_);
  if (used_on_other_streams_ || (chunks_ != nullptr && upload_stream_ != stream)) {
    // A launch on another stream may still read the table that is about to be overwritten.
    check(cudaDeviceSynchronize(), "waiting for launches before a new chunk table");
  }
  const auto count = static_cast<std::int64_t>(chunks.size());
  if (count > capacity_) {
    if (chunks_ != nullptr) {
      check(cudaFree(chunks_), "freeing the old chunk table");
      chunks_ = nullptr;
      capacity_ = 0;
    }
    void* memory = nullptr;
    check(cudaMalloc(&memory, chunks.size() * sizeof(Chunk)), "allocating the chunk table");
    chunks_ = static_cast<Chunk*>(memory);
    capacity_ = count;
  }
  count_ = count;
  if (count > 0) {
    // From pageable memory: the call returns when the host's copy may be dropped.
    check(cudaMemcpyAsync(chunks_, chunks.data(), chunks.size() * sizeof(Chunk),
                          cudaMemcpyHostToDevice, static_cast<cudaStream_t>(stream)),
          "copying the chunk table");
  }
  upload_stream_ = stream;
  ordered_everywhere_ = false;
  used_on_other_streams_ = false;
}

void DeviceTable::run(const Launch& launch, const std::vector<double>& weights, void* stream) {
  if (count_ == 0) {
    return;
  }
  const DeviceGuard guard(device_);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (stream != upload_stream_) {
    used_on_other_streams_ = true;
    if (!ordered_everywhere_) {
      check(cudaStreamSynchronize(static_cast<cudaStream_t>(upload_stream_)),
            "waiting for the chunk table");
      ordered_everywhere_ = true;
    }
  }
  Launch on_device = launch;
  void* device_weights = nullptr;
  if (!weights.empty()) {
    const std::size_t bytes = weights.size() * sizeof(double);
    check(cudaMallocAsync(&device_weights, bytes, cuda_stream), "allocating the weights");
    check(
        cudaMemcpyAsync(device_weights, weights.data(), bytes, cudaMemcpyHostToDevice, cuda_stream),
        "copying the weights");
  }
  on_device.weights = static_cast<const double*>(device_weights);
  const auto grid = static_cast<unsigned>(count_ < blocks_ ? count_ : blocks_);
  for_launch(launch, [&](auto operation, auto arithmetic) {
    update_kernel<operation.value, arithmetic.value>
        <<<grid, kThreads, 0, cuda_stream>>>(chunks_, count_, on_device);
  });
  const cudaError_t launched = cudaGetLastError();
  if (device_weights != nullptr) {
    check(cudaFreeAsync(device_weights, cuda_stream), "freeing the weights");
  }
  check(launched, "launching the update");
}

}  // namespace ema_fused::cuda
