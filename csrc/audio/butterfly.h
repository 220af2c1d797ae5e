// Small complex DFTs, on a scalar (CUDA, one butterfly a thread) or on a vector (CPU, one frame a lane).
// Included where MMLM_INLINE is defined for the compiler at hand; in an unnamed namespace, see simd.h.
#pragma once
#include <type_traits>
#include <utility>

namespace mmlm {
namespace {

template <typename V>
struct ScalarOf {
  using type = std::decay_t<decltype(std::declval<V>()[0])>;
};
template <>
struct ScalarOf<float> {
  using type = float;
};
template <>
struct ScalarOf<double> {
  using type = double;
};
template <typename V>
using Scalar = typename ScalarOf<V>::type;

template <typename V>
struct Complex {
  V re, im;
};
template <typename V>
MMLM_INLINE Complex<V> operator+(Complex<V> x, Complex<V> y) {
  return {x.re + y.re, x.im + y.im};
}
template <typename V>
MMLM_INLINE Complex<V> operator-(Complex<V> x, Complex<V> y) {
  return {x.re - y.re, x.im - y.im};
}
// x * (c - i s): the twiddle exp(-i angle) with c = cos(angle), s = sin(angle).
template <typename V>
MMLM_INLINE Complex<V> rotate(Complex<V> x, Scalar<V> c, Scalar<V> s) {
  return {x.re * c + x.im * s, x.im * c - x.re * s};
}

constexpr double kCos72 = 0.30901699437494742410, kCos144 = -0.80901699437494742410;
constexpr double kSin72 = 0.95105651629515357212, kSin144 = 0.58778525229247312917;
constexpr double kHalfSqrt2 = 0.70710678118654752440;
constexpr double kCosPi8 = 0.92387953251128675613, kSinPi8 = 0.38268343236508977173;
constexpr double kSin60 = 0.86602540378443864676;

// x times sqrt(1/2). The float nearest to it is 1.7e-8 too small, and as every pass uses it, that adds up to a gain
// below one which shows in sums over a peak: what is missing is added.
template <typename V>
MMLM_INLINE V times_half_sqrt2(V x) {
  using T = Scalar<V>;
  constexpr T high = T(kHalfSqrt2), low = T(kHalfSqrt2 - double(high));
  if constexpr (low == T(0)) {
    return x * high;
  } else {
    return x * high + x * low;
  }
}
template <typename V>
MMLM_INLINE Complex<V> rotate_45(Complex<V> x) {
  return {times_half_sqrt2(x.re + x.im), times_half_sqrt2(x.im - x.re)};
}
template <typename V>
MMLM_INLINE Complex<V> rotate_135(Complex<V> x) {
  return {times_half_sqrt2(x.im - x.re), times_half_sqrt2(-x.re - x.im)};
}

template <typename V>
MMLM_INLINE void dft3(const Complex<V>* x, Complex<V>* y) {
  using T = Scalar<V>;
  const Complex<V> s = x[1] + x[2], d = x[1] - x[2];
  const Complex<V> a = {x[0].re - T(0.5) * s.re, x[0].im - T(0.5) * s.im};
  y[0] = x[0] + s;
  y[1] = {a.re + T(kSin60) * d.im, a.im - T(kSin60) * d.re};
  y[2] = {a.re - T(kSin60) * d.im, a.im + T(kSin60) * d.re};
}

template <typename V>
MMLM_INLINE void dft4(Complex<V> a, Complex<V> b, Complex<V> c, Complex<V> d, Complex<V>* y) {
  const Complex<V> e = a + c, f = a - c, g = b + d, h = b - d;
  y[0] = e + g;
  y[2] = e - g;
  y[1] = {f.re + h.im, f.im - h.re};
  y[3] = {f.re - h.im, f.im + h.re};
}

template <typename V>
MMLM_INLINE void dft5(const Complex<V>* x, Complex<V>* y) {
  using T = Scalar<V>;
  const Complex<V> s1 = x[1] + x[4], s2 = x[2] + x[3], d1 = x[1] - x[4], d2 = x[2] - x[3];
  constexpr T c1 = T(kCos72), c2 = T(kCos144), n1 = T(kSin72), n2 = T(kSin144);
  const Complex<V> a = {x[0].re + c1 * s1.re + c2 * s2.re, x[0].im + c1 * s1.im + c2 * s2.im};
  const Complex<V> b = {x[0].re + c2 * s1.re + c1 * s2.re, x[0].im + c2 * s1.im + c1 * s2.im};
  const Complex<V> p = {n1 * d1.re + n2 * d2.re, n1 * d1.im + n2 * d2.im};
  const Complex<V> q = {n2 * d1.re - n1 * d2.re, n2 * d1.im - n1 * d2.im};
  y[0] = x[0] + s1 + s2;
  y[1] = {a.re + p.im, a.im - p.re};
  y[4] = {a.re - p.im, a.im + p.re};
  y[2] = {b.re + q.im, b.im - q.re};
  y[3] = {b.re - q.im, b.im + q.re};
}

// DFT of R points: in(k) is input k, emit(k, y) takes output k.
template <int R, typename V, typename In, typename Emit>
MMLM_INLINE void butterfly(const In& in, const Emit& emit) {
  if constexpr (R == 8) {
    Complex<V> even[4], odd[4];
    dft4<V>(in(0), in(2), in(4), in(6), even);
    dft4<V>(in(1), in(3), in(5), in(7), odd);
    odd[1] = rotate_45(odd[1]);
    odd[2] = {odd[2].im, -odd[2].re};
    odd[3] = rotate_135(odd[3]);
    emit(0, even[0] + odd[0]);
    emit(1, even[1] + odd[1]);
    emit(2, even[2] + odd[2]);
    emit(3, even[3] + odd[3]);
    emit(4, even[0] - odd[0]);
    emit(5, even[1] - odd[1]);
    emit(6, even[2] - odd[2]);
    emit(7, even[3] - odd[3]);
  } else if constexpr (R == 2) {
    const Complex<V> a = in(0), b = in(1);
    emit(0, a + b);
    emit(1, a - b);
  } else if constexpr (R == 3) {
    const Complex<V> x[3] = {in(0), in(1), in(2)};
    Complex<V> y[3];
    dft3(x, y);
    emit(0, y[0]);
    emit(1, y[1]);
    emit(2, y[2]);
  } else if constexpr (R == 4) {
    Complex<V> y[4];
    dft4<V>(in(0), in(1), in(2), in(3), y);
    emit(0, y[0]);
    emit(1, y[1]);
    emit(2, y[2]);
    emit(3, y[3]);
  } else {
    static_assert(R == 5, "no such butterfly");
    const Complex<V> x[5] = {in(0), in(1), in(2), in(3), in(4)};
    Complex<V> y[5];
    dft5(x, y);
    emit(0, y[0]);
    emit(1, y[1]);
    emit(2, y[2]);
    emit(3, y[3]);
    emit(4, y[4]);
  }
}

}  // namespace
}  // namespace mmlm
