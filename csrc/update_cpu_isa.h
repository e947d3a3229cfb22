// The pieces of the CPU loop. Each is compiled on its own, so that cores share the work, and once
// per instruction set: EMA_FUSED_ISA names both the namespace and the flags.
#pragma once

#include <cstdint>

#include "chunk_table.h"
#include "random.h"

#ifndef EMA_FUSED_ISA
#error "EMA_FUSED_ISA must name the instruction set this file is compiled for"
#endif

// The two sides of a pair may be equal but never overlap otherwise (drop_repeated_pairs), so no
// iteration depends on another.
#if defined(__clang__)
#define EMA_FUSED_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define EMA_FUSED_INDEPENDENT _Pragma("GCC ivdep")
#else
#define EMA_FUSED_INDEPENDENT
#endif

namespace ema_fused::EMA_FUSED_ISA {

// What has to be made ahead of a loop, random bits or widened elements, is made for this many
// elements: a core's first cache holds them.
constexpr std::int64_t kElementsATile = 1024;

// Updates one entry, which is one that this operation is for: no average gets an entry that is
// only copied.
template <Operation kOperation, Arithmetic kArithmetic>
void update_entry(const Chunk& chunk, const Launch& launch);

// The squared distance of one entry as it is; 0 where it is only copied.
double distance_of(const Chunk& chunk);

// The random bits of `blocks` blocks from block `first` on, four words each.
void random_blocks(std::uint32_t* words, const RandomKey& key, std::uint64_t first,
                   std::int64_t blocks);

// `count` elements from place `begin` on, in a type that holds them exactly: where they lie, if
// they have that type, else in `tile`.
template <typename Compute>
Compute* widen_elements(void* elements, DType dtype, std::int64_t begin, std::int64_t count,
                        Compute* tile);

}  // namespace ema_fused::EMA_FUSED_ISA
