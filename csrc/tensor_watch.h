// Remembers what a list of tensors was (memory, type, shape, device), and tells in nanoseconds
// whether it still is: parameters are moved, replaced through `.data` and given new storage while a
// plan for them lives.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "dtypes.h"
#include "python_refs.h"
#include "torch_doors.h"

namespace ema_fused {

struct TensorFacts {
  void* data = nullptr;
  std::int64_t elements = 0;
  std::int64_t item_bytes = 0;
  DType dtype = DType::kBytes;
  dlpack::DataType exact_dtype{};
  dlpack::Device device{};
  std::vector<std::int64_t> sizes;
  std::vector<std::int64_t> strides;
};

// Throws std::invalid_argument with torch's reason where the tensor is not exported.
TensorFacts facts_of(PyObject* tensor);

enum class Change : std::uint8_t {
  kNone,
  kMoved,  // other memory, the same type, shape, strides and device; facts() has the new pointers
  kDifferent,  // anything else
};

class TensorWatch {
 public:
  // Of the tensors of two lists, one behind the other.
  TensorWatch(PyObject* averaged, PyObject* source);
  explicit TensorWatch(PyObject* tensor);
  ~TensorWatch();
  TensorWatch(const TensorWatch&) = delete;
  TensorWatch& operator=(const TensorWatch&) = delete;

  // Compares every tensor with what is remembered. Holds the GIL.
  Change check();

  // The first tensor whose dtype or shape differs from what is remembered, with what that is, in
  // words; -1 where there is none.
  std::pair<std::int64_t, std::string> changed_kind() const;

  // Lets the tensors go. From here on nothing can be asked but facts() and matches().
  void release();
  bool released() const { return released_; }

  // Whether fresh tensors are, place by place, what is remembered: memory, type, shape, strides and
  // device. Asks the tensors that are given, so no address can be stale.
  bool matches(PyObject* averaged, PyObject* source) const;

  const std::vector<TensorFacts>& facts() const { return facts_; }

 private:
  // What the shim is asked for at every check, side by side in memory.
  struct Expected {
    torch_doors::Handle handle;  // null after release()
    const void* header;          // when it was planned, of a tensor that may be gone
    bool is_owned;               // the handle; else it is inside the Python object, in tensors_
    void* data;
    std::int64_t elements;
    std::int64_t stride;  // of the only dimension, where there is one
    std::int32_t dtype;
    std::int32_t dim;
    std::int32_t device_type;
    std::int32_t device_index;
    std::size_t layout;  // where layouts_ has the sizes, then the strides
  };

  Change compare(const torch_doors::Shim& torch, torch_doors::Handle handle,
                 const Expected& expected) const;
  bool same_layout(const torch_doors::Shim& torch, torch_doors::Handle handle,
                   const Expected& expected) const;
  bool same_sizes(const torch_doors::Shim& torch, torch_doors::Handle handle,
                  const Expected& expected) const;
  bool adopt(std::size_t i);
  bool match_from(PyObject* tensors, std::size_t first) const;
  bool match(PyObject* tensor, std::size_t i) const;
  Change check_through_dlpack();

  explicit TensorWatch(Ref tensors);

  Ref tensors_;  // a list of our own; none after release()
  std::vector<TensorFacts> facts_;
  std::vector<std::size_t> complex_;  // which of them are complex tensors
  std::vector<Expected> expected_;    // empty where the shim is missing
  std::vector<std::int64_t> layouts_;
  bool released_ = false;
};

}  // namespace ema_fused
