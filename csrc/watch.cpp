#include "watch.h"

namespace ema_fused {

SlotWatch::SlotWatch(PyObject* dictionaries) {
  for (std::size_t i = 0; i < list_size(dictionaries); ++i) {
    PyObject* dictionary = list_item(dictionaries, i);
    Py_ssize_t position = 0;
    PyObject *key = nullptr, *value = nullptr;
    while (PyDict_Next(dictionary, &position, &key, &value) != 0) {
      slots_.push_back({dictionary, Ref::borrow(key), Ref::borrow(value)});
    }
    dictionaries_.push_back({Ref::borrow(dictionary), PyDict_Size(dictionary)});
  }
}

bool SlotWatch::changed() const {
  for (const Dictionary& entry : dictionaries_) {
    if (PyDict_Size(entry.dictionary.get()) != entry.size) {
      return true;
    }
  }
  for (const Slot& slot : slots_) {
    PyObject* value = PyDict_GetItemWithError(slot.dictionary, slot.key.get());
    if (value == nullptr && PyErr_Occurred() != nullptr) {
      throw PythonError{};
    }
    if (value != slot.value.get()) {
      return true;
    }
  }
  return false;
}

}  // namespace ema_fused
