// Memory as a kernel sees it: every byte has rights. What is written belongs to one thread alone,
// so that the result can't depend on the order in which threads run.
#pragma once

#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "kernel.h"

namespace ema_fused::testing::ptx {

enum class Rights : u16 { kRead = 1, kReadAndWrite = 2 };

// One block of addresses with tensors in it, and bytes between them that nobody may touch.
class DeviceMemory {
 public:
  explicit DeviceMemory(std::size_t bytes)
      : memory_(static_cast<std::uint8_t*>(std::aligned_alloc(kAlignment, bytes))),
        size_(bytes),
        states_(bytes, kNothing) {
    std::memset(memory_.get(), 0xa5, bytes);
  }

  // Gives out `bytes`, `shift` bytes behind an address that is a multiple of 64.
  std::uint8_t* allocate(std::size_t bytes, std::size_t shift, Rights rights);
  // A copy of a thing that kernels read.
  template <typename T>
  const T* hold(const T* things, std::size_t count) {
    std::uint8_t* const there = allocate(count * sizeof(T), 0, Rights::kRead);
    std::memcpy(there, things, count * sizeof(T));
    return reinterpret_cast<const T*>(there);
  }
  // Takes back all that was given out.
  void clear();

  // Another launch: what threads have touched is everybody's again.
  void forget_threads();

  const std::uint8_t* data() const { return memory_.get(); }
  std::uint8_t* data() { return memory_.get(); }
  std::size_t used() const { return used_; }
  std::size_t size() const { return size_; }

  // Where thread `thread` may load or store kElements of Element; null: it may not (see why_not).
  template <typename Element, int kElements, bool kStores>
  std::uint8_t* at(u64 address, u16 thread) {
    constexpr std::size_t kBytes = sizeof(Element) * kElements;
    const u64 offset = address - reinterpret_cast<u64>(memory_.get());
    if (offset >= size_ || address % kBytes != 0) {
      return nullptr;
    }
    u16* const states = states_.data() + offset;
    const auto owned = static_cast<u16>(thread + kFirstOwner);
    const bool may = all_are<kBytes>(states, owned) ||
                     (!kStores && all_are<kBytes>(states, static_cast<u16>(Rights::kRead))) ||
                     take<kBytes, kStores>(states, owned);
    return may ? memory_.get() + offset : nullptr;
  }
  bool is_given_out(u64 address) const {
    const u64 offset = address - reinterpret_cast<u64>(memory_.get());
    return offset < size_ && states_[offset] != kNothing;
  }
  std::string why_not(u64 address, std::size_t bytes, bool stores, u16 thread) const;

  // Threads of one launch.
  static constexpr u32 kMostThreads = 65532;

 private:
  static constexpr std::size_t kAlignment = 4096;
  static constexpr u16 kNothing = 0;
  static constexpr u16 kFirstOwner = 3;

  template <std::size_t kBytes>
  static bool all_are(const u16* states, u16 state) {
    u16 difference = 0;
    for (std::size_t i = 0; i < kBytes; ++i) {
      difference |= states[i] ^ state;
    }
    return difference == 0;
  }

  template <std::size_t kBytes, bool kStores>
  static bool take(u16* states, u16 owned) {
    for (std::size_t i = 0; i < kBytes; ++i) {
      const bool is_read = !kStores && states[i] == static_cast<u16>(Rights::kRead);
      if (states[i] == static_cast<u16>(Rights::kReadAndWrite)) {
        states[i] = owned;
      } else if (states[i] != owned && !is_read) {
        return false;
      }
    }
    return true;
  }

  struct Free {
    void operator()(std::uint8_t* memory) const { std::free(memory); }
  };
  std::unique_ptr<std::uint8_t, Free> memory_;
  std::size_t size_;
  std::size_t used_ = 0;
  // Of each byte: 0, its rights, or the thread that has touched it.
  std::vector<u16> states_;
};

}  // namespace ema_fused::testing::ptx
