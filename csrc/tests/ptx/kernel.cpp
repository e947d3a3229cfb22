#include "kernel.h"

namespace ema_fused::testing::ptx {
namespace {

template <typename Result, typename... Operands>
constexpr std::size_t count_operands(Result (*)(Operands...)) {
  return sizeof...(Operands);
}

const OpInfo kInfos[] = {
#define PTX_INFO(name, text, ...) {text, 1, count_operands(&Computation_##name::run)},
    PTX_COMPUTATIONS(PTX_INFO)
#undef PTX_INFO
#define PTX_INFO(name, text, Element, elements) {text, elements, 1},
        PTX_PARAMETER_LOADS(PTX_INFO) PTX_LOADS(PTX_INFO)
#undef PTX_INFO
#define PTX_INFO(name, text, Element, elements) {text, 0, 1 + elements},
            PTX_STORES(PTX_INFO)
#undef PTX_INFO
#define PTX_INFO(name, text, writes, reads) {text, writes, reads},
                PTX_CONTROLS(PTX_INFO)
#undef PTX_INFO
};

}  // namespace

const OpInfo& info_of(Op op) { return kInfos[static_cast<std::size_t>(op)]; }

bool is_comparison(Op op) { return std::string(info_of(op).mnemonic).compare(0, 5, "setp.") == 0; }

void Kernel::fail(std::size_t instruction, const std::string& what) const {
  throw Fault("line " + std::to_string(lines[instruction]) + " (" +
              info_of(instructions[instruction].op).mnemonic + "): " + what);
}

}  // namespace ema_fused::testing::ptx
