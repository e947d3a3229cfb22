// The kernels of one PTX text, called as the C++ code calls them.
#pragma once

#include <string>
#include <vector>

#include "host_body.h"
#include "interpreter.h"

namespace ema_fused::testing::ptx {

class KernelsUnderTest {
 public:
  // Throws a Fault where the text holds other kernels than those of this operation and arithmetic,
  // or other parameters or launch bounds than the C++ code has.
  KernelsUnderTest(const std::string& text, Operation operation, Arithmetic arithmetic,
                   const std::string& plant);
  KernelsUnderTest(const KernelsUnderTest&) = delete;
  KernelsUnderTest& operator=(const KernelsUnderTest&) = delete;

  // One launch; with parts for the distances that of the kernel that measures.
  void run(const Parameters& parameters, const Grid& grid, DeviceMemory& memory);

  Operation operation() const { return operation_; }
  Arithmetic arithmetic() const { return arithmetic_; }
  const std::string& planted() const { return planted_; }

  // From here on what is executed is counted, for report().
  void cover() { coverages_.resize(kernels_.size()); }
  // What the launches so far have done.
  std::string report() const;

 private:
  std::size_t find(const std::string& name, const std::string& arguments) const;

  Operation operation_;
  Arithmetic arithmetic_;
  std::vector<Kernel> kernels_;
  std::string planted_;
  std::vector<Interpreter> interpreters_;
  std::vector<Coverage> coverages_;  // empty, or one of each kernel
  std::size_t update_;
  std::size_t measured_;  // of an average
};

}  // namespace ema_fused::testing::ptx
