// Vectors as wide as the ISA of the translation unit, through GCC/Clang vector extensions (NEON and SSE come for
// free). Included only by per-ISA files; everything lives in an unnamed namespace, so that the linker cannot keep
// one ISA's copy of an inline function for all.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "core/isa.h"

namespace mmlm {
namespace {

// MMLM_INSTRUCTIONS: width of the vectors that intrinsics are used for, 0 where the compiler is left to it. A build
// that names a width of its own (the ISA `wide`) gets that width and no intrinsics for it.
#if defined(MMLM_VECTOR_BYTES)
#define MMLM_INSTRUCTIONS 0
#elif defined(__AVX512F__)
#define MMLM_VECTOR_BYTES 64
#define MMLM_INSTRUCTIONS 64
#elif defined(__AVX2__)
#define MMLM_VECTOR_BYTES 32
#define MMLM_INSTRUCTIONS 32
#elif defined(__x86_64__)
#define MMLM_VECTOR_BYTES 16
#define MMLM_INSTRUCTIONS 16
#else
#define MMLM_VECTOR_BYTES 16
#define MMLM_INSTRUCTIONS 0
#endif
constexpr int kVectorBytes = MMLM_VECTOR_BYTES;
static_assert(kWidestVectorBytes % kVectorBytes == 0, "rows of shared layouts hold whole vectors");

template <typename T>
struct Lanes;
template <>
struct Lanes<float> {
  typedef float Vec __attribute__((vector_size(kVectorBytes)));
  typedef float Unaligned __attribute__((vector_size(kVectorBytes), aligned(4)));
  typedef int32_t Int __attribute__((vector_size(kVectorBytes)));
};
template <>
struct Lanes<double> {
  typedef double Vec __attribute__((vector_size(kVectorBytes)));
  typedef double Unaligned __attribute__((vector_size(kVectorBytes), aligned(8)));
  typedef int64_t Int __attribute__((vector_size(kVectorBytes)));
  typedef float Half __attribute__((vector_size(kVectorBytes / 2)));
};
template <typename T>
using Vec = typename Lanes<T>::Vec;
template <typename T>
constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(T));

#define MMLM_INLINE inline __attribute__((always_inline))

template <typename T>
MMLM_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename Lanes<T>::Unaligned*>(p);
}
MMLM_INLINE void store(float* p, Vec<float> v) { *reinterpret_cast<Lanes<float>::Unaligned*>(p) = v; }
MMLM_INLINE void store(double* p, Vec<double> v) { *reinterpret_cast<Lanes<double>::Unaligned*>(p) = v; }
template <typename T>
MMLM_INLINE Vec<T> broadcast(T x) {
  return x - Vec<T>{};
}

// Second operand where either is NaN, like maxps.
MMLM_INLINE Vec<float> max(Vec<float> a, Vec<float> b) {
#if MMLM_INSTRUCTIONS == 64
  return (Vec<float>)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);  // unmasked: false warning in GCC 12
#elif MMLM_INSTRUCTIONS == 32
  return (Vec<float>)_mm256_max_ps((__m256)a, (__m256)b);
#elif MMLM_INSTRUCTIONS == 16
  return (Vec<float>)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}
MMLM_INLINE Vec<double> max(Vec<double> a, Vec<double> b) { return a > b ? a : b; }
MMLM_INLINE Vec<float> min(Vec<float> a, Vec<float> b) {
#if MMLM_INSTRUCTIONS == 64
  return (Vec<float>)_mm512_maskz_min_ps(0xffff, (__m512)a, (__m512)b);
#elif MMLM_INSTRUCTIONS == 32
  return (Vec<float>)_mm256_min_ps((__m256)a, (__m256)b);
#elif MMLM_INSTRUCTIONS == 16
  return (Vec<float>)_mm_min_ps((__m128)a, (__m128)b);
#else
  return a < b ? a : b;
#endif
}
MMLM_INLINE Vec<double> min(Vec<double> a, Vec<double> b) { return a < b ? a : b; }

template <typename V>
MMLM_INLINE V square_root(V x) {
  constexpr int n = sizeof(V) / sizeof(x[0]);
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) x[i] = std::sqrt(x[i]);  // one vsqrt each for SSE, AVX and AVX-512
  return x;
}

// The nearest float of each lane: what a peer does that keeps its spectrum in complex64.
MMLM_INLINE Vec<float> round_to_float(Vec<float> x) { return x; }
MMLM_INLINE Vec<double> round_to_float(Vec<double> x) {
  return __builtin_convertvector(__builtin_convertvector(x, Lanes<double>::Half), Vec<double>);
}

// Exponent (relative to [sqrt(1/2), sqrt(2))) and mantissa minus one of positive normal numbers.
MMLM_INLINE void split(Vec<float> x, Vec<float>& exponent, Vec<float>& fraction) {
  using Int = Lanes<float>::Int;
  const Int bits = (Int)x, e = (bits - 0x3f3504f3) >> 23;
  fraction = (Vec<float>)(bits - (e << 23)) - 1.f;
  exponent = __builtin_convertvector(e, Vec<float>);
}
MMLM_INLINE void split(Vec<double> x, Vec<double>& exponent, Vec<double>& fraction) {
  using Int = Lanes<double>::Int;
  const Int bits = (Int)x, e = (bits - 0x3fe6a09e667f3bcd) >> 52;
  fraction = (Vec<double>)(bits - (e << 52)) - 1.;
  // Small integers to double without AVX-512's instruction: through the mantissa of 1.5 * 2^52.
  constexpr double kMagic = 6755399441055744.;
  exponent = (Vec<double>)(e + (int64_t)0x4338000000000000) - kMagic;
}

// ln(1 + f) of the fraction: Cephes' logf and log (Moshier), within about one unit in the last place.
MMLM_INLINE Vec<float> log1p_fraction(Vec<float> f) {
  Vec<float> p = 7.0376836292e-2f * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const Vec<float> square = f * f;
  return p * f * square + (f - 0.5f * square);
}
MMLM_INLINE Vec<double> log1p_fraction(Vec<double> f) {
  Vec<double> p = 1.01875663804580931796e-4 * f + 4.97494994976747001425e-1;
  p = p * f + 4.70579119878881725854e0;
  p = p * f + 1.44989225341610930846e1;
  p = p * f + 1.79368678507819816313e1;
  p = p * f + 7.70838733755885391666e0;
  Vec<double> q = f + 1.12873587189167450590e1;
  q = q * f + 4.52279145837532221105e1;
  q = q * f + 8.29875266912776603211e1;
  q = q * f + 7.11544750618563894466e1;
  q = q * f + 2.31251620126765340583e1;
  const Vec<double> square = f * f;
  return f * square * (p / q) + (f - 0.5 * square);
}

// ln(2) and log10(2) in two parts: the first has trailing zeros, so that exponent * first is exact.
template <typename T>
struct Ln2;
template <>
struct Ln2<float> {
  static constexpr float high = 0.693359375f, low = -2.12194440e-4f;
  static constexpr float log10_high = 0.301025390625f, log10_low = 4.6050389811952139e-6f;
};
template <>
struct Ln2<double> {
  static constexpr double high = 0.693359375, low = -2.121944400546905827679e-4;
  static constexpr double log10_high = 0.301025390625, log10_low = 4.605038981195213738894724493e-6;
};

// Natural and decimal logarithms of positive normal numbers.
template <typename T, typename V = Vec<T>>
MMLM_INLINE V ln_positive(V x) {
  V e, f;
  split(x, e, f);
  return e * Ln2<T>::high + (log1p_fraction(f) + e * Ln2<T>::low);
}
template <typename T, typename V = Vec<T>>
MMLM_INLINE V log10_positive(V x) {
  V e, f;
  split(x, e, f);
  return e * Ln2<T>::log10_high + (log1p_fraction(f) * T(0.43429448190325182765) + e * Ln2<T>::log10_low);
}

}  // namespace
}  // namespace mmlm
