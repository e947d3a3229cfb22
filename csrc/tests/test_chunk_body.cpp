// Runs what the GPU runs: every thread of every block in turn, over real chunk tables. Under the
// sanitizers a stray read is caught as well.
#include <limits>

#include "../chunk_body.h"
#include "cases.h"

using namespace ema_fused;
using namespace ema_fused::testing;

namespace {

void run_as_gpu(std::vector<Case>& cases, const Launch& launch, double* distances,
                std::int64_t chunk_elements, std::int64_t blocks, std::uint32_t threads) {
  const auto pairs =
      pairs_of(cases, [](const Copies& copies) -> void* { return copies.tested->data(); });
  const ChunkTable table = build_chunks(pairs, chunk_elements);
  // What no thread writes stays a NaN.
  const std::int64_t count = blocks * threads;
  std::vector<double> sums(static_cast<std::size_t>(kMaxAverages * count),
                           std::numeric_limits<double>::quiet_NaN());
  const Partials partials{sums.data(), kMaxAverages, count};
  for_launch(launch, [&](auto operation, auto arithmetic) {
    for (std::int64_t block = 0; block < blocks; ++block) {
      for (std::uint32_t thread = 0; thread < threads; ++thread) {
        const Chunk* const entries = table.entries.data();
        if (distances == nullptr) {
          Unmeasured measure;
          update_as_thread<operation.value, arithmetic.value>(entries, table.heads, launch, block,
                                                              blocks, thread, threads, measure);
        } else if constexpr (operation.value == Operation::kAverage) {
          update_measured_as_thread<arithmetic.value>(entries, table.heads, launch, partials, block,
                                                      blocks, thread, threads);
        }
      }
    }
  });
  if (distances != nullptr) {
    add_up(partials, distances);
  }
}

// The shape of the launch is drawn too: results must not depend on it.
void run_in_some_shape(std::vector<Case>& cases, const Launch& launch, double* distances,
                       Random& random) {
  const auto chunk_elements = static_cast<std::int64_t>(1 + random.below(1500));
  const auto blocks = static_cast<std::int64_t>(1 + random.below(9));
  const auto threads = static_cast<std::uint32_t>(1 + random.below(70));
  run_as_gpu(cases, launch, distances, chunk_elements, blocks, threads);
}

void run_as_a_device(std::vector<Case>& cases, const Launch& launch, double* distances, Random&) {
  run_as_gpu(cases, launch, distances, kLeastChunkElementsCuda, 3, 256);
}

}  // namespace

int main() {
  // Neither this file nor the baseline loop is compiled for a processor with fused multiply-add.
  check_all({run_in_some_shape, &baseline::update_chunks}, 12);
  for (const Arithmetic arithmetic : {Arithmetic::kLerp, Arithmetic::kStochastic}) {
    check_large(arithmetic, {run_as_a_device, &baseline::update_chunks});
  }
  return 0;
}
