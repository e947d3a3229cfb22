// From a PTX text to its kernels. What is not known is refused, by name and line.
#pragma once

#include <string>
#include <vector>

#include "kernel.h"

namespace ema_fused::testing::ptx {

// Throws a Fault.
std::vector<Kernel> parse(const std::string& text);

}  // namespace ema_fused::testing::ptx
