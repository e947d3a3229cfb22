#include "plants.h"

#include <cstdlib>
#include <map>
#include <utility>

namespace ema_fused::testing::ptx {
namespace {

// What stands in the place of an operation, by kind.
std::map<Op, Op> replacements_of(const std::string& kind) {
  std::map<Op, Op> pairs;
  if (kind == "comparison") {
#define PTX_PAIRS(T) {Op::setp_lt_##T, Op::setp_le_##T}, {Op::setp_gt_##T, Op::setp_ge_##T},
    pairs = {PTX_PAIRS(u16) PTX_PAIRS(s16) PTX_PAIRS(u32) PTX_PAIRS(s32) PTX_PAIRS(u64)
                 PTX_PAIRS(s64) PTX_PAIRS(f32) PTX_PAIRS(f64)};
#undef PTX_PAIRS
  } else if (kind == "equality") {
#define PTX_PAIRS(T) {Op::setp_eq_##T, Op::setp_ne_##T},
    pairs = {PTX_PAIRS(u16) PTX_PAIRS(s16) PTX_PAIRS(u32) PTX_PAIRS(s32) PTX_PAIRS(u64)
                 PTX_PAIRS(s64) PTX_PAIRS(f32) PTX_PAIRS(f64)};
#undef PTX_PAIRS
  } else if (kind == "branch") {
    pairs = {{Op::branch_if, Op::branch_unless}};
  } else if (kind == "rounding") {
    return {{Op::fma_rn_f32, Op::unfused_f32},
            {Op::fma_rn_f64, Op::unfused_f64},
            {Op::cvt_f32_f64, Op::cvt_rz_f32_f64},
            {Op::cvt_f16_f32, Op::cvt_rz_f16_f32}};
  } else if (kind == "lost") {
#define PTX_LOST(name, ...) pairs[Op::name] = Op::nothing;
    PTX_STORES(PTX_LOST)
#undef PTX_LOST
    return pairs;
  }
  const std::map<Op, Op> one_way = pairs;
  for (const auto& [from, to] : one_way) {
    pairs[to] = from;
  }
  return pairs;
}

const std::map<Op, s32>& element_sizes() {
  static const std::map<Op, s32> sizes = {
#define PTX_SIZE(name, text, Element, elements) {Op::name, s32{sizeof(Element) * elements}},
      PTX_PARAMETER_LOADS(PTX_SIZE) PTX_LOADS(PTX_SIZE) PTX_STORES(PTX_SIZE)
#undef PTX_SIZE
  };
  return sizes;
}

// The constant that an integer instruction computes with; null: it has none.
Constant* constant_of(Kernel& kernel, const Instruction& one) {
  const OpInfo& info = info_of(one.op);
  const std::string mnemonic = info.mnemonic;
  if (info.writes != 1 || mnemonic.find(".f") != std::string::npos) {
    return nullptr;
  }
  for (std::size_t k = 1; k <= info.reads; ++k) {
    for (Constant& constant : kernel.constants) {
      if (constant.place == one.operands[k]) {
        return &constant;
      }
    }
  }
  return nullptr;
}

// Changes this instruction if it is one of the kind; returns whether it is.
class Planter {
 public:
  explicit Planter(std::string kind) : kind_(std::move(kind)), replaced_(replacements_of(kind_)) {}

  bool plant(Kernel& kernel, Instruction& one, bool changes) const {
    const auto replaced = replaced_.find(one.op);
    if (replaced != replaced_.end()) {
      one.op = changes ? replaced->second : one.op;
      return true;
    }
    const bool is_ordered = one.op == Op::sub || one.op == Op::select || one.op == Op::sub_rn_f32 ||
                            one.op == Op::sub_rn_f64;
    if (kind_ == "operands" && is_ordered) {
      if (changes) {
        std::swap(one.operands[1], one.operands[2]);
      }
      return true;
    }
    const auto size = element_sizes().find(one.op);
    if (kind_ == "offset" && size != element_sizes().end()) {
      one.immediate += changes ? size->second : 0;
      return true;
    }
    Constant* const constant = kind_ == "constant" ? constant_of(kernel, one) : nullptr;
    if (constant != nullptr && changes) {
      ++constant->value;
    }
    return constant != nullptr;
  }

 private:
  std::string kind_;
  std::map<Op, Op> replaced_;
};

}  // namespace

std::string plant_fault(std::vector<Kernel>& kernels, const std::string& plant) {
  const std::size_t colon = plant.find(':');
  const Planter planter(plant.substr(0, colon));
  const std::string number = colon == std::string::npos ? "" : plant.substr(colon + 1);
  char* end = nullptr;
  const std::size_t wanted = std::strtoull(number.c_str(), &end, 10);
  std::size_t found = 0;
  for (Kernel& kernel : kernels) {
    for (std::size_t i = 0; i < kernel.instructions.size(); ++i) {
      Instruction& one = kernel.instructions[i];
      const OpInfo& info = info_of(one.op);
      if (planter.plant(kernel, one, false) && found++ == wanted && *end == '\0' && end != number) {
        planter.plant(kernel, one, true);
        return "line " + std::to_string(kernel.lines[i]) + ": " + info.mnemonic + ", " + plant;
      }
    }
  }
  throw Fault("--plant '" + plant + "': expected KIND:N of plants.h, N below " +
              std::to_string(found));
}

}  // namespace ema_fused::testing::ptx
