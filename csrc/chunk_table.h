// The chunk table: what one launch reads. Pairs of tensors of any number, size and type are cut
// into chunks of a bounded number of elements; every entry stands alone, so that a thread block (or
// a CPU thread) needs nothing but its entries and the launch parameters.
//
//   pairs:    [ weight, 20000 elements ] [ bias, 64 ] [ step count, 8 bytes ]
//   chunks:   | 0..8191 | 8192..16383 | 16384..19999 | 0..63 | 0..7 |
#pragma once

#include <cstdint>
#include <type_traits>
#include <vector>

#include "arithmetic.h"
#include "dtypes.h"

namespace ema_fused {

// One averaged tensor and its source, both dense with the same strides: flat memory.
struct Pair {
  void* averaged;
  void* source;  // written by a swap only
  std::int64_t count;
  DType averaged_dtype;
  DType source_dtype;
  bool only_copy;       // an average copies this pair: integer buffers, buffers that follow
  std::uint32_t index;  // its place in the caller's lists, and in the list of weights
};

struct Chunk {
  void* averaged;
  void* source;
  std::uint32_t count;
  std::uint32_t pair;
  DType averaged_dtype;
  DType source_dtype;
  bool only_copy;
};
static_assert(std::is_trivially_copyable_v<Chunk>, "the table is copied to a device as bytes");
static_assert(sizeof(Chunk) == 32, "two entries a cache sector");

// What a launch is told beside its table.
struct Launch {
  Operation operation;
  Arithmetic arithmetic;
  double weight;          // of every pair, where weights is null
  const double* weights;  // one a pair, by Pair::index; in the memory of the device that runs
};

// 8,192 elements: 64 KiB of a float32 pair, which stays in a core's L2 while it is worked on.
constexpr std::int64_t kChunkElementsCpu = 8192;
// 16,384 elements: 64 KiB a tensor; a table entry for every 192 KiB of float32 traffic.
constexpr std::int64_t kChunkElementsCuda = 16384;

std::int64_t count_chunks(const std::vector<Pair>& pairs, std::int64_t chunk_elements);

// Empty pairs get no chunk. Addresses are computed and never read.
std::vector<Chunk> build_chunks(const std::vector<Pair>& pairs, std::int64_t chunk_elements);

// What the pairs do to each other's memory.
enum class Conflict : std::uint8_t {
  kNone,
  kAveragedTwice,     // two pairs write overlapping memory
  kAveragedIsSource,  // one pair writes what another reads
  kSourceTwice,       // two pairs swap overlapping sources
};
struct Conflicts {
  Conflict kind = Conflict::kNone;
  std::uint32_t first = 0;  // Pair::index of the two
  std::uint32_t second = 0;
};

// Drops empty pairs, pairs whose two sides are the same memory, and repetitions of one and the same
// pair (tied tensors, updated once), in place. Then looks for the overlaps that would make the
// result depend on the order of the pairs. `writes_source` is the case of a swap.
Conflicts drop_repeated_pairs(std::vector<Pair>& pairs, bool writes_source);

}  // namespace ema_fused
