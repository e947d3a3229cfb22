// Memory of one device that the host fills now and then and that launches on any stream read.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <vector>

namespace ema_fused::cuda {

// Throws Error with what was tried and the runtime's text.
void check(cudaError_t code, const char* what);

// Work goes to the device of the tensors, which need not be the caller's current one.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

// Every upload goes into fresh memory on a stream of its own, so that it neither waits for what the
// device is doing nor is recorded where another stream is being captured into a graph. The memory
// before it is given back behind the launches that read it; captured launches may read theirs
// whenever the graph is replayed, so that memory stays until this object goes.
class UploadedMemory {
 public:
  explicit UploadedMemory(int device) : device_(device) {}
  ~UploadedMemory();
  UploadedMemory(const UploadedMemory&) = delete;
  UploadedMemory& operator=(const UploadedMemory&) = delete;

  // Complete when this returns.
  void upload(const void* bytes, std::size_t size);

  // The memory, for a launch on `stream`.
  const void* use_on(cudaStream_t stream);

 private:
  void release() noexcept;

  int device_;
  void* memory_ = nullptr;
  bool was_used_ = false;
  bool on_several_streams_ = false;
  bool was_captured_ = false;
  cudaStream_t stream_ = nullptr;  // of the last launch
  std::vector<void*> kept_;
};

}  // namespace ema_fused::cuda
