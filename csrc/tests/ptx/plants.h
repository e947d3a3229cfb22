// Faults planted into a kernel, one instruction at a time: the tests must see them.
#pragma once

#include <string>
#include <vector>

#include "kernel.h"

namespace ema_fused::testing::ptx {

// Changes one instruction; returns what it has done, with the line. `plant`: "KIND:N", the N-th
// place of its kind in the text, from 0 on. The kinds:
//   comparison   < for <=, >= for >, ...
//   equality     == for !=
//   branch       taken where it wasn't
//   rounding     a product and a sum rounded each; a conversion that rounds towards zero
//   operands     the first two of a difference or a selection exchanged
//   constant     one more than it was
//   offset       an access at the next element
//   lost         a store that isn't made
std::string plant_fault(std::vector<Kernel>& kernels, const std::string& plant);

}  // namespace ema_fused::testing::ptx
