// Small kernels that compute what is known, or do what no kernel may.
#include <cmath>
#include <limits>

#include "../check.h"
#include "assignments.h"
#include "interpreter.h"
#include "parser.h"

using namespace ema_fused::testing::ptx;

namespace {

struct Arguments {
  u64 writable;
  u64 readable;
};

std::string kernel_of(const std::string& body) {
  return ".version 9.0\n.target sm_75\n.address_size 64\n"
         ".visible .entry one(\n.param .u64 one_param_0,\n.param .u64 one_param_1\n)\n"
         ".maxntid 256\n.minnctapersm 3\n{\n.reg .pred %p<4>;\n.reg .b16 %h<9>;\n"
         ".reg .b32 %r<9>;\n.reg .f32 %f<9>;\n.reg .b64 %rd<9>;\n"
         "ld.param.u64 %rd1, [one_param_0];\nld.param.u64 %rd2, [one_param_1];\n"
         "mov.u32 %r1, %tid.x;\n" +
         body + "\nret;\n}\n";
}

// What is wrong with a kernel of this body in `threads` threads, over 64 bytes that may be written
// and 64 that may be read; empty: nothing. `result`: null, or gets the first number written.
std::string fault_of(const std::string& body, u32 threads = 2, u32* result = nullptr) {
  DeviceMemory memory(std::size_t{1} << 16);
  std::uint8_t* const writable = memory.allocate(64, 0, Rights::kReadAndWrite);
  std::uint8_t* const readable = memory.allocate(64, 0, Rights::kRead);
  std::memset(readable, 0, 64);
  try {
    const std::vector<Kernel> kernels = parse(kernel_of(body));
    check_assignments(kernels.front());
    const Arguments arguments{reinterpret_cast<u64>(writable), reinterpret_cast<u64>(readable)};
    Interpreter(kernels.front()).run({1, threads}, &arguments, memory);
  } catch (const Fault& fault) {
    return fault.what();
  }
  if (result != nullptr) {
    std::memcpy(result, writable, sizeof(*result));
  }
  return "";
}

void check_fault(const std::string& body, const std::string& expected) {
  const std::string found = fault_of(body);
  if (found.find(expected) == std::string::npos) {
    std::fprintf(stderr, "expected '%s', found '%s'\n", expected.c_str(), found.c_str());
    std::exit(1);
  }
}

void check_result(const std::string& body, u32 expected) {
  u32 found = 0;
  const std::string fault = fault_of(body + "\nst.global.u32 [%rd1], %r2;", 1, &found);
  if (!fault.empty() || found != expected) {
    std::fprintf(stderr, "%s: expected 0x%08x, found 0x%08x %s\n", body.c_str(), expected, found,
                 fault.c_str());
    std::exit(1);
  }
}

void check_what_is_refused() {
  check_fault("frob.u32 %r2, %r1;", "line 19: an instruction that the interpreter doesn't know");
  check_fault("add.rn.ftz.f32 %f1, 0f00000000, 0f00000000;", "found 'add.rn.ftz.f32'");
  check_fault("add.f32 %f1, 0f00000000, 0f00000000;", "found 'add.f32'");
  check_fault("ld.global.s8 %r2, [%rd2];", "found 'ld.global.s8'");
  check_fault("setp.eq.u32 %p1, %r1, 0;\n@%p1 mov.u32 %r2, %r1;", "behind a predicate");
  check_fault("add.u32 %r2, %r1;", "with 2 operands");
  check_fault("bra $nowhere;", "expected a label of this kernel, found '$nowhere'");
  check_fault("mov.u32 %r2, %laneid;", "expected a number, found '%laneid'");
}

void check_registers() {
  check_fault("add.u32 %r2, %r1, %r3;", "line 19 (add): expected a register that is written");
  const std::string on_one_way =
      "setp.eq.u32 %p1, %r1, 0;\n@%p1 bra $L;\nmov.u32 %r3, 1;\n$L:\nadd.u32 %r2, %r1, %r3;";
  check_fault(on_one_way, "on every way to here, found %r3");
  check_fault("$L:\nbra $L;", "doesn't come to its end");
}

void check_memory() {
  const std::string mine = "mul.wide.u32 %rd3, %r1, 4;\nadd.s64 %rd4, %rd1, %rd3;\n";
  CHECK(fault_of(mine + "st.global.u32 [%rd4], %r1;\nld.global.u32 %r2, [%rd4];").empty());
  CHECK(fault_of("ld.global.v4.u32 {%r2,%r3,%r4,%r5}, [%rd2+48];").empty());
  check_fault("st.global.u32 [%rd1], %r1;", "a byte that thread 0 has touched");
  check_fault(mine + "st.global.u32 [%rd4], %r1;\nld.global.u8 %h1, [%rd1];",
              "line 22 (ld.global.8): loads 1 bytes, thread 1: a byte that thread 0 has touched");
  check_fault("st.global.u32 [%rd2], %r1;", "memory that may only be read");
  check_fault("ld.global.u32 %r2, [%rd2+64];", "outside of all tensors");
  check_fault("ld.global.u64 %rd3, [%rd2+60];", "the address is no multiple of that");
  check_fault("ld.global.v2.u32 {%r2,%r3}, [%rd2+4];", "the address is no multiple of that");
  check_fault("ld.param.u64 %rd3, [one_param_1+8];", "outside of the parameters");
  check_fault("prefetch.global.L1 [%rd2+64];", "an address within the table");
}

void check_computations() {
  check_result("mov.u32 %r2, -1;\nshl.b32 %r2, %r2, 32;", 0);
  check_result("mov.b32 %r3, 0x12345678;\nshf.l.wrap.b32 %r2, %r3, %r3, 8;", 0x34567812u);
  check_result("mov.b32 {%h1, %h2}, 0x12345678;\nmov.b32 %r2, {%h2, %h1};", 0x56781234u);
  check_result("setp.lt.s16 %p1, -1, 1;\nselp.b32 %r2, 5, 6, %p1;", 5);
  check_result("setp.lt.u16 %p1, -1, 1;\nselp.b32 %r2, 5, 6, %p1;", 6);
  check_result("setp.neu.f32 %p1, 0f7FC00000, 0f00000000;\nselp.b32 %r2, 5, 6, %p1;", 5);
  check_result("setp.ne.f32 %p1, 0f7FC00000, 0f00000000;\nselp.b32 %r2, 5, 6, %p1;", 6);
  check_result("cvt.s64.s32 %rd3, -2;\nshr.u64 %rd3, %rd3, 32;\ncvt.u32.u64 %r2, %rd3;", ~0u);
  check_result("bfi.b64 %rd3, 3, 0, 4, 8;\ncvt.u32.u64 %r2, %rd3;", 0x30);
  // (1 + 2^-12)^2 - (1 + 2^-11): 2^-24 only if nothing is rounded on the way.
  check_result("fma.rn.f32 %f1, 0f3F800800, 0f3F800800, 0fBF801000;\nmov.b32 %r2, %f1;",
               0x33800000u);
  check_result("cvt.rzi.s32.f32 %r2, 0fC0200000;", static_cast<u32>(-2));
}

// The values of the host's tests have no float16 of the interpreter in them.
void check_float16() {
  for (u32 bits = 0; bits < 0x10000u; ++bits) {
    const f32 value = widen_float16(static_cast<u16>(bits));
    CHECK(std::isnan(value) ? (bits & 0x7fffu) > 0x7c00u : round_to_float16(value) == bits);
  }
  CHECK(round_to_float16(1.0f + 0x1p-11f) == 0x3c00);
  CHECK(round_to_float16(1.0f + 0x3p-11f) == 0x3c02);
  CHECK(round_to_float16(std::nextafter(1.0f + 0x1p-11f, 2.0f)) == 0x3c01);
  CHECK(round_to_float16(65519.0f) == 0x7bff);
  CHECK(round_to_float16(-65520.0f) == 0xfc00);
  CHECK(round_to_float16(0x1p-25f) == 0);
  CHECK(round_to_float16(std::nextafter(0x1p-25f, 1.0f)) == 1);
  CHECK(round_to_float16(0x1.ffep-15f + 0x1p-26f) == 0x0400);
}

}  // namespace

int main() {
  check_what_is_refused();
  check_registers();
  check_memory();
  check_computations();
  check_float16();
  return 0;
}
