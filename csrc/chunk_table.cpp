#include "chunk_table.h"

#include <algorithm>

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
         a.averaged_dtype == b.averaged_dtype && a.source_dtype == b.source_dtype;
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

}  // namespace

std::int64_t count_chunks(const std::vector<Pair>& pairs, std::int64_t chunk_elements) {
  std::int64_t chunks = 0;
  for (const Pair& pair : pairs) {
    chunks += (pair.count + chunk_elements - 1) / chunk_elements;
  }
  return chunks;
}

std::vector<Chunk> build_chunks(const std::vector<Pair>& pairs, std::int64_t chunk_elements) {
  std::vector<Chunk> chunks;
  chunks.reserve(static_cast<std::size_t>(count_chunks(pairs, chunk_elements)));
  for (const Pair& pair : pairs) {
    // Integer arithmetic on addresses: a table may be built for memory that is not there.
    const std::uintptr_t averaged = address(pair.averaged);
    const std::uintptr_t source = address(pair.source);
    for (std::int64_t start = 0; start < pair.count; start += chunk_elements) {
      Chunk chunk{};
      chunk.averaged = reinterpret_cast<void*>(
          averaged + static_cast<std::uintptr_t>(start * item_size(pair.averaged_dtype)));
      chunk.source = reinterpret_cast<void*>(
          source + static_cast<std::uintptr_t>(start * item_size(pair.source_dtype)));
      chunk.count = static_cast<std::uint32_t>(std::min(chunk_elements, pair.count - start));
      chunk.pair = pair.index;
      chunk.averaged_dtype = pair.averaged_dtype;
      chunk.source_dtype = pair.source_dtype;
      chunk.only_copy = pair.only_copy;
      chunks.push_back(chunk);
    }
  }
  return chunks;
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
