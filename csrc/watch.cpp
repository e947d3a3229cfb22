#include "watch.h"

namespace ema_fused {

namespace py = pybind11;

SlotWatch::SlotWatch(const py::list& dictionaries) {
  for (const py::handle item : dictionaries) {
    auto dictionary = py::reinterpret_borrow<py::dict>(item);
    for (const auto& [key, value] : dictionary) {
      slots_.push_back({dictionary.ptr(), py::reinterpret_borrow<py::object>(key),
                        py::reinterpret_borrow<py::object>(value)});
    }
    const Py_ssize_t size = PyDict_Size(dictionary.ptr());
    dictionaries_.push_back({std::move(dictionary), size});
  }
}

bool SlotWatch::changed() const {
  for (const Dictionary& entry : dictionaries_) {
    if (PyDict_Size(entry.dictionary.ptr()) != entry.size) {
      return true;
    }
  }
  for (const Slot& slot : slots_) {
    PyObject* value = PyDict_GetItemWithError(slot.dictionary, slot.key.ptr());
    if (value == nullptr && PyErr_Occurred() != nullptr) {
      throw py::error_already_set();
    }
    if (value != slot.value.ptr()) {
      return true;
    }
  }
  return false;
}

}  // namespace ema_fused
