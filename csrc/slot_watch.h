// Whether the dictionaries of a set of modules (their parameters, buffers and children) still hold
// the very objects they held, where walking the modules would cost microseconds.
//
// Looking at every slot means a cache miss or three for each of them in a training step. Python
// tells more cheaply that a dictionary has been written at all: up to 3.11 by a version number in
// it, from 3.12 on by calling a watcher. Only a dictionary that was written is looked into.
#pragma once

#include <cstdint>
#include <vector>

#include "python_refs.h"

namespace ema_fused {

class SlotWatch {
 public:
  // Remembers every key and value of these dictionaries, a list of them, and the shard of each of
  // these DTensors, a list too. Anything else than a dict is a TypeError of Python's.
  SlotWatch(PyObject* dictionaries, PyObject* sharded);
  ~SlotWatch();
  SlotWatch(const SlotWatch&) = delete;
  SlotWatch& operator=(const SlotWatch&) = delete;

  bool changed();

  // How it learns that a dictionary was written: "versions", "watcher", or "slots" where Python has
  // no watcher left (it has eight) and every slot is looked at.
  static const char* method();

 private:
  struct Dictionary {
    PyObject* dictionary;  // owned by owners_
    // Up to 3.11 its version when it was last looked into; from 3.12 on whether written_ has it.
    std::uint64_t mark;
  };
  struct Slot {
    Ref key;
    // Owned: an address must not come to mean another object while it is compared.
    Ref value;
  };
  struct Shard {
    Ref tensor;
    Ref shard;
  };

  void remember(PyObject* sharded);
  bool same_slots(std::size_t dictionary) const;
  bool written_ones_differ();

  std::vector<Dictionary> dictionaries_;
  std::vector<Ref> owners_;
  std::vector<Slot> slots_;
  std::vector<std::size_t> first_slot_;  // of each dictionary, and the end
  std::vector<Shard> shards_;
  std::vector<std::size_t> written_;  // dictionaries that the watcher told of; from 3.12 on

  friend struct DictionaryWatcher;
};

}  // namespace ema_fused
