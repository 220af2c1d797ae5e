// Elementary functions on float32 vectors. Included only by per-ISA files, like simd.h.
#pragma once
#include "core/simd.h"

namespace mmlm {
namespace {

MMLM_INLINE Vec<float> select(Lanes<float>::Int condition, Vec<float> yes, Vec<float> no) {
  return (Vec<float>)(((Lanes<float>::Int)yes & condition) | ((Lanes<float>::Int)no & ~condition));
}

MMLM_INLINE float sum_of(Vec<float> x) {
  for (int half = kWidth<float> / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) x[i] += x[i + half];
  }
  return x[0];
}

// exp(x) within about one unit in the last place (Cephes' expf, Moshier); 0 below -87, where the result would not be
// normal. NaN stays NaN.
MMLM_INLINE Vec<float> exp_of(Vec<float> x) {
  using V = Vec<float>;
  using Int = Lanes<float>::Int;
  const V clamped = min(broadcast(88.f), max(broadcast(-87.5f), x));  // NaN is the second operand: it passes
  const V shifted = clamped * 1.44269504088896341f + 12582912.f;      // rounds to an integer in the low mantissa bits
  const V n = shifted - 12582912.f;
  const V r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  V p = 1.9875691500e-4f * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.f;
  const Int bits = (Int)shifted << 23;  // the integer moves into the exponent; the magic number's bits leave
  const V result = (V)((Int)p + bits);
  return (V)((Int)result & ~(Int)(x < -87.f));
}

// tanh(x): Cephes' tanhf.
MMLM_INLINE Vec<float> tanh_of(Vec<float> x) {
  using V = Vec<float>;
  using Int = Lanes<float>::Int;
  const V z = x * x;
  V p = -5.70498872745e-3f * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const V small = p * z * x + x;
  const V magnitude = max(x, -x);
  const V large = 1.f - 2.f / (exp_of(min(broadcast(20.f), magnitude) * 2.f) + 1.f);
  const Int is_small = (Int)(magnitude < 0.625f), negative = (Int)(x < 0.f);
  const V signed_large = (V)(((Int)large & ~negative) | ((Int)-large & negative));
  return (V)(((Int)small & is_small) | ((Int)signed_large & ~is_small)) + 0.f * x;  // NaN stays NaN
}

// 1 / (1 + e) with e = exp(-x); 0 below -88, where e is not exact: times a huge number it would be anything.
MMLM_INLINE Vec<float> sigmoid_of(Vec<float> x, Vec<float>& e) {
  e = exp_of(-x);
  return select((Lanes<float>::Int)(x < -88.f), Vec<float>{}, 1.f / (1.f + e));
}

MMLM_INLINE Vec<float> sigmoid_of(Vec<float> x) {
  Vec<float> e;
  return sigmoid_of(x, e);
}

// erf(x): polynomials fitted (Lawson, in double) to erf(x)/x in x^2 below 1, and to -log(erfc(x)) from 1 to 4.
MMLM_INLINE Vec<float> erf_of(Vec<float> x) {
  using V = Vec<float>;
  using Int = Lanes<float>::Int;
  const V s = x * x;
  V p = -9.680136827e-6f * s + 1.127054420e-4f;
  p = p * s - 8.484711288e-4f;
  p = p * s + 5.221074913e-3f;
  p = p * s - 2.686544508e-2f;
  p = p * s + 1.128378287e-1f;
  p = p * s - 3.761263788e-1f;
  p = p * s + 1.283792257e-1f;
  const V small = p * x + x;
  const V a = min(broadcast(4.f), max(x, -x));
  V q = 1.690221865e-7f * a + 1.927224548e-5f;
  q = q * a - 4.265588359e-4f;
  q = q * a + 4.153943621e-3f;
  q = q * a - 2.510208263e-2f;
  q = q * a + 1.082788706e-1f;
  q = q * a + 6.333325505e-1f;
  q = q * a + 1.129527450e0f;
  q = q * a - 1.781451865e-4f;
  const V large = 1.f - exp_of(-q);
  const Int is_small = (Int)(a < 1.f), negative = (Int)(x < 0.f);
  const V signed_large = (V)(((Int)large & ~negative) | ((Int)-large & negative));
  return select(is_small, small, signed_large);  // NaN stays NaN: it is the second operand of min and max
}

}  // namespace
}  // namespace mmlm
