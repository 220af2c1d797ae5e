// One vector type per translation unit, as wide as its ISA, through GCC/Clang vector extensions (NEON and SSE
// come for free). Included only by per-ISA files; everything lives in an unnamed namespace, so that the linker
// cannot keep one ISA's copy of an inline function for all.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace mmlm {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float Vec __attribute__((vector_size(kWidth * 4)));
typedef int32_t IntVec __attribute__((vector_size(kWidth * 4)));
typedef float UnalignedVec __attribute__((vector_size(kWidth * 4), aligned(4)));

#define MMLM_INLINE inline __attribute__((always_inline))

MMLM_INLINE Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
MMLM_INLINE void store(float* p, Vec v) { *reinterpret_cast<UnalignedVec*>(p) = v; }
MMLM_INLINE Vec broadcast(float x) { return x - Vec{}; }

// Second operand where either is NaN, like maxps.
MMLM_INLINE Vec max(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);  // unmasked: false warning in GCC 12
#elif defined(__AVX2__)
  return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__x86_64__)
  return (Vec)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}
MMLM_INLINE Vec min(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_min_ps(0xffff, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec)_mm256_min_ps((__m256)a, (__m256)b);
#elif defined(__x86_64__)
  return (Vec)_mm_min_ps((__m128)a, (__m128)b);
#else
  return a < b ? a : b;
#endif
}

MMLM_INLINE float max_of(Vec v) {
  float m = v[0];
  for (int i = 1; i < kWidth; ++i) m = v[i] > m ? v[i] : m;
  return m;
}
MMLM_INLINE float min_of(Vec v) {
  float m = v[0];
  for (int i = 1; i < kWidth; ++i) m = v[i] < m ? v[i] : m;
  return m;
}

// log10 of positive normal numbers, within 1.1 ulp of the result for |log10| >= 0.1 (test_audio_log_mel pins the
// error of the features). Range reduction to [sqrt(1/2), sqrt(2)) and the polynomial of Cephes' logf (Moshier).
MMLM_INLINE Vec log10_positive(Vec x) {
  const IntVec bits = (IntVec)x;
  const IntVec exponent = (bits - 0x3f3504f3) >> 23;
  const Vec f = (Vec)(bits - (exponent << 23)) - 1.f;
  Vec p = 7.0376836292e-2f * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const Vec square = f * f;
  const Vec ln = p * f * square + (f - 0.5f * square);
  const Vec e = __builtin_convertvector(exponent, Vec);
  // log10(2) in two parts: the first has 11 trailing zeros, so e * high is exact.
  constexpr float kLog2High = 0.301025390625f, kLog2Low = 4.6050389811952139e-6f;
  return e * kLog2High + (ln * 0.43429448190325182f + e * kLog2Low);
}

}  // namespace
}  // namespace mmlm
