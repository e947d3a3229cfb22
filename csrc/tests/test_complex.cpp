// Complex numbers on the CPU: every instruction set gives the same bits, near what float64 gives,
// and touches nothing around the tensors.
#include <cmath>

#include "../update_cpu.h"
#include "check.h"
#include "guarded_tensor.h"

using namespace ema_fused;
using namespace ema_fused::testing;

namespace {

std::vector<UpdateChunks> instruction_sets() {
  std::vector<UpdateChunks> found = {&baseline::update_chunks};
#if defined(EMA_FUSED_HAVE_AVX2)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    found.push_back(&avx2::update_chunks);
  }
#endif
  if (cpu_kernel().update_chunks != found.back()) {
    found.push_back(cpu_kernel().update_chunks);
  }
  return found;
}

void run(UpdateChunks update_chunks, Tensor& averaged, Tensor& source, std::int64_t count,
         const Launch& launch) {
  Pair pair{};
  pair.averaged = averaged.data();
  pair.source = source.data();
  pair.count = count;
  pair.averaged_dtype = pair.source_dtype = averaged.dtype();
  const ChunkTable table = build_chunks({pair}, kChunkElementsCpu);
  update_chunks(table, 0, table.heads, launch, nullptr);
}

// The real and imaginary parts of a tensor, one after the other.
double part(const Tensor& tensor, std::int64_t i) {
  const DType parts = tensor.dtype() == DType::kComplex128 ? DType::kFloat64 : DType::kFloat32;
  return element_at(tensor.data(), parts, i);
}

void check(DType dtype, std::int64_t count, const Launch& launch, Random& random) {
  const std::size_t shift = random.below(4);
  Tensor averaged(dtype, count, shift, random);
  Tensor source(dtype, count, shift + 1, random);
  std::unique_ptr<Tensor> first;
  for (const UpdateChunks update_chunks : instruction_sets()) {
    auto a = averaged.clone(count, shift, random);
    auto s = source.clone(count, shift + 1, random);
    run(update_chunks, *a, *s, count, launch);
    CHECK(a->guards_are_whole() && s->guards_are_whole());
    CHECK(s->same_bits(launch.operation == Operation::kSwap ? averaged : source));
    CHECK(first == nullptr || a->same_bits(*first));
    first = first == nullptr ? std::move(a) : std::move(first);
  }
  if (launch.operation != Operation::kAverage) {
    CHECK(first->same_bits(source));
    return;
  }
  const double w = launch.weight[0].number;
  const double error = dtype == DType::kComplex128 ? 2e-15 : 1e-6;
  for (std::int64_t i = 0; i < 2 * count; ++i) {
    const double expected = part(averaged, i) * (1.0 - w) + part(source, i) * w;
    CHECK(std::abs(part(*first, i) - expected) <= error);
  }
}

}  // namespace

int main() {
  Random random(3);
  for (const DType dtype : {DType::kComplex64, DType::kComplex128}) {
    for (const std::int64_t count : {1, 2, 3, 15, 16, 17, 8191, 8193}) {
      for (int arithmetic = 0; arithmetic <= 4; ++arithmetic) {
        for (const double weight : {0.0, 0.001, 0.3, 0.5, 0.7, 1.0}) {
          check(dtype, count,
                launch_of(Operation::kAverage, static_cast<Arithmetic>(arithmetic), weight),
                random);
        }
      }
      check(dtype, count, launch_of(Operation::kCopy, Arithmetic::kLerp, 0.0), random);
      check(dtype, count, launch_of(Operation::kSwap, Arithmetic::kLerp, 0.0), random);
    }
  }
  return 0;
}
