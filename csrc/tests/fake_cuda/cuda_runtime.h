// As much of the CUDA runtime as uploaded_memory.cu calls, over host memory and for one thread,
// with streams that are as late as they may be: what is put into one waits until the code under
// test synchronises it or the test drains it. Memory that is given back too early is thus read
// after its free(). Rules that the runtime leaves to luck or to the kind of stream are errors here.
#pragma once

#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidResourceHandle = 400,
  cudaErrorLaunchFailure = 719,
  cudaErrorStreamCaptureUnsupported = 900,
  cudaErrorStreamCaptureImplicit = 906,
};
enum cudaStreamCaptureStatus {
  cudaStreamCaptureStatusNone,
  cudaStreamCaptureStatusActive,
  cudaStreamCaptureStatusInvalidated,
};
enum cudaStreamCaptureMode {
  cudaStreamCaptureModeGlobal,
  cudaStreamCaptureModeThreadLocal,
  cudaStreamCaptureModeRelaxed,
};
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1 };
constexpr unsigned cudaStreamDefault = 0;
constexpr unsigned cudaStreamNonBlocking = 1;
constexpr unsigned cudaEventDisableTiming = 2;
struct CUstream_st;
using cudaStream_t = CUstream_st*;
struct CUevent_st;
using cudaEvent_t = CUevent_st*;

namespace fake_cuda {

using Bytes = std::vector<unsigned char>;
using Operation = std::function<void()>;

// What captured launches became.
struct Graph {
  bool is_valid = true;
  std::vector<Operation> nodes;
};

}  // namespace fake_cuda

struct CUstream_st {
  int device = 0;
  bool is_legacy = false;
  bool is_blocking = false;
  bool is_capturing = false;
  std::deque<fake_cuda::Operation> queue;
  fake_cuda::Graph graph;  // while capturing
};

struct CUevent_st {
  cudaStream_t stream = nullptr;  // none: not recorded
  std::shared_ptr<bool> is_reached;
};

namespace fake_cuda {

struct Allocation {
  int number = 0;
  int device = 0;
  std::size_t size = 0;
  bool is_given_back = false;
};

struct State {
  int device = 0;
  cudaError_t last_error = cudaSuccess;
  cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
  std::vector<std::unique_ptr<CUstream_st>> streams;
  std::map<int, cudaStream_t> legacy;
  std::map<const void*, Allocation> memory;
  int allocations = 0;
  int events = 0;
  std::map<std::string, int> calls;
  std::string failing;  // the call that fails, "*" for all of them
  int calls_until_failure = 0;
};

inline State& state() {
  static State state;
  return state;
}

[[noreturn]] inline void violated(const char* what) {
  std::fprintf(stderr, "fake CUDA runtime: %s\n", what);
  std::abort();
}

// ---- For the calls below
// -------------------------------------------------------------------------

inline cudaError_t result(cudaError_t code) {
  if (code != cudaSuccess) {
    state().last_error = code;
  }
  return code;
}

inline bool fails(const char* name) {
  State& s = state();
  ++s.calls[name];
  if (s.failing == "*") {
    return true;
  }
  if (s.failing != name || --s.calls_until_failure > 0) {
    return false;
  }
  s.failing.clear();
  return true;
}

inline cudaStream_t new_stream(int device) {
  state().streams.push_back(std::make_unique<CUstream_st>());
  state().streams.back()->device = device;
  return state().streams.back().get();
}

inline cudaStream_t resolved(cudaStream_t stream) {
  if (stream != nullptr) {
    return stream;
  }
  cudaStream_t& legacy = state().legacy[state().device];
  if (legacy == nullptr) {
    legacy = new_stream(state().device);
    legacy->is_legacy = true;
  }
  return legacy;
}

// Ends the captures that a call has broken; false where there are none.
template <typename Breaks>
bool invalidate(Breaks breaks) {
  bool any = false;
  for (const auto& stream : state().streams) {
    if (stream->is_capturing && breaks(*stream)) {
      stream->graph.is_valid = false;
      any = true;
    }
  }
  return any;
}

// A legacy stream waits for the blocking streams, which may not be waited for while they capture.
inline bool waits_for_capture(const CUstream_st& stream, const CUstream_st& capturing) {
  return stream.is_legacy && capturing.is_blocking && capturing.device == stream.device;
}

// Which calls may be made beside a capture is little documented; a thread that has not asked for
// relaxed rules may make none.
inline cudaError_t may_call() {
  const bool broke =
      state().mode != cudaStreamCaptureModeRelaxed && invalidate([](auto&) { return true; });
  return broke ? cudaErrorStreamCaptureUnsupported : cudaSuccess;
}

inline cudaError_t may_call_on(cudaStream_t stream) {
  if (stream->device != state().device) {
    return cudaErrorInvalidResourceHandle;
  }
  if (invalidate([&](CUstream_st& other) { return waits_for_capture(*stream, other); })) {
    return cudaErrorStreamCaptureImplicit;
  }
  if (invalidate([&](CUstream_st& other) { return &other == stream; })) {
    return cudaErrorStreamCaptureUnsupported;
  }
  return may_call();
}

inline void run_one(CUstream_st& stream) {
  const Operation operation = std::move(stream.queue.front());
  stream.queue.pop_front();
  operation();
}

inline void run_all(CUstream_st& stream) {
  while (!stream.queue.empty()) {
    run_one(stream);
  }
}

inline Allocation& allocation(const void* memory) {
  const auto found = state().memory.find(memory);
  if (found == state().memory.end()) {
    violated("memory that is not allocated");
  }
  return found->second;
}

inline void give_back(const void* memory) {
  Allocation& given = allocation(memory);
  if (given.is_given_back) {
    violated("memory is given back twice");
  }
  given.is_given_back = true;
}

inline void free_now(void* memory) {
  std::memset(memory, 0xdd, allocation(memory).size);
  state().memory.erase(memory);
  std::free(memory);
}

// ---- For the test
// --------------------------------------------------------------------------------

inline cudaStream_t make_stream(unsigned flags = cudaStreamNonBlocking,
                                int device = state().device) {
  const cudaStream_t stream = new_stream(device);
  stream->is_blocking = (flags & cudaStreamNonBlocking) == 0;
  return stream;
}

// A launch that reads the table, or its node where the stream is being captured.
inline void launch(cudaStream_t stream, const void* table, Bytes expected) {
  stream = resolved(stream);
  if (invalidate([&](CUstream_st& other) { return waits_for_capture(*stream, other); })) {
    violated("a launch on a legacy stream beside the capture of a blocking one");
  }
  const int number = expected.empty() ? 0 : allocation(table).number;
  if (number != 0 && allocation(table).is_given_back) {
    violated("a launch over memory that was given back");
  }
  Operation read = [table, number, expected = std::move(expected)] {
    if (number == 0) {
      return;
    }
    if (std::memcmp(table, expected.data(), expected.size()) != 0) {
      violated("a launch reads other bytes than were uploaded");
    }
    if (allocation(table).number != number) {
      violated("a launch reads memory that was freed");
    }
  };
  if (stream->is_capturing) {
    stream->graph.nodes.push_back(std::move(read));
  } else {
    stream->queue.push_back(std::move(read));
  }
}

inline void begin_capture(cudaStream_t stream) {
  stream->is_capturing = true;
  stream->graph = {};
}
inline Graph end_capture(cudaStream_t stream) {
  stream->is_capturing = false;
  return std::move(stream->graph);
}
inline void replay(const Graph& graph, cudaStream_t stream) {
  stream = resolved(stream);
  stream->queue.insert(stream->queue.end(), graph.nodes.begin(), graph.nodes.end());
}

inline std::size_t pending(cudaStream_t stream) { return resolved(stream)->queue.size(); }
inline void drain(cudaStream_t stream) { run_all(*resolved(stream)); }
inline void drain_all() {
  for (const auto& stream : state().streams) {
    run_all(*stream);
  }
}

inline std::size_t allocated() { return state().memory.size(); }
inline int calls(const char* name) { return state().calls[name]; }

// The n-th call of `name` from here fails and does nothing; "*": every call, from now on.
inline void fail(const char* name, int n = 1) {
  state().failing = name;
  state().calls_until_failure = n;
}
inline bool still_to_fail() { return !state().failing.empty(); }
inline void fail_no_more() { state().failing.clear(); }

// Frees what was left over on purpose or by a failing runtime; how much that was.
inline std::size_t reclaim() {
  drain_all();
  const std::size_t count = allocated();
  while (!state().memory.empty()) {
    free_now(const_cast<void*>(state().memory.begin()->first));
  }
  return count;
}

}  // namespace fake_cuda

// ---- The runtime
// ---------------------------------------------------------------------------------

inline cudaError_t cudaGetLastError() { return std::exchange(fake_cuda::state().last_error, {}); }

inline const char* cudaGetErrorString(cudaError_t code) {
  return code == cudaErrorMemoryAllocation ? "out of memory" : "some error";
}

inline cudaError_t cudaGetDevice(int* device) {
  if (fake_cuda::fails("cudaGetDevice")) {
    return fake_cuda::result(cudaErrorLaunchFailure);
  }
  *device = fake_cuda::state().device;
  return cudaSuccess;
}

inline cudaError_t cudaSetDevice(int device) {
  if (fake_cuda::fails("cudaSetDevice")) {
    return fake_cuda::result(cudaErrorLaunchFailure);
  }
  fake_cuda::state().device = device;
  return cudaSuccess;
}

inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  if (fake_cuda::fails("cudaThreadExchangeStreamCaptureMode")) {
    return fake_cuda::result(cudaErrorLaunchFailure);
  }
  std::swap(*mode, fake_cuda::state().mode);
  return cudaSuccess;
}

inline cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  if (fake_cuda::fails("cudaStreamIsCapturing")) {
    return fake_cuda::result(cudaErrorLaunchFailure);
  }
  stream = fake_cuda::resolved(stream);
  for (const auto& other : fake_cuda::state().streams) {
    if (other->is_capturing && fake_cuda::waits_for_capture(*stream, *other)) {
      return fake_cuda::result(cudaErrorStreamCaptureImplicit);
    }
  }
  *status = !stream->is_capturing    ? cudaStreamCaptureStatusNone
            : stream->graph.is_valid ? cudaStreamCaptureStatusActive
                                     : cudaStreamCaptureStatusInvalidated;
  return cudaSuccess;
}

inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  cudaError_t code = fake_cuda::fails("cudaStreamCreateWithFlags") ? cudaErrorLaunchFailure
                                                                   : fake_cuda::may_call();
  if (code == cudaSuccess) {
    *stream = fake_cuda::make_stream(flags);
  }
  return fake_cuda::result(code);
}

inline cudaError_t cudaMallocAsync(void** memory, std::size_t size, cudaStream_t stream) {
  stream = fake_cuda::resolved(stream);
  cudaError_t code = fake_cuda::fails("cudaMallocAsync") ? cudaErrorMemoryAllocation
                                                         : fake_cuda::may_call_on(stream);
  if (code == cudaSuccess) {
    *memory = std::malloc(size);
    std::memset(*memory, 0xee, size);
    fake_cuda::State& state = fake_cuda::state();
    state.memory[*memory] = {++state.allocations, state.device, size, false};
  }
  return fake_cuda::result(code);
}

inline cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t size, cudaMemcpyKind,
                                   cudaStream_t stream) {
  stream = fake_cuda::resolved(stream);
  cudaError_t code =
      fake_cuda::fails("cudaMemcpyAsync") ? cudaErrorLaunchFailure : fake_cuda::may_call_on(stream);
  if (code == cudaSuccess) {
    if (fake_cuda::allocation(to).size < size) {
      fake_cuda::violated("a copy beyond its memory");
    }
    // Pageable memory is read before the call returns; it gets to the device later.
    const auto* bytes = static_cast<const unsigned char*>(from);
    stream->queue.push_back([to, staged = fake_cuda::Bytes(bytes, bytes + size)] {
      std::memcpy(to, staged.data(), staged.size());
    });
  }
  return fake_cuda::result(code);
}

inline cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  stream = fake_cuda::resolved(stream);
  cudaError_t code = fake_cuda::fails("cudaStreamSynchronize") ? cudaErrorLaunchFailure
                                                               : fake_cuda::may_call_on(stream);
  if (code == cudaSuccess) {
    fake_cuda::run_all(*stream);
  }
  return fake_cuda::result(code);
}

inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  cudaError_t code = fake_cuda::fails("cudaEventCreateWithFlags") ? cudaErrorMemoryAllocation
                                                                  : fake_cuda::may_call();
  if (code == cudaSuccess) {
    *event = new CUevent_st();
    ++fake_cuda::state().events;
  }
  return fake_cuda::result(code);
}

inline cudaError_t cudaEventDestroy(cudaEvent_t event) {
  --fake_cuda::state().events;
  delete event;  // who waits for it has its own hold on what it waits for
  return cudaSuccess;
}

// On a stream that is being captured it would be recorded, and draw who waits into the capture.
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  stream = fake_cuda::resolved(stream);
  cudaError_t code =
      fake_cuda::fails("cudaEventRecord") ? cudaErrorLaunchFailure : fake_cuda::may_call_on(stream);
  if (code == cudaSuccess) {
    event->stream = stream;
    event->is_reached = std::make_shared<bool>(false);
    stream->queue.push_back([reached = event->is_reached] { *reached = true; });
  }
  return fake_cuda::result(code);
}

inline cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  stream = fake_cuda::resolved(stream);
  cudaError_t code = fake_cuda::fails("cudaStreamWaitEvent") ? cudaErrorLaunchFailure
                                                             : fake_cuda::may_call_on(stream);
  if (code == cudaSuccess && event->stream != nullptr) {
    stream->queue.push_back([earlier = event->stream, reached = event->is_reached] {
      while (!*reached) {
        fake_cuda::run_one(*earlier);
      }
    });
  }
  return fake_cuda::result(code);
}

inline cudaError_t cudaFreeAsync(void* memory, cudaStream_t stream) {
  stream = fake_cuda::resolved(stream);
  cudaError_t code =
      fake_cuda::fails("cudaFreeAsync") ? cudaErrorLaunchFailure : fake_cuda::may_call_on(stream);
  if (code == cudaSuccess && fake_cuda::allocation(memory).device != stream->device) {
    code = cudaErrorInvalidValue;
  }
  if (code == cudaSuccess) {
    fake_cuda::give_back(memory);
    stream->queue.push_back([memory] { fake_cuda::free_now(memory); });
  }
  return fake_cuda::result(code);
}
