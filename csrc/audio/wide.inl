// Products of floats, added in double where the instruction set has no fused multiplication: what FMA would round.

namespace mmlm::MMLM_ISA {
namespace {

template <typename T>
constexpr bool kWidens = !kFuses && std::is_same_v<T, float>;
typedef double WideVec __attribute__((vector_size(2 * kVectorBytes)));  // as many lanes as a vector of floats
template <typename T>
using SumOf = std::conditional_t<kWidens<T>, WideVec, Vec<T>>;
template <typename T>
MMLM_INLINE void add_product(SumOf<T>& sum, Vec<T> x, T weight) {
  if constexpr (kWidens<T>) {
    sum += __builtin_convertvector(x, WideVec) * static_cast<double>(weight);
  } else {
    sum += x * weight;
  }
}
template <typename T>
MMLM_INLINE Vec<T> rounded(const SumOf<T>& sum) {
  if constexpr (kWidens<T>) {
    return __builtin_convertvector(sum, Vec<T>);
  } else {
    return sum;
  }
}
// x - c * before, of vectors and of numbers.
template <typename T>
MMLM_INLINE Vec<T> emphasis(Vec<T> x, T c, Vec<T> before) {
  if constexpr (kWidens<T>) {
    return __builtin_convertvector(
        __builtin_convertvector(x, WideVec) - static_cast<double>(c) * __builtin_convertvector(before, WideVec),
        Vec<T>);
  } else {
    return x - c * before;
  }
}
template <typename T>
MMLM_INLINE T emphasis_of(T x, T c, T before) {
  using Wide = std::conditional_t<kWidens<T>, double, T>;
  return static_cast<T>(static_cast<Wide>(x) - static_cast<Wide>(c) * static_cast<Wide>(before));
}

}  // namespace
}  // namespace mmlm::MMLM_ISA
