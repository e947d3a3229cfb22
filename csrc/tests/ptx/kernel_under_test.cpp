#include "kernel_under_test.h"

#include <algorithm>
#include <cstddef>

#include "../../update_cuda_kernel.cuh"
#include "assignments.h"
#include "parser.h"
#include "plants.h"

namespace ema_fused::testing::ptx {
namespace {

// What nvcc makes of a template argument, in a mangled name.
template <typename Enum>
std::string mangled(const std::string& name, Enum value) {
  return std::to_string(name.size()) + name + "E" + std::to_string(static_cast<int>(value)) + "E";
}

void expect(const Kernel& kernel, const std::string& what, std::size_t found,
            std::size_t expected) {
  if (found != expected) {
    throw Fault(kernel.name + ": " + what + ": expected " + std::to_string(expected) + ", found " +
                std::to_string(found));
  }
}

void check_interface(const Kernel& kernel, bool measures) {
  expect(kernel, ".maxntid", kernel.max_threads, cuda::kThreads);
  expect(kernel, ".minnctapersm", kernel.min_blocks_a_multiprocessor,
         cuda::kBlocksPerMultiprocessor);
  const Parameter expected[] = {{offsetof(Parameters, entries), sizeof(Parameters::entries)},
                                {offsetof(Parameters, heads), sizeof(Parameters::heads)},
                                {offsetof(Parameters, launch), sizeof(Parameters::launch)},
                                {offsetof(Parameters, partials), sizeof(Parameters::partials)}};
  const std::size_t count = measures ? 4 : 3;
  expect(kernel, "the number of parameters", kernel.parameters.size(), count);
  for (std::size_t i = 0; i < count; ++i) {
    const std::string parameter = "parameter " + std::to_string(i);
    expect(kernel, "the offset of " + parameter, kernel.parameters[i].offset, expected[i].offset);
    expect(kernel, "the size of " + parameter, kernel.parameters[i].size, expected[i].size);
  }
}

std::string report_of(const Kernel& kernel, const Coverage& coverage) {
  std::size_t executed = 0;
  std::size_t comparisons = 0;
  std::size_t met_exactly = 0;
  std::string missed;
  for (std::size_t i = 0; i < coverage.executed.size(); ++i) {
    executed += coverage.executed[i] ? 1 : 0;
    met_exactly += coverage.met_exactly[i] ? 1 : 0;
    comparisons += is_comparison(kernel.instructions[i].op) ? 1 : 0;
    if (!coverage.executed[i] && (i == 0 || coverage.executed[i - 1])) {
      missed += " " + std::to_string(kernel.lines[i]);
    }
  }
  return kernel.name + ": " + std::to_string(executed) + " of " +
         std::to_string(coverage.executed.size()) + " instructions executed, " +
         std::to_string(met_exactly) + " of " + std::to_string(comparisons) +
         " comparisons of two equal numbers; never executed, from lines" + missed;
}

}  // namespace

KernelsUnderTest::KernelsUnderTest(const std::string& text, Operation operation,
                                   Arithmetic arithmetic, const std::string& plant)
    : operation_(operation), arithmetic_(arithmetic), kernels_(parse(text)) {
  const bool measures = operation == Operation::kAverage;
  if (kernels_.size() != (measures ? 2 : 1)) {
    throw Fault("expected the kernels of one operation and arithmetic, found " +
                std::to_string(kernels_.size()));
  }
  const std::string which = mangled("Arithmetic", arithmetic);
  update_ = find("13update_kernel", mangled("Operation", operation) + "LNS_" + which);
  measured_ = measures ? find("22measured_update_kernel", which) : update_;
  for (const Kernel& kernel : kernels_) {
    check_assignments(kernel);
    check_interface(kernel, &kernel != &kernels_[update_]);
  }
  if (!plant.empty()) {
    planted_ = plant_fault(kernels_, plant);
  }
  for (const Kernel& kernel : kernels_) {
    interpreters_.emplace_back(kernel);
  }
}

std::size_t KernelsUnderTest::find(const std::string& name, const std::string& arguments) const {
  for (std::size_t i = 0; i < kernels_.size(); ++i) {
    const std::size_t at = kernels_[i].name.find(name);
    if (at != std::string::npos && kernels_[i].name.find(arguments, at) != std::string::npos) {
      return i;
    }
  }
  throw Fault("expected a kernel named ..." + name + "..." + arguments + ", found " +
              kernels_[0].name);
}

void KernelsUnderTest::run(const Parameters& parameters, const Grid& grid, DeviceMemory& memory) {
  const std::size_t which = parameters.partials.sums != nullptr ? measured_ : update_;
  Coverage* const coverage = coverages_.empty() ? nullptr : &coverages_[which];
  interpreters_[which].run(grid, &parameters, memory, coverage);
}

std::string KernelsUnderTest::report() const {
  u64 run = 0;
  for (const Interpreter& interpreter : interpreters_) {
    run += interpreter.instructions_run();
  }
  std::string text = std::to_string(run / 1000000) + " million instructions executed";
  for (std::size_t i = 0; i < coverages_.size(); ++i) {
    text += "\n" + report_of(kernels_[i], coverages_[i]);
  }
  return text;
}

}  // namespace ema_fused::testing::ptx
