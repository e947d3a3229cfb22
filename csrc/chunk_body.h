// What one GPU thread does with one chunk.
//
// A chunk is walked in packs: the elements of 16 bytes of the narrower of its two types. A thread
// loads several packs of both tensors before it uses the first, so that enough bytes are in flight
// to fill the memory pipe, and neighbouring threads take neighbouring packs.
//
//   | head | pack 0 | pack 1 | ...                       | tail |
//          ^ the averaged tensor is 16-byte aligned here
//
// Head and tail go element by element. The source's packs are loaded as vectors where it is aligned
// at the same place, else by element; the averaged tensor's always as vectors.
//
// Nothing here shares memory between threads or waits for another thread, so a host program that
// calls this for every thread of every block in turn computes exactly what the device computes.
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace ema_fused {

constexpr std::uint32_t kVectorBytes = 16;
// Bytes of both tensors that one thread has in flight: 32 registers hold them, which leaves enough
// for the arithmetic within the 80 that three blocks a multiprocessor allow.
constexpr std::uint32_t kBytesInFlight = 128;

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
  EMA_FUSED_HD void load_by_element(const T* from) {
    EMA_FUSED_UNROLL
    for (std::uint32_t i = 0; i < kElements; ++i) {
      set(i, from[i]);
    }
  }
  EMA_FUSED_HD void store(T* to) const {
    EMA_FUSED_UNROLL
    for (std::uint32_t i = 0; i < kVectors; ++i) {
      store_streaming(reinterpret_cast<Vector*>(to) + i,
                      Vector{{words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]}});
    }
  }
  EMA_FUSED_HD void store_by_element(T* to) const {
    EMA_FUSED_UNROLL
    for (std::uint32_t i = 0; i < kElements; ++i) {
      to[i] = get(i);
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

// The share of `thread`, one of `threads`, in `packs` packs.
template <bool kSourceAligned, typename A, typename S, typename Functor>
EMA_FUSED_HD void update_packs(A* averaged, S* source, std::uint32_t packs, std::uint32_t thread,
                               std::uint32_t threads, const Functor& functor) {
  constexpr std::uint32_t kElements = kPackElements<A, S>;
  constexpr std::uint32_t kPackBytes =
      kElements * static_cast<std::uint32_t>(sizeof(A) + sizeof(S));
  // Element loads take a register each, however small the element: one pack of them at a time.
  constexpr std::uint32_t kUnroll =
      kSourceAligned && kPackBytes < kBytesInFlight ? kBytesInFlight / kPackBytes : 1;

  for (std::uint32_t first = thread; first < packs; first += kUnroll * threads) {
    Pack<A, kElements> a[kUnroll];
    Pack<S, kElements> s[kUnroll];
    EMA_FUSED_UNROLL
    for (std::uint32_t u = 0; u < kUnroll; ++u) {
      const std::uint32_t pack = first + u * threads;
      if (pack < packs) {
        if constexpr (kSourceAligned) {
          s[u].load(source + pack * kElements);
        } else {
          s[u].load_by_element(source + pack * kElements);
        }
        if constexpr (Functor::kReadsAveraged) {
          a[u].load(averaged + pack * kElements);
        }
      }
    }
    EMA_FUSED_UNROLL
    for (std::uint32_t u = 0; u < kUnroll; ++u) {
      const std::uint32_t pack = first + u * threads;
      if (pack < packs) {
        EMA_FUSED_UNROLL
        for (std::uint32_t i = 0; i < kElements; ++i) {
          A averaged_element{};
          if constexpr (Functor::kReadsAveraged) {
            averaged_element = a[u].get(i);
          }
          S source_element = s[u].get(i);
          functor(averaged_element, source_element);
          a[u].set(i, averaged_element);
          if constexpr (Functor::kWritesSource) {
            s[u].set(i, source_element);
          }
        }
        a[u].store(averaged + pack * kElements);
        if constexpr (Functor::kWritesSource) {
          if constexpr (kSourceAligned) {
            s[u].store(source + pack * kElements);
          } else {
            s[u].store_by_element(source + pack * kElements);
          }
        }
      }
    }
  }
}

struct ChunkBody {
  std::uint32_t count;
  std::uint32_t thread;
  std::uint32_t threads;

  template <typename A, typename S, typename Functor>
  EMA_FUSED_HD void operator()(A* averaged, S* source, const Functor& functor) const {
    constexpr std::uint32_t kElements = kPackElements<A, S>;
    const std::uint32_t to_alignment = elements_to_alignment(averaged);
    const std::uint32_t head = to_alignment < count ? to_alignment : count;
    const std::uint32_t packs = (count - head) / kElements;
    const std::uint32_t tail = head + packs * kElements;

    for (std::uint32_t i = thread; i < head; i += threads) {
      functor(averaged[i], source[i]);
    }
    if (is_aligned(source + head)) {
      update_packs<true>(averaged + head, source + head, packs, thread, threads, functor);
    } else {
      update_packs<false>(averaged + head, source + head, packs, thread, threads, functor);
    }
    for (std::uint32_t i = tail + thread; i < count; i += threads) {
      functor(averaged[i], source[i]);
    }
  }
};

// What thread `thread` of block `block` does: every `blocks`-th chunk, from its own on.
template <Operation kOperation, Arithmetic kArithmetic>
EMA_FUSED_HD void update_as_thread(const Chunk* chunks, std::int64_t chunk_count,
                                   const Launch& launch, std::int64_t block, std::int64_t blocks,
                                   std::uint32_t thread, std::uint32_t threads) {
  for (std::int64_t i = block; i < chunk_count; i += blocks) {
    const Chunk chunk = chunks[i];
    dispatch<kOperation, kArithmetic>(chunk, launch, ChunkBody{chunk.count, thread, threads});
  }
}

}  // namespace ema_fused
