#include <algorithm>
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

// Of one device: where uploads run, and where old memory waits for the launches that read it. Two,
// so that no upload waits with it.
struct Streams {
  cudaStream_t upload = nullptr;
  cudaStream_t release = nullptr;
};

// Made once and never destroyed: at exit the context may go before them.
const Streams& streams_of(int device) {
  static auto* const known = new std::map<int, Streams>();
  static auto* const mutex = new std::mutex();
  const std::lock_guard<std::mutex> lock(*mutex);
  Streams& streams = (*known)[device];
  for (cudaStream_t* stream : {&streams.upload, &streams.release}) {
    if (*stream == nullptr) {
      check(cudaStreamCreateWithFlags(stream, cudaStreamNonBlocking),
            "making a stream for uploads");
    }
  }
  return streams;
}

// What is put on `later` from now on waits for what is on `earlier`. False where it can't be had.
bool order(cudaStream_t earlier, cudaStream_t later) {
  cudaEvent_t event = nullptr;
  if (cudaEventCreateWithFlags(&event, cudaEventDisableTiming) != cudaSuccess) {
    return false;
  }
  const bool ordered = cudaEventRecord(event, earlier) == cudaSuccess &&
                       cudaStreamWaitEvent(later, event, 0) == cudaSuccess;
  cudaEventDestroy(event);
  return ordered;
}

}  // namespace

void check(cudaError_t code, const char* what) {
  if (code != cudaSuccess) {
    cudaGetLastError();  // told here, and not by somebody's next call once more
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

BesideCaptures::BesideCaptures()
    : is_relaxed_(cudaThreadExchangeStreamCaptureMode(&mode_) == cudaSuccess) {}

BesideCaptures::~BesideCaptures() {
  if (is_relaxed_) {
    cudaThreadExchangeStreamCaptureMode(&mode_);
  }
}

UploadedMemory::~UploadedMemory() {
  // At interpreter exit the context may be gone already; there is nobody left to tell.
  try {
    if (memory_ != nullptr) {
      const DeviceGuard guard(device_);
      const BesideCaptures beside;
      release();
    }
  } catch (const Error&) {
    cudaGetLastError();
  }
}

void UploadedMemory::upload(const void* bytes, std::size_t size) {
  const DeviceGuard guard(device_);
  const BesideCaptures beside;
  void* fresh = nullptr;
  if (size > 0) {
    const cudaStream_t stream = streams_of(device_).upload;
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
  was_captured_ = was_captured_ || is_capturing(stream);
  if (std::find(streams_.begin(), streams_.end(), stream) == streams_.end()) {
    streams_.push_back(stream);
  }
  return memory_;
}

// Gives memory_ back once no launch reads it; where that can't be told, never.
void UploadedMemory::release() noexcept {
  if (memory_ != nullptr && !was_captured_) {
    const cudaStream_t release = streams_of(device_).release;
    const bool is_ordered = std::all_of(streams_.begin(), streams_.end(), [&](cudaStream_t stream) {
      return !is_capturing(stream) && order(stream, release);
    });
    if (is_ordered) {
      cudaFreeAsync(memory_, release);
    }
    cudaGetLastError();
  }
  memory_ = nullptr;
  was_captured_ = false;
  streams_.clear();
}

}  // namespace ema_fused::cuda
