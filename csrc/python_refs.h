// The little of Python's C API that the engine needs. pybind11 is included by bindings.cpp alone: a
// file that includes it compiles for seconds before its own first line.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstddef>
#include <utility>

namespace ema_fused {

// A Python exception is set; bindings.cpp lets it through as it is.
struct PythonError {};

// An owned reference, or none.
class Ref {
 public:
  Ref() = default;
  ~Ref() { Py_XDECREF(object_); }
  Ref(const Ref& other) : object_(other.object_) { Py_XINCREF(object_); }
  Ref(Ref&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
  Ref& operator=(Ref other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }

  static Ref borrow(PyObject* object) {
    Py_XINCREF(object);
    return Ref(object);
  }
  // What a function of Python's C API returned; null is its exception.
  static Ref take(PyObject* result) {
    if (result == nullptr) {
      throw PythonError{};
    }
    return Ref(result);
  }

  PyObject* get() const { return object_; }
  PyObject* release() { return std::exchange(object_, nullptr); }

 private:
  explicit Ref(PyObject* object) : object_(object) {}
  PyObject* object_ = nullptr;
};

// The items of a list, borrowed from it. It must not change meanwhile.
inline std::size_t list_size(PyObject* list) {
  return static_cast<std::size_t>(PyList_GET_SIZE(list));
}
inline PyObject* list_item(PyObject* list, std::size_t i) {
  return PyList_GET_ITEM(list, static_cast<Py_ssize_t>(i));
}

// Other Python threads may run while this lives.
class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  ~WithoutGil() { PyEval_RestoreThread(state_); }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  PyThreadState* state_;
};

}  // namespace ema_fused
