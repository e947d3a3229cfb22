#include "turns.h"

#include <pthread.h>

#include <new>
#include <stdexcept>

namespace ema_fused {
namespace {

// Held while turns are renewed, and by every fork: the child finds it in order.
std::mutex& renewal() {
  static std::mutex* instance = new std::mutex();
  return *instance;
}

// How many forks lie between the first process and this one.
unsigned process() {
  static std::atomic<unsigned> forks{0};
  static const int registered = pthread_atfork([] { renewal().lock(); }, [] { renewal().unlock(); },
                                               [] {
                                                 ++forks;
                                                 renewal().unlock();
                                               });
  static_cast<void>(registered);
  return forks;
}

// Not the system's number of a thread: in a fork, new threads get those of the threads that it
// doesn't have.
std::uint64_t this_thread() {
  static std::atomic<std::uint64_t> last{0};
  thread_local const std::uint64_t number = ++last;
  return number;
}

}  // namespace

// The first use in a fork. No other thread of this process can hold the turns before it.
void Turns::renew(unsigned process, bool& interrupted) {
  const std::lock_guard<std::mutex> lock(renewal());
  if (process_ == process) {
    return;
  }
  if (mutex_.try_lock()) {
    mutex_.unlock();
  } else {
    // Nobody is left to unlock it.
    new (&mutex_) std::mutex();
    holder_ = 0;
    interrupted = true;
  }
  process_ = process;
}

Turn::Turn(Turns& turns, bool& interrupted) : turns_(turns) {
  const std::uint64_t self = this_thread();
  if (turns.holder_ == self) {
    throw std::runtime_error(
        "the plan is used by code that runs while it looks at its tensors, in the same thread; use "
        "it when that call has returned");
  }
  const unsigned here = process();
  if (turns.process_ != here) {
    turns.renew(here, interrupted);
  }
  if (!turns.mutex_.try_lock()) {
    const WithoutGil others_run;
    turns.mutex_.lock();
  }
  turns.holder_ = self;
}

Turn::~Turn() {
  turns_.holder_ = 0;
  turns_.mutex_.unlock();
}

}  // namespace ema_fused
