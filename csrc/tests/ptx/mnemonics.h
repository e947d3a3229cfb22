// From the name of a PTX instruction to the operation of the interpreter.
#pragma once

#include <optional>
#include <string>

#include "operations.h"

namespace ema_fused::testing::ptx {

std::optional<Op> op_named(const std::string& mnemonic);

}  // namespace ema_fused::testing::ptx
