// Whether the dictionaries of a set of modules (their parameters, buffers and children) still hold
// the very objects they held: a few nanoseconds a slot, where walking the modules costs
// microseconds.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

namespace ema_fused {

class SlotWatch {
 public:
  // Remembers every key and value of these dictionaries.
  explicit SlotWatch(const pybind11::list& dictionaries);

  bool changed() const;

 private:
  struct Dictionary {
    pybind11::dict dictionary;
    Py_ssize_t size;
  };
  struct Slot {
    PyObject* dictionary;  // owned by dictionaries_
    pybind11::object key;
    // Owned: an address must not come to mean another object while it is compared.
    pybind11::object value;
  };
  std::vector<Dictionary> dictionaries_;
  std::vector<Slot> slots_;
};

}  // namespace ema_fused
