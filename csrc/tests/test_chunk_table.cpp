// Chunk tables at their limits, by address arithmetic alone, and what pairs may do to each other's
// memory.
#include <vector>

#include "../chunk_table.h"
#include "check.h"

using namespace ema_fused;

namespace {

void* at(std::uintptr_t address) { return reinterpret_cast<void*>(address); }
std::uintptr_t address(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer); }

Pair pair_of(std::uintptr_t averaged, std::uintptr_t source, std::int64_t count,
             std::uint32_t index = 0, DType averaged_dtype = DType::kFloat32,
             DType source_dtype = DType::kFloat32) {
  return {at(averaged), at(source), count, averaged_dtype, source_dtype, false, index};
}

void check_boundaries() {
  for (const std::int64_t chunk : {1, 16, 8192, 16384}) {
    for (const std::int64_t multiple : {0, 1, 2, 7}) {
      for (const std::int64_t off : {-1, 0, 1}) {
        const std::int64_t count = multiple * chunk + off;
        if (count < 0) {
          continue;
        }
        const std::vector<Pair> pairs{
            pair_of(0x10000, 0x9000000, count, 3, DType::kFloat32, DType::kBFloat16)};
        const std::vector<Chunk> table = build_chunks(pairs, chunk);
        CHECK(static_cast<std::int64_t>(table.size()) == count_chunks(pairs, chunk));
        std::int64_t covered = 0;
        for (const Chunk& entry : table) {
          CHECK(address(entry.averaged) == 0x10000 + static_cast<std::uintptr_t>(covered) * 4);
          CHECK(address(entry.source) == 0x9000000 + static_cast<std::uintptr_t>(covered) * 2);
          CHECK(entry.count > 0 && entry.count <= chunk);
          CHECK(entry.pair == 3);
          covered += entry.count;
        }
        CHECK(covered == count);
      }
    }
  }
}

void check_large() {
  // 2^40 elements of 8 bytes, in chunks of 2^28: every product beyond 32 bits.
  const std::int64_t count = (std::int64_t{1} << 40) + 1;
  const std::int64_t chunk = std::int64_t{1} << 28;
  const std::uintptr_t base = 0x1000;
  const std::uintptr_t other = std::uintptr_t{1} << 50;
  const std::vector<Chunk> table =
      build_chunks({pair_of(base, other, count, 0, DType::kFloat64, DType::kFloat64)}, chunk);
  CHECK(table.size() == 4097);
  CHECK(table.back().count == 1);
  CHECK(address(table.back().averaged) == base + (std::uintptr_t{1} << 43));
  CHECK(address(table.back().source) == other + (std::uintptr_t{1} << 43));

  // A million tensors.
  std::vector<Pair> pairs;
  for (std::uint32_t i = 0; i < 1000000; ++i) {
    pairs.push_back(
        pair_of(0x1000 + std::uintptr_t{i} * 64, other + std::uintptr_t{i} * 64, 16, i));
  }
  CHECK(drop_repeated_pairs(pairs, true).kind == Conflict::kNone);
  const std::vector<Chunk> many = build_chunks(pairs, kChunkElementsCpu);
  CHECK(many.size() == 1000000);
  CHECK(many.back().pair == 999999);
}

Conflict conflict_of(std::vector<Pair> pairs, bool writes_source = false) {
  return drop_repeated_pairs(pairs, writes_source).kind;
}

std::size_t left_of(std::vector<Pair> pairs) {
  CHECK(drop_repeated_pairs(pairs, false).kind == Conflict::kNone);
  return pairs.size();
}

void check_repetitions() {
  const Pair one = pair_of(0x1000, 0x5000, 16, 0);
  Pair again = one;
  again.index = 1;
  Pair once_more = one;
  once_more.index = 2;
  CHECK(left_of({one, again, once_more}) == 1);
  std::vector<Pair> kept{again, one};
  CHECK(drop_repeated_pairs(kept, false).kind == Conflict::kNone);
  CHECK(kept.size() == 1 && kept[0].index == 1);               // the first in the list
  CHECK(left_of({pair_of(0x1000, 0x1000, 16)}) == 0);          // one memory for both sides
  CHECK(left_of({pair_of(0x1000, 0x5000, 0)}) == 0);           // nothing
  CHECK(left_of({one, pair_of(0x2000, 0x5000, 16, 1)}) == 2);  // two averages of one source
}

void check_overlaps() {
  const Pair one = pair_of(0x1000, 0x5000, 16, 0);
  CHECK(conflict_of({one, pair_of(0x1040, 0x6000, 16, 1)}) == Conflict::kNone);  // side by side
  CHECK(conflict_of({one, pair_of(0x103c, 0x6000, 16, 1)}) == Conflict::kAveragedTwice);
  CHECK(conflict_of({one, pair_of(0x1000, 0x6000, 16, 1)}) == Conflict::kAveragedTwice);
  CHECK(conflict_of({one, pair_of(0x2000, 0x103c, 16, 1)}) == Conflict::kAveragedIsSource);
  CHECK(conflict_of({one, pair_of(0x503c, 0x6000, 16, 1)}) == Conflict::kAveragedIsSource);
  CHECK(conflict_of({pair_of(0x1000, 0x1004, 16)}) == Conflict::kAveragedIsSource);  // of one pair
  // One memory read as two types.
  CHECK(conflict_of({pair_of(0x1000, 0x1000, 16, 0, DType::kFloat32, DType::kBFloat16)}) ==
        Conflict::kAveragedIsSource);
  // Sources may overlap unless they are written.
  CHECK(conflict_of({one, pair_of(0x2000, 0x5004, 16, 1)}) == Conflict::kNone);
  CHECK(conflict_of({one, pair_of(0x2000, 0x5004, 16, 1)}, true) == Conflict::kSourceTwice);
  // A long span, a short one inside it, then one that meets only the long one.
  CHECK(conflict_of({pair_of(0x8000, 0x1000, 1024, 0), pair_of(0x9000, 0x1100, 4, 1),
                     pair_of(0x1800, 0xa000, 4, 2)}) == Conflict::kAveragedIsSource);
}

}  // namespace

int main() {
  check_boundaries();
  check_large();
  check_repetitions();
  check_overlaps();
  return 0;
}
