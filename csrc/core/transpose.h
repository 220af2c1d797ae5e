// Transposes of matrices in memory. Included only by per-ISA files, like simd.h.
#pragma once
#include <cstdint>
#include <type_traits>

#include "core/simd.h"

namespace mmlm {
namespace {

#if defined(__AVX2__)
MMLM_INLINE __m256 two_rows(const float* near, const float* far) {
  return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(near)), _mm_loadu_ps(far), 1);
}
// Four rows of `out` from the same four columns of eight rows of `x`.
MMLM_INLINE void transpose_8x4(const float* x, int64_t x_stride, float* out, int64_t out_stride) {
  const __m256 r0 = two_rows(x, x + 4 * x_stride), r1 = two_rows(x + x_stride, x + 5 * x_stride);
  const __m256 r2 = two_rows(x + 2 * x_stride, x + 6 * x_stride);
  const __m256 r3 = two_rows(x + 3 * x_stride, x + 7 * x_stride);
  const __m256 a = _mm256_unpacklo_ps(r0, r1), b = _mm256_unpackhi_ps(r0, r1);
  const __m256 c = _mm256_unpacklo_ps(r2, r3), d = _mm256_unpackhi_ps(r2, r3);
  _mm256_storeu_ps(out, _mm256_shuffle_ps(a, c, 0x44));
  _mm256_storeu_ps(out + out_stride, _mm256_shuffle_ps(a, c, 0xEE));
  _mm256_storeu_ps(out + 2 * out_stride, _mm256_shuffle_ps(b, d, 0x44));
  _mm256_storeu_ps(out + 3 * out_stride, _mm256_shuffle_ps(b, d, 0xEE));
}
MMLM_INLINE void transpose_2x4(const float* x, int64_t x_stride, float* out, int64_t out_stride) {
  const __m128 a = _mm_loadu_ps(x), b = _mm_loadu_ps(x + x_stride);
  const __m128 low = _mm_unpacklo_ps(a, b), high = _mm_unpackhi_ps(a, b);
  _mm_storel_pi(reinterpret_cast<__m64*>(out), low);
  _mm_storeh_pi(reinterpret_cast<__m64*>(out + out_stride), low);
  _mm_storel_pi(reinterpret_cast<__m64*>(out + 2 * out_stride), high);
  _mm_storeh_pi(reinterpret_cast<__m64*>(out + 3 * out_stride), high);
}
MMLM_INLINE void transpose_4x4(const double* x, int64_t x_stride, double* out, int64_t out_stride) {
  const __m256d r0 = _mm256_loadu_pd(x), r1 = _mm256_loadu_pd(x + x_stride);
  const __m256d r2 = _mm256_loadu_pd(x + 2 * x_stride), r3 = _mm256_loadu_pd(x + 3 * x_stride);
  const __m256d a = _mm256_unpacklo_pd(r0, r1), b = _mm256_unpackhi_pd(r0, r1);
  const __m256d c = _mm256_unpacklo_pd(r2, r3), d = _mm256_unpackhi_pd(r2, r3);
  _mm256_storeu_pd(out, _mm256_permute2f128_pd(a, c, 0x20));
  _mm256_storeu_pd(out + out_stride, _mm256_permute2f128_pd(b, d, 0x20));
  _mm256_storeu_pd(out + 2 * out_stride, _mm256_permute2f128_pd(a, c, 0x31));
  _mm256_storeu_pd(out + 3 * out_stride, _mm256_permute2f128_pd(b, d, 0x31));
}
#endif

// out[c][r] = x[r][c] for a matrix of rows x columns.
template <typename T, typename Out>
MMLM_INLINE void transpose(const T* __restrict x, int64_t x_stride, int rows, int columns, Out* __restrict out,
                           int64_t out_stride) {
  int done = 0;
#if defined(__AVX2__)
  if constexpr (std::is_same_v<T, float> && std::is_same_v<Out, float>) {
    const int even = columns / 4 * 4;
    for (; done + 8 <= rows; done += 8) {
      for (int c = 0; c < even; c += 4) {
        transpose_8x4(x + done * x_stride + c, x_stride, out + c * out_stride + done, out_stride);
      }
      for (int c = even; c < columns; ++c) {
        for (int r = done; r < done + 8; ++r) out[c * out_stride + r] = x[r * x_stride + c];
      }
    }
    for (; done + 2 <= rows; done += 2) {  // the last columns of a tile: a frame reaches a few hops further
      for (int c = 0; c < even; c += 4) {
        transpose_2x4(x + done * x_stride + c, x_stride, out + c * out_stride + done, out_stride);
      }
      for (int c = even; c < columns; ++c) {
        for (int r = done; r < done + 2; ++r) out[c * out_stride + r] = x[r * x_stride + c];
      }
    }
  }
#endif
#if defined(__AVX2__)
  if constexpr (std::is_same_v<T, double> && std::is_same_v<Out, double>) {
    const int even = columns / 4 * 4;
    for (; done + 4 <= rows; done += 4) {
      for (int c = 0; c < even; c += 4) {
        transpose_4x4(x + done * x_stride + c, x_stride, out + c * out_stride + done, out_stride);
      }
      for (int c = even; c < columns; ++c) {
        for (int r = done; r < done + 4; ++r) out[c * out_stride + r] = x[r * x_stride + c];
      }
    }
  }
#endif
  for (int c = 0; c < columns && done < rows; ++c) {
    for (int r = done; r < rows; ++r) out[c * out_stride + r] = static_cast<Out>(x[r * x_stride + c]);
  }
}

// Sums of products. Without an instruction that rounds once, each product of float32 is rounded before it is added, and
// such sums erred more than peers': they are formed in float64 there.
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA) || defined(__aarch64__)
constexpr bool kFuses = true;
#else
constexpr bool kFuses = false;
#endif

}  // namespace
}  // namespace mmlm
