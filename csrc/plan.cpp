#include "plan.h"

#include <algorithm>
#include <map>
#include <stdexcept>

#include "update_cpu.h"
#ifdef EMA_FUSED_HAVE_CUDA
#include "update_cuda.cuh"
#else
// Lets the pointer to it be destroyed; none is ever made.
namespace ema_fused::cuda {
class DeviceTable {};
}  // namespace ema_fused::cuda
#endif

namespace ema_fused {
namespace {

// The work of one thread is told in picoseconds, as a core does it on memory that is not in its
// caches: 10 GB/s, and what a chunk and its random bits cost beside.
constexpr std::int64_t kPicosecondsAByte = 100;
constexpr std::int64_t kPicosecondsAChunk = 30'000;
constexpr std::int64_t kPicosecondsARandomElement = 500;
// The least that is shared out. On an idle machine a second thread would bring something from tens
// of microseconds on. But where other processes hold the cores (data loaders, evaluations), a woken
// thread waits for its turn, milliseconds, and this one for it: the share must be worth that risk.
constexpr std::int64_t kPicosecondsToShare = 1'500'000'000;

std::int64_t work_of(const Chunk& chunk, Arithmetic arithmetic) {
  const std::int64_t bytes = 2 * item_size(chunk.averaged_dtype) + item_size(chunk.source_dtype);
  const bool is_random = arithmetic == Arithmetic::kStochastic && !chunk.only_copy;
  return kPicosecondsAChunk +
         chunk.count * (bytes * kPicosecondsAByte + (is_random ? kPicosecondsARandomElement : 0));
}

const char* describe(Conflict conflict) {
  switch (conflict) {
    case Conflict::kAveragedTwice:
      return "averaged tensors overlap in memory";
    case Conflict::kAveragedIsSource:
      return "an averaged tensor overlaps a source tensor in memory";
    case Conflict::kSourceTwice:
      return "source tensors overlap in memory, and a swap writes them";
    case Conflict::kNone:
      break;
  }
  return "";
}

// Dense: the elements fill one block of memory, in some order of the dimensions.
bool is_dense(const TensorFacts& facts) {
  std::vector<std::pair<std::int64_t, std::int64_t>> steps;  // stride, size
  for (std::size_t d = 0; d < facts.sizes.size(); ++d) {
    if (facts.sizes[d] > 1) {
      steps.emplace_back(facts.strides[d], facts.sizes[d]);
    }
  }
  std::sort(steps.begin(), steps.end());
  std::int64_t expected = 1;
  for (const auto& [stride, size] : steps) {
    if (stride != expected) {
      return false;
    }
    expected *= size;
  }
  return true;
}

// Strides matter only along dimensions longer than one.
bool same_strides(const TensorFacts& a, const TensorFacts& b) {
  for (std::size_t d = 0; d < a.sizes.size(); ++d) {
    if (a.sizes[d] > 1 && a.strides[d] != b.strides[d]) {
      return false;
    }
  }
  return true;
}

// Whether our complex numbers have torch's bits: elsewhere the compiler of torch's loops may have
// contracted products and sums.
#if defined(__x86_64__)
constexpr bool kHasComplexKernel = true;
#else
constexpr bool kHasComplexKernel = false;
#endif

bool is_host(const dlpack::Device& device) {
  return device.type == dlpack::kCpu || device.type == dlpack::kCudaHost;
}

bool same_device(const dlpack::Device& a, const dlpack::Device& b) {
  return (is_host(a) && is_host(b)) || (a.type == b.type && a.id == b.id);
}

bool is_aligned(const TensorFacts& facts) {
  return facts.item_bytes == 0 || reinterpret_cast<std::uintptr_t>(facts.data) %
                                          static_cast<std::uintptr_t>(facts.item_bytes) ==
                                      0;
}

// Why one tensor can't be given to a kernel; empty where it can.
std::string refusal_of(PyObject* tensor, const char* which, TensorFacts& facts) {
  const std::string name = which;
  if (!torch_doors::is_tensor(tensor)) {
    return "the " + name + " is not a torch.Tensor";
  }
  try {
    facts = facts_of(tensor);
  } catch (const std::invalid_argument& error) {
    return "the " + name + " gives no access to its memory (" + error.what() + ")";
  }
  if (facts.elements > 0 && facts.data == nullptr) {
    return "the " + name + " has no memory of its own";
  }
  if (facts.exact_dtype.code == dlpack::kComplex) {
    if (torch_doors::is_conjugated(tensor)) {
      return "the " + name + " has its conjugation pending (resolve_conj() materialises it)";
    }
    if (!kHasComplexKernel || !is_complex(facts.dtype) || !is_host(facts.device)) {
      return "complex tensors have a kernel in complex64 and complex128 on x86-64 processors only";
    }
  }
  if (facts.item_bytes == 0) {
    return "the " + name + "'s elements are smaller than a byte";
  }
  if (!is_aligned(facts)) {
    return "the " + name + " is not aligned to its element size";
  }
  if (torch_doors::is_negated(tensor)) {
    return "the " + name + " has its negation pending (resolve_neg() materialises it)";
  }
  return {};
}

std::string refusal_of(const TensorFacts& averaged, const TensorFacts& source) {
  if (averaged.sizes != source.sizes) {
    return "the shapes differ";
  }
  if (!same_device(averaged.device, source.device)) {
    return "the two tensors are on different devices";
  }
  const bool bytes = averaged.dtype == DType::kBytes || source.dtype == DType::kBytes;
  const auto& a = averaged.exact_dtype;
  const auto& s = source.exact_dtype;
  const bool same = a.code == s.code && a.bits == s.bits && a.lanes == s.lanes;
  const bool complex = is_complex(averaged.dtype) || is_complex(source.dtype);
  if (!same && (bytes || complex || !can_be_averaged(averaged.dtype))) {
    return "this combination of dtypes has no kernel";
  }
  if (!is_dense(averaged)) {
    return "the averaged tensor is not dense";
  }
  if (!same_strides(averaged, source)) {
    return "the source's strides are not the averaged tensor's";
  }
  return {};
}

}  // namespace

Inspection inspect(PyObject* averaged, PyObject* source) {
  if (list_size(averaged) != list_size(source)) {
    throw std::invalid_argument("the lists differ in length");
  }
  Inspection result;
  std::map<std::pair<std::int32_t, std::int32_t>, std::vector<std::size_t>> devices;
  for (std::size_t i = 0; i < list_size(averaged); ++i) {
    TensorFacts a;
    TensorFacts s;
    std::string refusal = refusal_of(list_item(averaged, i), "averaged tensor", a);
    if (refusal.empty()) refusal = refusal_of(list_item(source, i), "source", s);
    if (refusal.empty()) refusal = refusal_of(a, s);
    if (refusal.empty()) {
      const bool host = is_host(a.device);
      devices[{host ? dlpack::kCpu : a.device.type, host ? 0 : a.device.id}].push_back(i);
    } else {
      result.refusals.emplace_back(i, std::move(refusal));
    }
  }
  for (auto& [device, indices] : devices) {
    result.devices.emplace_back(device.first, device.second, std::move(indices));
  }
  return result;
}

Plan::Plan(PyObject* averaged, PyObject* source, std::vector<PairOptions> options,
           Arithmetic arithmetic)
    : watch_(averaged, source), options_(std::move(options)), arithmetic_(arithmetic) {
  if (list_size(averaged) != size() || list_size(source) != size()) {
    throw std::invalid_argument("the lists differ in length");
  }
  if (size() > 0) {
    device_ = this->averaged(0).device;
    if (is_host(device_)) {
      device_ = {dlpack::kCpu, 0};
    }
  }
#ifdef EMA_FUSED_HAVE_CUDA
  if (is_cuda()) {
    cuda_table_ = std::make_unique<cuda::DeviceTable>(device_.id);
  }
#endif
  if (device_.type != dlpack::kCpu && cuda_table_ == nullptr && size() > 0) {
    throw std::invalid_argument("this build has no kernel for the device of these tensors");
  }
  for (std::size_t i = size(); i-- > 0;) {
    averages_ = std::max<std::int64_t>(averages_, options_[i].average + 1);
    const TensorFacts& a = this->averaged(i);
    if (!options_[i].only_copy && !can_be_averaged(a.dtype)) {
      no_average_ = static_cast<std::int64_t>(i);
    }
    if (a.dtype != this->source(i).dtype) {
      no_swap_ = static_cast<std::int64_t>(i);
    }
  }
  build_table();
}

Plan::~Plan() = default;

std::tuple<std::int64_t, bool, std::string> Plan::changed() const {
  const auto [tensor, planned] = watch_.changed_kind();
  const auto count = static_cast<std::int64_t>(size());
  if (tensor < 0) {
    return {-1, false, ""};
  }
  return {tensor % count, tensor >= count, planned};
}

std::vector<Pair> Plan::pairs() const {
  std::vector<Pair> pairs;
  pairs.reserve(size());
  for (std::size_t i = 0; i < size(); ++i) {
    const TensorFacts& a = averaged(i);
    const TensorFacts& s = source(i);
    Pair pair{};
    pair.averaged = a.data;
    pair.source = s.data;
    pair.count = a.dtype == DType::kBytes ? a.elements * a.item_bytes : a.elements;
    pair.averaged_dtype = a.dtype;
    pair.source_dtype = s.dtype;
    pair.only_copy = options_[i].only_copy;
    pair.average = options_[i].average;
    pair.index = static_cast<std::uint32_t>(i);
    pair.number = options_[i].number;
    pairs.push_back(pair);
  }
  return pairs;
}

void Plan::build_table() {
  table_is_stale_ = true;
  swap_is_checked_ = false;
  std::vector<Pair> todo = pairs();
  const Conflicts conflicts = drop_repeated_pairs(todo, false);
  if (conflicts.kind != Conflict::kNone) {
    throw OverlapError{conflicts.first, conflicts.second, describe(conflicts.kind)};
  }
  elements_ = 0;
  for (const Pair& pair : todo) {
    elements_ += averaged(pair.index).elements;
  }
#ifdef EMA_FUSED_HAVE_CUDA
  if (is_cuda()) {
    const ChunkTable table = build_chunks(todo, chunk_elements_cuda(todo, cuda_table_->blocks()));
    chunk_count_ = static_cast<std::int64_t>(table.entries.size());
    cuda_table_->upload(table);
    table_is_stale_ = false;
    return;
  }
#endif
  CpuTable table;
  table.chunks = build_chunks(todo, kChunkElementsCpu);
  const std::vector<Chunk>& entries = table.chunks.entries;
  chunk_count_ = static_cast<std::int64_t>(entries.size());
  table.work_before.reserve(static_cast<std::size_t>(table.chunks.heads));
  for (std::int64_t head = 0; head < table.chunks.heads; ++head) {
    table.work_before.push_back(table.work);
    auto entry = static_cast<std::size_t>(head);
    do {
      table.work += work_of(entries[entry], arithmetic_);
      entry = static_cast<std::size_t>(entries[entry].next);
    } while (entry != 0);
  }
  cpu_table_ = std::move(table);
  table_is_stale_ = false;
}

// Follows tensors that have moved. False where one has changed in kind.
bool Plan::refresh() {
  if (watch_.released()) {
    return true;
  }
  const Change change = watch_.check();
  if (change != Change::kNone) {
    // Stays set if something is raised before the table is new: the watch has moved on already.
    table_is_stale_ = true;
  }
  if (change == Change::kDifferent) {
    return false;
  }
  if (table_is_stale_) {
    build_table();
  }
  return true;
}

void Plan::require(Operation operation) {
  if (operation == Operation::kAverage && no_average_ >= 0) {
    throw std::invalid_argument("only floating-point pairs can be averaged");
  }
  if (operation == Operation::kSwap && !swap_is_checked_) {
    std::vector<Pair> todo = pairs();
    const Conflicts conflicts = drop_repeated_pairs(todo, true);
    if (conflicts.kind != Conflict::kNone) {
      throw OverlapError{conflicts.first, conflicts.second, describe(conflicts.kind)};
    }
    if (no_swap_ >= 0) {
      throw std::invalid_argument("only pairs of one dtype can be swapped");
    }
    swap_is_checked_ = true;
  }
}

std::int64_t Plan::partials() const {
#ifdef EMA_FUSED_HAVE_CUDA
  if (is_cuda()) {
    return cuda_table_->partials();
  }
#endif
  return 1;
}

bool Plan::run(Operation operation, double weight, const LaunchOptions& options) {
  const std::vector<double>& by_pair = options.weights_by_pair;
  if (!by_pair.empty() && by_pair.size() != size()) {
    throw std::invalid_argument("one weight a pair is needed");
  }
  if (static_cast<std::int64_t>(options.weights_by_average.size()) > kMaxAverages) {
    throw std::invalid_argument("too many averages");
  }
  const Partials& partials = options.partials;
  if (partials.sums != nullptr && (partials.averages < averages_ || partials.count < 1)) {
    throw std::invalid_argument("a sum for every average and part is needed");
  }
  if (!refresh()) {
    return false;
  }
  require(operation);
  Launch launch = launch_of(operation, arithmetic_, weight);
  std::copy(options.weights_by_average.begin(), options.weights_by_average.end(), launch.weight);
  launch.found_inf = options.found_inf;
  launch.seed = options.seed;
  launch.step = options.step;
  launch.step_at = options.step_at;
#ifdef EMA_FUSED_HAVE_CUDA
  if (is_cuda()) {
    void* stream = torch_doors::current_stream(device_.type, device_.id);
    cuda_table_->run(launch, by_pair, partials, stream);
    return true;
  }
#endif
  launch.weights = by_pair.empty() ? nullptr : by_pair.data();
  run_on_cpu(launch, partials);
  return true;
}

void Plan::run_on_cpu(const Launch& launch, const Partials& partials) const {
  struct Context {
    const CpuTable* table;
    const Launch* launch;
    UpdateChunks update_chunks;
    double* distances;
  };
  const std::vector<Chunk>& entries = cpu_table_.chunks.entries;
  std::vector<double> distances(partials.sums == nullptr ? 0 : entries.size());
  Context context{&cpu_table_, &launch, cpu_kernel().update_chunks,
                  partials.sums == nullptr ? nullptr : distances.data()};

  const WithoutGil others_run;
  torch_doors::parallel_for(
      cpu_table_.work, kPicosecondsToShare,
      [](std::int64_t begin, std::int64_t end, void* opaque) {
        // A part of the work takes the chunks that begin in it.
        const auto& [table, launch, update_chunks, distances] =
            *static_cast<const Context*>(opaque);
        const auto& before = table->work_before;
        const auto first = std::lower_bound(before.begin(), before.end(), begin);
        const auto last = std::lower_bound(first, before.end(), end);
        update_chunks(table->chunks, first - before.begin(), last - before.begin(), *launch,
                      distances);
      },
      &context);
  // In the order of the table: the same bits for any number of threads.
  std::fill_n(partials.sums, partials.averages * partials.count, 0.0);
  for (std::size_t i = 0; i < distances.size(); ++i) {
    partials.sums[entries[i].average * partials.count] += distances[i];
  }
}

}  // namespace ema_fused
