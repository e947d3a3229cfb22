#include "chunk_table.h"

#include <algorithm>
#include <map>
#include <tuple>

namespace ema_fused {
namespace {

struct Span {
  std::uintptr_t begin;
  std::uintptr_t end;
  std::uint32_t index;
  bool is_source;
};

std::uintptr_t address(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer); }

Span averaged_span(const Pair& pair) {
  const std::uintptr_t begin = address(pair.averaged);
  const auto bytes = static_cast<std::uintptr_t>(pair.count * item_size(pair.averaged_dtype));
  return {begin, begin + bytes, pair.index, false};
}

Span source_span(const Pair& pair) {
  const std::uintptr_t begin = address(pair.source);
  const auto bytes = static_cast<std::uintptr_t>(pair.count * item_size(pair.source_dtype));
  return {begin, begin + bytes, pair.index, true};
}

bool same_memory(const Pair& a, const Pair& b) {
  return a.averaged == b.averaged && a.source == b.source && a.count == b.count &&
         a.averaged_dtype == b.averaged_dtype && a.source_dtype == b.source_dtype &&
         a.average == b.average;
}

// Sweeps over spans sorted by address, remembering the farthest end seen of each kind. Sources may
// overlap each other unless they are written.
Conflicts first_overlap(std::vector<Span>& spans, bool writes_source) {
  std::sort(spans.begin(), spans.end(), [](const Span& a, const Span& b) {
    return a.begin != b.begin ? a.begin < b.begin : a.index < b.index;
  });
  const Span* averaged = nullptr;
  const Span* source = nullptr;
  for (const Span& span : spans) {
    if (averaged != nullptr && span.begin < averaged->end) {
      const Conflict kind = span.is_source ? Conflict::kAveragedIsSource : Conflict::kAveragedTwice;
      return {kind, averaged->index, span.index};
    }
    if (source != nullptr && span.begin < source->end && (writes_source || !span.is_source)) {
      const Conflict kind = span.is_source ? Conflict::kSourceTwice : Conflict::kAveragedIsSource;
      return {kind, span.index, source->index};
    }
    const Span*& farthest = span.is_source ? source : averaged;
    if (farthest == nullptr || span.end > farthest->end) {
      farthest = &span;
    }
  }
  return {};
}

std::int64_t chunks_of(const Pair& pair, std::int64_t chunk_elements) {
  return (pair.count + chunk_elements - 1) / chunk_elements;
}

constexpr std::size_t kNone = static_cast<std::size_t>(-1);

// For each pair the one that its chain goes on with, and whether a chain leads to it.
struct Chains {
  std::vector<std::size_t> next;
  std::vector<bool> is_follower;
};

// Pairs are chained where one walk over the source serves them all: the same source, equal types,
// and averaged tensors that are equally far from a vector's boundary.
Chains chain_averages(const std::vector<Pair>& pairs) {
  Chains chains{std::vector<std::size_t>(pairs.size(), kNone),
                std::vector<bool>(pairs.size(), false)};
  const bool several =
      std::any_of(pairs.begin(), pairs.end(), [](const Pair& pair) { return pair.average > 0; });
  if (!several) {
    return chains;
  }
  std::map<std::tuple<std::uintptr_t, DType, std::int64_t, DType, std::uintptr_t, bool>,
           std::size_t>
      ends;
  for (std::size_t i = 0; i < pairs.size(); ++i) {
    const Pair& pair = pairs[i];
    const auto key =
        std::make_tuple(address(pair.source), pair.source_dtype, pair.count, pair.averaged_dtype,
                        address(pair.averaged) % 16, pair.only_copy);
    const auto [end, is_new] = ends.try_emplace(key, i);
    if (!is_new) {
      chains.next[end->second] = i;
      chains.is_follower[i] = true;
      end->second = i;
    }
  }
  return chains;
}

}  // namespace

std::int64_t chunk_elements_cuda(const std::vector<Pair>& pairs, std::int64_t blocks) {
  // Chains are dealt out, whatever their length: of several averages one counts.
  std::int64_t elements = 0;
  for (const Pair& pair : pairs) {
    elements += pair.average == 0 ? pair.count : 0;
  }
  const std::int64_t share = elements / (16 * blocks);
  const std::int64_t rounded = share / kLeastChunkElementsCuda * kLeastChunkElementsCuda;
  return std::clamp(rounded, kLeastChunkElementsCuda, kMostChunkElementsCuda);
}

ChunkTable build_chunks(const std::vector<Pair>& pairs, std::int64_t chunk_elements) {
  const Chains chains = chain_averages(pairs);
  // Where the entries of each pair begin: the heads of chains, then the others.
  std::vector<std::int64_t> begin(pairs.size());
  ChunkTable table;
  std::int64_t size = 0;
  for (const bool followers : {false, true}) {
    for (std::size_t i = 0; i < pairs.size(); ++i) {
      if (chains.is_follower[i] == followers) {
        begin[i] = size;
        size += chunks_of(pairs[i], chunk_elements);
      }
    }
    table.heads = followers ? table.heads : size;
  }

  table.entries.resize(static_cast<std::size_t>(size));
  for (std::size_t i = 0; i < pairs.size(); ++i) {
    const Pair& pair = pairs[i];
    // Integer arithmetic on addresses: a table may be built for memory that is not there.
    const std::uintptr_t averaged = address(pair.averaged);
    const std::uintptr_t source = address(pair.source);
    std::int64_t entry = begin[i];
    for (std::int64_t first = 0; first < pair.count; first += chunk_elements, ++entry) {
      Chunk& chunk = table.entries[static_cast<std::size_t>(entry)];
      chunk.averaged = reinterpret_cast<void*>(
          averaged + static_cast<std::uintptr_t>(first * item_size(pair.averaged_dtype)));
      chunk.source = reinterpret_cast<void*>(
          source + static_cast<std::uintptr_t>(first * item_size(pair.source_dtype)));
      chunk.first = first;
      chunk.next = chains.next[i] == kNone ? 0 : begin[chains.next[i]] + (entry - begin[i]);
      chunk.count = static_cast<std::uint32_t>(std::min(chunk_elements, pair.count - first));
      chunk.pair = pair.index;
      chunk.number = pair.number;
      chunk.averaged_dtype = pair.averaged_dtype;
      chunk.source_dtype = pair.source_dtype;
      chunk.only_copy = pair.only_copy;
      chunk.average = pair.average;
    }
  }
  return table;
}

Conflicts drop_repeated_pairs(std::vector<Pair>& pairs, bool writes_source) {
  pairs.erase(std::remove_if(pairs.begin(), pairs.end(),
                             [](const Pair& pair) {
                               return pair.count == 0 || (pair.averaged == pair.source &&
                                                          pair.averaged_dtype == pair.source_dtype);
                             }),
              pairs.end());

  // Repetitions stand side by side when ordered by address; of each, the first in the lists stays.
  std::vector<std::uint32_t> order(pairs.size());
  for (std::uint32_t i = 0; i < order.size(); ++i) {
    order[i] = i;
  }
  std::sort(order.begin(), order.end(), [&](std::uint32_t i, std::uint32_t j) {
    const Pair& a = pairs[i];
    const Pair& b = pairs[j];
    if (a.averaged != b.averaged) return address(a.averaged) < address(b.averaged);
    if (a.source != b.source) return address(a.source) < address(b.source);
    if (a.count != b.count) return a.count < b.count;
    return i < j;
  });
  bool repeated = false;
  for (std::size_t k = 1; k < order.size(); ++k) {
    if (same_memory(pairs[order[k - 1]], pairs[order[k]])) {
      pairs[order[k]].count = 0;
      order[k] = order[k - 1];  // compare the next one with the pair that stays
      repeated = true;
    }
  }
  if (repeated) {
    pairs.erase(std::remove_if(pairs.begin(), pairs.end(),
                               [](const Pair& pair) { return pair.count == 0; }),
                pairs.end());
  }

  std::vector<Span> spans;
  spans.reserve(2 * pairs.size());
  for (const Pair& pair : pairs) {
    spans.push_back(averaged_span(pair));
    spans.push_back(source_span(pair));
  }
  return first_overlap(spans, writes_source);
}

}  // namespace ema_fused
