#include "update_cpu.h"

#include <cstdlib>
#include <string>

namespace ema_fused {
namespace {

// How far ATEN_CPU_CAPABILITY lets us go: 0 baseline, 1 AVX2, 2 AVX-512.
[[maybe_unused]] int allowed_level() {
  const char* value = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string capability = value == nullptr ? "" : value;
  if (capability == "default") return 0;
  if (capability == "avx2") return 1;
  return 2;
}

CpuKernel choose() {
#if defined(EMA_FUSED_HAVE_AVX512)
  if (allowed_level() >= 2 && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma")) {
    return {"avx512", &avx512::update_chunks};
  }
#endif
#if defined(EMA_FUSED_HAVE_AVX2)
  if (allowed_level() >= 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return {"avx2", &avx2::update_chunks};
  }
#endif
  return {"baseline", &baseline::update_chunks};
}

}  // namespace

CpuKernel cpu_kernel() {
  static const CpuKernel kernel = choose();
  return kernel;
}

}  // namespace ema_fused
