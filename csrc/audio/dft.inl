// Real DFTs of any length, one frame per vector lane: mixed-radix autosort passes (Stockham) over a complex transform
// of half the length, and the 400-point prime-factor transform (dft400.inl). Included once per ISA, after simd.h.
#include "audio/spectral.h"

namespace mmlm {
namespace {

template <typename T>
struct Complex {
  Vec<T> re, im;
};
template <typename T>
MMLM_INLINE Complex<T> operator+(Complex<T> x, Complex<T> y) {
  return {x.re + y.re, x.im + y.im};
}
template <typename T>
MMLM_INLINE Complex<T> operator-(Complex<T> x, Complex<T> y) {
  return {x.re - y.re, x.im - y.im};
}
// x * (c - i s): the twiddle exp(-i angle) with c = cos(angle), s = sin(angle).
template <typename T>
MMLM_INLINE Complex<T> rotate(Complex<T> x, T c, T s) {
  return {x.re * c + x.im * s, x.im * c - x.re * s};
}

constexpr double kCos72 = 0.30901699437494742410, kCos144 = -0.80901699437494742410;
constexpr double kSin72 = 0.95105651629515357212, kSin144 = 0.58778525229247312917;
constexpr double kHalfSqrt2 = 0.70710678118654752440;
constexpr double kCosPi8 = 0.92387953251128675613, kSinPi8 = 0.38268343236508977173;
constexpr double kSin60 = 0.86602540378443864676;

// x times sqrt(1/2). The float nearest to it is 1.7e-8 too small, and as every pass uses it, that adds up to a gain below
// one which shows in sums over a peak: what is missing is added.
template <typename T>
MMLM_INLINE Vec<T> times_half_sqrt2(Vec<T> x) {
  constexpr T high = T(kHalfSqrt2), low = T(kHalfSqrt2 - double(high));
  if constexpr (low == T(0)) return x * high;
  return x * high + x * low;
}
template <typename T>
MMLM_INLINE Complex<T> rotate_45(Complex<T> x) {
  return {times_half_sqrt2<T>(x.re + x.im), times_half_sqrt2<T>(x.im - x.re)};
}
template <typename T>
MMLM_INLINE Complex<T> rotate_135(Complex<T> x) {
  return {times_half_sqrt2<T>(x.im - x.re), times_half_sqrt2<T>(-x.re - x.im)};
}

template <typename T>
MMLM_INLINE void dft3(Complex<T>* x) {
  const Complex<T> s = x[1] + x[2], d = x[1] - x[2];
  const Complex<T> a = {x[0].re - T(0.5) * s.re, x[0].im - T(0.5) * s.im};
  x[0] = x[0] + s;
  x[1] = {a.re + T(kSin60) * d.im, a.im - T(kSin60) * d.re};
  x[2] = {a.re - T(kSin60) * d.im, a.im + T(kSin60) * d.re};
}

template <typename T>
MMLM_INLINE void dft4(Complex<T> a, Complex<T> b, Complex<T> c, Complex<T> d, Complex<T>* y) {
  const Complex<T> e = a + c, f = a - c, g = b + d, h = b - d;
  y[0] = e + g;
  y[2] = e - g;
  y[1] = {f.re + h.im, f.im - h.re};
  y[3] = {f.re - h.im, f.im + h.re};
}

template <typename T>
MMLM_INLINE void dft5(const Complex<T>* x, Complex<T>* y) {
  const Complex<T> s1 = x[1] + x[4], s2 = x[2] + x[3], d1 = x[1] - x[4], d2 = x[2] - x[3];
  const T c1 = T(kCos72), c2 = T(kCos144), n1 = T(kSin72), n2 = T(kSin144);
  const Complex<T> a = {x[0].re + c1 * s1.re + c2 * s2.re, x[0].im + c1 * s1.im + c2 * s2.im};
  const Complex<T> b = {x[0].re + c2 * s1.re + c1 * s2.re, x[0].im + c2 * s1.im + c1 * s2.im};
  const Complex<T> p = {n1 * d1.re + n2 * d2.re, n1 * d1.im + n2 * d2.im};
  const Complex<T> q = {n2 * d1.re - n1 * d2.re, n2 * d1.im - n1 * d2.im};
  y[0] = x[0] + s1 + s2;
  y[1] = {a.re + p.im, a.im - p.re};
  y[4] = {a.re - p.im, a.im + p.re};
  y[2] = {b.re + q.im, b.im - q.re};
  y[3] = {b.re - q.im, b.im + q.re};
}

// 16-point DFT as 4 x 4: in(a) is input a, emit(q, y) takes output q.
template <typename T, typename In, typename Emit>
MMLM_INLINE void dft16(const In& in, const Emit& emit) {
  Complex<T> h[4][4];
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
    Complex<T> y[4];
    dft4(h[0][q], h[1][q], h[2][q], h[3][q], y);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) emit(q + 4 * i, y[i]);
  }
}

template <int R, typename T, typename In, typename Emit>
MMLM_INLINE void butterfly(const In& in, const Emit& emit) {
  if constexpr (R == 16) {
    dft16<T>(in, emit);
  } else if constexpr (R == 8) {
    Complex<T> even[4], odd[4];
    dft4(in(0), in(2), in(4), in(6), even);
    dft4(in(1), in(3), in(5), in(7), odd);
    odd[1] = rotate_45(odd[1]);
    odd[2] = {odd[2].im, -odd[2].re};
    odd[3] = rotate_135(odd[3]);
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      emit(q, even[q] + odd[q]);
      emit(q + 4, even[q] - odd[q]);
    }
  } else if constexpr (R == 2) {
    const Complex<T> a = in(0), b = in(1);
    emit(0, a + b);
    emit(1, a - b);
  } else {
    Complex<T> x[R], y[R];
#pragma GCC unroll 5
    for (int i = 0; i < R; ++i) x[i] = in(i);
    if constexpr (R == 3) {
      dft3(x);
      std::copy(x, x + 3, y);
    } else if constexpr (R == 4) {
      dft4(x[0], x[1], x[2], x[3], y);
    } else {
      dft5(x, y);
    }
#pragma GCC unroll 5
    for (int i = 0; i < R; ++i) emit(i, y[i]);
  }
}

template <typename T>
MMLM_INLINE Complex<T> get(const T* p, int64_t i) {
  return {load(p + i * 2 * kWidth<T>), load(p + i * 2 * kWidth<T> + kWidth<T>)};
}
template <typename T>
MMLM_INLINE void put(T* p, int64_t i, Complex<T> z) {
  store(p + i * 2 * kWidth<T>, z.re);
  store(p + i * 2 * kWidth<T> + kWidth<T>, z.im);
}

// Where a transform's input comes from: the complex buffer of the pass before, ...
template <typename T>
struct FromBuffer {
  const T* buffer;
  MMLM_INLINE Complex<T> operator()(int64_t i) const { return get(buffer, i); }
};
// ... or the windowed samples of a frame, two to a complex number,
template <typename T>
struct FromFramePacked {
  const T* samples;
  const int* offset;
  const T* window;
  MMLM_INLINE Complex<T> operator()(int64_t i) const {
    return {load(samples + offset[2 * i]) * window[2 * i], load(samples + offset[2 * i + 1]) * window[2 * i + 1]};
  }
};
// or one.
template <typename T>
struct FromFrame {
  const T* samples;
  const int* offset;
  const T* window;
  MMLM_INLINE Complex<T> operator()(int64_t i) const { return {load(samples + offset[i]) * window[i], Vec<T>{}}; }
};

template <int R, typename T, typename Input>
__attribute__((noinline)) void one_pass(const DftPass& pass, const T* twiddles, const Input& input, T* out) {
  const int points = pass.points, stride = pass.stride;
  for (int p = 0; p < points; ++p, twiddles += 2 * (R - 1)) {
    for (int q = 0; q < stride; ++q) {
      const int64_t from = q + static_cast<int64_t>(stride) * p, to = q + static_cast<int64_t>(stride) * R * p;
      butterfly<R, T>([&](int k) { return input(from + static_cast<int64_t>(stride) * points * k); },
                      [&](int k, Complex<T> y) {
                        if (k > 0 && p > 0) y = rotate(y, twiddles[2 * k - 2], twiddles[2 * k - 1]);
                        put(out, to + static_cast<int64_t>(stride) * k, y);
                      });
    }
  }
}

// A radix without a butterfly of its own, by the definition.
template <typename T, typename Input>
__attribute__((noinline)) void any_pass(const DftPass& pass, const T* twiddles, const T* roots, const Input& input,
                                        T* scratch, T* out) {
  const int r = pass.radix;
  for (int p = 0; p < pass.points; ++p, twiddles += 2 * (r - 1)) {
    for (int q = 0; q < pass.stride; ++q) {
      for (int k = 0; k < r; ++k) put(scratch, k, input(q + static_cast<int64_t>(pass.stride) * (p + pass.points * k)));
      for (int j = 0; j < r; ++j) {
        Complex<T> sum = get(scratch, 0);
        for (int k = 1, root = j; k < r; ++k, root = root + j >= r ? root + j - r : root + j) {
          sum = sum + rotate(get(scratch, k), roots[2 * root], roots[2 * root + 1]);
        }
        if (j > 0) sum = rotate(sum, twiddles[2 * j - 2], twiddles[2 * j - 1]);
        put(out, q + static_cast<int64_t>(pass.stride) * (static_cast<int64_t>(r) * p + j), sum);
      }
    }
  }
}

template <typename T, typename Input>
void run_pass(const DftPass& pass, const SpectralTables<T>& tables, const Input& input, T* scratch, T* out) {
  const T* twiddles = tables.twiddles.data() + pass.twiddle;
  switch (pass.radix) {
    case 2:
      return one_pass<2>(pass, twiddles, input, out);
    case 3:
      return one_pass<3>(pass, twiddles, input, out);
    case 4:
      return one_pass<4>(pass, twiddles, input, out);
    case 5:
      return one_pass<5>(pass, twiddles, input, out);
    case 8:
      return one_pass<8>(pass, twiddles, input, out);
    case 16:
      return one_pass<16>(pass, twiddles, input, out);
    default:
      return any_pass(pass, twiddles, tables.roots.data() + pass.root, input, scratch, out);
  }
}

// Spectrum of one group of frames: emit(k, re, im) for every bin. `buffers`: two of dft_length complex vectors, and
// one of largest_radix.
template <typename T, typename Emit>
MMLM_INLINE void dft_real(const SpectralPlan& plan, const SpectralTables<T>& tables, const T* samples,
                          const int* offset, T* buffers, const Emit& emit) {
  const int n = plan.dft_length;
  T *from = buffers, *to = buffers + static_cast<int64_t>(n) * 2 * kWidth<T>;
  T* scratch = to + static_cast<int64_t>(n) * 2 * kWidth<T>;
  for (size_t i = 0; i < plan.passes.size(); ++i) {
    if (i > 0) {
      run_pass(plan.passes[i], tables, FromBuffer<T>{from}, scratch, to);
    } else if (plan.packed) {
      run_pass(plan.passes[i], tables, FromFramePacked<T>{samples, offset, tables.window.data()}, scratch, to);
    } else {
      run_pass(plan.passes[i], tables, FromFrame<T>{samples, offset, tables.window.data()}, scratch, to);
    }
    std::swap(from, to);
  }
  if (plan.passes.empty()) {  // n_fft of 1 or 2
    put(from, 0,
        plan.packed ? FromFramePacked<T>{samples, offset, tables.window.data()}(0)
                    : FromFrame<T>{samples, offset, tables.window.data()}(0));
  }
  if (!plan.packed) {
    for (int k = 0; k < plan.num_bins; ++k) {
      const Complex<T> z = get(from, k);
      emit(k, z.re, z.im);
    }
    return;
  }
  // The window carries a factor 1/2, so that X[k] = (Z[k] + conj Z[n-k]) - i w^k (Z[k] - conj Z[n-k]) has none.
  const Complex<T> z = get(from, 0);
  emit(0, (z.re + z.im) * T(2), Vec<T>{});
  emit(n, (z.re - z.im) * T(2), Vec<T>{});
  for (int k = 1; k <= n / 2; ++k) {
    const Complex<T> a = get(from, k), b = get(from, n - k);
    const Complex<T> even = {a.re + b.re, a.im - b.im}, odd = {a.im + b.im, b.re - a.re};
    const Complex<T> turned = rotate(odd, tables.unpack[2 * k], tables.unpack[2 * k + 1]);
    emit(k, even.re + turned.re, even.im + turned.im);
    if (2 * k != n) emit(n - k, even.re - turned.re, turned.im - even.im);
  }
}

}  // namespace
}  // namespace mmlm
