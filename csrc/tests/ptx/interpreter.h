// Runs a kernel: one thread after the other, which is exact for kernels that share no memory and
// wait for nobody.
#pragma once

#include <vector>

#include "device_memory.h"
#include "kernel.h"

namespace ema_fused::testing::ptx {

// What launches have come across, by instruction.
struct Coverage {
  std::vector<bool> executed;
  std::vector<bool> met_exactly;  // comparisons: of two equal numbers
};

struct Grid {
  u32 blocks;
  u32 threads;
};

class Interpreter {
 public:
  explicit Interpreter(const Kernel& kernel);

  // `parameters`: a struct of them as the C++ caller has it. Throws a Fault that names the
  // instruction. `coverage`: null, or added to; then it runs at half the speed.
  void run(const Grid& grid, const void* parameters, DeviceMemory& memory,
           Coverage* coverage = nullptr);

  u64 instructions_run() const { return instructions_run_; }

 private:
  template <bool kCovers>
  void run_thread(DeviceMemory& memory, u16 thread, Coverage* coverage);
  template <auto kCompute>
  void compute(const Instruction& one);
  template <typename Element, int kElements>
  void load(const Instruction& one, const std::uint8_t* from);
  template <typename Element, int kElements>
  void store(const Instruction& one, std::uint8_t* to) const;
  const std::uint8_t* parameter_at(u64 address, std::size_t bytes) const;
  u64 address_of(const Instruction& one, std::size_t operand) const {
    return registers_[one.operands[operand]] + static_cast<u64>(s64{one.immediate});
  }

  const Kernel& kernel_;
  std::vector<u64> registers_;
  std::vector<std::uint8_t> parameters_;
  u64 instructions_run_ = 0;
};

}  // namespace ema_fused::testing::ptx
