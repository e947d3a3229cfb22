// A rare pair's source is widened to the type that the pair computes in (dispatch.h). That must
// give the bits that a functor of the pair's own two types gives.
#include <initializer_list>

#include "../dispatch.h"
#include "check.h"

using namespace ema_fused;

namespace {

template <typename T>
T any_bits(Random& random) {
  const std::uint64_t bits = random.bits();
  T value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// A NaN's payload aside.
template <typename T>
bool same(T a, T b) {
  const auto x = to_compute<double>(a);
  const auto y = to_compute<double>(b);
  return std::memcmp(&a, &b, sizeof(a)) == 0 || (x != x && y != y);
}

template <typename Functor, typename A, typename S>
A updated(A averaged, S source, double weight, std::uint32_t random) {
  const Functor functor(weight);
  if constexpr (Functor::kRandom) {
    functor(averaged, source, random);
  } else {
    functor(averaged, source);
  }
  return averaged;
}

template <template <typename, typename> class F, typename A, typename S>
void check_pair() {
  using Compute = ComputeType<A, S>;
  Random random(7);
  for (const double weight : {0.0, 0.001, 0.3, 0.5, 0.7, 1.0}) {
    for (int i = 0; i < 2000; ++i) {
      const A averaged = any_bits<A>(random);
      const S source = any_bits<S>(random);
      const auto bits = static_cast<std::uint32_t>(random.below(1u << 16));
      const A own = updated<F<A, S>>(averaged, source, weight, bits);
      const A widened = updated<F<A, Compute>>(averaged, to_compute<Compute>(source), weight, bits);
      CHECK(same(own, widened));
    }
  }
}

template <typename A, typename S>
void check_functors() {
  if constexpr (!std::is_same_v<A, S>) {
    check_pair<Copy, A, S>();
  }
  if constexpr (!kIsCommon<A, S>) {
    check_pair<Lerp, A, S>();
    check_pair<Axpby, A, S>();
    check_pair<Delta, A, S>();
    check_pair<Products, A, S>();
    check_pair<StochasticLerp, A, S>();
  }
}

template <typename A>
void check_sources() {
  check_functors<A, float>();
  check_functors<A, BFloat16>();
  check_functors<A, Float16>();
  check_functors<A, Float8E4M3>();
  check_functors<A, Float8E5M2>();
}

}  // namespace

int main() {
  check_sources<double>();
  check_sources<float>();
  check_sources<BFloat16>();
  check_sources<Float16>();
  return 0;
}
