#include "tensor_watch.h"

#include <algorithm>
#include <stdexcept>

namespace ema_fused {
namespace {

using torch_doors::shim;

// A check takes 10 ns from the cache and ten times as long from memory, where a training step
// leaves the tensors' headers. So they are asked for that many tensors ahead: first the header,
// then, once that has come, the storage that it points to. (Threads share none of it: a woken one
// costs microseconds, on busy cores milliseconds.)
constexpr std::size_t kHeadersAhead = 16;
constexpr std::size_t kStoragesAhead = 8;

DType dtype_from(const dlpack::DataType& dtype) {
  if (dtype.lanes == 1 && dtype.code == dlpack::kFloat) {
    if (dtype.bits == 64) return DType::kFloat64;
    if (dtype.bits == 32) return DType::kFloat32;
    if (dtype.bits == 16) return DType::kFloat16;
  }
  if (dtype.lanes == 1 && dtype.code == dlpack::kBfloat && dtype.bits == 16) {
    return DType::kBFloat16;
  }
  if (dtype.lanes == 1 && dtype.code == dlpack::kComplex) {
    if (dtype.bits == 64) return DType::kComplex64;
    if (dtype.bits == 128) return DType::kComplex128;
  }
  if (dtype.lanes == 1 && dtype.code == dlpack::kFloat8E4M3) return DType::kFloat8E4M3;
  if (dtype.lanes == 1 && dtype.code == dlpack::kFloat8E5M2) return DType::kFloat8E5M2;
  return DType::kBytes;
}

bool same_dtype(const TensorFacts& a, const TensorFacts& b) {
  return a.exact_dtype.code == b.exact_dtype.code && a.exact_dtype.bits == b.exact_dtype.bits &&
         a.exact_dtype.lanes == b.exact_dtype.lanes;
}

bool same_kind(const TensorFacts& a, const TensorFacts& b) {
  return same_dtype(a, b) && a.device.type == b.device.type && a.device.id == b.device.id &&
         a.sizes == b.sizes && a.strides == b.strides;
}

// Whether the elements are not what lies in memory: a negation or conjugation is pending.
bool is_pending(PyObject* tensor, const TensorFacts& facts) {
  return torch_doors::is_negated(tensor) ||
         (is_complex(facts.dtype) && torch_doors::is_conjugated(tensor));
}

Ref list_of(PyObject* item) {
  Ref list = Ref::take(PyList_New(1));
  PyList_SET_ITEM(list.get(), 0, Ref::borrow(item).release());
  return list;
}

// As Python tells a dtype and a shape: "float32 of shape (3, 4)".
std::string in_words(const TensorFacts& facts) {
  std::string words;
  switch (facts.exact_dtype.code) {
    case dlpack::kInt:
      words = "int";
      break;
    case dlpack::kUInt:
      words = "uint";
      break;
    case dlpack::kFloat:
      words = "float";
      break;
    case dlpack::kBfloat:
      words = "bfloat";
      break;
    case dlpack::kComplex:
      words = "complex";
      break;
    case dlpack::kBool:
      words = "bool";
      break;
    default:
      words = "bits";
  }
  if (facts.exact_dtype.code != dlpack::kBool) {
    words += std::to_string(facts.exact_dtype.bits);
  }
  words += " of shape (";
  for (std::size_t d = 0; d < facts.sizes.size(); ++d) {
    words += (d > 0 ? ", " : "") + std::to_string(facts.sizes[d]);
  }
  return words + (facts.sizes.size() == 1 ? ",)" : ")");
}

}  // namespace

TensorFacts facts_of(PyObject* tensor) {
  dlpack::Tensor description{};
  std::string why_not;
  if (!torch_doors::describe(tensor, description, why_not)) {
    throw std::invalid_argument(why_not);
  }
  TensorFacts facts;
  facts.data = description.data == nullptr
                   ? nullptr
                   : static_cast<char*>(description.data) + description.byte_offset;
  facts.exact_dtype = description.dtype;
  facts.dtype = dtype_from(description.dtype);
  facts.item_bytes =
      static_cast<std::int64_t>(description.dtype.bits) * description.dtype.lanes / 8;
  facts.device = description.device;
  facts.sizes.assign(description.shape, description.shape + description.ndim);
  facts.strides.assign(description.strides, description.strides + description.ndim);
  facts.elements = 1;
  for (const std::int64_t size : facts.sizes) {
    facts.elements *= size;
  }
  return facts;
}

TensorWatch::TensorWatch(PyObject* averaged, PyObject* source)
    : TensorWatch(Ref::take(PySequence_Concat(averaged, source))) {}

TensorWatch::TensorWatch(PyObject* tensor) : TensorWatch(list_of(tensor)) {}

TensorWatch::TensorWatch(Ref list) : tensors_(std::move(list)) {
  PyObject* tensors = tensors_.get();
  facts_.reserve(list_size(tensors));
  for (std::size_t i = 0; i < list_size(tensors); ++i) {
    facts_.push_back(facts_of(list_item(tensors, i)));
    if (is_complex(facts_.back().dtype)) {
      complex_.push_back(i);
    }
  }
  if (!shim().complete) {
    return;
  }
  expected_.reserve(facts_.size());
  for (std::size_t i = 0; i < facts_.size(); ++i) {
    const TensorFacts& facts = facts_[i];
    Expected expected{};
    // A handle of its own counts as a use of the tensor, and torch.utils.swap_tensors, with which
    // modules may be converted and loaded, takes tensors of one use only.
    expected.handle = torch_doors::borrowed_handle(list_item(tensors, i));
    if (expected.handle == nullptr) {
      expected.handle = torch_doors::make_handle(list_item(tensors, i));
      expected.is_owned = true;
    }
    expected.header = torch_doors::header_of(expected.handle);
    expected.elements = facts.elements;
    expected.dim = static_cast<std::int32_t>(facts.sizes.size());
    expected.stride = facts.strides.empty() ? 0 : facts.strides.back();
    expected.layout = layouts_.size();
    layouts_.insert(layouts_.end(), facts.sizes.begin(), facts.sizes.end());
    layouts_.insert(layouts_.end(), facts.strides.begin(), facts.strides.end());
    shim().dtype(expected.handle, &expected.dtype);
    shim().device_type(expected.handle, &expected.device_type);
    shim().device_index(expected.handle, &expected.device_index);
    // The pointer as the shim tells it: of a tensor without elements DLPack may tell another.
    shim().data_ptr(expected.handle, &expected.data);
    expected_.push_back(expected);
  }
}

TensorWatch::~TensorWatch() { release(); }

void TensorWatch::release() {
  for (Expected& expected : expected_) {
    torch_doors::Handle handle = std::exchange(expected.handle, nullptr);
    if (expected.is_owned && handle != nullptr) {
      shim().free_tensor(handle);
    }
  }
  tensors_ = Ref();
  released_ = true;
}

bool TensorWatch::matches(PyObject* averaged, PyObject* source) const {
  return list_size(averaged) + list_size(source) == facts_.size() && match_from(averaged, 0) &&
         match_from(source, list_size(averaged));
}

// Tells them from those remembered from place `first` on.
bool TensorWatch::match_from(PyObject* tensors, std::size_t first) const {
  const torch_doors::Shim torch = shim();
  const std::size_t count = list_size(tensors);
  for (std::size_t i = 0; i < count; ++i) {
    PyObject* tensor = list_item(tensors, i);
    const torch_doors::Handle handle = torch_doors::borrowed_handle(tensor);
    if (handle == nullptr || expected_.empty()) {
      if (!match(tensor, first + i)) {
        return false;
      }
      continue;
    }
    const Expected& expected = expected_[first + i];
    if (compare(torch, handle, expected) != Change::kNone || !same_sizes(torch, handle, expected)) {
      return false;
    }
    if (torch_doors::header_of(handle) != expected.header) {
      // Not the tensor that was remembered: what compare() doesn't ask for may differ too.
      std::int32_t type = -1;
      std::int32_t index = -1;
      torch.device_type(handle, &type);
      torch.device_index(handle, &index);
      if (type != expected.device_type || index != expected.device_index ||
          is_pending(tensor, facts_[first + i])) {
        return false;
      }
    } else if (is_complex(facts_[first + i].dtype) && is_pending(tensor, facts_[first + i])) {
      return false;
    }
  }
  return true;
}

// The same of one tensor through DLPack.
bool TensorWatch::match(PyObject* tensor, std::size_t i) const {
  dlpack::Tensor now{};
  std::string why_not;
  if (!torch_doors::is_tensor(tensor) || !torch_doors::describe(tensor, now, why_not)) {
    return false;
  }
  const TensorFacts& facts = facts_[i];
  const char* data = now.data == nullptr ? nullptr : static_cast<char*>(now.data) + now.byte_offset;
  const auto& dtype = facts.exact_dtype;
  return data == facts.data && now.dtype.code == dtype.code && now.dtype.bits == dtype.bits &&
         now.dtype.lanes == dtype.lanes && now.device.type == facts.device.type &&
         now.device.id == facts.device.id &&
         static_cast<std::size_t>(now.ndim) == facts.sizes.size() &&
         std::equal(facts.sizes.begin(), facts.sizes.end(), now.shape) &&
         std::equal(facts.strides.begin(), facts.strides.end(), now.strides) &&
         !is_pending(tensor, facts);
}

Change TensorWatch::check() {
  // Of the same memory too: `parameter.data = parameter.data.conj()` changes nothing else.
  for (const std::size_t i : complex_) {
    if (is_pending(list_item(tensors_.get(), i), facts_[i])) {
      return Change::kDifferent;
    }
  }
  if (!shim().complete) {
    return check_through_dlpack();
  }
  // A copy: the calls could change shim() for all that the compiler knows.
  const torch_doors::Shim torch = shim();
  Change worst = Change::kNone;
  const std::size_t count = expected_.size();
  for (std::size_t i = 0; i < count; ++i) {
    if (i + kHeadersAhead < count) {
      torch_doors::prefetch_header(expected_[i + kHeadersAhead].handle,
                                   expected_[i + kHeadersAhead].header);
    }
    if (i + kStoragesAhead < count) {
      torch_doors::prefetch_storage(expected_[i + kStoragesAhead].handle);
    }
    worst = std::max(worst, compare(torch, expected_[i].handle, expected_[i]));
  }
  if (worst != Change::kMoved) {
    return worst;
  }
  for (std::size_t i = 0; i < expected_.size(); ++i) {
    if (compare(torch, expected_[i].handle, expected_[i]) != Change::kNone && !adopt(i)) {
      return Change::kDifferent;
    }
  }
  return Change::kMoved;
}

Change TensorWatch::compare(const torch_doors::Shim& torch, torch_doors::Handle handle,
                            const Expected& expected) const {
  std::int64_t elements = -1;
  std::int32_t dtype = -1;
  void* data = nullptr;
  torch.numel(handle, &elements);
  torch.dtype(handle, &dtype);
  if (elements != expected.elements || dtype != expected.dtype ||
      !same_layout(torch, handle, expected) || torch.data_ptr(handle, &data) != 0) {
    return Change::kDifferent;
  }
  return data == expected.data ? Change::kNone : Change::kMoved;
}

// Sizes and strides against what is remembered. With one dimension and a known element count the
// stride alone tells, which saves two of the three questions for the many small tensors of a model.
bool TensorWatch::same_layout(const torch_doors::Shim& torch, torch_doors::Handle handle,
                              const Expected& expected) const {
  std::int64_t* strides = nullptr;
  if (expected.elements <= 1) {
    return true;
  }
  if (expected.dim == 1) {
    torch.strides(handle, &strides);
    return strides[0] == expected.stride;
  }
  std::int64_t dim = -1;
  std::int64_t* sizes = nullptr;
  torch.dim(handle, &dim);
  if (dim != expected.dim) {
    return false;
  }
  torch.sizes(handle, &sizes);
  torch.strides(handle, &strides);
  const std::int64_t* planned_sizes = layouts_.data() + expected.layout;
  const std::int64_t* planned_strides = planned_sizes + expected.dim;
  for (std::int32_t d = 0; d < expected.dim; ++d) {
    if (sizes[d] != planned_sizes[d] || (sizes[d] > 1 && strides[d] != planned_strides[d])) {
      return false;
    }
  }
  return true;
}

// All sizes, which same_layout() leaves out where they can't mislead a kernel. A pair of two shapes
// has to be refused all the same.
bool TensorWatch::same_sizes(const torch_doors::Shim& torch, torch_doors::Handle handle,
                             const Expected& expected) const {
  std::int64_t dim = -1;
  std::int64_t* sizes = nullptr;
  torch.dim(handle, &dim);
  torch.sizes(handle, &sizes);
  return dim == expected.dim && std::equal(sizes, sizes + dim, layouts_.data() + expected.layout);
}

// Takes over another pointer. False where the memory is of another kind (device, pending negation).
bool TensorWatch::adopt(std::size_t i) {
  void* data = nullptr;
  shim().data_ptr(expected_[i].handle, &data);
  if (facts_[i].elements > 0) {
    PyObject* tensor = list_item(tensors_.get(), i);
    dlpack::Tensor now{};
    std::string why_not;
    if (data == nullptr || !torch_doors::describe(tensor, now, why_not) ||
        now.device.type != facts_[i].device.type || now.device.id != facts_[i].device.id ||
        is_pending(tensor, facts_[i])) {
      return false;
    }
    facts_[i].data = data;
  }
  expected_[i].data = data;
  return true;
}

Change TensorWatch::check_through_dlpack() {
  Change change = Change::kNone;
  for (std::size_t i = 0; i < facts_.size(); ++i) {
    TensorFacts now;
    try {
      now = facts_of(list_item(tensors_.get(), i));
    } catch (const std::invalid_argument&) {
      return Change::kDifferent;
    }
    if (!same_kind(now, facts_[i])) {
      return Change::kDifferent;
    }
    if (now.data != facts_[i].data) {
      if (now.elements > 0 &&
          (now.data == nullptr || is_pending(list_item(tensors_.get(), i), facts_[i]))) {
        return Change::kDifferent;
      }
      facts_[i].data = now.data;
      change = Change::kMoved;
    }
  }
  return change;
}

std::pair<std::int64_t, std::string> TensorWatch::changed_kind() const {
  for (std::size_t i = 0; i < facts_.size(); ++i) {
    const TensorFacts& planned = facts_[i];
    try {
      const TensorFacts now = facts_of(list_item(tensors_.get(), i));
      if (same_dtype(now, planned) && now.sizes == planned.sizes) {
        continue;
      }
    } catch (const std::invalid_argument&) {
      // Not even readable any more.
    }
    return {static_cast<std::int64_t>(i), in_words(planned)};
  }
  return {-1, ""};
}

}  // namespace ema_fused
