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

// While it lives, this thread may allocate, copy and load code although some stream is being
// captured: what it does is not meant for the graph.
class BesideCaptures {
 public:
  BesideCaptures();
  ~BesideCaptures();
  BesideCaptures(const BesideCaptures&) = delete;
  BesideCaptures& operator=(const BesideCaptures&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
  bool is_relaxed_;
};

// Every upload goes into fresh memory on a stream of its own, so that it neither waits for what the
// device is doing nor is recorded where another stream is being captured into a graph. The memory
// before it is given back behind the launches that read it. What a captured launch reads is never
// given back: the graph may be replayed at any time, and nobody tells when it is gone.
class UploadedMemory {
 public:
  explicit UploadedMemory(int device) : device_(device) {}
  ~UploadedMemory();
  UploadedMemory(const UploadedMemory&) = delete;
  UploadedMemory& operator=(const UploadedMemory&) = delete;

  // Complete when this returns.
  void upload(const void* bytes, std::size_t size);

  // The memory, for a launch on `stream`, of the current device; the stream must live as long as
  // this memory is in use.
  const void* use_on(cudaStream_t stream);

 private:
  void release() noexcept;

  int device_;
  void* memory_ = nullptr;
  bool was_captured_ = false;
  std::vector<cudaStream_t> streams_;  // of the launches that read memory_
};

}  // namespace ema_fused::cuda
