// All that is asked of torch, at run time and through interfaces that hold across its releases:
//   1. the DLPack exchange table: what a tensor is, and a device's current stream
//   2. the C shim of libtorch_cpu: the pointer, type and shape of a tensor in a few nanoseconds
//   3. torch_parallel_for, in the same library: torch's own thread pool
// No torch header, no torch symbol at link time. Every function here needs the GIL, but for
// parallel_for, which must be called without it.
#pragma once

#include <cstdint>
#include <string>

#include "dlpack_abi.h"
#include "python_refs.h"

namespace ema_fused::torch_doors {

// An owned reference to a tensor, as the C shim knows it.
using Handle = void*;

// Finds the doors. `library` is the path of libtorch_cpu, already loaded; `make_handles` is
// torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors or None.
void connect(PyObject* tensor_type, PyObject* parameter_type, const std::string& library,
             PyObject* make_handles);

// What is missing, in words, for a report; empty where every door was found.
std::string missing();

bool is_tensor(PyObject* object);

// False where torch does not export this tensor, with its reason.
bool describe(PyObject* tensor, dlpack::Tensor& description, std::string& why_not);

// tensor.is_neg(): a lazy negation that the description does not tell.
bool is_negated(PyObject* tensor);
// tensor.is_conj(): the same of a complex tensor's conjugation.
bool is_conjugated(PyObject* tensor);

void* current_stream(std::int32_t device_type, std::int32_t device_id);

// The C shim: functions return 0 on success. Null members: not there, go through describe().
struct Shim {
  int (*data_ptr)(Handle, void**) = nullptr;
  int (*numel)(Handle, std::int64_t*) = nullptr;
  int (*dtype)(Handle, std::int32_t*) = nullptr;
  int (*dim)(Handle, std::int64_t*) = nullptr;
  int (*sizes)(Handle, std::int64_t**) = nullptr;
  int (*strides)(Handle, std::int64_t**) = nullptr;
  int (*device_type)(Handle, std::int32_t*) = nullptr;
  int (*device_index)(Handle, std::int32_t*) = nullptr;
  int (*free_tensor)(Handle) = nullptr;
  bool complete = false;
};
const Shim& shim();

// A new handle; the caller frees it with shim().free_tensor. Needs shim().complete.
Handle make_handle(PyObject* tensor);

// The handle of a plain tensor or parameter, borrowed from its Python object: good while that
// lives. Null for subclasses, and where this torch keeps its tensors elsewhere in its objects.
Handle borrowed_handle(PyObject* tensor);

// Hints to the cache, which change nothing but time: a handle is torch's pointer to the header of
// the tensor (its TensorImpl), and the header's third word is its pointer to the storage. In a
// torch that lays them out in another way, useless lines are asked for.
inline const void* header_of(Handle handle) { return *static_cast<const void* const*>(handle); }

inline void prefetch_header(Handle handle, const void* header) {
  constexpr int kLineBytes = 64;
  constexpr int kHeaderBytes = 192;
  __builtin_prefetch(handle);
  for (int at = 0; at < kHeaderBytes; at += kLineBytes) {
    __builtin_prefetch(static_cast<const char*>(header) + at);
  }
}

inline void prefetch_storage(Handle handle) {
  __builtin_prefetch(static_cast<const void* const*>(header_of(handle))[2]);
}

// body(begin, end, context) over parts of [0, size), on torch's threads.
using ParallelBody = void (*)(std::int64_t begin, std::int64_t end, void* context);
void parallel_for(std::int64_t size, std::int64_t grain, ParallelBody body, void* context);

}  // namespace ema_fused::torch_doors
