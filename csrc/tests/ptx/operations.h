// The PTX instructions that an interpreter of our kernels knows: what each computes.
//
// A register holds 64 bits. Whoever reads it takes as many of the low ones as its type has, so
// sums, products and bitwise operations of all widths are one operation on 64 bits.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace ema_fused::testing::ptx {

using u16 = std::uint16_t;
using s16 = std::int16_t;
using u32 = std::uint32_t;
using s32 = std::int32_t;
using u64 = std::uint64_t;
using s64 = std::int64_t;
using f32 = float;
using f64 = double;

// A float32 rounded to float16: to nearest, ties to even. By the definition of the format, unlike
// the conversion that is tested with it.
u16 round_to_float16(f32 value);
f32 widen_float16(u16 bits);

// Saturating, towards zero; a NaN gives 0.
s32 truncate_to_s32(f32 value);

// Towards zero.
u16 truncate_to_float16(f32 value);
f32 truncate_to_float32(f64 value);

// One instruction a line, which the formatter would run together.
// clang-format off

// name, mnemonic without the types that don't matter, type of the result, operands, result
#define PTX_WIDTHLESS(X)                                     \
  X(mov, "mov", u64, (u64 a), a)                             \
  X(add, "add", u64, (u64 a, u64 b), a + b)                  \
  X(sub, "sub", u64, (u64 a, u64 b), a - b)                  \
  X(mul_lo, "mul.lo", u64, (u64 a, u64 b), a * b)            \
  X(mad_lo, "mad.lo", u64, (u64 a, u64 b, u64 c), a * b + c) \
  X(bit_and, "and", u64, (u64 a, u64 b), a & b)              \
  X(bit_or, "or", u64, (u64 a, u64 b), a | b)                \
  X(bit_xor, "xor", u64, (u64 a, u64 b), a ^ b)              \
  X(bit_not, "not", u64, (u64 a), ~a)                        \
  X(select, "selp", u64, (u64 a, u64 b, bool c), c ? a : b)

#define PTX_OTHERS(X)                                                                           \
  X(not_pred, "not.pred", bool, (bool a), !a)                                                   \
  X(cvta_to_global, "cvta.to.global.u64", u64, (u64 a), a)                                      \
  X(mul_wide_u16, "mul.wide.u16", u32, (u16 a, u16 b), u32{a} * b)                              \
  X(mul_wide_u32, "mul.wide.u32", u64, (u32 a, u32 b), u64{a} * b)                              \
  X(mul_wide_s32, "mul.wide.s32", s64, (s32 a, s32 b), s64{a} * b)                              \
  X(mad_wide_u32, "mad.wide.u32", u64, (u32 a, u32 b, u64 c), u64{a} * b + c)                   \
  X(mad_wide_s32, "mad.wide.s32", u64, (s32 a, s32 b, u64 c), static_cast<u64>(s64{a} * b) + c) \
  X(mul_hi_u32, "mul.hi.u32", u32, (u32 a, u32 b), static_cast<u32>(u64{a} * b >> 32))          \
  X(shl_b16, "shl.b16", u16, (u16 a, u32 b), b > 15 ? u16{0} : static_cast<u16>(a << b))        \
  X(shl_b32, "shl.b32", u32, (u32 a, u32 b), b > 31 ? 0 : a << b)                               \
  X(shl_b64, "shl.b64", u64, (u64 a, u32 b), b > 63 ? 0 : a << b)                               \
  X(shr_u16, "shr.u16", u16, (u16 a, u32 b), b > 15 ? u16{0} : static_cast<u16>(a >> b))        \
  X(shr_u32, "shr.u32", u32, (u32 a, u32 b), b > 31 ? 0 : a >> b)                               \
  X(shr_u64, "shr.u64", u64, (u64 a, u32 b), b > 63 ? 0 : a >> b)                               \
  X(shr_s32, "shr.s32", s32, (s32 a, u32 b), a >> std::min(b, 31u))                             \
  X(shr_s64, "shr.s64", s64, (s64 a, u32 b), a >> std::min(b, 63u))                             \
  X(shf_l_wrap, "shf.l.wrap.b32", u32, (u32 a, u32 b, u32 c),                                   \
    static_cast<u32>(((u64{b} << 32 | a) << (c & 31u)) >> 32))                                  \
  X(shf_r_wrap, "shf.r.wrap.b32", u32, (u32 a, u32 b, u32 c),                                   \
    static_cast<u32>((u64{b} << 32 | a) >> (c & 31u)))                                          \
  X(bfi_b32, "bfi.b32", u32, (u32 a, u32 b, u32 c, u32 d), insert_bits<u32>(a, b, c, d))        \
  X(bfi_b64, "bfi.b64", u64, (u64 a, u64 b, u32 c, u32 d), insert_bits<u64>(a, b, c, d))        \
  X(min_u32, "min.u32", u32, (u32 a, u32 b), std::min(a, b))                                    \
  X(max_u32, "max.u32", u32, (u32 a, u32 b), std::max(a, b))                                    \
  X(min_s64, "min.s64", s64, (s64 a, s64 b), std::min(a, b))                                    \
  X(max_s64, "max.s64", s64, (s64 a, s64 b), std::max(a, b))                                    \
  X(min_u64, "min.u64", u64, (u64 a, u64 b), std::min(a, b))                                    \
  X(max_u64, "max.u64", u64, (u64 a, u64 b), std::max(a, b))                                    \
  X(pack_b32, "pack.b32", u32, (u16 a, u16 b), u32{b} << 16 | a)                                \
  X(pack_b64, "pack.b64", u64, (u32 a, u32 b), u64{b} << 32 | a)                                \
  X(cvt_f64_f32, "cvt.f64.f32", f64, (f32 a), f64{a})                                           \
  X(cvt_f32_f64, "cvt.rn.f32.f64", f32, (f64 a), static_cast<f32>(a))                           \
  X(cvt_f32_f16, "cvt.f32.f16", f32, (u16 a), widen_float16(a))                                 \
  X(cvt_f16_f32, "cvt.rn.f16.f32", u16, (f32 a), round_to_float16(a))                           \
  X(cvt_s32_f32, "cvt.rzi.s32.f32", s32, (f32 a), truncate_to_s32(a))

// A sum or product without .rn could be contracted by the assembler: it is not among them.
#define PTX_FLOATS(X, T)                                             \
  X(add_rn_##T, "add.rn." #T, T, (T a, T b), a + b)                  \
  X(sub_rn_##T, "sub.rn." #T, T, (T a, T b), a - b)                  \
  X(mul_rn_##T, "mul.rn." #T, T, (T a, T b), a * b)                  \
  X(fma_rn_##T, "fma.rn." #T, T, (T a, T b, T c), std::fma(a, b, c)) \
  X(neg_##T, "neg." #T, T, (T a), -a)                                \
  X(abs_##T, "abs." #T, T, (T a), std::fabs(a))

// Faults that are planted: the first two are no instructions.
#define PTX_PLANTED(X)                                                      \
  X(unfused_f32, "mul.add.f32", f32, (f32 a, f32 b, f32 c), a * b + c)      \
  X(unfused_f64, "mul.add.f64", f64, (f64 a, f64 b, f64 c), a * b + c)      \
  X(cvt_rz_f32_f64, "cvt.rz.f32.f64", f32, (f64 a), truncate_to_float32(a)) \
  X(cvt_rz_f16_f32, "cvt.rz.f16.f32", u16, (f32 a), truncate_to_float16(a))

#define PTX_COMPARISONS(X, T)                                     \
  X(setp_eq_##T, "setp.eq." #T, bool, (T a, T b), a == b)         \
  X(setp_ne_##T, "setp.ne." #T, bool, (T a, T b), a < b || a > b) \
  X(setp_lt_##T, "setp.lt." #T, bool, (T a, T b), a < b)          \
  X(setp_le_##T, "setp.le." #T, bool, (T a, T b), a <= b)         \
  X(setp_gt_##T, "setp.gt." #T, bool, (T a, T b), a > b)          \
  X(setp_ge_##T, "setp.ge." #T, bool, (T a, T b), a >= b)

// True where an operand is a NaN.
#define PTX_UNORDERED(X, T)                                            \
  X(setp_equ_##T, "setp.equ." #T, bool, (T a, T b), !(a < b || a > b)) \
  X(setp_neu_##T, "setp.neu." #T, bool, (T a, T b), !(a == b))         \
  X(setp_ltu_##T, "setp.ltu." #T, bool, (T a, T b), !(a >= b))         \
  X(setp_leu_##T, "setp.leu." #T, bool, (T a, T b), !(a > b))          \
  X(setp_gtu_##T, "setp.gtu." #T, bool, (T a, T b), !(a <= b))         \
  X(setp_geu_##T, "setp.geu." #T, bool, (T a, T b), !(a < b))          \
  X(setp_nan_##T, "setp.nan." #T, bool, (T a, T b), a != a || b != b)

#define PTX_ALL_COMPARISONS(X)                                            \
  PTX_COMPARISONS(X, u16) PTX_COMPARISONS(X, s16) PTX_COMPARISONS(X, u32) \
  PTX_COMPARISONS(X, s32) PTX_COMPARISONS(X, u64) PTX_COMPARISONS(X, s64) \
  PTX_COMPARISONS(X, f32) PTX_COMPARISONS(X, f64) PTX_UNORDERED(X, f32) PTX_UNORDERED(X, f64)

#define PTX_INTEGER_CONVERSION(X, To, From) \
  X(cvt_##To##_##From, "cvt." #To "." #From, To, (From a), static_cast<To>(a))
#define PTX_INTEGER_CONVERSIONS(X, From)                                    \
  PTX_INTEGER_CONVERSION(X, u16, From) PTX_INTEGER_CONVERSION(X, s16, From) \
  PTX_INTEGER_CONVERSION(X, u32, From) PTX_INTEGER_CONVERSION(X, s32, From) \
  PTX_INTEGER_CONVERSION(X, u64, From) PTX_INTEGER_CONVERSION(X, s64, From)

// All that compute one register from others.
#define PTX_COMPUTATIONS(X)                                                              \
  PTX_WIDTHLESS(X) PTX_OTHERS(X) PTX_PLANTED(X) PTX_FLOATS(X, f32) PTX_FLOATS(X, f64)    \
  PTX_ALL_COMPARISONS(X) PTX_INTEGER_CONVERSIONS(X, u16) PTX_INTEGER_CONVERSIONS(X, s16) \
  PTX_INTEGER_CONVERSIONS(X, u32) PTX_INTEGER_CONVERSIONS(X, s32)                        \
  PTX_INTEGER_CONVERSIONS(X, u64) PTX_INTEGER_CONVERSIONS(X, s64)

// name, mnemonic without cache hints, type of one element, elements
#define PTX_ACCESSES_OF(X, kind, text)          \
  X(kind##_8, text ".8", std::uint8_t, 1)       \
  X(kind##_16, text ".16", u16, 1)              \
  X(kind##_32, text ".32", u32, 1)              \
  X(kind##_64, text ".64", u64, 1)              \
  X(kind##_v2_8, text ".v2.8", std::uint8_t, 2) \
  X(kind##_v4_8, text ".v4.8", std::uint8_t, 4) \
  X(kind##_v2_16, text ".v2.16", u16, 2)        \
  X(kind##_v4_16, text ".v4.16", u16, 4)        \
  X(kind##_v2_32, text ".v2.32", u32, 2)        \
  X(kind##_v4_32, text ".v4.32", u32, 4)        \
  X(kind##_v2_64, text ".v2.64", u64, 2)
#define PTX_PARAMETER_LOADS(X) PTX_ACCESSES_OF(X, load_parameter, "ld.param")
#define PTX_LOADS(X) PTX_ACCESSES_OF(X, load, "ld.global")
#define PTX_STORES(X) PTX_ACCESSES_OF(X, store, "st.global")

// name, mnemonic, registers written, registers read
#define PTX_CONTROLS(X)                   \
  X(unpack_b32, "unpack.b32", 2, 1)       \
  X(unpack_b64, "unpack.b64", 2, 1)       \
  X(prefetch, "prefetch.global.L1", 0, 1) \
  X(nothing, "nothing", 0, 0)             \
  X(branch, "bra", 0, 0)                  \
  X(branch_if, "@bra", 0, 1)              \
  X(branch_unless, "@!bra", 0, 1)         \
  X(leave, "ret", 0, 0)

// clang-format on

enum class Op : u16 {
#define PTX_NAME(name, ...) name,
  PTX_COMPUTATIONS(PTX_NAME) PTX_PARAMETER_LOADS(PTX_NAME) PTX_LOADS(PTX_NAME) PTX_STORES(PTX_NAME)
      PTX_CONTROLS(PTX_NAME)
#undef PTX_NAME
};

// `length` bits of `from` put into `into` at bit `start`.
template <typename T>
T insert_bits(T from, T into, u32 start, u32 length) {
  constexpr u32 kBits = 8 * sizeof(T);
  start &= 0xffu;
  length = std::min(length & 0xffu, kBits);
  if (start >= kBits || length == 0) {
    return into;
  }
  const T mask = (length == kBits ? ~T{0} : (T{1} << length) - 1) << start;
  return (into & ~mask) | ((from << start) & mask);
}

// What the computations are, by name: Computation_add::run(a, b).
#define PTX_FUNCTION(name, text, Result, operands, result) \
  struct Computation_##name {                              \
    static Result run operands { return result; }          \
  };
PTX_COMPUTATIONS(PTX_FUNCTION)
#undef PTX_FUNCTION

}  // namespace ema_fused::testing::ptx
