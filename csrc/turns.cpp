#include "turns.h"

#include <pthread.h>

#include <new>
#include <stdexcept>

namespace ema_fused {
namespace {

// How many forks lie between the first process and this one.
unsigned process() {
  static std::atomic<unsigned> forks{0};
  static const int registered = pthread_atfork(nullptr, nullptr, [] { ++forks; });
  static_cast<void>(registered);
  return forks;
}

}  // namespace

Turn::Turn(Turns& turns, bool& interrupted) : turns_(turns) {
  const std::thread::id self = std::this_thread::get_id();
  const unsigned here = process();
  if (turns.holder_.load() == self) {
    throw std::runtime_error(
        "the plan is used by code that runs while it looks at its tensors, in the same thread; use "
        "it when that call has returned");
  }
  if (!turns.mutex_.try_lock()) {
    if (turns.process_ != here) {
      // Nobody is left to unlock it, nor another thread that could want it.
      new (&turns.mutex_) std::mutex();
      turns.mutex_.lock();
      interrupted = true;
    } else {
      const WithoutGil others_run;
      turns.mutex_.lock();
    }
  }
  turns.holder_ = self;
  turns.process_ = here;
}

Turn::~Turn() {
  turns_.holder_ = std::thread::id();
  turns_.mutex_.unlock();
}

}  // namespace ema_fused
