// What one GPU thread does with one chunk.
//
// A chunk is walked in packs: the elements of 16 bytes of the narrower of its two types. A thread
// loads several packs of both tensors before it uses the first, so that enough bytes are in flight
// to fill the memory pipe, and neighbouring threads take neighbouring packs.
//
//   | head | pack 0 | pack 1 | ...                       | tail |
//          ^ both tensors are 16-byte aligned here
//
// Head and tail go element by element, and so does a whole chunk whose tensors are not aligned at
// the same place. Where a source has several averages the packs of the source stay in registers
// while one average after the other is updated from them.
//
// Nothing here shares memory between threads or waits for another thread, so a host program that
// calls this for every thread of every block in turn computes exactly what the device computes.
#pragma once

#include <cstdint>
#include <type_traits>

#include "dispatch.h"
#include "squared_distance.h"

namespace ema_fused {

constexpr std::uint32_t kVectorBytes = 16;
// Bytes of both tensors that one thread has in flight at most: 32 registers hold them, which leaves
// enough for the arithmetic within the 80 that three blocks a multiprocessor allow.
constexpr std::uint32_t kBytesInFlight = 128;
// Making random bits takes registers too.
constexpr std::uint32_t kBytesInFlightRandom = 64;

struct alignas(kVectorBytes) Vector {
  std::uint32_t words[4];
};

// Streaming: these bytes are used once a step, so they should not push others out of the cache.
EMA_FUSED_HD Vector load_streaming(const Vector* from) {
#if defined(__CUDA_ARCH__)
  const uint4 value = __ldcs(reinterpret_cast<const uint4*>(from));
  return Vector{{value.x, value.y, value.z, value.w}};
#else
  return *from;
#endif
}

EMA_FUSED_HD void store_streaming(Vector* to, const Vector& value) {
#if defined(__CUDA_ARCH__)
  __stcs(reinterpret_cast<uint4*>(to),
         make_uint4(value.words[0], value.words[1], value.words[2], value.words[3]));
#else
  *to = value;
#endif
}

// The unsigned integer that is as large as T.
template <typename T>
using Bits = std::conditional_t<
    sizeof(T) == 8, unsigned long long,
    std::conditional_t<sizeof(T) == 4, unsigned int,
                       std::conditional_t<sizeof(T) == 2, unsigned short, unsigned char>>>;

template <typename T>
EMA_FUSED_HD T load_streaming(const T* from) {
#if defined(__CUDA_ARCH__)
  return bit_cast<T>(__ldcs(reinterpret_cast<const Bits<T>*>(from)));
#else
  return *from;
#endif
}

template <typename T>
EMA_FUSED_HD void store_streaming(T* to, T value) {
#if defined(__CUDA_ARCH__)
  __stcs(reinterpret_cast<Bits<T>*>(to), bit_cast<Bits<T>>(value));
#else
  *to = value;
#endif
}

// kElements elements held as the 32-bit words that registers are. Elements are cut out of the words
// by shifts: an array of 16-bit elements would be put into local memory.
template <typename T, std::uint32_t kElements>
struct Pack {
  static constexpr std::uint32_t kVectors = kElements * sizeof(T) / kVectorBytes;
  static_assert(kElements * sizeof(T) % kVectorBytes == 0);
  std::uint32_t words[4 * kVectors]{};

  EMA_FUSED_HD void load(const T* from) {
    EMA_FUSED_UNROLL
    for (std::uint32_t i = 0; i < kVectors; ++i) {
      const Vector vector = load_streaming(reinterpret_cast<const Vector*>(from) + i);
      EMA_FUSED_UNROLL
      for (std::uint32_t k = 0; k < 4; ++k) {
        words[4 * i + k] = vector.words[k];
      }
    }
  }
  EMA_FUSED_HD void store(T* to) const {
    EMA_FUSED_UNROLL
    for (std::uint32_t i = 0; i < kVectors; ++i) {
      store_streaming(reinterpret_cast<Vector*>(to) + i,
                      Vector{{words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]}});
    }
  }

  EMA_FUSED_HD T get(std::uint32_t i) const {
    if constexpr (sizeof(T) == 8) {
      return bit_cast<T>(static_cast<std::uint64_t>(words[2 * i + 1]) << 32 | words[2 * i]);
    } else if constexpr (sizeof(T) == 4) {
      return bit_cast<T>(words[i]);
    } else if constexpr (sizeof(T) == 2) {
      return bit_cast<T>(static_cast<std::uint16_t>(words[i / 2] >> (16 * (i % 2))));
    } else {
      return bit_cast<T>(static_cast<std::uint8_t>(words[i / 4] >> (8 * (i % 4))));
    }
  }
  EMA_FUSED_HD void set(std::uint32_t i, T value) {
    if constexpr (sizeof(T) == 8) {
      const std::uint64_t bits = bit_cast<std::uint64_t>(value);
      words[2 * i] = static_cast<std::uint32_t>(bits);
      words[2 * i + 1] = static_cast<std::uint32_t>(bits >> 32);
    } else if constexpr (sizeof(T) == 4) {
      words[i] = bit_cast<std::uint32_t>(value);
    } else if constexpr (sizeof(T) == 2) {
      insert(words[i / 2], bit_cast<std::uint16_t>(value), 0xffffu, 16 * (i % 2));
    } else {
      insert(words[i / 4], bit_cast<std::uint8_t>(value), 0xffu, 8 * (i % 4));
    }
  }

 private:
  EMA_FUSED_HD static void insert(std::uint32_t& word, std::uint32_t bits, std::uint32_t mask,
                                  std::uint32_t shift) {
    word = (word & ~(mask << shift)) | (bits << shift);
  }
};

EMA_FUSED_HD bool is_aligned(const void* pointer) {
  return reinterpret_cast<std::uintptr_t>(pointer) % kVectorBytes == 0;
}

// One element, handled like a pack.
template <typename T>
struct Single {
  T value{};

  EMA_FUSED_HD void load(const T* from) { value = load_streaming(from); }
  EMA_FUSED_HD void store(T* to) const { store_streaming(to, value); }
  EMA_FUSED_HD T get(std::uint32_t) const { return value; }
  EMA_FUSED_HD void set(std::uint32_t, T element) { value = element; }
};

// The element at place `i` of a source whose type the chunk names.
template <typename Compute>
EMA_FUSED_HD Compute load_widened(const void* source, DType dtype, std::uint32_t i) {
  switch (dtype) {
    case DType::kFloat32:
      return to_compute<Compute>(load_streaming(static_cast<const float*>(source) + i));
    case DType::kBFloat16:
      return to_compute<Compute>(load_streaming(static_cast<const BFloat16*>(source) + i));
    case DType::kFloat16:
      return to_compute<Compute>(load_streaming(static_cast<const Float16*>(source) + i));
    case DType::kFloat8E4M3:
      return to_compute<Compute>(load_streaming(static_cast<const Float8E4M3*>(source) + i));
    case DType::kFloat8E5M2:
      return to_compute<Compute>(load_streaming(static_cast<const Float8E5M2*>(source) + i));
    case DType::kFloat64:  // never widened
    case DType::kComplex64:
    case DType::kComplex128:
    case DType::kBytes:
      return Compute(0);
  }
  return Compute(0);
}

// Asks for an entry of the table ahead of its turn; threads 0 and 1 for its two ends, which may lie
// in two sectors of the cache.
EMA_FUSED_HD void prefetch([[maybe_unused]] const Chunk* entry,
                           [[maybe_unused]] std::uint32_t thread) {
#if defined(__CUDA_ARCH__)
  if (thread < 2) {
    asm volatile("prefetch.global.L1 [%0];" ::"l"(reinterpret_cast<const char*>(entry) +
                                                  thread * (sizeof(Chunk) - 1)));
  }
#endif
}

// Elements before the first 16-byte boundary. A pointer off its own element size never meets one
// (such tensors don't get here).
template <typename T>
EMA_FUSED_HD std::uint32_t elements_to_alignment(const T* pointer) {
  const auto past =
      static_cast<std::uint32_t>(reinterpret_cast<std::uintptr_t>(pointer) % kVectorBytes);
  return past == 0 ? 0 : (kVectorBytes - past) / static_cast<std::uint32_t>(sizeof(T));
}

template <typename A, typename S>
constexpr std::uint32_t kPackElements =
    kVectorBytes / static_cast<std::uint32_t>(sizeof(A) < sizeof(S) ? sizeof(A) : sizeof(S));

// One average of a chain: where it lies and what to do to it.
template <typename A, typename Functor>
struct Target {
  A* averaged;
  std::int64_t next;
  Functor functor;
  std::uint32_t number;

  EMA_FUSED_HD Target(const Chunk& entry, const Launch& launch)
      : averaged(static_cast<A*>(entry.averaged)),
        next(entry.next),
        functor(weight_of(launch, entry)),
        number(entry.number) {}
};

// Which elements of a chunk a walk covers: units of a fixed number of elements, one behind the
// other, but for the elements [hole, hole + hole_size).
struct Range {
  std::uint32_t units;
  std::uint32_t hole;
  std::uint32_t hole_size;
};

template <typename Measure>
struct ChunkBody {
  static constexpr bool kServesComplex = false;
  const Chunk* entries;
  const Chunk& chunk;
  const Launch& launch;
  std::uint32_t thread;
  std::uint32_t threads;
  Measure& measure;

  // Copies among averages have no distance.
  template <typename Functor>
  static constexpr bool kMeasured = Measure::kMeasures && Functor::kReadsAveraged;

  template <typename Types>
  EMA_FUSED_HD void operator()(Types) const {
    using A = typename Types::Averaged;
    using S = typename Types::Source;
    using Functor = typename Types::Functor;
    Target<A, Functor> target = target_of<A, Functor>(chunk);

    std::uint32_t head = 0;
    std::uint32_t in_packs = 0;
    // A measured update goes element by element: it is asked for once in a while, and five more
    // kernels with packs would take nearly as long to compile as all the others.
    if constexpr (kIsCommon<A, S> && !Measure::kMeasures) {
      constexpr std::uint32_t kElements = kPackElements<A, S>;
      head = elements_to_alignment(target.averaged);
      bool packs_fit = head < chunk.count && is_aligned(static_cast<S*>(chunk.source) + head);
      if constexpr (Functor::kRandom) {
        // A pack takes the bits of one random block.
        static_assert(kElements % kElementsARandomBlock == 0);
        packs_fit = packs_fit && (chunk.first + head) % kElementsARandomBlock == 0;
      }
      if (packs_fit) {
        constexpr auto kPackBytes = kElements * static_cast<std::uint32_t>(sizeof(A) + sizeof(S));
        constexpr std::uint32_t kBytes = Functor::kRandom ? kBytesInFlightRandom : kBytesInFlight;
        constexpr std::uint32_t kUnroll = kPackBytes < kBytes ? kBytes / kPackBytes : 1;
        const std::uint32_t packs = (chunk.count - head) / kElements;
        walk<kElements, kUnroll, Pack<A, kElements>, Pack<S, kElements>, S>(target,
                                                                            {packs, 0, head});
        in_packs = packs * kElements;
      }
    }
    // Neither random bits nor rare types are worth more registers and code.
    constexpr std::uint32_t kSingles = Functor::kRandom || Widening<S>::kWidens ? 1 : 4;
    using Element = typename Widening<S>::Element;
    walk<1, kSingles, Single<A>, Single<Element>, S>(target,
                                                     {chunk.count - in_packs, head, in_packs});
  }

 private:
  template <typename A, typename Functor>
  EMA_FUSED_HD Target<A, Functor> target_of(const Chunk& entry) const {
    if constexpr (kMeasured<Functor>) {
      measure.turn_to(entry.average);
    }
    return Target<A, Functor>(entry, launch);
  }

  template <std::uint32_t kElements, std::uint32_t kUnroll, typename PackA, typename PackS,
            typename S, typename A, typename Functor>
  EMA_FUSED_HD void walk(Target<A, Functor>& target, const Range& range) const {
    void* const source = chunk.source;
    for (std::uint32_t first = thread; first < range.units; first += kUnroll * threads) {
      // Recomputed where it is needed: registers are scarcer.
      const auto at = [&](std::uint32_t u) {
        const std::uint32_t element = (first + u * threads) * kElements;
        return element + (element < range.hole ? 0 : range.hole_size);
      };
      PackS s[kUnroll];
      EMA_FUSED_UNROLL
      for (std::uint32_t u = 0; u < kUnroll; ++u) {
        if (first + u * threads < range.units) {
          if constexpr (Widening<S>::kWidens) {
            s[u].value = load_widened<decltype(s[u].value)>(source, chunk.source_dtype, at(u));
          } else {
            s[u].load(static_cast<const S*>(source) + at(u));
          }
        }
      }
      while (true) {
        PackA a[kUnroll];
        EMA_FUSED_UNROLL
        for (std::uint32_t u = 0; u < kUnroll; ++u) {
          if (Functor::kReadsAveraged && first + u * threads < range.units) {
            a[u].load(target.averaged + at(u));
          }
        }
        EMA_FUSED_UNROLL
        for (std::uint32_t u = 0; u < kUnroll; ++u) {
          if (first + u * threads < range.units) {
            update<kElements>(target, a[u], s[u], at(u));
            a[u].store(target.averaged + at(u));
            if constexpr (Functor::kWritesSource) {
              s[u].store(static_cast<S*>(source) + at(u));
            }
          }
        }
        // A source that is written has one partner.
        if (Functor::kWritesSource || target.next == 0) {
          break;
        }
        target = target_of<A, Functor>(entries[target.next]);
      }
      if (!Functor::kWritesSource && chunk.next != 0) {
        target = target_of<A, Functor>(chunk);
      }
    }
  }

  // The elements from place `at` of the chunk on.
  template <std::uint32_t kElements, typename PackA, typename PackS, typename A, typename Functor>
  EMA_FUSED_HD void update(const Target<A, Functor>& target, PackA& a, PackS& s,
                           [[maybe_unused]] std::uint32_t at) const {
    using S = decltype(s.get(0));
    EMA_FUSED_UNROLL
    for (std::uint32_t begin = 0; begin < kElements; begin += kElementsARandomBlock) {
      [[maybe_unused]] const auto place = static_cast<std::uint64_t>(chunk.first) + at + begin;
      [[maybe_unused]] RandomWords random{};
      if constexpr (Functor::kRandom) {
        random = random_block(random_key_of(launch, target.number), place / kElementsARandomBlock);
      }
      EMA_FUSED_UNROLL
      for (std::uint32_t i = begin; i < kElements && i < begin + kElementsARandomBlock; ++i) {
        A averaged = a.get(i);
        S source = s.get(i);
        if constexpr (kMeasured<Functor>) {
          measure.add(averaged, source);
        }
        if constexpr (Functor::kRandom) {
          // Of a pack the lane is known when this is compiled.
          const std::uint32_t lane = kElements == 1
                                         ? static_cast<std::uint32_t>(place % kElementsARandomBlock)
                                         : i - begin;
          target.functor(averaged, source, random_half(random, lane));
        } else {
          target.functor(averaged, source);
        }
        a.set(i, averaged);
        if constexpr (Functor::kWritesSource) {
          s.set(i, source);
        }
      }
    }
  }
};

// What thread `thread` of block `block` does: every `blocks`-th chain, from its own on.
template <Operation kOperation, Arithmetic kArithmetic, typename Measure>
EMA_FUSED_HD void update_as_thread(const Chunk* entries, std::int64_t heads, const Launch& launch,
                                   std::int64_t block, std::int64_t blocks, std::uint32_t thread,
                                   std::uint32_t threads, Measure& measure) {
  if (is_skipped(launch)) {
    return;
  }
  // Counted by the entry's address alone: an index beside it would take registers.
  const Chunk* const end = entries + heads;
  for (const Chunk* entry = entries + block; entry < end; entry += blocks) {
    if (entry + blocks < end) {
      prefetch(entry + blocks, thread);
    }
    // By reference: what is needed of an entry late is read late.
    const Chunk& chunk = *entry;
    const ChunkBody<Measure> body{entries, chunk, launch, thread, threads, measure};
    if constexpr (kOperation == Operation::kAverage) {
      if (chunk.only_copy) {
        // Converted copies among averages are a model's few buffers: they have no vectors.
        with_copy<false>(chunk, body);
        continue;
      }
    }
    dispatch<kOperation, kArithmetic>(chunk, body);
  }
}

// The same of an average that is measured. `partials` has a part for each thread.
template <Arithmetic kArithmetic>
EMA_FUSED_HD void update_measured_as_thread(const Chunk* entries, std::int64_t heads,
                                            const Launch& launch, const Partials& partials,
                                            std::int64_t block, std::int64_t blocks,
                                            std::uint32_t thread, std::uint32_t threads) {
  MeasuredByThread measure(partials, static_cast<std::uint32_t>(block) * threads + thread);
  update_as_thread<Operation::kAverage, kArithmetic>(entries, heads, launch, block, blocks, thread,
                                                     threads, measure);
  measure.finish();
}

}  // namespace ema_fused
