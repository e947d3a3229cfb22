// Runs what the GPU runs: every thread of every block in turn, over real chunk tables. Results are
// compared with the CPU loop to the bit and with float64, and nothing outside the tensors may be
// touched. Under the sanitizers a stray read is caught as well.
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "../chunk_body.h"
#include "../update_cpu.h"
#include "check.h"

using namespace ema_fused;

namespace {

constexpr DType kFloats[] = {DType::kFloat64, DType::kFloat32, DType::kBFloat16, DType::kFloat16};
constexpr std::uint8_t kPoison = 0xa5;
constexpr std::size_t kGuard = 64;  // bytes on either side of every tensor

double element_at(const std::uint8_t* data, DType dtype, std::int64_t i) {
  switch (dtype) {
    case DType::kFloat64:
      return reinterpret_cast<const double*>(data)[i];
    case DType::kFloat32:
      return reinterpret_cast<const float*>(data)[i];
    case DType::kBFloat16:
      return widen(reinterpret_cast<const BFloat16*>(data)[i]);
    case DType::kFloat16:
      return widen(reinterpret_cast<const Float16*>(data)[i]);
    case DType::kBytes:
      return data[i];
  }
  return 0.0;
}

void set_element(std::uint8_t* data, DType dtype, std::int64_t i, double value) {
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
    case DType::kBytes:
      data[i] = static_cast<std::uint8_t>(value * 100);
      break;
  }
}

double epsilon_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 2.3e-16;
    case DType::kFloat32:
      return 1.2e-7;
    case DType::kBFloat16:
      return 7.9e-3;
    default:
      return 9.8e-4;
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
  }

  std::uint8_t* data() { return memory_.data() + start_; }
  const std::uint8_t* data() const { return memory_.data() + start_; }
  bool same_bits(const Tensor& other) const {
    return std::memcmp(data(), other.data(), bytes_) == 0;
  }
  bool guards_are_whole() const {
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
  DType dtype_;
  std::size_t bytes_;
  std::vector<std::uint8_t> memory_;
  std::size_t start_ = 0;
};

struct Case {
  std::int64_t count;
  bool only_copy;
  std::unique_ptr<Tensor> averaged;
  std::unique_ptr<Tensor> source;
  // The same, for the CPU loop, and what was there before.
  std::unique_ptr<Tensor> cpu_averaged;
  std::unique_ptr<Tensor> cpu_source;
  std::unique_ptr<Tensor> before_averaged;
  std::unique_ptr<Tensor> before_source;
};

Case make_case(DType averaged, DType source, std::int64_t count, bool only_copy, Random& random) {
  Case made;
  made.count = count;
  made.only_copy = only_copy;
  const std::size_t shift_a = random.below(3) == 0 ? 0 : random.below(16);
  const std::size_t shift_s = random.below(3) == 0 ? 0 : random.below(16);
  made.averaged = std::make_unique<Tensor>(averaged, count, shift_a, random);
  made.source = std::make_unique<Tensor>(source, count, shift_s, random);
  made.cpu_averaged = made.averaged->clone(count, shift_a, random);
  made.cpu_source = made.source->clone(count, shift_s, random);
  made.before_averaged = made.averaged->clone(count, shift_a, random);
  made.before_source = made.source->clone(count, shift_s, random);
  return made;
}

std::vector<Chunk> table_of(const std::vector<Case>& cases, bool for_cpu, std::int64_t elements) {
  std::vector<Pair> pairs;
  for (const Case& one : cases) {
    Tensor& averaged = for_cpu ? *one.cpu_averaged : *one.averaged;
    Tensor& source = for_cpu ? *one.cpu_source : *one.source;
    pairs.push_back({averaged.data(), source.data(), one.count, averaged.dtype(), source.dtype(),
                     one.only_copy, static_cast<std::uint32_t>(pairs.size())});
  }
  return build_chunks(pairs, elements);
}

void run_as_gpu(const std::vector<Chunk>& chunks, const Launch& launch, std::int64_t blocks,
                std::uint32_t threads) {
  for_launch(launch, [&](auto operation, auto arithmetic) {
    for (std::int64_t block = 0; block < blocks; ++block) {
      for (std::uint32_t thread = 0; thread < threads; ++thread) {
        update_as_thread<operation.value, arithmetic.value>(
            chunks.data(), static_cast<std::int64_t>(chunks.size()), launch, block, blocks, thread,
            threads);
      }
    }
  });
}

void check_against_float64(const Case& one, const Launch& launch, double weight) {
  const DType a = one.averaged->dtype();
  for (std::int64_t i = 0; i < one.count; ++i) {
    const double before = one.before_averaged->at(i);
    const double source = one.before_source->at(i);
    double expected = source;
    if (launch.operation == Operation::kAverage && !one.only_copy) {
      expected = (1.0 - weight) * before + weight * source;
    }
    const double found = one.averaged->at(i);
    const double bound = std::abs(before) + std::abs(source) + std::abs(source - before);
    CHECK(std::abs(found - expected) <= 2.0 * epsilon_of(a) * bound + 1e-7);
    const double left = launch.operation == Operation::kSwap ? before : source;
    CHECK(one.source->at(i) == left);
  }
}

const std::int64_t kCounts[] = {0,   1,   2,   3,    7,    8,    15,   16,   17,
                                127, 128, 129, 1023, 1024, 1025, 4095, 4096, 4097};

void check_launch(Operation operation, Arithmetic arithmetic, bool weighted, Random& random) {
  std::vector<Case> cases;
  for (const DType a : kFloats) {
    for (const DType s : kFloats) {
      if (operation == Operation::kSwap && a != s) {
        continue;
      }
      for (int repeat = 0; repeat < 6; ++repeat) {
        const std::int64_t count = kCounts[random.below(std::size(kCounts))];
        cases.push_back(make_case(a, s, count, random.below(5) == 0, random));
      }
    }
  }
  for (const std::int64_t bytes : {1, 8, 16, 33, 4099}) {
    cases.push_back(make_case(DType::kBytes, DType::kBytes, bytes, true, random));
  }

  std::vector<double> weights;
  for (std::size_t i = 0; i < cases.size(); ++i) {
    weights.push_back(random.between(0.0, 1.0));
  }
  const double weight = random.below(2) == 0 ? 0.01 : 0.7;
  const Launch launch{operation, arithmetic, weight, weighted ? weights.data() : nullptr};

  const std::int64_t chunk_elements = static_cast<std::int64_t>(1 + random.below(1500));
  const auto blocks = static_cast<std::int64_t>(1 + random.below(9));
  const auto threads = static_cast<std::uint32_t>(1 + random.below(70));
  run_as_gpu(table_of(cases, false, chunk_elements), launch, blocks, threads);
  const std::vector<Chunk> cpu_table = table_of(cases, true, kChunkElementsCpu);
  baseline::update_chunks(cpu_table.data(), 0, static_cast<std::int64_t>(cpu_table.size()), launch);

  for (std::size_t i = 0; i < cases.size(); ++i) {
    const Case& one = cases[i];
    CHECK(one.averaged->same_bits(*one.cpu_averaged));
    CHECK(one.source->same_bits(*one.cpu_source));
    CHECK(one.averaged->guards_are_whole());
    CHECK(one.source->guards_are_whole());
    CHECK(one.cpu_averaged->guards_are_whole());
    check_against_float64(one, launch, weighted ? weights[i] : weight);
  }
}

// The very launch shape of the device, on chunks of the device's size.
void check_full_size(Random& random) {
  std::vector<Case> cases;
  cases.push_back(
      make_case(DType::kFloat32, DType::kBFloat16, 3 * kChunkElementsCuda + 5, false, random));
  cases.push_back(
      make_case(DType::kBFloat16, DType::kBFloat16, kChunkElementsCuda - 1, false, random));
  cases.push_back(
      make_case(DType::kFloat32, DType::kFloat32, kChunkElementsCuda + 1, false, random));
  const Launch launch{Operation::kAverage, Arithmetic::kLerp, 0.001, nullptr};
  run_as_gpu(table_of(cases, false, kChunkElementsCuda), launch, 3, 256);
  const std::vector<Chunk> cpu_table = table_of(cases, true, kChunkElementsCpu);
  baseline::update_chunks(cpu_table.data(), 0, static_cast<std::int64_t>(cpu_table.size()), launch);
  for (const Case& one : cases) {
    CHECK(one.averaged->same_bits(*one.cpu_averaged));
    CHECK(one.averaged->guards_are_whole());
  }
}

// Every float16 there is goes to float32 and back unchanged, and the narrowings round to even.
void check_conversions() {
  for (std::uint32_t bits = 0; bits < 0x10000u; ++bits) {
    const Float16 half{static_cast<std::uint16_t>(bits)};
    const BFloat16 brain{static_cast<std::uint16_t>(bits)};
    const float from_half = widen(half);
    const float from_brain = widen(brain);
    if (std::isnan(from_half)) {
      CHECK(std::isnan(widen(narrow_to_float16(from_half))));
    } else {
      CHECK(narrow_to_float16(from_half).bits == bits);
      const std::uint32_t exponent = (bits >> 10) & 0x1fu;
      const double mantissa = bits & 0x3ffu;
      const double magnitude = exponent == 0 ? std::ldexp(mantissa, -24)
                               : exponent == 31
                                   ? INFINITY
                                   : std::ldexp(1024.0 + mantissa, static_cast<int>(exponent) - 25);
      CHECK(static_cast<double>(from_half) == ((bits & 0x8000u) != 0u ? -magnitude : magnitude));
    }
    if (std::isnan(from_brain)) {
      CHECK(std::isnan(widen(narrow_to_bfloat16(from_brain))));
    } else {
      CHECK(narrow_to_bfloat16(from_brain).bits == bits);
    }
  }
  CHECK(narrow_to_float16(1.0f + 0.00048828125f).bits == 0x3c00u);   // half way: to even
  CHECK(narrow_to_float16(1.0f + 0.00146484375f).bits == 0x3c02u);   // half way: to even
  CHECK(narrow_to_float16(65519.0f).bits == 0x7bffu);                // the largest that rounds down
  CHECK(narrow_to_float16(65520.0f).bits == 0x7c00u);                // to infinity
  CHECK(narrow_to_float16(2.9802322387695312e-8f).bits == 0x0000u);  // half the least subnormal
  CHECK(narrow_to_float16(4.5e-8f).bits == 0x0001u);
  CHECK(narrow_to_bfloat16(1.00390625f).bits == 0x3f80u);  // half way: to even
  CHECK(narrow_to_bfloat16(1.01171875f).bits == 0x3f82u);  // half way: to even
}

}  // namespace

int main() {
  check_conversions();
  for (std::uint64_t seed = 0; seed < 40; ++seed) {
    Random random(seed);
    for (const bool weighted : {false, true}) {
      check_launch(Operation::kAverage, Arithmetic::kLerp, weighted, random);
      check_launch(Operation::kAverage, Arithmetic::kAxpby, weighted, random);
      check_launch(Operation::kAverage, Arithmetic::kDelta, weighted, random);
    }
    check_launch(Operation::kCopy, Arithmetic::kLerp, false, random);
    check_launch(Operation::kSwap, Arithmetic::kLerp, false, random);
  }
  Random random(99);
  check_full_size(random);
  return 0;
}
