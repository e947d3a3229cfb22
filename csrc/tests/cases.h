// Generated problems for an update: tensors of all types at all alignments in poisoned memory, run
// by the implementation under test and by the CPU loop, compared with each other to the bit and
// with float64, and nothing outside the tensors may be touched.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <iterator>
#include <memory>
#include <vector>

#include "../chunk_table.h"
#include "../dispatch.h"
#include "../update_cpu.h"
#include "check.h"
#include "guarded_tensor.h"

namespace ema_fused::testing {

constexpr DType kAveraged[] = {DType::kFloat64, DType::kFloat32, DType::kBFloat16, DType::kFloat16};
constexpr DType kSources[] = {DType::kFloat64, DType::kFloat32,    DType::kBFloat16,
                              DType::kFloat16, DType::kFloat8E4M3, DType::kFloat8E5M2};

inline double epsilon_of(DType dtype) {
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

// One tensor three times: for the implementation under test, for the CPU loop, and as it was.
struct Copies {
  std::unique_ptr<Tensor> tested;
  std::unique_ptr<Tensor> on_cpu;
  std::unique_ptr<Tensor> before;

  Copies(DType dtype, std::int64_t count, std::size_t shift, Random& random)
      : tested(std::make_unique<Tensor>(dtype, count, shift, random)),
        on_cpu(tested->clone(count, shift, random)),
        before(tested->clone(count, shift, random)) {}
};

// A source and its averages.
struct Case {
  std::int64_t count;
  bool only_copy;
  std::vector<Copies> averaged;
  Copies source;
};

inline Case make_case(const std::vector<DType>& averaged, DType source, std::int64_t count,
                      bool only_copy, Random& random) {
  const auto shift = [&] { return random.below(3) == 0 ? 0 : random.below(16); };
  Case made{count, only_copy, {}, Copies(source, count, shift(), random)};
  // Averages that are often, not always, aligned alike: then they share a walk over the source.
  const std::size_t common = shift();
  for (const DType dtype : averaged) {
    made.averaged.emplace_back(dtype, count, random.below(3) == 0 ? shift() : common, random);
  }
  return made;
}

// The pairs of all cases, average by average, at the addresses that `address_of` tells.
template <typename AddressOf>
std::vector<Pair> pairs_of(std::vector<Case>& cases, const AddressOf& address_of) {
  std::vector<Pair> pairs;
  for (std::uint8_t average = 0; average < kMaxAverages; ++average) {
    for (Case& one : cases) {
      if (average < one.averaged.size()) {
        const Copies& averaged = one.averaged[average];
        Pair pair{};
        pair.averaged = address_of(averaged);
        pair.source = address_of(one.source);
        pair.count = one.count;
        pair.averaged_dtype = averaged.tested->dtype();
        pair.source_dtype = one.source.tested->dtype();
        pair.only_copy = one.only_copy;
        pair.average = average;
        pair.index = static_cast<std::uint32_t>(pairs.size());
        pair.number = 7 * pair.index + 3;
        pairs.push_back(pair);
      }
    }
  }
  return pairs;
}

// The squared distance of each average from its parts; zeros behind those that have parts.
inline void add_up(const Partials& partials, double* distances) {
  for (std::int64_t k = 0; k < kMaxAverages; ++k) {
    distances[k] = 0.0;
    for (std::int64_t i = 0; k < partials.averages && i < partials.count; ++i) {
      distances[k] += partials.sums[k * partials.count + i];
    }
  }
}

// `launch` holds numbers only: what pointers tell is for the implementation under test to find.
// `distances`: null, or gets the squared distance of each average.
inline void run_on_cpu(std::vector<Case>& cases, const Launch& launch, UpdateChunks update,
                       double* distances) {
  const auto pairs =
      pairs_of(cases, [](const Copies& copies) -> void* { return copies.on_cpu->data(); });
  const ChunkTable table = build_chunks(pairs, kChunkElementsCpu);
  std::vector<double> by_entry(table.entries.size());
  update(table, 0, table.heads, launch, distances == nullptr ? nullptr : by_entry.data());
  if (distances != nullptr) {
    std::fill_n(distances, kMaxAverages, 0.0);
    for (std::size_t i = 0; i < by_entry.size(); ++i) {
      distances[table.entries[i].average] += by_entry[i];
    }
  }
}

// How the weights of an update are told.
enum class Weighting { kNumber, kByPair, kByAverage, kByAddress };

// What is tested, run on the `tested` copies (pointers in the launch are to the host), and the CPU
// loop that has a fused multiply-add if it has one. `distances`: as of run_on_cpu().
struct Subject {
  std::function<void(std::vector<Case>& cases, const Launch& launch, double* distances,
                     Random& random)>
      run;
  UpdateChunks on_cpu;
};

// Of the tensors as they were.
inline void check_distances(const std::vector<Case>& cases, const double* distances, bool skipped) {
  for (std::size_t k = 0; k < kMaxAverages; ++k) {
    double expected = 0.0;
    for (const Case& one : cases) {
      const bool counts = k < one.averaged.size() && !one.only_copy && !skipped;
      for (std::int64_t i = 0; counts && i < one.count; ++i) {
        const double difference = one.source.before->at(i) - one.averaged[k].before->at(i);
        expected += difference * difference;
      }
    }
    CHECK(std::abs(distances[k] - expected) <= 2e-7 * expected);
  }
}

// `skipped`: the launch had nothing to do.
inline void check_against_float64(const Case& one, Operation operation, std::size_t average,
                                  double weight, bool skipped) {
  const Copies& averaged = one.averaged[average];
  const bool is_average = operation == Operation::kAverage && !one.only_copy;
  for (std::int64_t i = 0; i < one.count; ++i) {
    const double before = averaged.before->at(i);
    const double source = one.source.before->at(i);
    double expected = is_average ? (1.0 - weight) * before + weight * source : source;
    if (skipped) {
      expected = before;
    }
    const double found = averaged.tested->at(i);
    const double bound = std::abs(before) + std::abs(source) + std::abs(source - before);
    CHECK(std::abs(found - expected) <= 2.0 * epsilon_of(averaged.tested->dtype()) * bound + 1e-7);
    const bool swapped = operation == Operation::kSwap && !skipped;
    CHECK(one.source.tested->at(i) == (swapped ? before : source));
  }
}

// 300 and 600: with 256 threads, loops end in the middle of a round.
constexpr std::int64_t kCounts[] = {0,   1,   2,   3,   7,    8,    15,   16,   17,   127,
                                    128, 129, 300, 600, 1023, 1024, 1025, 4095, 4096, 4097};

// Every combination of types, some several times, as far as the operation takes them.
inline std::vector<Case> make_cases(Operation operation, Random& random) {
  std::vector<Case> cases;
  const auto count = [&] { return kCounts[random.below(std::size(kCounts))]; };
  for (const DType a : kAveraged) {
    for (const DType s : kSources) {
      if (operation == Operation::kSwap) {
        if (a == s) {
          cases.push_back(make_case({a}, s, count(), false, random));
        }
        continue;
      }
      for (int repeat = 0; repeat < 4; ++repeat) {
        std::vector<DType> averaged(random.below(3) == 0 ? 1 + random.below(kMaxAverages) : 1, a);
        if (averaged.size() > 2 && random.below(2) == 0) {
          averaged[1] = kAveraged[random.below(std::size(kAveraged))];
        }
        cases.push_back(make_case(averaged, s, count(), random.below(5) == 0, random));
      }
    }
  }
  for (const std::int64_t bytes : {1, 8, 16, 33, 4099}) {
    cases.push_back(make_case({DType::kBytes}, DType::kBytes, bytes, true, random));
  }
  cases.push_back(make_case({DType::kFloat8E5M2}, DType::kFloat8E5M2, 99, true, random));
  return cases;
}

inline void check_launch(Operation operation, Arithmetic arithmetic, Weighting weighting,
                         bool found_inf, const Subject& subject, Random& random) {
  std::vector<Case> cases = make_cases(operation, random);
  const auto nowhere = [](const Copies&) -> void* { return nullptr; };
  const std::vector<Pair> pairs = pairs_of(cases, nowhere);

  // The same update told twice: to the CPU loop in numbers, one a pair, to what is tested in the
  // way that is tested.
  const double weight = random.below(2) == 0 ? 0.01 : 0.7;
  Launch plain = launch_of(operation, arithmetic, weight);
  plain.seed = random.bits();
  plain.step = static_cast<std::int64_t>(random.below(std::uint64_t{1} << 40));
  Launch launch = plain;

  double float64[kMaxAverages];
  float float32[kMaxAverages];
  for (std::int64_t k = 0; k < kMaxAverages; ++k) {
    float32[k] = static_cast<float>(random.between(0.0, 1.0));
    float64[k] = static_cast<double>(float32[k]);
    if (weighting == Weighting::kByAverage) {
      launch.weight[k].number = float64[k];
    } else if (weighting == Weighting::kByAddress) {
      launch.weight[k].is_float64 = k % 2 == 0;
      launch.weight[k].at = k % 2 == 0 ? static_cast<const void*>(&float64[k]) : &float32[k];
    }
  }
  std::vector<double> weights;
  for (const Pair& pair : pairs) {
    const bool by_average =
        weighting == Weighting::kByAverage || weighting == Weighting::kByAddress;
    const double by_pair = weighting == Weighting::kByPair ? random.between(0.0, 1.0) : weight;
    weights.push_back(by_average ? float64[pair.average] : by_pair);
  }
  plain.weights = weights.data();
  if (weighting == Weighting::kByPair) {
    launch.weights = weights.data();
  }
  const float flag = found_inf ? 1.0f : 0.0f;
  launch.found_inf = found_inf || random.below(2) == 0 ? &flag : nullptr;
  const std::int64_t step = plain.step;
  if (random.below(2) == 0) {
    launch.step = -1;
    launch.step_at = &step;
  }

  // Either is measured or not: the averages must not differ.
  double distances[kMaxAverages];
  const auto measured = [&] {
    return operation == Operation::kAverage && random.below(2) == 0 ? distances : nullptr;
  };
  double* const asked = measured();
  subject.run(cases, launch, asked, random);
  if (asked != nullptr) {
    check_distances(cases, distances, found_inf);
  }
  if (!found_inf) {
    double* const asked_on_cpu = measured();
    run_on_cpu(cases, plain, subject.on_cpu, asked_on_cpu);
    if (asked_on_cpu != nullptr) {
      check_distances(cases, distances, false);
    }
  }

  std::size_t pair = 0;
  for (std::uint8_t k = 0; k < kMaxAverages; ++k) {
    for (const Case& one : cases) {
      if (k >= one.averaged.size()) {
        continue;
      }
      CHECK(one.averaged[k].tested->same_bits(*one.averaged[k].on_cpu));
      CHECK(one.averaged[k].tested->guards_are_whole());
      CHECK(one.averaged[k].on_cpu->guards_are_whole());
      check_against_float64(one, operation, k, weights[pair], found_inf);
      ++pair;
    }
  }
  for (const Case& one : cases) {
    CHECK(one.source.tested->same_bits(*one.source.on_cpu));
    CHECK(one.source.tested->guards_are_whole());
  }
}

// One kernel: an average with its weight told in all ways.
inline void check_kernel(Operation operation, Arithmetic arithmetic, const Subject& subject,
                         Random& random) {
  if (operation != Operation::kAverage) {
    check_launch(operation, arithmetic, Weighting::kNumber, false, subject, random);
    return;
  }
  for (const Weighting weighting :
       {Weighting::kNumber, Weighting::kByPair, Weighting::kByAverage, Weighting::kByAddress}) {
    const bool found_inf = random.below(8) == 0;
    check_launch(operation, arithmetic, weighting, found_inf, subject, random);
  }
}

// All operations and arithmetics, over `seeds` generated problems each.
inline void check_all(const Subject& subject, std::uint64_t seeds) {
  for (std::uint64_t seed = 0; seed < seeds; ++seed) {
    Random random(seed);
    for (const Arithmetic arithmetic : {Arithmetic::kLerp, Arithmetic::kAxpby, Arithmetic::kDelta,
                                        Arithmetic::kProducts, Arithmetic::kStochastic}) {
      check_kernel(Operation::kAverage, arithmetic, subject, random);
    }
    check_kernel(Operation::kCopy, Arithmetic::kLerp, subject, random);
    check_kernel(Operation::kSwap, Arithmetic::kLerp, subject, random);
  }
}

// Chunks as large as a device's, in the very launch shape of a device.
inline void check_large(Arithmetic arithmetic, const Subject& subject) {
  const DType f32 = DType::kFloat32;
  const DType bf16 = DType::kBFloat16;
  const std::int64_t chunk = kLeastChunkElementsCuda;
  Random random(99);
  std::vector<Case> cases;
  cases.push_back(make_case({f32}, bf16, 3 * chunk + 5, false, random));
  cases.push_back(make_case({bf16}, bf16, chunk - 1, false, random));
  cases.push_back(make_case({bf16, bf16}, f32, 2 * chunk + 9, false, random));
  cases.push_back(make_case({f32, f32, f32, f32}, f32, chunk + 1, false, random));
  Launch launch = launch_of(Operation::kAverage, arithmetic, 0.001);
  launch.seed = 1;
  double distances[kMaxAverages];
  subject.run(cases, launch, distances, random);
  check_distances(cases, distances, false);
  run_on_cpu(cases, launch, subject.on_cpu, nullptr);
  for (const Case& one : cases) {
    for (const Copies& averaged : one.averaged) {
      CHECK(averaged.tested->same_bits(*averaged.on_cpu));
      CHECK(averaged.tested->guards_are_whole());
    }
  }
}

}  // namespace ema_fused::testing
