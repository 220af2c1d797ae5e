// The log-mel kernel, one frame per vector lane. Included once per ISA with MMLM_LOG_MEL_FRAMES naming the symbol.
//
// Per 8 frames about 950 vector instructions: 400 windowed samples -> sixteen real 25-point DFTs -> one real and
// twelve complex 16-point DFTs -> 201 powers -> sparse mel -> log10. Everything stays in L1 and L2.
#include <algorithm>
#include <cstdlib>
#include <new>

#include "audio/log_mel.h"
#include "audio/log_mel_tile.h"
#include "audio/simd.h"

namespace mmlm {
namespace {

static_assert(kTileFrames % kWidth == 0, "a tile is a whole number of vectors");
constexpr int kGroups = kTileFrames / kWidth;

struct Scratch {
  alignas(64) float tile[kHopLength * kTileStride];
  alignas(64) float columns[kColumns * kOuter * 2 * kWidth];  // [column][a][re, im][lane]
  alignas(64) float power[kNumBins * kTileFrames];            // [bin][frame]
  alignas(64) float edge[kTileSamples];
};

struct ScratchHolder {
  ScratchHolder() : scratch(static_cast<Scratch*>(std::aligned_alloc(64, sizeof(Scratch)))) {
    if (scratch == nullptr) throw std::bad_alloc();
    std::memset(scratch, 0, sizeof(Scratch));
  }
  ~ScratchHolder() { std::free(scratch); }
  Scratch* scratch;
};

struct Complex {
  Vec re, im;
};

MMLM_INLINE Complex operator+(Complex x, Complex y) { return {x.re + y.re, x.im + y.im}; }
MMLM_INLINE Complex operator-(Complex x, Complex y) { return {x.re - y.re, x.im - y.im}; }
// x * (c - i s): the twiddle exp(-i angle) with c = cos(angle), s = sin(angle).
MMLM_INLINE Complex rotate(Complex x, float c, float s) { return {x.re * c + x.im * s, x.im * c - x.re * s}; }

constexpr float kCos72 = 0.30901699437494742f, kCos144 = -0.80901699437494742f;
constexpr float kSin72 = 0.95105651629515357f, kSin144 = 0.58778525229247313f;
constexpr float kHalfSqrt2 = 0.70710678118654752f;
constexpr float kCosPi8 = 0.92387953251128674f, kSinPi8 = 0.38268343236508977f;
// cos and sin of 2 pi k / 25.
constexpr float kCos25[9] = {1.f,
                             0.96858316112863108f,
                             0.87630668004386358f,
                             0.72896862742141155f,
                             0.53582679497899655f,
                             0.30901699437494745f,
                             0.06279051952931353f,
                             -0.18738131458572463f,
                             -0.42577929156507272f};
constexpr float kSin25[9] = {0.f,
                             0.24868988716485479f,
                             0.48175367410171532f,
                             0.68454710592868862f,
                             0.84432792550201508f,
                             0.95105651629515353f,
                             0.99802672842827156f,
                             0.98228725072868872f,
                             0.90482705246601947f};

// Real 5-point DFT from x0 and the folded pairs s1 = x1 + x4, s2 = x2 + x3, d1 = x1 - x4, d2 = x2 - x3.
MMLM_INLINE void dft5_real(Vec x0, Vec s1, Vec s2, Vec d1, Vec d2, Vec& y0, Complex& y1, Complex& y2) {
  y0 = x0 + s1 + s2;
  y1 = {x0 + kCos72 * s1 + kCos144 * s2, -kSin72 * d1 - kSin144 * d2};
  y2 = {x0 + kCos144 * s1 + kCos72 * s2, kSin72 * d2 - kSin144 * d1};
}

MMLM_INLINE void dft5(const Complex* x, Complex* y) {
  const Complex s1 = x[1] + x[4], s2 = x[2] + x[3], d1 = x[1] - x[4], d2 = x[2] - x[3];
  y[0] = x[0] + s1 + s2;
  const Complex a = {x[0].re + kCos72 * s1.re + kCos144 * s2.re, x[0].im + kCos72 * s1.im + kCos144 * s2.im};
  const Complex b = {x[0].re + kCos144 * s1.re + kCos72 * s2.re, x[0].im + kCos144 * s1.im + kCos72 * s2.im};
  const Complex p = {kSin72 * d1.re + kSin144 * d2.re, kSin72 * d1.im + kSin144 * d2.im};
  const Complex q = {kSin144 * d1.re - kSin72 * d2.re, kSin144 * d1.im - kSin72 * d2.im};
  y[1] = {a.re + p.im, a.im - p.re};
  y[4] = {a.re - p.im, a.im + p.re};
  y[2] = {b.re + q.im, b.im - q.re};
  y[3] = {b.re - q.im, b.im + q.re};
}

MMLM_INLINE void dft4(Complex a, Complex b, Complex c, Complex d, Complex* y) {
  const Complex e = a + c, f = a - c, g = b + d, h = b - d;
  y[0] = e + g;
  y[2] = e - g;
  y[1] = {f.re + h.im, f.im - h.re};
  y[3] = {f.re - h.im, f.im + h.re};
}

MMLM_INLINE void put(float* columns, int column, int a, Complex z) {
  float* p = columns + (column * kOuter + a) * 2 * kWidth;
  store(p, z.re);
  store(p + kWidth, z.im);
}

MMLM_INLINE Complex get(const float* columns, int column, int a) {
  const float* p = columns + (column * kOuter + a) * 2 * kWidth;
  return {load(p), load(p + kWidth)};
}

// Window and sixteen real 25-point DFTs (5 x 5), the window folded into the first butterflies.
__attribute__((noinline)) void first_stage(const LogMelPlan& plan, const float* __restrict tile,
                                           float* __restrict columns) {
  for (int a = 0; a < kOuter; ++a) {
    const int* offset = plan.tile_offset[a];
    const float* window = plan.window[a];
    Vec real[5];
    Complex one[5], two[5];
#pragma GCC unroll 5
    for (int b = 0; b < 5; ++b) {
      const Vec x0 = load(tile + offset[b]) * window[b];
      const Vec x1 = load(tile + offset[b + 5]) * window[b + 5];
      const Vec x2 = load(tile + offset[b + 10]) * window[b + 10];
      const Vec x3 = load(tile + offset[b + 15]), x4 = load(tile + offset[b + 20]);
      const Vec s1 = x4 * window[b + 20] + x1, d1 = x1 - x4 * window[b + 20];
      const Vec s2 = x3 * window[b + 15] + x2, d2 = x2 - x3 * window[b + 15];
      dft5_real(x0, s1, s2, d1, d2, real[b], one[b], two[b]);
      if (b > 0) {
        one[b] = rotate(one[b], kCos25[b], kSin25[b]);
        two[b] = rotate(two[b], kCos25[2 * b], kSin25[2 * b]);
      }
    }
    Vec zero;
    Complex five, ten, y[5];
    dft5_real(real[0], real[1] + real[4], real[2] + real[3], real[1] - real[4], real[2] - real[3], zero, five, ten);
    store(columns + a * 2 * kWidth, zero);
    put(columns, 1, a, five);
    put(columns, 2, a, ten);
    dft5(one, y);
#pragma GCC unroll 5
    for (int i = 0; i < 5; ++i) put(columns, 3 + i, a, y[i]);
    dft5(two, y);
#pragma GCC unroll 5
    for (int i = 0; i < 5; ++i) put(columns, 8 + i, a, y[i]);
  }
}

// |DFT16|^2 of the real column 0: nine bins.
MMLM_INLINE void real_column(const LogMelPlan& plan, const float* __restrict columns, float* __restrict power) {
  const int* bin = plan.power_bin[0];
  Vec sum[4], difference[4];
  Complex odd[4];
#pragma GCC unroll 4
  for (int a = 0; a < 4; ++a) {
    const auto x = [&](int i) { return load(columns + i * 2 * kWidth); };
    const Vec e = x(a) + x(a + 8), f = x(a) - x(a + 8), g = x(a + 4) + x(a + 12), h = x(a + 4) - x(a + 12);
    sum[a] = e + g;
    difference[a] = e - g;
    odd[a] = {f, -h};
  }
  const auto emit = [&](int q, Vec re, Vec im) { store(power + bin[q] * kTileFrames, re * re + im * im); };
  const Vec e = sum[0] + sum[2], g = sum[1] + sum[3];
  emit(0, e + g, Vec{});
  emit(8, e - g, Vec{});
  emit(4, sum[0] - sum[2], sum[1] - sum[3]);
  const Vec u = (difference[1] - difference[3]) * kHalfSqrt2, v = (difference[1] + difference[3]) * kHalfSqrt2;
  emit(2, difference[0] + u, difference[2] + v);
  emit(6, difference[0] - u, v - difference[2]);
  Complex y[4];
  dft4(odd[0], rotate(odd[1], kCosPi8, kSinPi8), rotate(odd[2], kHalfSqrt2, kHalfSqrt2),
       rotate(odd[3], kSinPi8, kCosPi8), y);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) emit(1 + 4 * i, y[i].re, y[i].im);
}

MMLM_INLINE Complex rotate_45(Complex x) { return {(x.re + x.im) * kHalfSqrt2, (x.im - x.re) * kHalfSqrt2}; }
MMLM_INLINE Complex rotate_135(Complex x) { return {(x.im - x.re) * kHalfSqrt2, (x.re + x.im) * -kHalfSqrt2}; }

// Power spectrum from the columns: 16-point DFTs (4 x 4), scattered to bin order.
__attribute__((noinline)) void second_stage(const LogMelPlan& plan, const float* __restrict columns,
                                            float* __restrict power) {
  real_column(plan, columns, power);
  for (int c = 1; c < kColumns; ++c) {
    const int* bin = plan.power_bin[c];
    Complex h[4][4];
#pragma GCC unroll 4
    for (int a = 0; a < 4; ++a) {
      dft4(get(columns, c, a), get(columns, c, a + 4), get(columns, c, a + 8), get(columns, c, a + 12), h[a]);
    }
    h[1][1] = rotate(h[1][1], kCosPi8, kSinPi8);
    h[1][2] = rotate_45(h[1][2]);
    h[1][3] = rotate(h[1][3], kSinPi8, kCosPi8);
    h[2][1] = rotate_45(h[2][1]);
    h[2][2] = {h[2][2].im, -h[2][2].re};
    h[2][3] = rotate_135(h[2][3]);
    h[3][1] = rotate(h[3][1], kSinPi8, kCosPi8);
    h[3][2] = rotate_135(h[3][2]);
    h[3][3] = rotate(h[3][3], -kCosPi8, -kSinPi8);
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      Complex y[4];
      dft4(h[0][q], h[1][q], h[2][q], h[3][q], y);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        store(power + bin[q + 4 * i] * kTileFrames, y[i].re * y[i].re + y[i].im * y[i].im);
      }
    }
  }
}

#if defined(__AVX2__)
MMLM_INLINE __m256 two_rows(const float* near, const float* far) {
  return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(near)), _mm_loadu_ps(far), 1);
}
// Four rows of the tile from the same four samples of eight frames.
MMLM_INLINE void transpose_4x8(const float* x, float* tile) {
  const __m256 r0 = two_rows(x, x + 4 * kHopLength), r1 = two_rows(x + kHopLength, x + 5 * kHopLength);
  const __m256 r2 = two_rows(x + 2 * kHopLength, x + 6 * kHopLength);
  const __m256 r3 = two_rows(x + 3 * kHopLength, x + 7 * kHopLength);
  const __m256 a = _mm256_unpacklo_ps(r0, r1), b = _mm256_unpackhi_ps(r0, r1);
  const __m256 c = _mm256_unpacklo_ps(r2, r3), d = _mm256_unpackhi_ps(r2, r3);
  _mm256_store_ps(tile, _mm256_shuffle_ps(a, c, 0x44));
  _mm256_store_ps(tile + kTileStride, _mm256_shuffle_ps(a, c, 0xEE));
  _mm256_store_ps(tile + 2 * kTileStride, _mm256_shuffle_ps(b, d, 0x44));
  _mm256_store_ps(tile + 3 * kTileStride, _mm256_shuffle_ps(b, d, 0xEE));
}
#endif

// tile[m][l] = x[160 l + m] for the 18 columns that 16 frames touch.
MMLM_INLINE void transpose(const float* __restrict x, float* __restrict tile) {
#if defined(__AVX2__)
  for (int l = 0; l < kTileFrames; l += 8) {
    for (int m = 0; m < kHopLength; m += 4) transpose_4x8(x + kHopLength * l + m, tile + m * kTileStride + l);
  }
  const float *near = x + kHopLength * kTileFrames, *far = near + kHopLength;
  float* out = tile + kTileFrames;
  for (int m = 0; m < kHopLength; m += 4, out += 4 * kTileStride) {
    const __m128 a = _mm_loadu_ps(near + m), b = _mm_loadu_ps(far + m);
    const __m128 low = _mm_unpacklo_ps(a, b), high = _mm_unpackhi_ps(a, b);
    _mm_storel_pi(reinterpret_cast<__m64*>(out), low);
    _mm_storeh_pi(reinterpret_cast<__m64*>(out + kTileStride), low);
    _mm_storel_pi(reinterpret_cast<__m64*>(out + 2 * kTileStride), high);
    _mm_storeh_pi(reinterpret_cast<__m64*>(out + 3 * kTileStride), high);
  }
#else
  for (int m = 0; m < kHopLength; ++m) {
    for (int l = 0; l < kTileColumns; ++l) tile[m * kTileStride + l] = x[kHopLength * l + m];
  }
#endif
}

// Samples [start, start + kTileSamples) of the zero-padded clip, reflected at both ends.
MMLM_INLINE void copy_edge(const LogMelClip& clip, int64_t start, float* edge) {
  const int64_t n = clip.num_samples;
  for (int i = 0; i < kTileSamples; ++i) {
    int64_t j = start + i;
    if (j < 0) j = -j;
    if (j >= n) j = 2 * (n - 1) - j;
    edge[i] = j >= 0 && j < clip.num_valid ? clip.samples[j] : 0.f;
  }
}

// Mel sums of one tile, floored, in log10: `emit(m, group, values)`. Returns the sum of all mel values: NaN or
// infinite as soon as one of them is.
template <typename Emit>
MMLM_INLINE Vec mel_log10(const LogMelPlan& plan, const float* __restrict power, const Emit& emit) {
  const float* weight = plan.weights.data();
  const Vec floor = broadcast(kMelFloor);
  Vec total = broadcast(0.f);
  for (int m = 0; m < plan.num_mel_bins; ++m) {
    Vec mel[kGroups] = {};
    const float* p = power + plan.first_bin[m] * kTileFrames;
    for (int k = plan.count[m]; k > 0; --k, ++weight, p += kTileFrames) {
#pragma GCC unroll 4
      for (int g = 0; g < kGroups; ++g) mel[g] += load(p + g * kWidth) * *weight;
    }
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g) {
      total += mel[g];
      emit(m, g, log10_positive(max(mel[g], floor)));
    }
  }
  return total;
}

// Every sample the frames see is zero.
bool is_silent(const LogMelClip& clip, int64_t start, int num_frames) {
  const int64_t last = start + kHopLength * (num_frames - 1) + kFrameLength - 1;
  const int64_t reflected = last < clip.num_samples ? last : 2 * (clip.num_samples - 1) - last;
  return start >= clip.num_valid && reflected >= clip.num_valid;
}

}  // namespace

LogMelRange MMLM_LOG_MEL_FRAMES(const LogMelPlan& plan, const LogMelClip& clip, int64_t first, int64_t last,
                                float* tile_min) {
  static thread_local ScratchHolder holder;
  Scratch& s = *holder.scratch;
  const int64_t row_stride = clip.num_samples / kHopLength;
  Vec largest = broadcast(-10.f), total = broadcast(0.f);
  for (int64_t f = first; f < last; f += kTileFrames) {
    const int num_frames = static_cast<int>(std::min<int64_t>(kTileFrames, last - f));
    const int64_t start = f * kHopLength - kFrameLength / 2;
    float* out = clip.out + f;
    if (is_silent(clip, start, num_frames)) {
      tile_min[f / kTileFrames] = kSilentTile;
      continue;
    }
    const bool inside = start >= 0 && start + kTileSamples <= clip.num_valid;
    if (!inside) copy_edge(clip, start, s.edge);
    transpose(inside ? clip.samples + start : s.edge, s.tile);
    // The next tile's samples come in while this one is transformed: half the time of a cold clip was waiting.
    const float* next = clip.samples + start + kTileSamples;
    if (inside && next + kTileFrames * kHopLength <= clip.samples + clip.num_valid) {
      for (int i = 0; i < kTileFrames * kHopLength; i += 16) __builtin_prefetch(next + i, 0, 3);
    }
    for (int g = 0; g < kGroups; ++g) {
      first_stage(plan, s.tile + g * kWidth, s.columns);
      second_stage(plan, s.columns, s.power + g * kWidth);
    }
    Vec smallest = broadcast(100.f);
    if (num_frames == kTileFrames) {
      total += mel_log10(plan, s.power, [&](int m, int g, Vec value) {
        largest = max(value, largest);
        smallest = min(value, smallest);
        store(out + m * row_stride + g * kWidth, value * 0.25f + 1.f);
      });
    } else {  // lanes past the clip's last frame hold reflected samples: keep them out of the maximum
      total += mel_log10(plan, s.power, [&](int m, int g, Vec value) {
        for (int i = 0; i < kWidth && g * kWidth + i < num_frames; ++i) {
          largest[i] = value[i] > largest[i] ? value[i] : largest[i];
          smallest[i] = value[i] < smallest[i] ? value[i] : smallest[i];
          out[m * row_stride + g * kWidth + i] = value[i] * 0.25f + 1.f;
        }
      });
    }
    tile_min[f / kTileFrames] = min_of(smallest);
  }
  float sum = 0;
  for (int i = 0; i < kWidth; ++i) sum += total[i];
  return {max_of(largest), sum - sum == 0.f};
}

}  // namespace mmlm
