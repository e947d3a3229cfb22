// The chunk table: what one launch reads. Pairs of tensors of any number, size and type are cut
// into chunks of a bounded number of elements; a thread block (or a CPU thread) needs nothing but
// its entries and the launch parameters.
//
//   pairs:    [ weight, 20000 elements ] [ bias, 64 ] [ step count, 8 bytes ]
//   entries:  | 0..8191 | 8192..16383 | 16384..19999 | 0..63 | 0..7 |
//
// Where one source has several averages, their entries form a chain, so that the source is read
// once for all of them. The heads of the chains come first: they are what is shared out.
//
//   entries:  | weight of average a | bias of a | weight of average b | bias of b |
//               next ------------------------------^        `--- next ---^
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
  bool only_copy;        // an average copies this pair: integer buffers, buffers that follow
  std::uint8_t average;  // which of several averages: its place in Launch::weight
  std::uint32_t index;   // its place in the lists of this table, and in the list of weights
  std::uint32_t number;  // its place in the caller's lists: what its random bits are counted by
};

struct alignas(16) Chunk {
  void* averaged;
  void* source;
  std::int64_t first;  // the place of the first element in its tensor
  std::int64_t next;   // the entry of the next average of the same elements; 0: there is none
  std::uint32_t count;
  std::uint32_t pair;
  std::uint32_t number;
  DType averaged_dtype;
  DType source_dtype;
  bool only_copy;
  std::uint8_t average;
};
static_assert(std::is_trivially_copyable_v<Chunk>, "the table is copied to a device as bytes");
static_assert(sizeof(Chunk) == 48, "no entry in more than two 32-byte sectors of a cache");

struct ChunkTable {
  std::vector<Chunk> entries;
  std::int64_t heads = 0;  // entries[0, heads) each begin a chain
};

// How many averages of one source a launch can give a weight each.
constexpr std::int64_t kMaxAverages = 8;

// A weight: a number, or where a number lies in the memory of the device that runs.
struct Weight {
  double number;
  const void* at;   // null: `number` counts
  bool is_float64;  // else float32
};

// What a launch is told beside its table. Pointers are into the memory of the device that runs.
struct Launch {
  Operation operation;
  Arithmetic arithmetic;
  Weight weight[kMaxAverages];  // by Chunk::average
  const double* weights;        // null, or one a pair that counts instead, by Chunk::pair
  const float* found_inf;       // null, or a flag: anything but 0 makes the launch do nothing
  // Of stochastic rounding: what the random bits are counted by, beside pair and element.
  std::uint64_t seed;
  std::int64_t step;
  const std::int64_t* step_at;  // null, or where the step lies instead
};

// Where a launch that measures puts the squared distance between source and averages: for each
// average `count` parts, whose sum it is. Memory of the device that runs.
struct Partials {
  double* sums = nullptr;  // null: nobody asks
  std::int64_t averages = 0;
  std::int64_t count = 0;
};

inline Launch launch_of(Operation operation, Arithmetic arithmetic, double weight) {
  Launch launch{};
  launch.operation = operation;
  launch.arithmetic = arithmetic;
  for (Weight& one : launch.weight) {
    one.number = weight;
  }
  return launch;
}

// 8,192 elements: 64 KiB of a float32 pair, which stays in a core's L2 while it is worked on.
constexpr std::int64_t kChunkElementsCpu = 8192;

// On a GPU chunks are dealt out to the blocks in turn. So that no block is left with much more than
// another, a block should get some 16 of them; a chunk of 4,096 elements of a float32 average still
// gives each of its 256 threads a full round of work, and beyond 65,536 nothing is gained.
constexpr std::int64_t kLeastChunkElementsCuda = 4096;
constexpr std::int64_t kMostChunkElementsCuda = 65536;
std::int64_t chunk_elements_cuda(const std::vector<Pair>& pairs, std::int64_t blocks);

// Empty pairs get no chunk. Addresses are computed and never read.
ChunkTable build_chunks(const std::vector<Pair>& pairs, std::int64_t chunk_elements);

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
