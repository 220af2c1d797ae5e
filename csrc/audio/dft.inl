// Real DFTs of any length, one frame per vector lane: mixed-radix autosort passes (Stockham) over a complex transform
// of half the length, and the 400-point prime-factor transform (dft400.inl). Included once per ISA, after simd.h.
#include "audio/butterfly.h"
#include "audio/spectral.h"

namespace mmlm {
namespace {

template <typename T>
MMLM_INLINE Complex<Vec<T>> get(const T* p, int64_t i) {
  return {load(p + i * 2 * kWidth<T>), load(p + i * 2 * kWidth<T> + kWidth<T>)};
}
template <typename T>
MMLM_INLINE void put(T* p, int64_t i, Complex<Vec<T>> z) {
  store(p + i * 2 * kWidth<T>, z.re);
  store(p + i * 2 * kWidth<T> + kWidth<T>, z.im);
}

// Where a transform's input comes from: the complex buffer of the pass before, ...
template <typename T>
struct FromBuffer {
  const T* buffer;
  MMLM_INLINE Complex<Vec<T>> operator()(int64_t i) const { return get(buffer, i); }
  MMLM_INLINE Complex<Vec<T>> last(int64_t i) const { return get(buffer, i); }
};
// ... or the samples of a frame, less their mean and windowed, two to a complex number,
template <typename T>
struct FromFramePacked {
  const T* samples;
  const int* offset;
  const T* window;
  Vec<T> mean;
  int num_samples;  // zeros follow, where the transform is longer than the frame: the last quarter of Kaldi's, nearly
  MMLM_INLINE Complex<Vec<T>> last(int64_t i) const {
    return 2 * i < num_samples ? (*this)(i) : Complex<Vec<T>>{Vec<T>{}, Vec<T>{}};
  }
  MMLM_INLINE Complex<Vec<T>> operator()(int64_t i) const {
    return {(load(samples + offset[2 * i]) - mean) * window[2 * i],
            (load(samples + offset[2 * i + 1]) - mean) * window[2 * i + 1]};
  }
};
// or one.
template <typename T>
struct FromFrame {
  const T* samples;
  const int* offset;
  const T* window;
  Vec<T> mean;
  MMLM_INLINE Complex<Vec<T>> last(int64_t i) const { return (*this)(i); }
  MMLM_INLINE Complex<Vec<T>> operator()(int64_t i) const {
    return {(load(samples + offset[i]) - mean) * window[i], Vec<T>{}};
  }
};

template <int R, typename T, typename Input>
__attribute__((noinline)) void one_pass(const DftPass& pass, const T* twiddles, const Input& input, T* out) {
  const int points = pass.points, stride = pass.stride;
  for (int p = 0; p < points; ++p, twiddles += 2 * (R - 1)) {
    for (int q = 0; q < stride; ++q) {
      const int64_t from = q + static_cast<int64_t>(stride) * p, to = q + static_cast<int64_t>(stride) * R * p;
      butterfly<R, Vec<T>>(
          [&](int k) {
            const int64_t i = from + static_cast<int64_t>(stride) * points * k;
            return k == R - 1 ? input.last(i) : input(i);
          },
          [&](int k, Complex<Vec<T>> y) {
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
        Complex<Vec<T>> sum = get(scratch, 0);
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
    default:
      return any_pass(pass, twiddles, tables.roots.data() + pass.root, input, scratch, out);
  }
}

// Spectrum of one group of frames: emit(k, re, im) for every bin. `buffers`: two of dft_length complex vectors, and
// one of largest_radix.
template <typename T, typename Emit>
MMLM_INLINE void dft_real(const SpectralPlan& plan, const SpectralTables<T>& tables, const T* samples,
                          const int* offset, Vec<T> mean, T* buffers, const Emit& emit) {
  const int n = plan.dft_length;
  T *from = buffers, *to = buffers + static_cast<int64_t>(n) * 2 * kWidth<T>;
  T* scratch = to + static_cast<int64_t>(n) * 2 * kWidth<T>;
  for (size_t i = 0; i < plan.passes.size(); ++i) {
    if (i > 0) {
      run_pass(plan.passes[i], tables, FromBuffer<T>{from}, scratch, to);
    } else if (plan.packed) {
      run_pass(plan.passes[i], tables,
               FromFramePacked<T>{samples, offset, tables.window.data(), mean, plan.options.frame_length}, scratch, to);
    } else {
      run_pass(plan.passes[i], tables, FromFrame<T>{samples, offset, tables.window.data(), mean}, scratch, to);
    }
    std::swap(from, to);
  }
  if (plan.passes.empty()) {  // n_fft of 1 or 2
    put(from, 0,
        plan.packed ? FromFramePacked<T>{samples, offset, tables.window.data(), mean, plan.options.frame_length}(0)
                    : FromFrame<T>{samples, offset, tables.window.data(), mean}(0));
  }
  if (!plan.packed) {
    for (int k = 0; k < plan.num_bins; ++k) {
      const Complex<Vec<T>> z = get(from, k);
      emit(k, z.re, z.im);
    }
    return;
  }
  // The window carries a factor 1/2, so that X[k] = (Z[k] + conj Z[n-k]) - i w^k (Z[k] - conj Z[n-k]) has none.
  const Complex<Vec<T>> z = get(from, 0);
  emit(0, (z.re + z.im) * T(2), Vec<T>{});
  emit(n, (z.re - z.im) * T(2), Vec<T>{});
  for (int k = 1; k <= n / 2; ++k) {
    const Complex<Vec<T>> a = get(from, k), b = get(from, n - k);
    const Complex<Vec<T>> even = {a.re + b.re, a.im - b.im}, odd = {a.im + b.im, b.re - a.re};
    const Complex<Vec<T>> turned = rotate(odd, tables.unpack[2 * k], tables.unpack[2 * k + 1]);
    emit(k, even.re + turned.re, even.im + turned.im);
    if (2 * k != n) emit(n - k, even.re - turned.re, turned.im - even.im);
  }
}

}  // namespace
}  // namespace mmlm
