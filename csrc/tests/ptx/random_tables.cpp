#include "random_tables.h"

#include <limits>

#include "../../update_cuda_kernel.cuh"
#include "values.h"

namespace ema_fused::testing::ptx {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// What the C++ code makes pairs of, and codes that no kernel serves.
constexpr DType kTypes[] = {DType::kFloat64,       DType::kFloat32,        DType::kBFloat16,
                            DType::kFloat16,       DType::kFloat8E4M3,     DType::kFloat8E5M2,
                            DType::kBytes,         DType::kComplex64,      DType::kComplex128,
                            static_cast<DType>(9), static_cast<DType>(200)};

template <typename T, std::size_t kCount>
T one_of(const T (&choices)[kCount], Random& random) {
  return choices[random.below(kCount)];
}

struct Tensor {
  std::uint8_t* data;
  DType dtype;
  std::int64_t count;
  bool keeps_bits;  // of NaNs too: it is only copied
};

// One launch over drawn tensors.
class Problem {
 public:
  Problem(Operation operation, Arithmetic arithmetic, DeviceMemory& memory, Random& random)
      : random_(random), memory_(memory), launch_(launch_of(operation, arithmetic, weight())) {
    memory.clear();
    // Of few threads, which come to every place of a loop with few elements; now and then of as
    // many as the C++ code launches.
    const bool is_full = random.below(6) == 0;
    grid_ = {static_cast<u32>(1 + random.below(3)),
             is_full ? u32{cuda::kThreads}
                     : static_cast<u32>(1 + random.below(u32{1} << random.below(7)))};
    const std::uint64_t sources = 1 + random.below(4);
    for (std::uint64_t i = 0; i < sources; ++i) {
      add_source();
    }
    make_table();
    tell_weights();
    tell_the_rest();
  }

  const Grid& grid() const { return grid_; }
  const Parameters& parameters() const { return parameters_; }

  // The same launch over a copy of the memory, `distance` bytes further on.
  Parameters moved(std::ptrdiff_t distance, std::vector<Chunk>& entries) const {
    const auto move = [&](auto*& pointer) {
      const auto address = reinterpret_cast<std::uintptr_t>(pointer);
      if (address != 0) {
        pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(
            address + static_cast<std::uintptr_t>(distance));
      }
    };
    entries = table_.entries;
    for (Chunk& chunk : entries) {
      move(chunk.averaged);
      move(chunk.source);
    }
    Parameters parameters = parameters_;
    parameters.entries = entries.data();
    for (Weight& weight : parameters.launch.weight) {
      move(weight.at);
    }
    move(parameters.launch.weights);
    move(parameters.launch.found_inf);
    move(parameters.launch.step_at);
    move(parameters.partials.sums);
    return parameters;
  }

  // Throws a Fault where the kernel has left something else than the host.
  void compare(std::ptrdiff_t distance) const {
    for (const Tensor& tensor : tensors_) {
      const auto size = static_cast<std::ptrdiff_t>(item_size(tensor.dtype));
      for (std::int64_t i = 0; i < tensor.count; ++i) {
        const std::uint8_t* const found = tensor.data + i * size;
        const bool is_same =
            tensor.keeps_bits
                ? std::memcmp(found, found + distance, static_cast<std::size_t>(size)) == 0
                : ptx::is_same(found, found + distance, tensor.dtype);
        if (!is_same) {
          throw Fault("element " + std::to_string(i) + " of " + std::to_string(tensor.count) +
                      " of a tensor of dtype " + std::to_string(static_cast<int>(tensor.dtype)) +
                      ": expected " + hexadecimal(found + distance, size) +
                      " as of the host, found " + hexadecimal(found, size));
        }
      }
    }
  }

 private:
  static std::string hexadecimal(const std::uint8_t* bytes, std::ptrdiff_t size) {
    std::string text = "0x";
    for (std::ptrdiff_t i = size; i-- > 0;) {
      text += "0123456789abcdef"[bytes[i] >> 4];
      text += "0123456789abcdef"[bytes[i] & 15];
    }
    return text;
  }

  double weight() {
    const double choices[] = {0.0,
                              1.0,
                              0.5,
                              0.01,
                              0.7,
                              0.4999999999,
                              1e-3,
                              -0.25,
                              1e-300,
                              1e-40,
                              kInfinity,
                              kNaN,
                              random_.between(0.0, 1.0),
                              random_.between(0.0, 1.0)};
    return one_of(choices, random_);
  }

  bool is_average() const { return launch_.operation == Operation::kAverage; }

  // Near a count where a loop over elements or packs of them ends at one of its places.
  std::int64_t count(DType averaged, DType source) {
    const std::int64_t pack =
        random_.below(2) == 0 ? 1 : 16 / std::min(item_size(averaged), item_size(source));
    const auto rounds = static_cast<std::int64_t>(random_.below(6));
    const std::int64_t near = static_cast<std::int64_t>(random_.below(24)) - 4;
    return std::max<std::int64_t>(0, rounds * grid_.threads * pack + near);
  }

  std::pair<DType, DType> types() {
    const DType floats[] = {DType::kFloat64, DType::kFloat32, DType::kBFloat16, DType::kFloat16};
    const DType averaged =
        random_.below(8) == 0 ? one_of(kTypes, random_) : one_of(floats, random_);
    const bool is_swap = launch_.operation == Operation::kSwap;
    const DType source = is_swap || random_.below(3) == 0 ? averaged
                         : random_.below(4) == 0          ? one_of(kTypes, random_)
                                                          : one_of(floats, random_);
    return {averaged, source};
  }

  // Elements that a tensor begins behind a boundary.
  std::size_t shift() { return random_.below(2) == 0 ? 0 : random_.below(16); }

  std::uint8_t* tensor(DType dtype, std::int64_t count, std::size_t shift, bool is_written,
                       bool keeps_bits) {
    const auto size = static_cast<std::size_t>(item_size(dtype));
    const auto bytes = static_cast<std::size_t>(count) * size;
    std::uint8_t* const data =
        memory_.allocate(bytes, shift * size, is_written ? Rights::kReadAndWrite : Rights::kRead);
    fill(data, dtype, count, random_);
    tensors_.push_back({data, dtype, count, keeps_bits});
    return data;
  }

  // A source with its averages, which are often aligned alike: then there are packs, and chains.
  void add_source() {
    const auto [averaged, source] = types();
    const bool writes_source = launch_.operation == Operation::kSwap;
    const bool only_copy = is_average() && random_.below(5) == 0;
    const std::int64_t elements = count(averaged, source);
    const std::size_t common = shift();
    std::uint8_t* const from =
        tensor(source, elements, random_.below(2) == 0 ? shift() : common, writes_source, true);
    const std::uint64_t averages =
        writes_source || random_.below(2) == 0 ? 1 : 1 + random_.below(kMaxAverages);
    for (std::uint64_t k = 0; k < averages; ++k) {
      const bool keeps_bits = (only_copy || !is_average()) && averaged == source;
      Pair pair{};
      pair.averaged =
          tensor(averaged, elements, random_.below(4) == 0 ? shift() : common, true, keeps_bits);
      pair.source = from;
      pair.count = elements;
      pair.averaged_dtype = averaged;
      pair.source_dtype = source;
      pair.only_copy = only_copy;
      pair.average = static_cast<std::uint8_t>(
          averages == 1 && random_.below(2) == 0 ? random_.below(kMaxAverages) : k);
      pair.number = static_cast<std::uint32_t>(random_.bits());
      pairs_.push_back(pair);
    }
  }

  void make_table() {
    // Beyond what 31 bits, and all but, hold.
    const std::uint32_t firsts[] = {0, 0x7ffffffeu, 0x80000000u, 0xffffff00u};
    first_pair_ = one_of(firsts, random_);
    for (std::size_t i = 0; i < pairs_.size(); ++i) {
      pairs_[i].index = first_pair_ + static_cast<std::uint32_t>(i);
    }
    const std::int64_t chunks[] = {1 << 20, kLeastChunkElementsCuda,
                                   static_cast<std::int64_t>(1 + random_.below(4000))};
    table_ = build_chunks(pairs_, one_of(chunks, random_));
    // Tensors of more elements than there is memory for.
    const std::int64_t firsts_of_tensors[] = {0, static_cast<std::int64_t>(random_.bits() >> 2),
                                              static_cast<std::int64_t>(random_.bits() >> 20 << 4)};
    const std::int64_t first = one_of(firsts_of_tensors, random_);
    for (Chunk& chunk : table_.entries) {
      chunk.first += first;
    }
    parameters_.entries = memory_.hold(table_.entries.data(), table_.entries.size());
    parameters_.heads = table_.heads;
  }

  void tell_weights() {
    const std::uint64_t manner = random_.below(4);
    for (Weight& one : launch_.weight) {
      one.number = manner == 0 ? one.number : weight();
      if (manner == 2 || (manner == 3 && random_.below(2) == 0)) {
        const double float64 = weight();
        const auto float32 = static_cast<float>(float64);
        one.is_float64 = random_.below(2) == 0;
        one.at = one.is_float64 ? static_cast<const void*>(memory_.hold(&float64, 1))
                                : memory_.hold(&float32, 1);
      }
    }
    if (random_.below(3) == 0) {
      std::vector<double> weights;
      for (std::size_t i = 0; i < pairs_.size(); ++i) {
        weights.push_back(weight());
      }
      // Where the weights of all pairs before these would begin.
      const double* const there = memory_.hold(weights.data(), weights.size());
      launch_.weights = reinterpret_cast<const double*>(
          reinterpret_cast<std::uintptr_t>(there) - std::uintptr_t{first_pair_} * sizeof(double));
    }
  }

  void tell_the_rest() {
    const float flags[] = {0.0f, 0.0f, -0.0f, 0.0f, 1.0f, std::numeric_limits<float>::quiet_NaN()};
    const float flag = one_of(flags, random_);
    launch_.found_inf = random_.below(3) != 0 ? nullptr : memory_.hold(&flag, 1);
    launch_.seed = random_.bits();
    launch_.step = static_cast<std::int64_t>(random_.bits());
    const auto step = static_cast<std::int64_t>(random_.bits() >> random_.below(64));
    launch_.step_at = random_.below(2) == 0 ? nullptr : memory_.hold(&step, 1);
    if (is_average() && random_.below(3) == 0) {
      std::int64_t averages = 1;
      for (const Pair& pair : pairs_) {
        averages = std::max<std::int64_t>(averages, pair.average + 1);
      }
      averages = random_.below(2) == 0 ? averages : kMaxAverages;
      const std::int64_t parts = std::int64_t{grid_.blocks} * grid_.threads;
      auto* const sums =
          reinterpret_cast<double*>(tensor(DType::kFloat64, averages * parts, 0, true, false));
      std::fill_n(sums, averages * parts, 42.0);
      parameters_.partials = {sums, averages, parts};
    }
    parameters_.launch = launch_;
  }

  Random& random_;
  DeviceMemory& memory_;
  Launch launch_;
  Grid grid_{};
  std::vector<Tensor> tensors_;
  std::vector<Pair> pairs_;
  std::uint32_t first_pair_ = 0;
  ChunkTable table_;
  Parameters parameters_{};
};

}  // namespace

void check_random_tables(KernelsUnderTest& kernels, DeviceMemory& memory, std::uint64_t launches) {
  // Aligned alike, so that the copy's addresses are.
  DeviceMemory on_host(memory.size());
  const std::ptrdiff_t distance = on_host.data() - memory.data();
  Random random(1);
  for (std::uint64_t i = 0; i < launches; ++i) {
    Problem problem(kernels.operation(), kernels.arithmetic(), memory, random);
    std::memcpy(on_host.data(), memory.data(), memory.used());
    std::vector<Chunk> entries;
    run_on_host(problem.moved(distance, entries), problem.grid().blocks, problem.grid().threads);
    try {
      kernels.run(problem.parameters(), problem.grid(), memory);
      problem.compare(distance);
    } catch (const Fault& fault) {
      throw Fault("drawn launch " + std::to_string(i) + ": " + fault.what());
    }
  }
}

}  // namespace ema_fused::testing::ptx
