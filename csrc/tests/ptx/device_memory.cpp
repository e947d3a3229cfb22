#include "device_memory.h"

#include <algorithm>

namespace ema_fused::testing::ptx {
namespace {

constexpr std::size_t kGap = 64;

}  // namespace

std::uint8_t* DeviceMemory::allocate(std::size_t bytes, std::size_t shift, Rights rights) {
  const std::size_t begin = (used_ + 2 * kGap - 1) / kGap * kGap + shift;
  if (begin + bytes + kGap > size_) {
    throw Fault("the tests ask for more device memory than their " + std::to_string(size_) +
                " bytes");
  }
  std::fill_n(states_.begin() + static_cast<std::ptrdiff_t>(begin), bytes,
              static_cast<u16>(rights));
  used_ = begin + bytes;
  return memory_.get() + begin;
}

void DeviceMemory::clear() {
  std::fill_n(states_.begin(), used_, kNothing);
  std::memset(memory_.get(), 0xa5, used_);
  used_ = 0;
}

void DeviceMemory::forget_threads() {
  for (std::size_t i = 0; i < used_; ++i) {
    states_[i] = std::min(states_[i], static_cast<u16>(Rights::kReadAndWrite));
  }
}

std::string DeviceMemory::why_not(u64 address, std::size_t bytes, bool stores, u16 thread) const {
  const std::string access = std::string(stores ? "stores " : "loads ") + std::to_string(bytes) +
                             " bytes, thread " + std::to_string(thread) + ": ";
  if (address % bytes != 0) {
    return access + "the address is no multiple of that";
  }
  const u64 offset = address - reinterpret_cast<u64>(memory_.get());
  for (u64 i = offset; i < offset + bytes; ++i) {
    const u16 state = i < size_ ? states_[i] : kNothing;
    if (state == kNothing) {
      return access + "outside of all tensors";
    }
    if (stores && state == static_cast<u16>(Rights::kRead)) {
      return access + "memory that may only be read";
    }
    if (state >= kFirstOwner && state != thread + kFirstOwner) {
      return access + "a byte that thread " + std::to_string(state - kFirstOwner) +
             " has touched, in memory that is written";
    }
  }
  return access + "permitted";
}

}  // namespace ema_fused::testing::ptx
