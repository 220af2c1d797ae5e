// The spectral features of frames, phase by phase: what the CUDA kernel does between two barriers. Plain functions of a
// lane's index, so that the host can run them lane by lane: how the tests prove them where there is no GPU.
//
// A frame is a warp's, in longer transforms two's to eight's: what a lane does next follows from its lane alone, so no
// index is divided, and a warp waits for itself alone. Shared memory, per frame: two complex buffers of the transform's
// length, used in turn (samples, windowed samples, passes, power), the filter sums, and sums of parts of the frame.
// Bytes for 64 clips x 30 s of int16 in, float32 out: 61 MB read, 61 MB written, 29 us at 4.3 TB/s; flops 2.35 G, 35
// us. What bounds it are instructions: see CONTRIBUTING.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "audio/spectral.h"
#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define MMLM_INLINE __host__ __device__ __forceinline__
// Loops of 3 to 13 turns of a lane: unrolled 16 times they would run in the loop for what is left, some lanes in both.
#define MMLM_UNROLL(n) _Pragma(n)
#else
#define MMLM_INLINE inline
#define MMLM_UNROLL(n)
#endif
//
#include "audio/butterfly.h"

namespace mmlm {

constexpr int kDeviceThreads = 256, kMostFrames = 8;  // of a block
constexpr int kSumParts = 32;                         // of a frame's sums: a lane each, added in order by all
constexpr int kMaxPasses = 16;
constexpr int kClipsPerLaunch = 64;  // their description travels as a kernel argument: no copy, no pinned memory

enum class OutType { float32 = 0, float16 = 1, bfloat16 = 2 };

struct DeviceClip {
  const void* samples;
  int64_t sample_stride, num_valid, num_samples, num_frames;
  void* out;
};

// What a launch needs of a plan: scalars, and pointers to its tables in device memory.
struct SpectralCudaArgs {
  int frame_length, hop_length, n_fft, num_bins, num_filters, num_ceps, num_out;
  int64_t offset;
  Edge edge;
  float scale, signal_preemphasis, frame_preemphasis;
  bool remove_dc_offset, is_packed, has_filters, bins_first, raw_energy, is_int16;
  Spectrum spectrum;
  float exponent, power_add, power_floor, add, floor, multiply, shift, dynamic_range, energy_floor;
  Log log;
  Energy energy;
  OutType out_type;
  int dft_length, num_passes, frames_per_block;  // a power of two
  DftPass passes[kMaxPasses];
  uint32_t stride_inverse[kMaxPasses];  // see divided
  const float *window, *twiddles, *roots, *unpack, *weights, *dct;
  const int32_t *first_bin, *count, *weight_offset;
  uint32_t* clip_max;  // one a clip, where there is a dynamic range
  int64_t out_stride;
  DeviceClip clips[kClipsPerLaunch];

  MMLM_INLINE int buffer_floats() const { return 2 * dft_length + 2; }  // room for num_bins too
  MMLM_INLINE int floats_per_frame() const {
    return 2 * buffer_floats() + (num_filters + 1) / 2 * 2 + 2 + 2 * kSumParts;
  }
  MMLM_INLINE int lanes() const { return kDeviceThreads / frames_per_block; }
  // Samples are windowed as they are read: nothing else is done to them.
  MMLM_INLINE bool is_plain() const { return !remove_dc_offset && frame_preemphasis == 0 && energy == Energy::none; }
};

// Floats ordered as unsigned integers, so that an integer maximum finds the largest: deterministic.
MMLM_INLINE uint32_t ordered(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
MMLM_INLINE float from_ordered(uint32_t key) {
  const uint32_t bits = key & 0x80000000u ? key & 0x7fffffffu : ~key;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

namespace {

// Two floats of shared memory or of a table, eight bytes at once; at even places.
struct __attribute__((may_alias, aligned(8))) Pair {
  float re, im;
};
MMLM_INLINE Pair load_pair(const float* from) { return *reinterpret_cast<const Pair*>(from); }
MMLM_INLINE void store_pair(float* to, float re, float im) { *reinterpret_cast<Pair*>(to) = {re, im}; }

// n / d for n d < 2^32, with inverse = floor(2^32 / d) + 1; 0 stands for d = 1.
MMLM_INLINE int divided(int n, uint32_t inverse) {
  return inverse == 0 ? n : static_cast<int>(static_cast<uint64_t>(static_cast<uint32_t>(n)) * inverse >> 32);
}

// One frame of a clip in shared memory, as one of its lanes sees it.
struct Frame {
  const SpectralCudaArgs& a;
  const DeviceClip& clip;
  float* shared;
  int64_t index;
  int lane, lanes;

  MMLM_INLINE float* buffer(int which) const { return shared + which * a.buffer_floats(); }
  MMLM_INLINE float* sums() const { return shared + 2 * a.buffer_floats(); }  // of filters
  MMLM_INLINE float& energy() const { return sums()[(a.num_filters + 1) / 2 * 2]; }
  MMLM_INLINE float* parts(int of) const { return &energy() + 2 + of * kSumParts; }
  // Where pass i reads; it writes the other one. Samples are staged in buffer 0 and windowed into buffer 1.
  MMLM_INLINE int source_of_pass(int i) const { return (i + 1) & 1; }
  MMLM_INLINE int64_t first_sample() const { return index * a.hop_length + a.offset; }
};

MMLM_INLINE float raw_sample(const SpectralCudaArgs& a, const DeviceClip& clip, int64_t i) {
  if (i < 0 || i >= clip.num_valid) return 0.f;
  const int64_t at = i * clip.sample_stride;
  return a.is_int16 ? static_cast<const int16_t*>(clip.samples)[at] * (1.f / 32768)
                    : static_cast<const float*>(clip.samples)[at];
}

// Sample i of the clip, with what the plan makes up beyond both ends.
MMLM_INLINE float sample_at(const SpectralCudaArgs& a, const DeviceClip& clip, int64_t i) {
  const int64_t n = clip.num_samples;
  if (i < 0 || i >= n) {
    if (a.edge != Edge::reflect && a.edge != Edge::mirror) return 0.f;
    const int64_t repeated = a.edge == Edge::mirror;
    const int64_t period = 2 * n - 2 + 2 * repeated > 1 ? 2 * n - 2 + 2 * repeated : 1;
    i = (i % period + period) % period;
    if (i >= n) i = period - repeated - i;
  }
  float x = raw_sample(a, clip, i);
  if (a.signal_preemphasis != 0 && i < clip.num_valid) x -= a.signal_preemphasis * raw_sample(a, clip, i - 1);
  return x;
}

// Windowed sample `at` of the frame into buffer 1: as they lie there, pairs are the packed transform's complex numbers.
MMLM_INLINE void put_windowed(const Frame& f, int at, float x) {
  if (f.a.is_packed) {
    f.buffer(1)[at] = x;
  } else {
    store_pair(f.buffer(1) + 2 * at, x, 0.f);
  }
}

// `use(at, x)` for the frame's samples.
template <typename Use>
MMLM_INLINE void each_sample(const Frame& f, const Use& use) {
  const int n = f.a.frame_length;
  const int64_t first = f.first_sample(), stride = f.clip.sample_stride;
  if (first >= 0 && first + n <= f.clip.num_valid && f.a.signal_preemphasis == 0) {  // all are there as they are
    if (f.a.is_int16) {
      const int16_t* x = static_cast<const int16_t*>(f.clip.samples) + (first + f.lane) * stride;
      MMLM_UNROLL("unroll 4")
      for (int at = f.lane; at < n; at += f.lanes, x += f.lanes * stride) use(at, *x * (1.f / 32768));
    } else {
      const float* x = static_cast<const float*>(f.clip.samples) + (first + f.lane) * stride;
      MMLM_UNROLL("unroll 4")
      for (int at = f.lane; at < n; at += f.lanes, x += f.lanes * stride) use(at, *x);
    }
  } else {
    for (int at = f.lane; at < n; at += f.lanes) use(at, sample_at(f.a, f.clip, first + at));
  }
}

// Samples into buffer 0; where nothing but the window is between, windowed into buffer 1.
MMLM_INLINE void stage_samples(const Frame& f) {
  float* to = f.buffer(f.a.is_plain() ? 1 : 0);
  const float* window = f.a.window;
  if (!f.a.is_plain()) return each_sample(f, [=](int at, float x) { to[at] = x; });
  if (f.a.is_packed) {
    each_sample(f, [=](int at, float x) { to[at] = x * window[at]; });
  } else {
    each_sample(f, [=](int at, float x) { store_pair(to + 2 * at, x * window[at], 0.f); });
  }
  for (int at = f.a.frame_length + f.lane; at < f.a.n_fft; at += f.lanes) put_windowed(f, at, 0.f);
}

MMLM_INLINE float sum_of_parts(const Frame& f, int of) {
  float sum = 0;
  for (int part = 0; part < kSumParts; ++part) sum += f.parts(of)[part];
  return sum;
}

MMLM_INLINE void partial_means(const Frame& f) {
  if (!f.a.remove_dc_offset || f.lane >= kSumParts) return;
  float sum = 0;
  for (int at = f.lane; at < f.a.frame_length; at += kSumParts) sum += f.buffer(0)[at];
  f.parts(0)[f.lane] = sum;
}

MMLM_INLINE float mean(const Frame& f) { return f.a.remove_dc_offset ? sum_of_parts(f, 0) / f.a.frame_length : 0.f; }

// The frame's sample, mean removed and pre-emphasised.
MMLM_INLINE float prepared(const Frame& f, float mean, int at) {
  const float* samples = f.buffer(0);
  const float x = samples[at] - mean;
  return f.a.frame_preemphasis == 0 ? x : x - f.a.frame_preemphasis * (samples[at > 0 ? at - 1 : 0] - mean);
}

MMLM_INLINE void partial_energies(const Frame& f) {
  if (f.a.energy == Energy::none || f.lane >= kSumParts) return;
  const float middle = mean(f);
  float sum = 0;
  for (int at = f.lane; at < f.a.frame_length; at += kSumParts) {
    // The window table carries 1/2 where the transform is packed.
    const float x = f.a.raw_energy ? (f.buffer(0)[at] - middle) * f.a.scale
                                   : prepared(f, middle, at) * f.a.window[at] * (f.a.is_packed ? 2.f : 1.f);
    sum += x * x;
  }
  f.parts(1)[f.lane] = sum;
}

MMLM_INLINE void apply_window(const Frame& f) {
  const float middle = mean(f);
  for (int at = f.lane; at < f.a.n_fft; at += f.lanes) {
    put_windowed(f, at, at < f.a.frame_length ? prepared(f, middle, at) * f.a.window[at] : 0.f);
  }
  if (f.a.energy != Energy::none && f.lane == 0) {
    const float sum = sum_of_parts(f, 1), least = f.a.energy_floor > 1.1920929e-07f ? f.a.energy_floor : 1.1920929e-07f;
    f.energy() = logf(sum < least ? least : sum);
  }
}

// kPoints and kStride are the pass's, where they are known when this is compiled.
template <int R, int kPoints = 0, int kStride = 0>
MMLM_INLINE void butterflies(const Frame& f, int index, const float* from, float* to) {
  const DftPass& pass = f.a.passes[index];
  const float* twiddles = f.a.twiddles + pass.twiddle;
  const int stride = kStride ? kStride : pass.stride, work = (kPoints ? kPoints : pass.points) * stride;
  MMLM_UNROLL("unroll 1")
  for (int item = f.lane; item < work; item += f.lanes) {
    const int p = kStride ? item / stride : divided(item, f.a.stride_inverse[index]), q = item - p * stride;
    const float *turn = twiddles + p * 2 * (R - 1), *in = from + 2 * item;
    float* out = to + 2 * (q + stride * R * p);
    butterfly<R, float>(
        [&](int k) {
          const Pair x = load_pair(in + 2 * k * work);
          return Complex<float>{x.re, x.im};
        },
        [&](int k, Complex<float> y) {
          if (k > 0 && kPoints != 1) {  // for p = 0 by 1: branching there costs every warp both ways
            const Pair by = load_pair(turn + 2 * k - 2);
            y = rotate(y, by.re, by.im);
          }
          store_pair(out + 2 * k * stride, y.re, y.im);
        });
  }
}

// A radix without a butterfly of its own: a lane makes one output.
MMLM_INLINE void any_butterflies(const Frame& f, const DftPass& pass, const float* from, float* to) {
  const float *twiddles = f.a.twiddles + pass.twiddle, *roots = f.a.roots + pass.root;
  const int r = pass.radix, work = pass.points * pass.stride;
  for (int i = f.lane; i < work * r; i += f.lanes) {
    const int j = i / work, item = i - j * work, p = item / pass.stride, q = item - p * pass.stride;
    Complex<float> sum = {0.f, 0.f};
    for (int k = 0, root = 0; k < r; ++k, root = root + j >= r ? root + j - r : root + j) {
      const Pair x = load_pair(from + 2 * (item + work * k)), by = load_pair(roots + 2 * root);
      sum = sum + rotate(Complex<float>{x.re, x.im}, by.re, by.im);
    }
    if (j > 0) {
      const Pair by = load_pair(twiddles + p * 2 * (r - 1) + 2 * j - 2);
      sum = rotate(sum, by.re, by.im);
    }
    store_pair(to + 2 * (q + pass.stride * (r * p + j)), sum.re, sum.im);
  }
}

// The transforms of nearly all speech models: of 400 samples and of 512, packed. Theirs are passes by 8, 5, 5 and 4, 8,
// 8 (factors_of); any other has a kLength of 0.
MMLM_INLINE constexpr bool is_known(int length) { return length == 200 || length == 256; }

template <int kLength>
MMLM_INLINE int num_passes(const SpectralCudaArgs& a) {
  return is_known(kLength) ? 3 : a.num_passes;
}

template <int kLength>
MMLM_INLINE void dft_pass(const Frame& f, int index) {
  const float* from = f.buffer(f.source_of_pass(index));
  float* to = f.buffer(1 - f.source_of_pass(index));
  if constexpr (kLength == 200) {
    if (index == 0) return butterflies<8, 25, 1>(f, index, from, to);
    if (index == 1) return butterflies<5, 5, 8>(f, index, from, to);
    return butterflies<5, 1, 40>(f, index, from, to);
  }
  if constexpr (kLength == 256) {
    if (index == 0) return butterflies<4, 64, 1>(f, index, from, to);
    if (index == 1) return butterflies<8, 8, 4>(f, index, from, to);
    return butterflies<8, 1, 32>(f, index, from, to);
  }
  const DftPass& pass = f.a.passes[index];
  switch (pass.root >= 0 ? 0 : pass.radix) {
    case 2:
      return butterflies<2>(f, index, from, to);
    case 3:
      return butterflies<3>(f, index, from, to);
    case 4:
      return butterflies<4>(f, index, from, to);
    case 5:
      return butterflies<5>(f, index, from, to);
    case 8:
      return butterflies<8>(f, index, from, to);
    default:
      return any_butterflies(f, pass, from, to);
  }
}

// `of(power)` of every bin into the buffer that the last pass did not write. Of a packed transform bins k and n - k at
// once.
template <int kLength, typename Of>
MMLM_INLINE void each_power(const Frame& f, const Of& of) {
  const int from = f.source_of_pass(num_passes<kLength>(f.a));
  const float* z = f.buffer(from);
  float* out = f.buffer(1 - from);
  const float add = f.a.power_add, least = f.a.power_floor;
  const auto put = [=](int k, float re, float im) {
    const float power = re * re + im * im + add;
    out[k] = of(power < least ? least : power);
  };
  if (!is_known(kLength) && !f.a.is_packed) {
    for (int k = f.lane; k < f.a.num_bins; k += f.lanes) {
      const Pair x = load_pair(z + 2 * k);
      put(k, x.re, x.im);
    }
    return;
  }
  const int n = is_known(kLength) ? kLength : f.a.dft_length;
  MMLM_UNROLL("unroll 1")
  for (int low = f.lane; low <= n / 2; low += f.lanes) {
    const Pair x = load_pair(z + 2 * low), y = load_pair(z + 2 * (low == 0 ? 0 : n - low));
    const Complex<float> even = {x.re + y.re, x.im - y.im}, odd = {x.im + y.im, y.re - x.re};
    const Pair by = load_pair(f.a.unpack + 2 * low);
    const Complex<float> turned = rotate(odd, by.re, by.im);
    put(low, even.re + turned.re, even.im + turned.im);
    put(n - low, even.re - turned.re, turned.im - even.im);
  }
}

template <int kLength>
MMLM_INLINE void powers(const Frame& f) {
  const float half = f.a.exponent / 2;
  switch (f.a.spectrum) {
    case Spectrum::power:
      return each_power<kLength>(f, [](float power) { return power; });
    case Spectrum::magnitude:
      return each_power<kLength>(f, [](float power) { return sqrtf(power); });
    case Spectrum::exponent:
      return each_power<kLength>(f, [=](float power) { return powf(power, half); });
  }
}

MMLM_INLINE float logarithm(const SpectralCudaArgs& a, float x) {
  x += a.add;
  if (a.floor != 0 || a.log != Log::none) x = x < a.floor ? a.floor : x;  // NaN passes through, as torch.clamp lets it
  if (a.log == Log::natural) x = logf(x);
  if (a.log == Log::decimal) x = log10f(x);
  return x * a.multiply + a.shift;
}

MMLM_INLINE void filters(const Frame& f) {
  const float* power = f.buffer(1 - f.source_of_pass(f.a.num_passes));
  MMLM_UNROLL("unroll 1")
  for (int m = f.lane; m < f.a.num_filters; m += f.lanes) {
    float sum = 0;
    if (f.a.has_filters) {
      const float *p = power + f.a.first_bin[m], *weight = f.a.weights + f.a.weight_offset[m];
      int left = f.a.count[m];
      MMLM_UNROLL("unroll 1")
      for (; left >= 8; left -= 8, p += 8, weight += 8) {  // sums of sums, as on the CPU
        float part = 0;
        for (int k = 0; k < 8; ++k) part += p[k] * weight[k];
        sum += part;
      }
      float part = 0;
      MMLM_UNROLL("unroll 2")
      for (int k = 0; k < left; ++k) part += p[k] * weight[k];
      sum += part;
    } else {
      sum = power[m];
    }
    f.sums()[m] = logarithm(f.a, sum);
  }
}

// Row m of a frame's output.
MMLM_INLINE float output_of(const Frame& f, int m) {
  const SpectralCudaArgs& a = f.a;
  const float* sums = f.sums();
  const int last = a.num_out - 1;
  if ((a.energy == Energy::first || a.energy == Energy::replace_first) && m == 0) return f.energy();
  if ((a.energy == Energy::last || a.energy == Energy::replace_last) && m == last) return f.energy();
  const int row = a.energy == Energy::first ? m - 1 : m;
  if (a.num_ceps == 0) return sums[row];
  float sum = 0;
  for (int k = 0; k < a.num_filters; ++k) sum += a.dct[row * a.num_filters + k] * sums[k];
  return sum;
}

MMLM_INLINE void store_out(const SpectralCudaArgs& a, void* out, int64_t at, float value) {
#if defined(__CUDACC__)
  if (a.out_type == OutType::float16) {
    static_cast<__half*>(out)[at] = __float2half_rn(value);
    return;
  }
  if (a.out_type == OutType::bfloat16) {
    static_cast<__nv_bfloat16*>(out)[at] = __float2bfloat16_rn(value);
    return;
  }
#else
  (void)a;
#endif
  static_cast<float*>(out)[at] = value;
}
MMLM_INLINE float load_out(const SpectralCudaArgs& a, const void* out, int64_t at) {
#if defined(__CUDACC__)
  if (a.out_type == OutType::float16) return __half2float(static_cast<const __half*>(out)[at]);
  if (a.out_type == OutType::bfloat16) return __bfloat162float(static_cast<const __nv_bfloat16*>(out)[at]);
#else
  (void)a;
#endif
  return static_cast<const float*>(out)[at];
}

// Outputs of a block's frames, the first of which is `f` for lane 0, to memory; returns the largest this thread wrote.
// Neighbouring threads write neighbouring addresses.
MMLM_INLINE float write_outputs(const Frame& f, int num_frames, int thread) {
  const SpectralCudaArgs& a = f.a;
  const int rows = a.num_out, frames = a.frames_per_block, lanes = a.lanes();
  const int frame = a.bins_first ? thread & (frames - 1) : thread / lanes;
  float largest = -INFINITY;
  if (frame >= num_frames) return largest;
  const Frame mine = {a, f.clip, f.shared + frame * a.floats_per_frame(), f.index + frame, 0, lanes};
  const int64_t step = a.bins_first ? a.out_stride : 1;
  const int first = a.bins_first ? thread / frames : thread & (lanes - 1);
  int64_t to = first * step + (a.bins_first ? mine.index : mine.index * a.out_stride);
  MMLM_UNROLL("unroll 1")
  for (int m = first; m < rows; m += lanes, to += lanes * step) {
    const float value = output_of(mine, m);
    store_out(a, f.clip.out, to, value);
    largest = value <= largest ? largest : value;  // NaN wins
  }
  return largest;
}

// Raise a clip's values to its largest less the dynamic range: column `column` of the rows `row`, `row` + `rows`, …
MMLM_INLINE void clip_outputs(const SpectralCudaArgs& a, const DeviceClip& clip, uint32_t max_key, int64_t column,
                              int64_t row, int64_t rows) {
  const float floor = from_ordered(max_key) - a.dynamic_range;
  const int64_t outer = a.bins_first ? a.num_out : clip.num_frames, inner = a.bins_first ? clip.num_frames : a.num_out;
  if (column >= inner) return;
  for (; row < outer; row += rows) {
    const int64_t at = row * a.out_stride + column;
    if (load_out(a, clip.out, at) < floor) store_out(a, clip.out, at, floor);
  }
}

}  // namespace

// The same phases, lane by lane, on the host. `tables` and clips are in host memory; float32 output.
void spectral_on_host(SpectralCudaArgs& args, const DeviceClip* clips, int64_t num_clips);

}  // namespace mmlm
