// Launches that are drawn: tables of every kind that the C++ code can make, and some that it can't,
// run by the kernels and by the host's body, which must leave the same memory.
#pragma once

#include "kernel_under_test.h"

namespace ema_fused::testing::ptx {

// Throws a Fault at the first difference.
void check_random_tables(KernelsUnderTest& kernels, DeviceMemory& memory, std::uint64_t launches);

}  // namespace ema_fused::testing::ptx
