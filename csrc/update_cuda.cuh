// The CUDA side: devices, the table in device memory, the launch. No CUDA header is needed to
// include this, so that the rest of the library compiles without the toolkit.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "chunk_table.h"

namespace ema_fused::cuda {

// A CUDA call that failed: what was tried, and the runtime's own text and code.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct DeviceReport {
  int count = 0;
  std::string why_none;  // the runtime's reason where count is 0
};
DeviceReport devices();

// Empty where the kernels run on this device, else the reason (no code for its architecture, ...).
std::string why_not_on(int device);

// A chunk table in one device's memory, and the launches over it. Calls are ordered on the streams
// they are given; the caller's current device is left as it was.
class DeviceTable {
 public:
  explicit DeviceTable(int device);
  ~DeviceTable();
  DeviceTable(const DeviceTable&) = delete;
  DeviceTable& operator=(const DeviceTable&) = delete;

  // Replaces the table. Launches still in flight keep the old one until they are done.
  void upload(const std::vector<Chunk>& chunks, void* stream);

  // One kernel launch. `weights` (one a pair, in host memory) is copied before this returns; empty:
  // launch.weight serves all.
  void run(const Launch& launch, const std::vector<double>& weights, void* stream);

 private:
  int device_;
  int blocks_;  // that fill the device
  Chunk* chunks_ = nullptr;
  std::int64_t capacity_ = 0;
  std::int64_t count_ = 0;
  void* upload_stream_ = nullptr;
  bool ordered_everywhere_ = true;  // no stream can see the table half-copied
  bool used_on_other_streams_ = false;
};

}  // namespace ema_fused::cuda
