#include "model_update.h"

#include <stdexcept>

namespace ema_fused {

Counter::Counter(PyObject* tensor) : watch_(tensor) {
  const TensorFacts& facts = watch_.facts()[0];
  const dlpack::DataType& dtype = facts.exact_dtype;
  if (facts.elements != 1 || facts.device.type != dlpack::kCpu || dtype.code != dlpack::kInt ||
      dtype.bits != 64 || dtype.lanes != 1) {
    throw std::invalid_argument("a counter is one int64 in host memory");
  }
}

std::int64_t* Counter::find() {
  if (watch_.check() == Change::kDifferent) {
    return nullptr;
  }
  return static_cast<std::int64_t*>(watch_.facts()[0].data);
}

bool update_model(Plan& plan, double weight, SlotWatch& averaged, SlotWatch& model,
                  Counter* counter, std::int64_t steps) {
  const Turn turn = plan.take_turn();
  if (averaged.changed() || model.changed()) {
    return false;
  }
  std::int64_t* const counted = counter == nullptr ? nullptr : counter->find();
  if (counter != nullptr && (counted == nullptr || *counted != steps)) {
    return false;
  }
  if (!plan.run(Operation::kAverage, weight, LaunchOptions{})) {
    return false;
  }
  if (counted != nullptr) {
    *counted = steps + 1;
  }
  return true;
}

}  // namespace ema_fused
