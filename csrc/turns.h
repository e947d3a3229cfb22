// One thread at a time uses a plan. Python's lock (the GIL) doesn't see to that: it is given up for
// the launch on a CPU, and free-threaded builds of Python have none.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>

#include "python_refs.h"

namespace ema_fused {

class Turns {
 private:
  friend class Turn;
  void renew(unsigned process, bool& interrupted);

  std::mutex mutex_;
  std::atomic<std::uint64_t> holder_{0};  // a thread's number; 0: none
  std::atomic<unsigned> process_{0};      // in which it is used, counted by forks
};

// Holds `turns` while it lives; other threads wait, without the GIL. Throws std::runtime_error
// where this thread holds them already: torch calls Python code while a tensor is looked at (a
// torch function mode, a finalizer), and that must not use the plan in the middle.
class Turn {
 public:
  // `interrupted` becomes true where the last holder was a thread that this process, a fork,
  // doesn't have: it left off wherever it was.
  Turn(Turns& turns, bool& interrupted);
  ~Turn();
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;

 private:
  Turns& turns_;
};

}  // namespace ema_fused
