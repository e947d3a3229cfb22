#include "interpreter.h"

#include <utility>

namespace ema_fused::testing::ptx {
namespace {

// A thread that jumps more often than this never ends.
constexpr u32 kMostJumps = 1u << 20;

template <typename T>
T from_bits(u64 bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <typename T>
u64 to_bits(T value) {
  u64 bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <auto kCompute>
struct Computation;
template <typename Result, typename... Operands, Result (*kCompute)(Operands...)>
struct Computation<kCompute> {
  template <std::size_t... kPlaces>
  static u64 run(const u64* registers, const u16* operands, std::index_sequence<kPlaces...>) {
    return to_bits(kCompute(from_bits<Operands>(registers[operands[kPlaces]])...));
  }
  static u64 run(const u64* registers, const u16* operands) {
    return run(registers, operands, std::index_sequence_for<Operands...>{});
  }
};

template <typename T>
bool are_equal(bool (*)(T, T), u64 a, u64 b) {
  return from_bits<T>(a) == from_bits<T>(b);
}

// Whether a comparison is of two equal numbers.
bool is_met_exactly(const Instruction& one, const u64* registers) {
  const u64 a = registers[one.operands[1]];
  const u64 b = registers[one.operands[2]];
  switch (one.op) {
#define PTX_CASE(name, ...) \
  case Op::name:            \
    return are_equal(&Computation_##name::run, a, b);
    PTX_ALL_COMPARISONS(PTX_CASE)
#undef PTX_CASE
    default:
      return false;
  }
}

}  // namespace

Interpreter::Interpreter(const Kernel& kernel)
    : kernel_(kernel), registers_(kernel.register_names.size(), 0) {
  for (const Constant& constant : kernel.constants) {
    registers_[constant.place] = constant.value;
  }
}

void Interpreter::run(const Grid& grid, const void* parameters, DeviceMemory& memory,
                      Coverage* coverage) {
  if (grid.blocks * grid.threads > DeviceMemory::kMostThreads) {
    throw Fault("a launch of more threads than the tests' memory can tell apart");
  }
  const Parameter& last = kernel_.parameters.back();
  const auto* bytes = static_cast<const std::uint8_t*>(parameters);
  parameters_.assign(bytes, bytes + last.offset + last.size);
  if (coverage != nullptr) {
    coverage->executed.resize(kernel_.instructions.size());
    coverage->met_exactly.resize(kernel_.instructions.size());
  }
  memory.forget_threads();
  registers_[kNtid] = grid.threads;
  registers_[kNctaid] = grid.blocks;
  u16 thread = 0;
  for (u32 block = 0; block < grid.blocks; ++block) {
    registers_[kCtaid] = block;
    for (u32 i = 0; i < grid.threads; ++i, ++thread) {
      registers_[kTid] = i;
      if (coverage != nullptr) {
        run_thread<true>(memory, thread, coverage);
      } else {
        run_thread<false>(memory, thread, nullptr);
      }
    }
  }
}

template <auto kCompute>
inline void Interpreter::compute(const Instruction& one) {
  registers_[one.operands[0]] = Computation<kCompute>::run(registers_.data(), one.operands + 1);
}

template <typename Element, int kElements>
inline void Interpreter::load(const Instruction& one, const std::uint8_t* from) {
  for (int i = 0; i < kElements; ++i) {
    Element element;
    std::memcpy(&element, from + static_cast<std::size_t>(i) * sizeof(Element), sizeof(Element));
    registers_[one.operands[i]] = element;
  }
}

template <typename Element, int kElements>
inline void Interpreter::store(const Instruction& one, std::uint8_t* to) const {
  for (int i = 0; i < kElements; ++i) {
    const auto element = from_bits<Element>(registers_[one.operands[1 + i]]);
    std::memcpy(to + static_cast<std::size_t>(i) * sizeof(Element), &element, sizeof(Element));
  }
}

const std::uint8_t* Interpreter::parameter_at(u64 address, std::size_t bytes) const {
  const u64 number = address >> kParameterAddressBits;
  const u64 offset = address & ((u64{1} << kParameterAddressBits) - 1);
  if (number >= kernel_.parameters.size() || offset % bytes != 0 ||
      offset + bytes > kernel_.parameters[number].size) {
    return nullptr;
  }
  return parameters_.data() + kernel_.parameters[number].offset + offset;
}

template <bool kCovers>
void Interpreter::run_thread(DeviceMemory& memory, u16 thread, Coverage* coverage) {
  const Instruction* const begin = kernel_.instructions.data();
  const Instruction* next = begin;
  u32 jumps = 0;
  u64 count = 0;
  while (true) {
    const Instruction& one = *next++;
    const auto place = static_cast<std::size_t>(&one - begin);
    ++count;
    if constexpr (kCovers) {
      coverage->executed[place] = true;
      if (is_met_exactly(one, registers_.data())) {
        coverage->met_exactly[place] = true;
      }
    }
    switch (one.op) {
#define PTX_CASE(name, ...)                 \
  case Op::name:                            \
    compute<&Computation_##name::run>(one); \
    break;
      PTX_COMPUTATIONS(PTX_CASE)
#undef PTX_CASE
#define PTX_CASE(name, text, Element, elements)                                        \
  case Op::name: {                                                                     \
    const std::uint8_t* from =                                                         \
        parameter_at(address_of(one, elements), sizeof(Element) * elements);           \
    if (from == nullptr) {                                                             \
      kernel_.fail(place, "outside of the parameters, or at no multiple of its size"); \
    }                                                                                  \
    load<Element, elements>(one, from);                                                \
    break;                                                                             \
  }
      PTX_PARAMETER_LOADS(PTX_CASE)
#undef PTX_CASE
#define PTX_CASE(name, text, Element, elements)                                                \
  case Op::name: {                                                                             \
    const u64 address = address_of(one, elements);                                             \
    const std::uint8_t* from = memory.at<Element, elements, false>(address, thread);           \
    if (from == nullptr) {                                                                     \
      kernel_.fail(place, memory.why_not(address, sizeof(Element) * elements, false, thread)); \
    }                                                                                          \
    load<Element, elements>(one, from);                                                        \
    break;                                                                                     \
  }
      PTX_LOADS(PTX_CASE)
#undef PTX_CASE
#define PTX_CASE(name, text, Element, elements)                                               \
  case Op::name: {                                                                            \
    const u64 address = address_of(one, 0);                                                   \
    std::uint8_t* to = memory.at<Element, elements, true>(address, thread);                   \
    if (to == nullptr) {                                                                      \
      kernel_.fail(place, memory.why_not(address, sizeof(Element) * elements, true, thread)); \
    }                                                                                         \
    store<Element, elements>(one, to);                                                        \
    break;                                                                                    \
  }
      PTX_STORES(PTX_CASE)
#undef PTX_CASE
      case Op::unpack_b32: {
        const u64 bits = registers_[one.operands[2]];
        registers_[one.operands[0]] = static_cast<u16>(bits);
        registers_[one.operands[1]] = static_cast<u16>(bits >> 16);
        break;
      }
      case Op::unpack_b64: {
        const u64 bits = registers_[one.operands[2]];
        registers_[one.operands[0]] = static_cast<u32>(bits);
        registers_[one.operands[1]] = static_cast<u32>(bits >> 32);
        break;
      }
      case Op::prefetch:
        // What is asked for ahead must be there, and is read by nobody.
        if (!memory.is_given_out(address_of(one, 0))) {
          kernel_.fail(place, "expected an address within the table");
        }
        break;
      case Op::nothing:
        break;
      case Op::branch:
      case Op::branch_if:
      case Op::branch_unless:
        if (one.op == Op::branch ||
            (registers_[one.operands[0]] != 0) == (one.op == Op::branch_if)) {
          next = begin + one.immediate;
          if (++jumps > kMostJumps) {
            kernel_.fail(place, "the thread doesn't come to its end");
          }
        }
        break;
      case Op::leave:
        instructions_run_ += count;
        return;
    }
  }
}

}  // namespace ema_fused::testing::ptx
