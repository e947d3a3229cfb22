// What the update of a whole model adds to the launch of its plan: is it still the model that was
// paired, and which step is it.
#pragma once

#include <cstdint>

#include "plan.h"
#include "python_refs.h"
#include "slot_watch.h"
#include "tensor_watch.h"

namespace ema_fused {

// The number of updates so far, in a tensor of one int64 in host memory: read and written where it
// lies. Its version counter stays, so it must be a tensor that no gradient is taken through.
class Counter {
 public:
  // Throws std::invalid_argument for any other tensor.
  explicit Counter(PyObject* tensor);

  // Where the number lies now; null if the tensor has become another kind.
  std::int64_t* find();

 private:
  TensorWatch watch_;
};

// One average of `plan` at step `steps`: true, with the step counted. False, with nothing done,
// where a tensor or a module was replaced, a tensor has changed in kind, or the counter is at
// another step. Without a counter the caller counts.
bool update_model(Plan& plan, double weight, SlotWatch& averaged, SlotWatch& model,
                  Counter* counter, std::int64_t steps);

}  // namespace ema_fused
