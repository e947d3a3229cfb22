// The CUDA side: devices, the table in device memory, the launch. No CUDA header is needed to
// include this, so that the rest of the library compiles without the toolkit.
#pragma once

#include <cstdint>
#include <memory>
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

// A chunk table in one device's memory, and the launches over it, on any stream. The caller's
// current device is left as it was.
//
// A launch that is captured into a CUDA graph refers to the table, which then stays for good.
class DeviceTable {
 public:
  explicit DeviceTable(int device);
  ~DeviceTable();
  DeviceTable(const DeviceTable&) = delete;
  DeviceTable& operator=(const DeviceTable&) = delete;

  // How many blocks fill the device.
  std::int64_t blocks() const;

  // Replaces the table, waiting for no launch. Launches under way keep the old one.
  void upload(const ChunkTable& table);

  // How many parts an average's distance should have: one for each thread of a launch.
  std::int64_t partials() const;

  // One kernel launch. `weights` (one a pair, in host memory) is copied before this returns; empty:
  // launch.weight counts. Of an average with `partials` the distance is measured too; their count
  // is one that partials() told since the last upload or before it.
  void run(const Launch& launch, const std::vector<double>& weights, const Partials& partials,
           void* stream);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace ema_fused::cuda
