#include "slot_watch.h"

#include <algorithm>
#include <mutex>
#include <unordered_map>
#include <utility>

namespace ema_fused {

#if PY_VERSION_HEX >= 0x030C0000

// The one watcher of this process, and who asked it to watch what.
struct DictionaryWatcher {
  using Place = std::pair<SlotWatch*, std::size_t>;

  int id = -1;  // -1: Python had none left
  // Guards `places`, and of every SlotWatch the marks and written_. No Python code runs under it: a
  // free-threaded Python calls written() in any thread.
  std::mutex mutex;
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
    const std::lock_guard<std::mutex> lock(get().mutex);
    const auto found = get().places.find(dictionary);
    if (found != get().places.end()) {
      for (const auto& [watch, place] : found->second) {
        note(*watch, place);
      }
    }
    return 0;
  }

  static void note(SlotWatch& watch, std::size_t place) {
    // A loop that writes the same buffer at every step, and never asks, must not fill memory.
    if (std::exchange(watch.dictionaries_[place].mark, 1) == 0) {
      watch.written_.push_back(place);
    }
  }

  // The dictionaries that were written since they were last taken.
  std::vector<std::size_t> take_written(SlotWatch& watch) {
    const std::lock_guard<std::mutex> lock(mutex);
    for (const std::size_t place : watch.written_) {
      watch.dictionaries_[place].mark = 0;
    }
    return std::exchange(watch.written_, {});
  }

  void give_back(SlotWatch& watch, const std::vector<std::size_t>& taken) {
    const std::lock_guard<std::mutex> lock(mutex);
    for (const std::size_t place : taken) {
      note(watch, place);
    }
  }

  void watch(SlotWatch* owner) {
    const std::lock_guard<std::mutex> lock(mutex);
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
    const std::lock_guard<std::mutex> lock(mutex);
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

// The value at a key, or none. (From 3.13 on, because free-threaded builds can't lend it.)
Ref item_of(PyObject* dictionary, PyObject* key) {
#if PY_VERSION_HEX >= 0x030D0000
  PyObject* value = nullptr;
  if (PyDict_GetItemRef(dictionary, key, &value) < 0) {
    throw PythonError{};
  }
  return value == nullptr ? Ref() : Ref::take(value);
#else
  PyObject* const value = PyDict_GetItemWithError(dictionary, key);
  if (value == nullptr && PyErr_Occurred() != nullptr) {
    throw PythonError{};
  }
  return Ref::borrow(value);
#endif
}

// While it lives, no other thread changes the object: under the GIL as long as no Python code runs.
class WhileUnchanged {
 public:
#ifdef Py_GIL_DISABLED
  explicit WhileUnchanged(PyObject* object) { PyCriticalSection_Begin(&section_, object); }
  ~WhileUnchanged() { PyCriticalSection_End(&section_); }

 private:
  PyCriticalSection section_;
#else
  explicit WhileUnchanged(PyObject*) {}
  ~WhileUnchanged() {}
#endif
  WhileUnchanged(const WhileUnchanged&) = delete;
  WhileUnchanged& operator=(const WhileUnchanged&) = delete;
};

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
    owners_.push_back(Ref::borrow(dictionary));
    dictionaries_.push_back({dictionary, 0});
#if PY_VERSION_HEX < 0x030C0000
    dictionaries_.back().mark = version_of(dictionary);
#endif
  }
#if PY_VERSION_HEX >= 0x030C0000
  // Watched before it is read: what another thread writes meanwhile is looked at again.
  if (DictionaryWatcher::get().id >= 0) {
    try {
      DictionaryWatcher::get().watch(this);
      remember(sharded);
    } catch (...) {
      DictionaryWatcher::get().unwatch(this);
      throw;
    }
    return;
  }
#endif
  remember(sharded);
}

void SlotWatch::remember(PyObject* sharded) {
  for (const Dictionary& entry : dictionaries_) {
    first_slot_.push_back(slots_.size());
    const WhileUnchanged lock(entry.dictionary);
    Py_ssize_t position = 0;
    PyObject *key = nullptr, *value = nullptr;
    while (PyDict_Next(entry.dictionary, &position, &key, &value) != 0) {
      slots_.push_back({Ref::borrow(key), Ref::borrow(value)});
    }
  }
  first_slot_.push_back(slots_.size());
  for (std::size_t i = 0; i < list_size(sharded); ++i) {
    PyObject* tensor = list_item(sharded, i);
    shards_.push_back({Ref::borrow(tensor), Ref::take(PyObject_GetAttr(tensor, shard_name()))});
  }
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
    if (item_of(now, slots_[i].key.get()).get() != slots_[i].value.get()) {
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
  // Taken first: a write while they are looked at counts again.
  const std::vector<std::size_t> taken = DictionaryWatcher::get().take_written(*this);
  bool differ = true;
  try {
    differ = !std::all_of(taken.begin(), taken.end(),
                          [this](std::size_t place) { return same_slots(place); });
  } catch (const PythonError&) {
    DictionaryWatcher::get().give_back(*this, taken);
    throw;
  }
  if (differ) {
    DictionaryWatcher::get().give_back(*this, taken);
  }
  return differ;
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
