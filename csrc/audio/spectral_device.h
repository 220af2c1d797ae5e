// The spectral features of one block of frames, phase by phase: what the CUDA kernel does between two barriers. Plain
// functions of a thread's index, so that the host can run them thread by thread: how the tests prove them where there
// is no GPU.
//
// Shared memory, per frame: two complex buffers of the transform's length, used in turn (samples, windowed samples,
// passes, power), and the filter sums. Bytes for 64 clips x 30 s of int16 in, float32 out: 61 MB read, 61 MB written,
// 29 us at 4.3 TB/s; flops 2.35 G, 35 us. Speed not measured yet.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "audio/spectral.h"
#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define MMLM_INLINE __host__ __device__ __forceinline__
#else
#define MMLM_INLINE inline
#endif
//
#include "audio/butterfly.h"

namespace mmlm {

constexpr int kDeviceThreads = 256;
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
  int dft_length, num_passes, frames_per_block;
  DftPass passes[kMaxPasses];
  const float *window, *twiddles, *roots, *unpack, *weights, *dct;
  const int32_t *first_bin, *count, *weight_offset;
  uint32_t* clip_max;  // one a clip, where there is a dynamic range
  int64_t out_stride;
  DeviceClip clips[kClipsPerLaunch];

  MMLM_INLINE int buffer_floats() const { return 2 * dft_length + 2; }  // room for num_bins too
  MMLM_INLINE int floats_per_frame() const { return 2 * buffer_floats() + num_filters + 4; }
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

// One tile of frames of one clip in shared memory.
struct Tile {
  const SpectralCudaArgs& a;
  const DeviceClip& clip;
  float* shared;
  int64_t first_frame;
  int num_frames;  // of frames_per_block, those that exist

  MMLM_INLINE float* buffer(int which, int frame) const {
    return shared + (static_cast<int64_t>(frame) * 2 + which) * a.buffer_floats();
  }
  MMLM_INLINE float* sums(int frame) const {  // filter sums, then: mean, energy
    return shared + static_cast<int64_t>(a.frames_per_block) * 2 * a.buffer_floats() +
           static_cast<int64_t>(frame) * (a.num_filters + 4);
  }
  // Where pass i reads; it writes the other one. Samples are staged in buffer 0 and windowed into buffer 1.
  MMLM_INLINE int source_of_pass(int i) const { return (i + 1) & 1; }
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

// Samples of every frame into buffer 0.
MMLM_INLINE void stage_samples(const Tile& t, int thread, int threads) {
  const int n = t.a.frame_length;
  for (int i = thread; i < n * t.num_frames; i += threads) {
    const int frame = i / n, at = i % n;
    const int64_t index = (t.first_frame + frame) * t.a.hop_length + t.a.offset + at;
    t.buffer(0, frame)[at] = sample_at(t.a, t.clip, index);
  }
}

constexpr int kSumThreads = 16;  // threads that sum one frame, each a part; then one adds the parts in order

MMLM_INLINE void partial_means(const Tile& t, int thread, int threads) {
  const int n = t.a.frame_length;
  for (int i = thread; i < kSumThreads * t.num_frames; i += threads) {
    const int frame = i / kSumThreads, part = i % kSumThreads;
    float sum = 0;
    for (int at = part; at < n; at += kSumThreads) sum += t.buffer(0, frame)[at];
    t.buffer(1, frame)[part] = sum;
  }
}

MMLM_INLINE void means(const Tile& t, int thread, int threads) {
  for (int frame = thread; frame < t.num_frames; frame += threads) {
    float sum = 0;
    for (int part = 0; part < kSumThreads; ++part) sum += t.buffer(1, frame)[part];
    t.sums(frame)[t.a.num_filters] = t.a.remove_dc_offset ? sum / t.a.frame_length : 0.f;
  }
}

// The frame's sample, mean removed and pre-emphasised.
MMLM_INLINE float prepared(const Tile& t, const float* samples, float mean, int at) {
  const float x = samples[at] - mean;
  return t.a.frame_preemphasis == 0 ? x : x - t.a.frame_preemphasis * (samples[at > 0 ? at - 1 : 0] - mean);
}

MMLM_INLINE void partial_energies(const Tile& t, int thread, int threads) {
  const int n = t.a.frame_length;
  for (int i = thread; i < kSumThreads * t.num_frames; i += threads) {
    const int frame = i / kSumThreads, part = i % kSumThreads;
    const float* samples = t.buffer(0, frame);
    const float mean = t.sums(frame)[t.a.num_filters];
    float sum = 0;
    for (int at = part; at < n; at += kSumThreads) {
      // The window table carries 1/2 where the transform is packed.
      const float x = t.a.raw_energy ? (samples[at] - mean) * t.a.scale
                                     : prepared(t, samples, mean, at) * t.a.window[at] * (t.a.is_packed ? 2.f : 1.f);
      sum += x * x;
    }
    t.buffer(1, frame)[part] = sum;
  }
}

MMLM_INLINE void energies(const Tile& t, int thread, int threads) {
  for (int frame = thread; frame < t.num_frames; frame += threads) {
    float sum = 0;
    for (int part = 0; part < kSumThreads; ++part) sum += t.buffer(1, frame)[part];
    const float least = t.a.energy_floor > 1.1920929e-07f ? t.a.energy_floor : 1.1920929e-07f;
    t.sums(frame)[t.a.num_filters + 1] = logf(sum < least ? least : sum);
  }
}

// Windowed samples of every frame into buffer 1: as they lie there, pairs are the packed transform's complex numbers.
MMLM_INLINE void apply_window(const Tile& t, int thread, int threads) {
  const int n = t.a.n_fft;
  for (int i = thread; i < n * t.num_frames; i += threads) {
    const int frame = i / n, at = i % n;
    const float mean = t.sums(frame)[t.a.num_filters];
    const float x = at < t.a.frame_length ? prepared(t, t.buffer(0, frame), mean, at) * t.a.window[at] : 0.f;
    float* to = t.buffer(1, frame);
    if (t.a.is_packed) {
      to[at] = x;
    } else {
      to[2 * at] = x;
      to[2 * at + 1] = 0.f;
    }
  }
}

template <int R>
MMLM_INLINE void one_butterfly(const DftPass& pass, const float* twiddles, const float* from, float* to, int p, int q) {
  const float* turn = twiddles + static_cast<int64_t>(p) * 2 * (R - 1);
  butterfly<R, float>(
      [&](int k) {
        const int at = q + pass.stride * (p + pass.points * k);
        return Complex<float>{from[2 * at], from[2 * at + 1]};
      },
      [&](int k, Complex<float> y) {
        if (k > 0 && p > 0) y = rotate(y, turn[2 * k - 2], turn[2 * k - 1]);
        const int at = q + pass.stride * (R * p + k);
        to[2 * at] = y.re;
        to[2 * at + 1] = y.im;
      });
}

MMLM_INLINE void any_output(const DftPass& pass, const float* twiddles, const float* roots, const float* from,
                            float* to, int p, int q, int j) {
  const int r = pass.radix;
  Complex<float> sum = {0.f, 0.f};
  for (int k = 0, root = 0; k < r; ++k, root = root + j >= r ? root + j - r : root + j) {
    const int at = q + pass.stride * (p + pass.points * k);
    sum = sum + rotate(Complex<float>{from[2 * at], from[2 * at + 1]}, roots[2 * root], roots[2 * root + 1]);
  }
  const float* turn = twiddles + static_cast<int64_t>(p) * 2 * (r - 1);
  if (j > 0) sum = rotate(sum, turn[2 * j - 2], turn[2 * j - 1]);
  const int at = q + pass.stride * (r * p + j);
  to[2 * at] = sum.re;
  to[2 * at + 1] = sum.im;
}

MMLM_INLINE void dft_pass(const Tile& t, int index, int thread, int threads) {
  const DftPass& pass = t.a.passes[index];
  const float* twiddles = t.a.twiddles + pass.twiddle;
  const int from = t.source_of_pass(index);
  const bool is_any = pass.root >= 0;
  const int work = pass.points * pass.stride * (is_any ? pass.radix : 1);
  for (int i = thread; i < work * t.num_frames; i += threads) {
    const int frame = i / work, item = i % work;
    const float* in = t.buffer(from, frame);
    float* out = t.buffer(1 - from, frame);
    const int q = item % pass.stride, p = item / pass.stride % pass.points;
    switch (is_any ? 0 : pass.radix) {
      case 2:
        one_butterfly<2>(pass, twiddles, in, out, p, q);
        break;
      case 3:
        one_butterfly<3>(pass, twiddles, in, out, p, q);
        break;
      case 4:
        one_butterfly<4>(pass, twiddles, in, out, p, q);
        break;
      case 5:
        one_butterfly<5>(pass, twiddles, in, out, p, q);
        break;
      case 8:
        one_butterfly<8>(pass, twiddles, in, out, p, q);
        break;
      default:
        any_output(pass, twiddles, t.a.roots + pass.root, in, out, p, q, item / (pass.stride * pass.points));
    }
  }
}

MMLM_INLINE float power_of(const SpectralCudaArgs& a, float re, float im) {
  float value = re * re + im * im + a.power_add;
  value = value < a.power_floor ? a.power_floor : value;
  if (a.spectrum == Spectrum::magnitude) return sqrtf(value);
  return a.spectrum == Spectrum::exponent ? powf(value, a.exponent / 2) : value;
}

// Powers of every bin into the buffer that the last pass did not write.
MMLM_INLINE void powers(const Tile& t, int thread, int threads) {
  const int n = t.a.dft_length, bins = t.a.num_bins;
  const int from = t.source_of_pass(t.a.num_passes);
  for (int i = thread; i < bins * t.num_frames; i += threads) {
    const int frame = i / bins, k = i % bins;
    const float* z = t.buffer(from, frame);
    float re = z[2 * k], im = z[2 * k + 1];
    if (t.a.is_packed) {
      const int low = k <= n / 2 ? k : n - k, high = low == 0 ? 0 : n - low;
      const float ar = z[2 * low], ai = z[2 * low + 1], br = z[2 * high], bi = z[2 * high + 1];
      const Complex<float> even = {ar + br, ai - bi}, odd = {ai + bi, br - ar};
      const Complex<float> turned = rotate(odd, t.a.unpack[2 * low], t.a.unpack[2 * low + 1]);
      const float sign = k <= n / 2 ? 1.f : -1.f;
      re = even.re + sign * turned.re;
      im = sign * even.im + turned.im;
    }
    t.buffer(1 - from, frame)[k] = power_of(t.a, re, im);
  }
}

MMLM_INLINE float logarithm(const SpectralCudaArgs& a, float x) {
  x += a.add;
  if (a.floor != 0 || a.log != Log::none) x = x < a.floor ? a.floor : x;  // NaN passes through, as torch.clamp lets it
  if (a.log == Log::natural) x = logf(x);
  if (a.log == Log::decimal) x = log10f(x);
  return x * a.multiply + a.shift;
}

MMLM_INLINE void filters(const Tile& t, int thread, int threads) {
  const int rows = t.a.num_filters, from = 1 - t.source_of_pass(t.a.num_passes);
  for (int i = thread; i < rows * t.num_frames; i += threads) {
    const int frame = i / rows, m = i % rows;
    const float* power = t.buffer(from, frame);
    float sum = 0;
    if (t.a.has_filters) {
      const float *p = power + t.a.first_bin[m], *weight = t.a.weights + t.a.weight_offset[m];
      for (int left = t.a.count[m]; left > 0; left -= 8, p += 8, weight += 8) {  // sums of sums, as on the CPU
        float part = 0;
        for (int k = 0; k < 8 && k < left; ++k) part += p[k] * weight[k];
        sum += part;
      }
    } else {
      sum = power[m];
    }
    t.sums(frame)[m] = logarithm(t.a, sum);
  }
}

// Row m of a frame's output.
MMLM_INLINE float output_of(const Tile& t, int frame, int m) {
  const SpectralCudaArgs& a = t.a;
  const float* sums = t.sums(frame);
  const float energy = sums[a.num_filters + 1];
  const int last = a.num_out - 1;
  if ((a.energy == Energy::first || a.energy == Energy::replace_first) && m == 0) return energy;
  if ((a.energy == Energy::last || a.energy == Energy::replace_last) && m == last) return energy;
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

// Outputs to memory; returns the largest this thread wrote.
MMLM_INLINE float write_outputs(const Tile& t, int thread, int threads) {
  const int rows = t.a.num_out, frames = t.num_frames;
  float largest = -INFINITY;
  for (int i = thread; i < rows * frames; i += threads) {
    // Neighbouring threads write neighbouring addresses.
    const int m = t.a.bins_first ? i / frames : i % rows, frame = t.a.bins_first ? i % frames : i / rows;
    const float value = output_of(t, frame, m);
    const int64_t f = t.first_frame + frame;
    store_out(t.a, t.clip.out, t.a.bins_first ? m * t.a.out_stride + f : f * t.a.out_stride + m, value);
    largest = value <= largest ? largest : value;  // NaN wins
  }
  return largest;
}

// Raise the clip's values to its largest less the dynamic range.
MMLM_INLINE void clip_outputs(const SpectralCudaArgs& a, const DeviceClip& clip, uint32_t max_key, int64_t thread,
                              int64_t threads) {
  const float floor = from_ordered(max_key) - a.dynamic_range;
  const int64_t outer = a.bins_first ? a.num_out : clip.num_frames, inner = a.bins_first ? clip.num_frames : a.num_out;
  for (int64_t i = thread; i < outer * inner; i += threads) {
    const int64_t at = i / inner * a.out_stride + i % inner;
    const float value = load_out(a, clip.out, at);
    if (value < floor) store_out(a, clip.out, at, floor);
  }
}

}  // namespace

// The same phases, thread by thread, on the host. `tables` and clips are in host memory; float32 output.
void spectral_on_host(SpectralCudaArgs& args, const DeviceClip* clips, int64_t num_clips);

}  // namespace mmlm
