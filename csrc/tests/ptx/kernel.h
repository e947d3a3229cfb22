// A kernel of a PTX text, decoded for the interpreter.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>
#include <vector>

#include "operations.h"

namespace ema_fused::testing::ptx {

// What is wrong with a text, or with what a kernel does: with the line it stands in.
class Fault : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// First the registers that are written, then those that are read. Constants and special registers
// have places among the registers, so that every operand is one.
struct Instruction {
  Op op;
  u16 operands[5];
  s32 immediate;  // the offset of an access, the place a branch goes to
};
static_assert(sizeof(Instruction) == 16, "four of them in a cache line");

struct OpInfo {
  const char* mnemonic;
  std::size_t writes;
  std::size_t reads;
};
const OpInfo& info_of(Op op);
bool is_comparison(Op op);

struct Parameter {
  std::size_t offset;  // in a struct of all of them
  std::size_t size;
};

struct Constant {
  u16 place;
  u64 value;
};

// Where the special registers lie.
enum SpecialRegister : u16 { kTid, kNtid, kCtaid, kNctaid, kSpecialRegisters };

struct Kernel {
  std::string name;
  std::vector<Parameter> parameters;
  u32 max_threads = 0;                  // .maxntid; 0: none told
  u32 min_blocks_a_multiprocessor = 0;  // .minnctapersm
  std::vector<Instruction> instructions;
  std::vector<u32> lines;                   // of each instruction, from 1 on
  std::vector<std::string> register_names;  // of each place
  std::vector<Constant> constants;

  // "line 12 (add): ..."
  [[noreturn]] void fail(std::size_t instruction, const std::string& what) const;
};

// Addresses of parameters: apart, so that none is reached from its neighbour.
constexpr u32 kParameterAddressBits = 16;

}  // namespace ema_fused::testing::ptx
