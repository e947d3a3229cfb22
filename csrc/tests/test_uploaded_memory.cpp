// What is kept, waited for and given back, on the host: the code of uploaded_memory.cu over a fake
// runtime that runs what streams hold as late as it may and ends the program where memory is read
// after it was freed, freed twice or not what was uploaded.
#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "../uploaded_memory.cu"
#include "check.h"

using namespace ema_fused::cuda;
using fake_cuda::Bytes;

namespace {

// Other bytes in every table.
Bytes table(int number, std::size_t size = 64) {
  return Bytes(size, static_cast<unsigned char>(1 + number % 200));
}

void upload(UploadedMemory& memory, Bytes bytes) {
  memory.upload(bytes.data(), bytes.size());
  std::fill(bytes.begin(), bytes.end(), 0);  // the host reuses its own
}

void launch(UploadedMemory& memory, cudaStream_t stream, const Bytes& expected) {
  fake_cuda::launch(stream, memory.use_on(stream), expected);
}

// What upload() throws, or nothing.
std::string error_of_upload(UploadedMemory& memory, const Bytes& bytes) {
  try {
    upload(memory, bytes);
  } catch (const Error& error) {
    return error.what();
  }
  return {};
}

// As the caller left it.
bool is_restored(int device) {
  return fake_cuda::state().device == device &&
         fake_cuda::state().mode == cudaStreamCaptureModeGlobal;
}

// The end of every check: nothing is left, and every stream still runs.
void check_nothing_left(int device = 0) {
  fake_cuda::drain_all();
  CHECK(fake_cuda::allocated() == 0 && fake_cuda::state().events == 0);
  CHECK(is_restored(device));
  CHECK(!fake_cuda::still_to_fail());
  cudaGetLastError();
}

void check_use() {
  {
    const cudaStream_t stream = fake_cuda::make_stream();
    UploadedMemory memory(0);
    for (const std::size_t size : {1, 64, 100000}) {
      upload(memory, table(1, size));
      launch(memory, stream, table(1, size));
      launch(memory, stream, table(1, size));
      fake_cuda::drain(stream);
    }
    for (const auto& made : fake_cuda::state().streams) {
      CHECK(!made->is_blocking);  // uploads would wait for the default stream
    }
  }
  check_nothing_left();
}

void check_empty() {
  {
    const cudaStream_t stream = fake_cuda::make_stream();
    UploadedMemory memory(0);
    CHECK(memory.use_on(stream) == nullptr);
    memory.upload(nullptr, 0);
    CHECK(memory.use_on(stream) == nullptr);
    CHECK(fake_cuda::allocated() == 0);
    upload(memory, table(1));
    launch(memory, stream, table(1));
    memory.upload(nullptr, 0);
    CHECK(memory.use_on(stream) == nullptr);
    fake_cuda::drain_all();
    CHECK(fake_cuda::allocated() == 0);
    upload(memory, table(2));
    launch(memory, stream, table(2));
  }
  check_nothing_left();
}

// Neither waits for the stream nor keeps what it has done with.
void check_replaced_on_one_stream() {
  for (const cudaStream_t stream : {fake_cuda::make_stream(), cudaStream_t{nullptr}}) {
    {
      UploadedMemory memory(0);
      for (int number = 0; number < 5; ++number) {
        upload(memory, table(number));
        launch(memory, stream, table(number));
        launch(memory, stream, table(number));
      }
      CHECK(fake_cuda::pending(stream) >= 10);
      CHECK(fake_cuda::allocated() == 5);
      fake_cuda::drain_all();
      CHECK(fake_cuda::allocated() == 1);
      launch(memory, stream, table(4));
    }
    CHECK(fake_cuda::pending(stream) >= 1);
    check_nothing_left();
  }
}

void check_replaced_on_several_streams() {
  const cudaStream_t first = fake_cuda::make_stream();
  const cudaStream_t second = fake_cuda::make_stream();
  const std::vector<std::vector<cudaStream_t>> uses{{first, second},
                                                    {first, second, first},
                                                    {nullptr, first},
                                                    {first, nullptr},
                                                    {second, first, nullptr}};
  for (const std::vector<cudaStream_t>& streams : uses) {
    for (const bool destroyed : {false, true}) {
      for (const cudaStream_t early : streams) {
        auto memory = std::make_unique<UploadedMemory>(0);
        upload(*memory, table(1));
        for (const cudaStream_t stream : streams) {
          launch(*memory, stream, table(1));
        }
        if (destroyed) {
          memory.reset();
        } else {
          upload(*memory, table(2));
          launch(*memory, first, table(2));
          upload(*memory, table(3));
        }
        for (const cudaStream_t stream : streams) {
          CHECK(fake_cuda::pending(stream) >= 1);
        }
        CHECK(fake_cuda::allocated() == (destroyed ? 1 : 3));
        fake_cuda::drain(early);
        fake_cuda::drain_all();
        CHECK(fake_cuda::allocated() == (destroyed ? 0 : 1));
        memory.reset();
        check_nothing_left();
      }
    }
  }
}

// What a graph reads stays for ever, also behind the object; what only others read does not.
void check_captured() {
  const cudaStream_t stream = fake_cuda::make_stream();
  const cudaStream_t other = fake_cuda::make_stream();
  std::vector<fake_cuda::Graph> graphs;
  {
    UploadedMemory memory(0);
    upload(memory, table(0));
    for (int number = 0; number < 3; ++number) {
      // Launches before and after that are not captured don't make the table theirs alone.
      launch(memory, other, table(number));
      fake_cuda::begin_capture(stream);
      launch(memory, stream, table(number));
      graphs.push_back(fake_cuda::end_capture(stream));
      CHECK(graphs.back().is_valid && graphs.back().nodes.size() == 1);
      launch(memory, number == 1 ? stream : other, table(number));
      if (number == 2) {
        break;  // captured to the end
      }
      upload(memory, table(number + 10));
      launch(memory, stream, table(number + 10));
      upload(memory, table(number + 1));
      upload(memory, table(number + 1));  // the one before was never used
      for (const fake_cuda::Graph& graph : graphs) {
        fake_cuda::replay(graph, other);
      }
      fake_cuda::drain_all();
      CHECK(fake_cuda::allocated() == graphs.size() + 1);
    }
  }
  for (const fake_cuda::Graph& graph : graphs) {
    fake_cuda::replay(graph, other);
    fake_cuda::replay(graph, stream);
  }
  CHECK(fake_cuda::reclaim() == 3);
  check_nothing_left();
}

// From the first upload to a device on: its streams are made then.
void check_upload_beside_capture(int device) {
  fake_cuda::state().device = device;
  for (const unsigned flags : {cudaStreamNonBlocking, cudaStreamDefault}) {
    const cudaStream_t stream = fake_cuda::make_stream(flags);
    const cudaStream_t other = fake_cuda::make_stream();
    {
      UploadedMemory memory(device);
      fake_cuda::begin_capture(stream);
      upload(memory, table(1));
      launch(memory, stream, table(1));
      upload(memory, table(2));
      launch(memory, other, table(2));
      upload(memory, table(3));
      fake_cuda::drain_all();
      CHECK(fake_cuda::allocated() == 2);
      launch(memory, stream, table(3));
      const fake_cuda::Graph graph = fake_cuda::end_capture(stream);
      CHECK(graph.is_valid && graph.nodes.size() == 2);
      upload(memory, table(4));
      fake_cuda::replay(graph, other);
    }
    CHECK(fake_cuda::reclaim() == 2);
    check_nothing_left(device);
  }
  fake_cuda::state().device = 0;
}

// Tables that the capture has no part in go as ever, used or not, and it is not broken.
void check_released_beside_capture() {
  const cudaStream_t first = fake_cuda::make_stream();
  const cudaStream_t second = fake_cuda::make_stream();
  for (const unsigned flags : {cudaStreamNonBlocking, cudaStreamDefault}) {
    const cudaStream_t captured = fake_cuda::make_stream(flags);
    {
      UploadedMemory memory(0);
      upload(memory, table(1));
      launch(memory, first, table(1));
      launch(memory, second, table(1));
      fake_cuda::begin_capture(captured);
      upload(memory, table(2));
      upload(memory, table(3));
      launch(memory, first, table(3));
    }
    const fake_cuda::Graph graph = fake_cuda::end_capture(captured);
    CHECK(graph.is_valid && graph.nodes.empty());
    check_nothing_left();
  }
}

// A stream that was used before somebody captures it can't say when it is done with the table: that
// stays, and the capture is not broken.
void check_stream_captured_later() {
  const cudaStream_t stream = fake_cuda::make_stream();
  const cudaStream_t other = fake_cuda::make_stream();
  const cudaStream_t blocking = fake_cuda::make_stream(cudaStreamDefault);
  for (const cudaStream_t used : {stream, cudaStream_t{nullptr}}) {
    for (const bool destroyed : {false, true}) {
      auto memory = std::make_unique<UploadedMemory>(0);
      upload(*memory, table(1));
      launch(*memory, used, table(1));
      launch(*memory, other, table(1));
      // The default stream can't be captured; it can't be used either beside a blocking capture.
      const cudaStream_t captured = used == nullptr ? blocking : used;
      fake_cuda::begin_capture(captured);
      if (destroyed) {
        memory.reset();
      } else {
        upload(*memory, table(2));
      }
      const fake_cuda::Graph graph = fake_cuda::end_capture(captured);
      CHECK(graph.is_valid && graph.nodes.empty());
      CHECK(cudaGetLastError() == cudaSuccess);
      memory.reset();
      CHECK(fake_cuda::reclaim() == 1);
      check_nothing_left();
    }
  }
}

void check_failing_upload() {
  struct Failure {
    const char* call;
    const char* text;
  };
  const std::array<Failure, 4> failures{{
      {"cudaStreamCreateWithFlags", "making a stream for uploads: some error (CUDA error 719)"},
      {"cudaMallocAsync", "allocating a chunk table: out of memory (CUDA error 2)"},
      {"cudaMemcpyAsync", "copying a chunk table: some error (CUDA error 719)"},
      {"cudaStreamSynchronize", "copying a chunk table: some error (CUDA error 719)"},
  }};
  for (const Failure& failure : failures) {
    const bool is_first = &failure == failures.data();
    const int device = 5;
    const cudaStream_t stream = fake_cuda::make_stream(cudaStreamNonBlocking, device);
    {
      UploadedMemory memory(device);
      if (!is_first) {
        upload(memory, table(1));
        launch(memory, stream, table(1));
      }
      fake_cuda::fail(failure.call);
      CHECK(error_of_upload(memory, table(2)) == failure.text);
      CHECK(is_restored(0) && cudaGetLastError() == cudaSuccess);
      fake_cuda::drain_all();
      CHECK(fake_cuda::allocated() == (is_first ? 0 : 1));
      if (!is_first) {
        launch(memory, stream, table(1));
      }
      upload(memory, table(3));
      launch(memory, stream, table(3));
    }
    check_nothing_left();
  }
}

// A table that can't be given back behind its launches stays, and nobody else hears of it.
void check_failing_release() {
  const cudaStream_t first = fake_cuda::make_stream();
  const cudaStream_t second = fake_cuda::make_stream();
  for (const bool destroyed : {false, true}) {
    for (const char* call : {"cudaStreamIsCapturing", "cudaEventCreateWithFlags", "cudaEventRecord",
                             "cudaStreamWaitEvent", "cudaFreeAsync"}) {
      for (const int n : {1, 2}) {
        if (n == 2 && std::string(call) == "cudaFreeAsync") {
          continue;  // called once
        }
        auto memory = std::make_unique<UploadedMemory>(0);
        upload(*memory, table(1));
        launch(*memory, first, table(1));
        launch(*memory, second, table(1));
        fake_cuda::fail(call, n);
        if (destroyed) {
          memory.reset();
        } else {
          upload(*memory, table(2));
          launch(*memory, first, table(2));
        }
        CHECK(cudaGetLastError() == cudaSuccess);
        memory.reset();
        CHECK(fake_cuda::reclaim() == 1);
        check_nothing_left();
      }
    }
  }
}

void check_destructor() {
  // Nothing to give back: the runtime is left alone.
  fake_cuda::fail("*");
  const auto calls = fake_cuda::state().calls;
  {
    UploadedMemory memory(0);
  }
  CHECK(fake_cuda::state().calls == calls);
  fake_cuda::fail_no_more();

  // A runtime that is gone: no way to free, and nobody to tell.
  for (const int device : {0, 1}) {
    const cudaStream_t stream = fake_cuda::make_stream(cudaStreamNonBlocking, device);
    for (const char* call : {"*", "cudaGetDevice"}) {
      {
        UploadedMemory memory(device);
        upload(memory, table(1));
        launch(memory, stream, table(1));
        upload(memory, table(2));
        launch(memory, stream, table(2));
        fake_cuda::fail(call);
      }
      fake_cuda::fail_no_more();
      CHECK(is_restored(0));
      CHECK(cudaGetLastError() == cudaSuccess);
      CHECK(fake_cuda::reclaim() == 1);
      check_nothing_left();
    }
  }
}

void check_devices() {
  const cudaStream_t streams[2] = {fake_cuda::make_stream(cudaStreamNonBlocking, 0),
                                   fake_cuda::make_stream(cudaStreamNonBlocking, 1)};
  for (const int current : {0, 1, 2}) {
    fake_cuda::state().device = current;
    {
      UploadedMemory memories[2]{UploadedMemory(0), UploadedMemory(1)};
      for (int number = 0; number < 3; ++number) {
        for (const int device : {0, 1}) {
          upload(memories[device], table(2 * number + device));
          CHECK(is_restored(current));
          launch(memories[device], streams[device], table(2 * number + device));
        }
      }
      for (const auto& [address, allocation] : fake_cuda::state().memory) {
        CHECK(allocation.device == (static_cast<const unsigned char*>(address)[0] - 1) % 2);
      }
      const cudaStream_t second = fake_cuda::make_stream(cudaStreamNonBlocking, 1);
      launch(memories[1], second, table(5));
      upload(memories[1], table(7));
      for (const char* call : {"cudaGetDevice", "cudaSetDevice", "cudaMallocAsync"}) {
        if (current == 1 && std::string(call) == "cudaSetDevice") {
          continue;  // not called
        }
        fake_cuda::fail(call);
        CHECK(!error_of_upload(memories[1], table(9)).empty());
        CHECK(is_restored(current));
      }
      launch(memories[1], second, table(7));
    }
    check_nothing_left(current);
  }
  fake_cuda::state().device = 0;

  const int calls = fake_cuda::calls("cudaSetDevice");
  {
    const DeviceGuard guard(0);
  }
  CHECK(fake_cuda::calls("cudaSetDevice") == calls);
  {
    const DeviceGuard guard(3);
    CHECK(fake_cuda::state().device == 3);
  }
  CHECK(fake_cuda::state().device == 0);
}

// Every call of a short life fails in turn. An upload then works or throws; the table that counts
// has its bytes, captured ones have theirs, and no more is left than one failure can leave.
void check_every_failure() {
  int device = 100;  // a new one each time, so that its upload stream is made anew
  for (const std::string call :
       {"cudaGetDevice", "cudaSetDevice", "cudaThreadExchangeStreamCaptureMode",
        "cudaStreamCreateWithFlags", "cudaStreamIsCapturing", "cudaMallocAsync", "cudaMemcpyAsync",
        "cudaStreamSynchronize", "cudaFreeAsync", "cudaEventCreateWithFlags", "cudaEventRecord",
        "cudaStreamWaitEvent"}) {
    const bool restores = call == "cudaSetDevice" || call == "cudaThreadExchangeStreamCaptureMode";
    const bool fails_uploads = call == "cudaStreamCreateWithFlags" || call == "cudaMallocAsync" ||
                               call == "cudaMemcpyAsync" || call == "cudaStreamSynchronize";
    for (int n = 1;; ++n) {
      ++device;
      const cudaStream_t first = fake_cuda::make_stream(cudaStreamNonBlocking, device);
      const cudaStream_t second = fake_cuda::make_stream(cudaStreamNonBlocking, device);
      auto memory = std::make_unique<UploadedMemory>(device);
      Bytes current;
      std::set<const void*> captured;
      fake_cuda::fail(call.c_str(), n);
      const auto check_restored = [&] {
        CHECK(is_restored(0) || (restores && !fake_cuda::still_to_fail()));
        fake_cuda::state().device = 0;
        fake_cuda::state().mode = cudaStreamCaptureModeGlobal;
      };
      const auto replace = [&](int number) {
        const bool failed = !error_of_upload(*memory, table(number)).empty();
        CHECK(!failed || !fake_cuda::still_to_fail());
        current = failed ? current : table(number);
        check_restored();
      };
      replace(1);
      launch(*memory, first, current);
      replace(2);
      launch(*memory, first, current);
      launch(*memory, second, current);
      replace(3);
      fake_cuda::begin_capture(second);
      launch(*memory, second, current);
      captured.insert(memory->use_on(second));
      replace(4);
      launch(*memory, second, current);
      captured.insert(memory->use_on(second));
      const fake_cuda::Graph graph = fake_cuda::end_capture(second);
      CHECK(graph.is_valid || call == "cudaThreadExchangeStreamCaptureMode");
      launch(*memory, first, current);
      replace(5);
      launch(*memory, first, current);
      launch(*memory, second, current);
      memory.reset();
      check_restored();
      fake_cuda::replay(graph, first);
      const bool failed = !fake_cuda::still_to_fail();
      const std::size_t left = fake_cuda::reclaim();
      CHECK(left == captured.size() || (left == captured.size() + 1 && failed && !fails_uploads));
      fake_cuda::fail_no_more();
      check_nothing_left();
      if (!failed) {
        CHECK(n > 1);  // it is called at all
        break;
      }
    }
  }
}

// Anything, in any order, on streams of every kind; exactly what a graph may read is left.
void check_random_lives() {
  for (std::uint64_t seed = 0; seed < 2000; ++seed) {
    Random random(seed);
    const cudaStream_t blocking = fake_cuda::make_stream(cudaStreamDefault);
    const std::array<cudaStream_t, 4> streams{nullptr, fake_cuda::make_stream(),
                                              fake_cuda::make_stream(), blocking};
    auto memory = std::make_unique<UploadedMemory>(0);
    std::vector<fake_cuda::Graph> graphs;
    std::size_t kept = 0;
    cudaStream_t captured = nullptr;
    Bytes current;
    std::set<cudaStream_t> readers;
    bool was_captured = false;
    const auto release = [&] {
      const bool is_captured = readers.count(captured) != 0 && captured != nullptr;
      const bool is_unusable = readers.count(nullptr) != 0 && captured == blocking;
      kept += !current.empty() && (was_captured || is_captured || is_unusable);
      was_captured = false;
      readers.clear();
    };
    const auto end_capture = [&] {
      graphs.push_back(fake_cuda::end_capture(captured));
      CHECK(graphs.back().is_valid);
      captured = nullptr;
    };
    for (int step = 0; step < 60; ++step) {
      cudaStream_t stream = streams[random.below(streams.size())];
      if (captured == blocking && stream == nullptr) {
        stream = streams[1];  // nobody may use the default stream now
      }
      switch (random.below(6)) {
        case 0: {
          const Bytes bytes = table(step, random.below(4) * 16);
          const std::array<const char*, 4> calls{"cudaMallocAsync", "cudaMemcpyAsync",
                                                 "cudaStreamSynchronize", "cudaGetDevice"};
          if (!bytes.empty() && random.below(4) == 0) {
            fake_cuda::fail(calls[random.below(calls.size())]);
            CHECK(!error_of_upload(*memory, bytes).empty());
          } else {
            release();
            upload(*memory, bytes);
            current = bytes;
          }
          CHECK(is_restored(0));
          break;
        }
        case 1:
        case 2:
          launch(*memory, stream, current);
          readers.insert(stream);
          was_captured = was_captured || (stream == captured && captured != nullptr);
          break;
        case 3:
          fake_cuda::drain(stream);
          break;
        case 4:
          if (captured != nullptr) {
            end_capture();
          } else if (stream != nullptr) {
            fake_cuda::begin_capture(stream);
            captured = stream;
          }
          break;
        case 5:
          if (!graphs.empty() && stream != captured) {
            fake_cuda::replay(graphs[random.below(graphs.size())], stream);
          }
          break;
      }
    }
    release();
    memory.reset();
    if (captured != nullptr) {
      end_capture();
    }
    for (const fake_cuda::Graph& graph : graphs) {
      fake_cuda::replay(graph, streams[1]);
    }
    fake_cuda::drain(streams[random.below(streams.size())]);
    CHECK(fake_cuda::reclaim() == kept);
    check_nothing_left();
  }
}

}  // namespace

int main() {
  check_use();
  check_empty();
  check_replaced_on_one_stream();
  check_replaced_on_several_streams();
  check_captured();
  check_upload_beside_capture(4);
  check_released_beside_capture();
  check_stream_captured_later();
  check_failing_upload();
  check_failing_release();
  check_destructor();
  check_devices();
  check_every_failure();
  check_random_lives();
  return 0;
}
