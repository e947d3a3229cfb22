// The walk over a table on one thread, for one instruction set.
#include "dispatch.h"
#include "update_cpu.h"
#include "update_cpu_isa.h"

namespace ema_fused::EMA_FUSED_ISA {

void update_chunks(const ChunkTable& table, std::int64_t begin, std::int64_t end,
                   const Launch& launch, double* distances) {
  if (is_skipped(launch)) {
    return;
  }
  using UpdateEntry = void (*)(const Chunk& chunk, const Launch& launch);
  const UpdateEntry copy = &update_entry<Operation::kCopy, Arithmetic::kLerp>;
  const UpdateEntry update = for_launch(launch, [](auto operation, auto arithmetic) -> UpdateEntry {
    return &update_entry<operation.value, arithmetic.value>;
  });
  const Chunk* const entries = table.entries.data();
  for (std::int64_t i = begin; i < end; ++i) {
    // One average after the other: a chunk of the source stays in the cache meanwhile.
    std::int64_t entry = i;
    do {
      const Chunk& chunk = entries[entry];
      if (distances != nullptr) {
        // The update that comes behind it finds the entry in the cache.
        distances[entry] = distance_of(chunk);
      }
      const bool is_copied = launch.operation == Operation::kAverage && chunk.only_copy;
      (is_copied ? copy : update)(chunk, launch);
      entry = chunk.next;
    } while (entry != 0);
  }
}

}  // namespace ema_fused::EMA_FUSED_ISA
