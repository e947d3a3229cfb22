#include "torch_doors.h"

#include <dlfcn.h>

namespace ema_fused::torch_doors {
namespace {

// A Python tensor object begins with its torch tensor, behind what every object begins with.
Handle handle_inside(PyObject* tensor) { return tensor + 1; }

struct Doors {
  PyTypeObject* tensor_type = nullptr;
  PyTypeObject* parameter_type = nullptr;
  bool handles_are_inside = false;
  const dlpack::ExchangeApi* exchange = nullptr;
  Shim shim;
  Ref make_handles;
  Ref is_neg;
  Ref is_conj;
  int (*parallel_for)(std::int64_t, std::int64_t, std::int64_t, ParallelBody, void*) = nullptr;
  std::string missing;
};

// Never destroyed: it holds Python objects, and the interpreter may be gone by then.
Doors& doors() {
  static Doors* instance = new Doors();
  return *instance;
}

template <typename Function>
bool find(void* library, const char* name, Function*& function) {
  function = library == nullptr ? nullptr : reinterpret_cast<Function*>(dlsym(library, name));
  return function != nullptr;
}

Shim find_shim(void* library) {
  Shim shim;
  shim.complete = find(library, "aoti_torch_get_data_ptr", shim.data_ptr) &&
                  find(library, "aoti_torch_get_numel", shim.numel) &&
                  find(library, "aoti_torch_get_dtype", shim.dtype) &&
                  find(library, "aoti_torch_get_dim", shim.dim) &&
                  find(library, "aoti_torch_get_sizes", shim.sizes) &&
                  find(library, "aoti_torch_get_strides", shim.strides) &&
                  find(library, "aoti_torch_get_device_type", shim.device_type) &&
                  find(library, "aoti_torch_get_device_index", shim.device_index) &&
                  find(library, "aoti_torch_delete_tensor_object", shim.free_tensor);
  return shim;
}

[[noreturn]] void fail_to_import(const char* why) {
  PyErr_SetString(PyExc_ImportError, why);
  throw PythonError{};
}

const dlpack::ExchangeApi* find_exchange(PyObject* tensor_type) {
  if (PyObject_HasAttrString(tensor_type, "__dlpack_c_exchange_api__") == 0) {
    fail_to_import("torch offers no DLPack exchange table; torch 2.10 or later does");
  }
  const Ref capsule = Ref::take(PyObject_GetAttrString(tensor_type, "__dlpack_c_exchange_api__"));
  void* pointer = PyCapsule_GetPointer(capsule.get(), dlpack::kCapsuleName);
  if (pointer == nullptr) {
    throw PythonError{};
  }
  const auto* header = static_cast<const dlpack::ExchangeHeader*>(pointer);
  while (header != nullptr && header->version.major != dlpack::kMajorVersion) {
    header = header->previous;
  }
  if (header == nullptr) {
    fail_to_import("torch's DLPack exchange table has no version 1");
  }
  const auto* exchange = reinterpret_cast<const dlpack::ExchangeApi*>(header);
  if (exchange->tensor_from_py_object == nullptr || exchange->current_work_stream == nullptr) {
    fail_to_import("torch's DLPack exchange table is incomplete");
  }
  return exchange;
}

// Whether handle_inside() finds, in two tensors that are made for it, what torch's own handles
// hold.
bool finds_handles_inside(PyObject* tensor_type) {
  const Ref tensors[] = {Ref::take(PyObject_CallNoArgs(tensor_type)),
                         Ref::take(PyObject_CallNoArgs(tensor_type))};
  bool inside = true;
  for (const Ref& tensor : tensors) {
    const Handle handle = make_handle(tensor.get());
    inside = inside && header_of(handle) == header_of(handle_inside(tensor.get()));
    shim().free_tensor(handle);
  }
  return inside;
}

}  // namespace

void connect(PyObject* tensor_type, PyObject* parameter_type, const std::string& library,
             PyObject* make_handles) {
  Doors& all = doors();
  all.exchange = find_exchange(tensor_type);
  all.is_neg = Ref::take(PyObject_GetAttrString(tensor_type, "is_neg"));
  all.is_conj = Ref::take(PyObject_GetAttrString(tensor_type, "is_conj"));
  all.missing.clear();
  // RTLD_NOLOAD: only the copy that torch itself has loaded will do.
  void* handle = dlopen(library.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  all.shim = find_shim(handle);
  all.make_handles = Ref::borrow(make_handles);
  if (!all.shim.complete || make_handles == Py_None) {
    all.shim.complete = false;
    all.missing = "torch's C shim (tensors are watched through DLPack, which is slower)";
  }
  if (!find(handle, "torch_parallel_for", all.parallel_for)) {
    all.missing += all.missing.empty() ? "" : "; ";
    all.missing += "torch_parallel_for (the CPU kernel runs on one thread)";
  }
  all.tensor_type = reinterpret_cast<PyTypeObject*>(Ref::borrow(tensor_type).release());
  all.parameter_type = reinterpret_cast<PyTypeObject*>(Ref::borrow(parameter_type).release());
  all.handles_are_inside = all.shim.complete && finds_handles_inside(tensor_type);
}

std::string missing() { return doors().missing; }

bool is_tensor(PyObject* object) { return PyObject_TypeCheck(object, doors().tensor_type) != 0; }

Handle borrowed_handle(PyObject* tensor) {
  const Doors& all = doors();
  const bool is_plain =
      Py_IS_TYPE(tensor, all.tensor_type) || Py_IS_TYPE(tensor, all.parameter_type);
  return all.handles_are_inside && is_plain ? handle_inside(tensor) : nullptr;
}

bool describe(PyObject* tensor, dlpack::Tensor& description, std::string& why_not) {
  if (doors().exchange->tensor_from_py_object(tensor, &description) == 0) {
    return true;
  }
  PyObject *type = nullptr, *value = nullptr, *traceback = nullptr;
  PyErr_Fetch(&type, &value, &traceback);
  PyObject* const words = PyObject_Str(value == nullptr ? Py_None : value);
  const char* utf8 = words == nullptr ? nullptr : PyUnicode_AsUTF8(words);
  why_not = utf8 == nullptr ? "" : utf8;
  // What has no words, or none in UTF-8, has raised once more.
  PyErr_Clear();
  Py_XDECREF(words);
  Py_XDECREF(type);
  Py_XDECREF(value);
  Py_XDECREF(traceback);
  return false;
}

bool is_negated(PyObject* tensor) {
  return Ref::take(PyObject_CallOneArg(doors().is_neg.get(), tensor)).get() == Py_True;
}

bool is_conjugated(PyObject* tensor) {
  return Ref::take(PyObject_CallOneArg(doors().is_conj.get(), tensor)).get() == Py_True;
}

void* current_stream(std::int32_t device_type, std::int32_t device_id) {
  void* stream = nullptr;
  if (doors().exchange->current_work_stream(device_type, device_id, &stream) != 0) {
    throw PythonError{};
  }
  return stream;
}

const Shim& shim() { return doors().shim; }

Handle make_handle(PyObject* tensor) {
  const Ref tensors = Ref::take(PyList_New(1));
  PyList_SET_ITEM(tensors.get(), 0, Ref::borrow(tensor).release());
  const Ref capsules = Ref::take(PyObject_CallOneArg(doors().make_handles.get(), tensors.get()));
  if (PyList_Check(capsules.get()) == 0 || list_size(capsules.get()) != 1) {
    fail_to_import("torch made no list of one handle for each tensor");
  }
  Handle handle = PyCapsule_GetPointer(list_item(capsules.get(), 0), nullptr);
  if (handle == nullptr) {
    throw PythonError{};
  }
  return handle;
}

void parallel_for(std::int64_t size, std::int64_t grain, ParallelBody body, void* context) {
  const auto on_torch = doors().parallel_for;
  if (on_torch == nullptr || on_torch(0, size, grain, body, context) != 0) {
    body(0, size, context);
  }
}

}  // namespace ema_fused::torch_doors
