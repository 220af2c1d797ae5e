// The 400-point real DFT as a 16 x 25 prime-factor transform (Good 1958): sample n = 25a + 16b (mod 400) needs no
// twiddles between the sixteen real 25-point and the thirteen 16-point transforms that real input leaves.
#include "audio/spectral.h"

namespace mmlm {
namespace {

// cos and sin of 2 pi k / 25.
constexpr double kCos25[9] = {1.,
                              0.96858316112863108134,
                              0.87630668004386364006,
                              0.72896862742141155235,
                              0.53582679497899665793,
                              0.30901699437494742410,
                              0.06279051952931337160,
                              -0.18738131458572462680,
                              -0.42577929156507266500};
constexpr double kSin25[9] = {0.,
                              0.24868988716485478740,
                              0.48175367410171527870,
                              0.68454710592868872620,
                              0.84432792550201507580,
                              0.95105651629515357212,
                              0.99802672842827156200,
                              0.98228725072868868130,
                              0.90482705246601949020};

// Real 5-point DFT from x0 and the folded pairs s1 = x1 + x4, s2 = x2 + x3, d1 = x1 - x4, d2 = x2 - x3.
template <typename T>
MMLM_INLINE void dft5_real(Vec<T> x0, Vec<T> s1, Vec<T> s2, Vec<T> d1, Vec<T> d2, Vec<T>& y0, Complex<Vec<T>>& y1,
                           Complex<Vec<T>>& y2) {
  y0 = x0 + s1 + s2;
  y1 = {x0 + T(kCos72) * s1 + T(kCos144) * s2, T(-kSin72) * d1 - T(kSin144) * d2};
  y2 = {x0 + T(kCos144) * s1 + T(kCos72) * s2, T(kSin72) * d2 - T(kSin144) * d1};
}

// Window and sixteen real 25-point DFTs (5 x 5), the window folded into the first butterflies.
template <typename T>
__attribute__((noinline)) void first_stage_400(const int* offsets, const T* windows, const T* __restrict samples,
                                               T* __restrict columns) {
  const auto column = [&](int c, int a, Complex<Vec<T>> z) { put(columns, c * kOuter400 + a, z); };
  for (int a = 0; a < kOuter400; ++a) {
    const int* offset = offsets + a * kInner400;
    const T* window = windows + a * kInner400;
    Vec<T> real[5];
    Complex<Vec<T>> one[5], two[5];
#pragma GCC unroll 5
    for (int b = 0; b < 5; ++b) {
      const Vec<T> x0 = load(samples + offset[b]) * window[b];
      const Vec<T> x1 = load(samples + offset[b + 5]) * window[b + 5];
      const Vec<T> x2 = load(samples + offset[b + 10]) * window[b + 10];
      const Vec<T> x3 = load(samples + offset[b + 15]), x4 = load(samples + offset[b + 20]);
      const Vec<T> s1 = x4 * window[b + 20] + x1, d1 = x1 - x4 * window[b + 20];
      const Vec<T> s2 = x3 * window[b + 15] + x2, d2 = x2 - x3 * window[b + 15];
      dft5_real<T>(x0, s1, s2, d1, d2, real[b], one[b], two[b]);
      if (b > 0) {
        one[b] = rotate(one[b], T(kCos25[b]), T(kSin25[b]));
        two[b] = rotate(two[b], T(kCos25[2 * b]), T(kSin25[2 * b]));
      }
    }
    Vec<T> zero;
    Complex<Vec<T>> five, ten, y[5];
    dft5_real<T>(real[0], real[1] + real[4], real[2] + real[3], real[1] - real[4], real[2] - real[3], zero, five, ten);
    store(columns + a * 2 * kWidth<T>, zero);
    column(1, a, five);
    column(2, a, ten);
    dft5(one, y);
#pragma GCC unroll 5
    for (int i = 0; i < 5; ++i) column(3 + i, a, y[i]);
    dft5(two, y);
#pragma GCC unroll 5
    for (int i = 0; i < 5; ++i) column(8 + i, a, y[i]);
  }
}

// The real column 0: nine bins.
template <typename T, typename Emit>
MMLM_INLINE void real_column_400(const int* bin, const T* __restrict columns, const Emit& emit) {
  Vec<T> sum[4], difference[4];
  Complex<Vec<T>> odd[4];
#pragma GCC unroll 4
  for (int a = 0; a < 4; ++a) {
    const auto x = [&](int i) { return load(columns + i * 2 * kWidth<T>); };
    const Vec<T> e = x(a) + x(a + 8), f = x(a) - x(a + 8), g = x(a + 4) + x(a + 12), h = x(a + 4) - x(a + 12);
    sum[a] = e + g;
    difference[a] = e - g;
    odd[a] = {f, -h};
  }
  const Vec<T> e = sum[0] + sum[2], g = sum[1] + sum[3];
  emit(bin[0], e + g, Vec<T>{});
  emit(bin[8], e - g, Vec<T>{});
  emit(bin[4], sum[0] - sum[2], sum[1] - sum[3]);
  const T h = T(kHalfSqrt2);
  const Vec<T> u = (difference[1] - difference[3]) * h, v = (difference[1] + difference[3]) * h;
  emit(bin[2], difference[0] + u, difference[2] + v);
  emit(bin[6], difference[0] - u, v - difference[2]);
  Complex<Vec<T>> y[4];
  dft4(odd[0], rotate(odd[1], T(kCosPi8), T(kSinPi8)), rotate(odd[2], h, h), rotate(odd[3], T(kSinPi8), T(kCosPi8)), y);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) emit(bin[1 + 4 * i], y[i].re, y[i].im);
}

// 16-point DFT as 4 x 4: in(a) is input a, emit(q, y) takes output q.
template <typename T, typename In, typename Emit>
MMLM_INLINE void dft16(const In& in, const Emit& emit) {
  Complex<Vec<T>> h[4][4];
#pragma GCC unroll 4
  for (int a = 0; a < 4; ++a) dft4(in(a), in(a + 4), in(a + 8), in(a + 12), h[a]);
  h[1][1] = rotate(h[1][1], T(kCosPi8), T(kSinPi8));
  h[1][2] = rotate_45(h[1][2]);
  h[1][3] = rotate(h[1][3], T(kSinPi8), T(kCosPi8));
  h[2][1] = rotate_45(h[2][1]);
  h[2][2] = {h[2][2].im, -h[2][2].re};
  h[2][3] = rotate_135(h[2][3]);
  h[3][1] = rotate(h[3][1], T(kSinPi8), T(kCosPi8));
  h[3][2] = rotate_135(h[3][2]);
  h[3][3] = rotate(h[3][3], T(-kCosPi8), T(-kSinPi8));
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) {
    Complex<Vec<T>> y[4];
    dft4(h[0][q], h[1][q], h[2][q], h[3][q], y);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) emit(q + 4 * i, y[i]);
  }
}

template <typename T, typename Emit>
MMLM_INLINE void dft_400(const SpectralPlan& plan, const SpectralTables<T>& tables, const T* samples, const int* offset,
                         T* columns, const Emit& emit) {
  first_stage_400(offset, tables.window.data(), samples, columns);
  real_column_400(plan.bin_400.data(), columns, emit);
  for (int c = 1; c < kColumns400; ++c) {
    const int* bin = plan.bin_400.data() + c * kOuter400;
    dft16<T>([&](int a) { return get(columns, c * kOuter400 + a); },
             [&](int q, Complex<Vec<T>> y) { emit(bin[q], y.re, y.im); });
  }
}

}  // namespace
}  // namespace mmlm
