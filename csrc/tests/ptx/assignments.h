// A register must be written on every way to where it is read.
#pragma once

#include "kernel.h"

namespace ema_fused::testing::ptx {

// Throws a Fault that names the first instruction that may read a register nobody has written.
// Looked for once, in the text: what holds on every way needn't be watched while a kernel runs.
void check_assignments(const Kernel& kernel);

}  // namespace ema_fused::testing::ptx
