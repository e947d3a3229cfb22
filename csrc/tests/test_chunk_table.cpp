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
  Pair pair{};
  pair.averaged = at(averaged);
  pair.source = at(source);
  pair.count = count;
  pair.averaged_dtype = averaged_dtype;
  pair.source_dtype = source_dtype;
  pair.index = pair.number = index;
  return pair;
}

void check_boundaries() {
  for (const std::int64_t chunk : {1, 16, 4096, 8192, 65536}) {
    for (const std::int64_t multiple : {0, 1, 2, 7}) {
      for (const std::int64_t off : {-1, 0, 1}) {
        const std::int64_t count = multiple * chunk + off;
        if (count < 0) {
          continue;
        }
        const std::vector<Pair> pairs{
            pair_of(0x10000, 0x9000000, count, 3, DType::kFloat32, DType::kBFloat16)};
        const ChunkTable table = build_chunks(pairs, chunk);
        const std::int64_t chunks = (count + chunk - 1) / chunk;
        CHECK(static_cast<std::int64_t>(table.entries.size()) == chunks);
        CHECK(table.heads == chunks);
        std::int64_t covered = 0;
        for (const Chunk& entry : table.entries) {
          CHECK(address(entry.averaged) == 0x10000 + static_cast<std::uintptr_t>(covered) * 4);
          CHECK(address(entry.source) == 0x9000000 + static_cast<std::uintptr_t>(covered) * 2);
          CHECK(entry.count > 0 && entry.count <= chunk);
          CHECK(entry.pair == 3 && entry.number == 3);
          CHECK(entry.first == covered && entry.next == 0);
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
      build_chunks({pair_of(base, other, count, 0, DType::kFloat64, DType::kFloat64)}, chunk)
          .entries;
  CHECK(table.size() == 4097);
  CHECK(table.back().count == 1);
  CHECK(table.back().first == std::int64_t{1} << 40);
  CHECK(address(table.back().averaged) == base + (std::uintptr_t{1} << 43));
  CHECK(address(table.back().source) == other + (std::uintptr_t{1} << 43));

  // Around 2^31 elements, in chunks of a device's size, with two averages.
  for (const std::int64_t off : {-1, 0, 1}) {
    const std::int64_t around = (std::int64_t{1} << 31) + off;
    std::vector<Pair> two{pair_of(base, other, around, 0), pair_of(base << 30, other, around, 1)};
    two[1].average = 1;
    const ChunkTable both = build_chunks(two, kMostChunkElementsCuda);
    CHECK(both.heads == 32768 + (off > 0 ? 1 : 0));
    CHECK(static_cast<std::int64_t>(both.entries.size()) == 2 * both.heads);
    const Chunk& last = both.entries[static_cast<std::size_t>(both.heads - 1)];
    const Chunk& follower = both.entries[static_cast<std::size_t>(last.next)];
    CHECK(last.first + last.count == around && follower.first + follower.count == around);
    CHECK(address(follower.averaged) ==
          (base << 30) + static_cast<std::uintptr_t>(follower.first) * 4);
    CHECK(address(follower.source) == address(last.source));
  }

  // A million tensors.
  std::vector<Pair> pairs;
  for (std::uint32_t i = 0; i < 1000000; ++i) {
    pairs.push_back(
        pair_of(0x1000 + std::uintptr_t{i} * 64, other + std::uintptr_t{i} * 64, 16, i));
  }
  CHECK(drop_repeated_pairs(pairs, true).kind == Conflict::kNone);
  const std::vector<Chunk> many = build_chunks(pairs, kChunkElementsCpu).entries;
  CHECK(many.size() == 1000000);
  CHECK(many.back().pair == 999999);
}

// Which averages share a walk over their source.
void check_chains() {
  const auto average = [](std::uint8_t k, std::uintptr_t averaged, std::uintptr_t source,
                          DType dtype = DType::kFloat32) {
    Pair pair = pair_of(averaged, source, 5, k, dtype);
    pair.average = k;
    return pair;
  };
  // Three of one source; another's; one aligned otherwise, one of another type.
  const std::vector<Pair> pairs{
      average(0, 0x10000, 0x1000), average(0, 0x20000, 0x2000),
      average(1, 0x30000, 0x1000), average(2, 0x40000, 0x1000),
      average(3, 0x50004, 0x1000), average(4, 0x60000, 0x1000, DType::kFloat64)};
  const ChunkTable table = build_chunks(pairs, 4);
  CHECK(table.entries.size() == 12 && table.heads == 8);
  std::size_t walked = 0;
  for (std::int64_t head = 0; head < table.heads; ++head) {
    const Chunk* entry = &table.entries[static_cast<std::size_t>(head)];
    const Chunk& first = *entry;
    std::uint8_t length = 1;
    while (entry->next != 0) {
      entry = &table.entries[static_cast<std::size_t>(entry->next)];
      CHECK(entry->source == first.source && entry->count == first.count);
      CHECK(entry->first == first.first && entry->averaged_dtype == first.averaged_dtype);
      CHECK(entry->average == length);
      ++length;
    }
    CHECK(length == (address(first.averaged) < 0x20000 ? 3 : 1));
    walked += length;
  }
  CHECK(walked == table.entries.size());
  // Without several averages nothing is looked for.
  CHECK(build_chunks({pair_of(0x10000, 0x1000, 5), pair_of(0x20000, 0x1000, 5)}, 8).heads == 2);
}

void check_chunk_elements() {
  const auto chosen = [](std::int64_t elements) {
    return chunk_elements_cuda({pair_of(0x1000, 0x2000, elements)}, 396);
  };
  CHECK(chosen(0) == kLeastChunkElementsCuda);
  CHECK(chosen(25'557'032) == kLeastChunkElementsCuda);
  CHECK(chosen(268'435'456) == 40960);
  CHECK(chosen(std::int64_t{1} << 40) == kMostChunkElementsCuda);
  std::vector<Pair> several(4, pair_of(0x1000, 0x2000, 268'435'456));
  for (std::uint8_t k = 0; k < 4; ++k) {
    several[k].average = k;
  }
  CHECK(chunk_elements_cuda(several, 396) == 40960);
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
  // One memory as two averages of one source: which of the two weights would count?
  Pair second = one;
  second.average = 1;
  CHECK(conflict_of({one, second}) == Conflict::kAveragedTwice);
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
  check_chains();
  check_chunk_elements();
  check_repetitions();
  check_overlaps();
  return 0;
}
