#include "host_body.h"

#include <algorithm>

#include "../../chunk_body.h"

namespace ema_fused::testing::ptx {

void run_on_host(const Parameters& parameters, std::int64_t blocks, std::uint32_t threads) {
  const auto& [entries, heads, launch, partials] = parameters;
  const auto run = [&, entries = entries, heads = heads, &launch = launch, &partials = partials](
                       auto operation, auto arithmetic) {
    for (std::int64_t block = 0; block < blocks; ++block) {
      for (std::uint32_t thread = 0; thread < threads; ++thread) {
        if (partials.sums == nullptr) {
          Unmeasured measure;
          update_as_thread<operation.value, arithmetic.value>(entries, heads, launch, block, blocks,
                                                              thread, threads, measure);
        } else if constexpr (operation.value == Operation::kAverage) {
          update_measured_as_thread<arithmetic.value>(entries, heads, launch, partials, block,
                                                      blocks, thread, threads);
        }
      }
    }
  };
  for_launch(launch, run);
}

void update_chunks_on_host(const ChunkTable& table, std::int64_t begin, std::int64_t end,
                           const Launch& launch, double* distances) {
  double sums[kMaxAverages];
  Partials partials;
  if (distances != nullptr && launch.operation == Operation::kAverage) {
    partials = {sums, kMaxAverages, 1};
  }
  // Followers are reached from the heads, by their places in the whole table.
  if (begin == 0) {
    run_on_host({table.entries.data(), end, launch, partials}, 1, 1);
  }
  for (std::uint8_t k = 0; distances != nullptr && k < kMaxAverages; ++k) {
    const auto of_average = [&](const Chunk& chunk) { return chunk.average == k; };
    const auto first = std::find_if(table.entries.begin(), table.entries.end(), of_average);
    if (first != table.entries.end()) {
      distances[first - table.entries.begin()] = sums[k];
    }
  }
}

}  // namespace ema_fused::testing::ptx
