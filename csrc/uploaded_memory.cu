#include <map>
#include <mutex>
#include <string>

#include "update_cuda.cuh"
#include "uploaded_memory.cuh"

namespace ema_fused::cuda {
namespace {

// Also where the runtime can't tell.
bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const cudaError_t code = cudaStreamIsCapturing(stream, &status);
  cudaGetLastError();
  return code != cudaSuccess || status != cudaStreamCaptureStatusNone;
}

// While it lives, this thread may allocate and copy although some stream is being captured: what it
// does is not meant for the graph.
class BesideCaptures {
 public:
  BesideCaptures() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~BesideCaptures() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  BesideCaptures(const BesideCaptures&) = delete;
  BesideCaptures& operator=(const BesideCaptures&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// The stream of all uploads to a device. Made once and never destroyed: at exit the context may go
// before it.
cudaStream_t upload_stream(int device) {
  static auto* const streams = new std::map<int, cudaStream_t>();
  static auto* const mutex = new std::mutex();
  const std::lock_guard<std::mutex> lock(*mutex);
  const auto found = streams->find(device);
  if (found != streams->end()) {
    return found->second;
  }
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "making a stream for uploads");
  streams->emplace(device, stream);
  return stream;
}

}  // namespace

void check(cudaError_t code, const char* what) {
  if (code != cudaSuccess) {
    throw Error(std::string(what) + ": " + cudaGetErrorString(code) + " (CUDA error " +
                std::to_string(static_cast<int>(code)) + ")");
  }
}

DeviceGuard::DeviceGuard(int device) {
  check(cudaGetDevice(&previous_), "cudaGetDevice");
  if (previous_ != device) {
    check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = true;
  }
}

DeviceGuard::~DeviceGuard() {
  if (changed_) {
    cudaSetDevice(previous_);
  }
}

UploadedMemory::~UploadedMemory() {
  // At interpreter exit the context may be gone already; there is nobody left to tell.
  try {
    if (memory_ == nullptr && kept_.empty()) {
      return;
    }
    const DeviceGuard guard(device_);
    const BesideCaptures beside;
    release();
    if (!kept_.empty() && cudaDeviceSynchronize() == cudaSuccess) {
      for (void* memory : kept_) {
        cudaFree(memory);
      }
    }
  } catch (const Error&) {
  }
  cudaGetLastError();
}

void UploadedMemory::upload(const void* bytes, std::size_t size) {
  const DeviceGuard guard(device_);
  const BesideCaptures beside;
  void* fresh = nullptr;
  if (size > 0) {
    const cudaStream_t stream = upload_stream(device_);
    check(cudaMallocAsync(&fresh, size, stream), "allocating a chunk table");
    cudaError_t copied = cudaMemcpyAsync(fresh, bytes, size, cudaMemcpyHostToDevice, stream);
    if (copied == cudaSuccess) {
      copied = cudaStreamSynchronize(stream);
    }
    if (copied != cudaSuccess) {
      cudaFreeAsync(fresh, stream);
      check(copied, "copying a chunk table");
    }
  }
  release();
  memory_ = fresh;
}

const void* UploadedMemory::use_on(cudaStream_t stream) {
  on_several_streams_ = on_several_streams_ || (was_used_ && stream != stream_);
  was_captured_ = was_captured_ || is_capturing(stream);
  was_used_ = true;
  stream_ = stream;
  return memory_;
}

// Gives memory_ back once no launch reads it; where that can't be had, keeps it to the end.
void UploadedMemory::release() noexcept {
  void* const memory = memory_;
  const bool wait_for_all = on_several_streams_;
  const cudaStream_t stream = stream_;
  const bool read_by_graph = was_captured_ || (was_used_ && is_capturing(stream));
  memory_ = nullptr;
  stream_ = nullptr;
  was_used_ = on_several_streams_ = was_captured_ = false;
  if (memory == nullptr) {
    return;
  }
  const bool is_free = !read_by_graph &&
                       (!wait_for_all || cudaDeviceSynchronize() == cudaSuccess) &&
                       cudaFreeAsync(memory, stream) == cudaSuccess;
  if (!is_free) {
    cudaGetLastError();
    kept_.push_back(memory);
  }
}

}  // namespace ema_fused::cuda
