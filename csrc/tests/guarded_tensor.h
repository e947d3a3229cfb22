// A tensor of any type and alignment, with random elements, in memory whose every other byte is
// watched.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "../dtypes.h"
#include "check.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) static_cast<void>(0)
#define ASAN_UNPOISON_MEMORY_REGION(address, size) static_cast<void>(0)
#endif

namespace ema_fused::testing {

constexpr std::uint8_t kPoison = 0xa5;
constexpr std::size_t kGuard = 64;  // bytes on either side of every tensor

inline double element_at(const std::uint8_t* data, DType dtype, std::int64_t i) {
  switch (dtype) {
    case DType::kFloat64:
      return reinterpret_cast<const double*>(data)[i];
    case DType::kFloat32:
      return reinterpret_cast<const float*>(data)[i];
    case DType::kBFloat16:
      return widen(reinterpret_cast<const BFloat16*>(data)[i]);
    case DType::kFloat16:
      return widen(reinterpret_cast<const Float16*>(data)[i]);
    case DType::kFloat8E4M3:
      return widen(Float8E4M3{data[i]});
    case DType::kFloat8E5M2:
      return widen(Float8E5M2{data[i]});
    case DType::kComplex64:  // the real part
      return reinterpret_cast<const float*>(data)[2 * i];
    case DType::kComplex128:
      return reinterpret_cast<const double*>(data)[2 * i];
    case DType::kBytes:
      return data[i];
  }
  return 0.0;
}

// `value` is in [-2, 2].
inline void set_element(std::uint8_t* data, DType dtype, std::int64_t i, double value) {
  switch (dtype) {
    case DType::kFloat64:
      reinterpret_cast<double*>(data)[i] = value;
      break;
    case DType::kFloat32:
      reinterpret_cast<float*>(data)[i] = static_cast<float>(value);
      break;
    case DType::kBFloat16:
      reinterpret_cast<BFloat16*>(data)[i] = narrow_to_bfloat16(static_cast<float>(value));
      break;
    case DType::kFloat16:
      reinterpret_cast<Float16*>(data)[i] = narrow_to_float16(static_cast<float>(value));
      break;
    case DType::kFloat8E4M3:
    case DType::kFloat8E5M2:
      // Any bits of a number below 2^10, subnormal ones too.
      data[i] = static_cast<std::uint8_t>(std::abs(value) * 49.0);
      data[i] |= value < 0.0 ? 0x80u : 0u;
      break;
    case DType::kComplex64:
      reinterpret_cast<Complex<float>*>(data)[i] = {static_cast<float>(value),
                                                    static_cast<float>(1.0 / 3.0 - value)};
      break;
    case DType::kComplex128:
      reinterpret_cast<Complex<double>*>(data)[i] = {value, 1.0 / 3.0 - value};
      break;
    case DType::kBytes:
      data[i] = static_cast<std::uint8_t>((value + 2.0) * 60.0);
      break;
  }
}

// A tensor in the middle of poisoned memory, `shift` elements off a 64-byte boundary.
class Tensor {
 public:
  Tensor(DType dtype, std::int64_t count, std::size_t shift, Random& random)
      : dtype_(dtype),
        bytes_(static_cast<std::size_t>(count * item_size(dtype))),
        memory_(bytes_ + 4 * kGuard, kPoison) {
    const auto address = reinterpret_cast<std::uintptr_t>(memory_.data());
    start_ = kGuard + (kGuard - address % kGuard) % kGuard +
             shift * static_cast<std::size_t>(item_size(dtype));
    for (std::int64_t i = 0; i < count; ++i) {
      set_element(data(), dtype, i, random.between(-2.0, 2.0));
    }
    close_guards();
  }
  ~Tensor() { open_guards(); }
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;

  std::uint8_t* data() { return memory_.data() + start_; }
  const std::uint8_t* data() const { return memory_.data() + start_; }
  // All of it, guards included, and where the tensor begins in it.
  std::vector<std::uint8_t>& memory() {
    open_guards();
    return memory_;
  }
  std::size_t start() const { return start_; }

  bool same_bits(const Tensor& other) const {
    return std::memcmp(data(), other.data(), bytes_) == 0;
  }
  bool guards_are_whole() const {
    open_guards();
    for (std::size_t i = 0; i < memory_.size(); ++i) {
      if ((i < start_ || i >= start_ + bytes_) && memory_[i] != kPoison) {
        return false;
      }
    }
    return true;
  }
  double at(std::int64_t i) const { return element_at(data(), dtype_, i); }
  DType dtype() const { return dtype_; }
  // A copy at the same offset from a boundary.
  std::unique_ptr<Tensor> clone(std::int64_t count, std::size_t shift, Random& random) const {
    auto other = std::make_unique<Tensor>(dtype_, count, shift, random);
    std::memcpy(other->data(), data(), bytes_);
    return other;
  }

 private:
  // Under the address sanitizer the guards may not even be read.
  void close_guards() const {
    ASAN_POISON_MEMORY_REGION(memory_.data(), start_);
    ASAN_POISON_MEMORY_REGION(data() + bytes_, memory_.size() - start_ - bytes_);
  }
  void open_guards() const { ASAN_UNPOISON_MEMORY_REGION(memory_.data(), memory_.size()); }

  DType dtype_;
  std::size_t bytes_;
  std::vector<std::uint8_t> memory_;
  std::size_t start_ = 0;
};

}  // namespace ema_fused::testing
