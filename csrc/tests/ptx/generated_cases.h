// The problems of ../cases.h, run by the kernels as a GPU would run them.
#pragma once

#include "kernel_under_test.h"

namespace ema_fused::testing::ptx {

// Ends the process where a result is wrong (../check.h); throws a Fault of the interpreter.
void check_generated_cases(KernelsUnderTest& kernels, DeviceMemory& memory, std::uint64_t seeds);

}  // namespace ema_fused::testing::ptx
