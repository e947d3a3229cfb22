#include "slot_watch.h"

#include <algorithm>
#include <unordered_map>
#include <utility>

namespace ema_fused {

#if PY_VERSION_HEX >= 0x030C0000

// The one watcher of this process, and who asked it to watch what.
struct DictionaryWatcher {
  using Place = std::pair<SlotWatch*, std::size_t>;

  int id = -1;  // -1: Python had none left
  std::unordered_map<PyObject*, std::vector<Place>> places;

  DictionaryWatcher() : id(PyDict_AddWatcher(&written)) {
    if (id < 0) {
      PyErr_Clear();
    }
  }

  // Never destroyed: dictionaries may outlive the statics of this library.
  static DictionaryWatcher& get() {
    static DictionaryWatcher* instance = new DictionaryWatcher();
    return *instance;
  }

  static int written(PyDict_WatchEvent, PyObject* dictionary, PyObject*, PyObject*) {
    const auto found = get().places.find(dictionary);
    if (found != get().places.end()) {
      for (const auto& [watch, place] : found->second) {
        // A loop that writes the same buffer at every step, and never asks, must not fill memory.
        if (std::exchange(watch->dictionaries_[place].mark, 1) == 0) {
          watch->written_.push_back(place);
        }
      }
    }
    return 0;
  }

  void watch(SlotWatch* owner) {
    for (std::size_t i = 0; i < owner->dictionaries_.size(); ++i) {
      PyObject* dictionary = owner->dictionaries_[i].dictionary;
      std::vector<Place>& interested = places[dictionary];
      if (interested.empty() && PyDict_Watch(id, dictionary) != 0) {
        throw PythonError{};
      }
      interested.emplace_back(owner, i);
    }
  }

  void unwatch(SlotWatch* owner) {
    for (const SlotWatch::Dictionary& entry : owner->dictionaries_) {
      const auto found = places.find(entry.dictionary);
      if (found == places.end()) {
        continue;
      }
      std::vector<Place>& interested = found->second;
      interested.erase(std::remove_if(interested.begin(), interested.end(),
                                      [&](const Place& place) { return place.first == owner; }),
                       interested.end());
      if (interested.empty()) {
        places.erase(found);
        // This may run while an exception is on its way, which must arrive as it is.
        PyObject* const pending = PyErr_GetRaisedException();
        if (PyDict_Unwatch(id, entry.dictionary) != 0) {
          PyErr_Clear();
        }
        PyErr_SetRaisedException(pending);
      }
    }
  }
};

#endif

namespace {

#if PY_VERSION_HEX < 0x030C0000
// Another number after every write.
std::uint64_t version_of(PyObject* dictionary) {
  return reinterpret_cast<PyDictObject*>(dictionary)->ma_version_tag;
}
#endif

PyObject* shard_name() {
  static PyObject* name = Ref::take(PyUnicode_InternFromString("_local_tensor")).release();
  return name;
}

void require_dict(PyObject* object) {
  if (PyDict_Check(object) == 0) {
    PyErr_SetString(PyExc_TypeError, "only dicts can be watched for replaced values");
    throw PythonError{};
  }
}

}  // namespace

SlotWatch::SlotWatch(PyObject* dictionaries, PyObject* sharded) {
  for (std::size_t i = 0; i < list_size(dictionaries); ++i) {
    PyObject* dictionary = list_item(dictionaries, i);
    require_dict(dictionary);
    first_slot_.push_back(slots_.size());
    owners_.push_back(Ref::borrow(dictionary));
    Py_ssize_t position = 0;
    PyObject *key = nullptr, *value = nullptr;
    while (PyDict_Next(dictionary, &position, &key, &value) != 0) {
      slots_.push_back({Ref::borrow(key), Ref::borrow(value)});
    }
    dictionaries_.push_back({dictionary, 0});
#if PY_VERSION_HEX < 0x030C0000
    dictionaries_.back().mark = version_of(dictionary);
#endif
  }
  first_slot_.push_back(slots_.size());
  for (std::size_t i = 0; i < list_size(sharded); ++i) {
    PyObject* tensor = list_item(sharded, i);
    shards_.push_back({Ref::borrow(tensor), Ref::take(PyObject_GetAttr(tensor, shard_name()))});
  }
#if PY_VERSION_HEX >= 0x030C0000
  if (DictionaryWatcher::get().id >= 0) {
    try {
      DictionaryWatcher::get().watch(this);
    } catch (...) {
      DictionaryWatcher::get().unwatch(this);
      throw;
    }
  }
#endif
}

SlotWatch::~SlotWatch() {
#if PY_VERSION_HEX >= 0x030C0000
  if (DictionaryWatcher::get().id >= 0) {
    DictionaryWatcher::get().unwatch(this);
  }
#endif
}

const char* SlotWatch::method() {
#if PY_VERSION_HEX >= 0x030C0000
  return DictionaryWatcher::get().id >= 0 ? "watcher" : "slots";
#else
  return "versions";
#endif
}

bool SlotWatch::same_slots(std::size_t dictionary) const {
  PyObject* const now = dictionaries_[dictionary].dictionary;
  const std::size_t first = first_slot_[dictionary];
  const std::size_t end = first_slot_[dictionary + 1];
  if (static_cast<std::size_t>(PyDict_Size(now)) != end - first) {
    return false;
  }
  for (std::size_t i = first; i < end; ++i) {
    PyObject* value = PyDict_GetItemWithError(now, slots_[i].key.get());
    if (value == nullptr && PyErr_Occurred() != nullptr) {
      throw PythonError{};
    }
    if (value != slots_[i].value.get()) {
      return false;
    }
  }
  return true;
}

#if PY_VERSION_HEX < 0x030C0000

bool SlotWatch::written_ones_differ() {
  // Far enough ahead that a line comes from memory meanwhile.
  constexpr std::size_t kAhead = 16;
  for (std::size_t i = 0; i < dictionaries_.size(); ++i) {
    if (i + kAhead < dictionaries_.size()) {
      __builtin_prefetch(
          &reinterpret_cast<PyDictObject*>(dictionaries_[i + kAhead].dictionary)->ma_version_tag);
    }
    Dictionary& entry = dictionaries_[i];
    const std::uint64_t version = version_of(entry.dictionary);
    if (version != entry.mark) {
      if (!same_slots(i)) {
        return true;
      }
      entry.mark = version;
    }
  }
  return false;
}

#else

bool SlotWatch::written_ones_differ() {
  if (DictionaryWatcher::get().id < 0) {
    for (std::size_t i = 0; i < dictionaries_.size(); ++i) {
      if (!same_slots(i)) {
        return true;
      }
    }
    return false;
  }
  for (const std::size_t place : written_) {
    if (!same_slots(place)) {
      return true;
    }
  }
  for (const std::size_t place : written_) {
    dictionaries_[place].mark = 0;
  }
  written_.clear();
  return false;
}

#endif

bool SlotWatch::changed() {
  if (written_ones_differ()) {
    return true;
  }
  for (const Shard& entry : shards_) {
    if (Ref::take(PyObject_GetAttr(entry.tensor.get(), shard_name())).get() != entry.shard.get()) {
      return true;
    }
  }
  return false;
}

}  // namespace ema_fused
