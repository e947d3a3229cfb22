// Whether the dictionaries of a set of modules (their parameters, buffers and children) still hold
// the very objects they held: a few nanoseconds a slot, where walking the modules costs
// microseconds.
#pragma once

#include <vector>

#include "python_refs.h"

namespace ema_fused {

class SlotWatch {
 public:
  // Remembers every key and value of these dictionaries, a list of them.
  explicit SlotWatch(PyObject* dictionaries);

  bool changed() const;

 private:
  struct Dictionary {
    Ref dictionary;
    Py_ssize_t size;
  };
  struct Slot {
    PyObject* dictionary;  // owned by dictionaries_
    Ref key;
    // Owned: an address must not come to mean another object while it is compared.
    Ref value;
  };
  std::vector<Dictionary> dictionaries_;
  std::vector<Slot> slots_;
};

}  // namespace ema_fused
