#include "torch_doors.h"

#include <dlfcn.h>

namespace ema_fused::torch_doors {
namespace {

struct Doors {
  PyTypeObject* tensor_type = nullptr;
  const dlpack::ExchangeApi* exchange = nullptr;
  Shim shim;
  py::object make_handles;
  py::object is_neg;
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

const dlpack::ExchangeApi* find_exchange(py::handle tensor_type) {
  if (!py::hasattr(tensor_type, "__dlpack_c_exchange_api__")) {
    throw py::import_error("torch offers no DLPack exchange table; torch 2.10 or later does");
  }
  const py::object capsule = tensor_type.attr("__dlpack_c_exchange_api__");
  void* pointer = PyCapsule_GetPointer(capsule.ptr(), dlpack::kCapsuleName);
  if (pointer == nullptr) {
    throw py::error_already_set();
  }
  const auto* header = static_cast<const dlpack::ExchangeHeader*>(pointer);
  while (header != nullptr && header->version.major != dlpack::kMajorVersion) {
    header = header->previous;
  }
  if (header == nullptr) {
    throw py::import_error("torch's DLPack exchange table has no version 1");
  }
  const auto* exchange = reinterpret_cast<const dlpack::ExchangeApi*>(header);
  if (exchange->tensor_from_py_object == nullptr || exchange->current_work_stream == nullptr) {
    throw py::import_error("torch's DLPack exchange table is incomplete");
  }
  return exchange;
}

}  // namespace

void connect(py::type tensor_type, const std::string& library, py::object make_handles) {
  Doors& all = doors();
  all.exchange = find_exchange(tensor_type);
  all.is_neg = tensor_type.attr("is_neg");
  all.missing.clear();
  // RTLD_NOLOAD: only the copy that torch itself has loaded will do.
  void* handle = dlopen(library.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  all.shim = find_shim(handle);
  all.make_handles = std::move(make_handles);
  if (!all.shim.complete || all.make_handles.is_none()) {
    all.shim.complete = false;
    all.missing = "torch's C shim (tensors are watched through DLPack, which is slower)";
  }
  if (!find(handle, "torch_parallel_for", all.parallel_for)) {
    all.missing += all.missing.empty() ? "" : "; ";
    all.missing += "torch_parallel_for (the CPU kernel runs on one thread)";
  }
  all.tensor_type = reinterpret_cast<PyTypeObject*>(tensor_type.release().ptr());
}

std::string missing() { return doors().missing; }

bool is_tensor(py::handle object) {
  return PyObject_TypeCheck(object.ptr(), doors().tensor_type) != 0;
}

bool describe(py::handle tensor, dlpack::Tensor& description, std::string& why_not) {
  if (doors().exchange->tensor_from_py_object(tensor.ptr(), &description) == 0) {
    return true;
  }
  const py::error_already_set error;
  why_not = py::str(error.value()).cast<std::string>();
  return false;
}

bool is_negated(py::handle tensor) {
  PyObject* answer = PyObject_CallOneArg(doors().is_neg.ptr(), tensor.ptr());
  if (answer == nullptr) {
    throw py::error_already_set();
  }
  const bool negated = answer == Py_True;
  Py_DECREF(answer);
  return negated;
}

void* current_stream(std::int32_t device_type, std::int32_t device_id) {
  void* stream = nullptr;
  if (doors().exchange->current_work_stream(device_type, device_id, &stream) != 0) {
    throw py::error_already_set();
  }
  return stream;
}

const Shim& shim() { return doors().shim; }

std::vector<Handle> make_handles(const py::list& tensors) {
  const py::list capsules = doors().make_handles(tensors);
  std::vector<Handle> handles;
  handles.reserve(capsules.size());
  for (const py::handle capsule : capsules) {
    handles.push_back(PyCapsule_GetPointer(capsule.ptr(), nullptr));
  }
  return handles;
}

void parallel_for(std::int64_t size, std::int64_t grain, ParallelBody body, void* context) {
  const auto on_torch = doors().parallel_for;
  if (on_torch == nullptr || on_torch(0, size, grain, body, context) != 0) {
    body(0, size, context);
  }
}

}  // namespace ema_fused::torch_doors
