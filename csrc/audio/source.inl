// Reading a clip: integer or float samples in memory, mixed down, resampled, pre-emphasised, and made up beyond its
// ends. Included once per ISA, after simd.h.
#include <algorithm>

#include "audio/resample.h"
#include "audio/spectral.h"
#include "core/arena.h"

namespace mmlm {
namespace {

constexpr int64_t aligned_count(int64_t count) { return (count + 15) / 16 * 16; }

template <typename S>
constexpr double full_scale() {
  return sizeof(S) == 2 ? 1. / 32768 : 1. / 2147483648.;
}
template <>
constexpr double full_scale<float>() {
  return 1;
}
template <>
constexpr double full_scale<double>() {
  return 1;
}

template <typename S, typename T>
void convert(const S* samples, const SpectralClip& clip, int64_t first, int64_t count, T* __restrict out) {
  const S* p = samples + first * clip.sample_stride;
  constexpr T scale = T(full_scale<S>());
  if (clip.num_channels == 1 && clip.sample_stride == 1) {
    for (int64_t i = 0; i < count; ++i) out[i] = T(p[i]) * scale;
  } else if (clip.num_channels == 1) {
    for (int64_t i = 0; i < count; ++i) out[i] = T(p[i * clip.sample_stride]) * scale;
  } else if (clip.num_channels == 2 && clip.sample_stride == 2 && clip.channel_stride == 1) {
    for (int64_t i = 0; i < count; ++i) out[i] = (T(p[2 * i]) + T(p[2 * i + 1])) * (scale / 2);
  } else {
    const T share = scale / T(clip.num_channels);
    for (int64_t i = 0; i < count; ++i) {
      T sum = 0;
      for (int c = 0; c < clip.num_channels; ++c) sum += T(p[i * clip.sample_stride + c * clip.channel_stride]);
      out[i] = sum * share;
    }
  }
}

// Samples [first, first + count) in memory, all of them there.
template <typename T>
void read_input(const SpectralClip& clip, int64_t first, int64_t count, T* out) {
  switch (clip.type) {
    case SampleType::int16:
      return convert(static_cast<const int16_t*>(clip.samples), clip, first, count, out);
    case SampleType::int32:
      return convert(static_cast<const int32_t*>(clip.samples), clip, first, count, out);
    case SampleType::float32:
      return convert(static_cast<const float*>(clip.samples), clip, first, count, out);
    case SampleType::float64:
      return convert(static_cast<const double*>(clip.samples), clip, first, count, out);
  }
}

// The same by their index in the signal, zeros where there are none in memory.
template <typename T>
void read_padded(const SpectralClip& clip, int64_t first, int64_t count, T* out) {
  const int64_t last = clip.first_sample + clip.num_input;
  const int64_t begin = std::clamp<int64_t>(first, clip.first_sample, last);
  const int64_t end = std::clamp<int64_t>(first + count, begin, last);
  if (begin == end) {
    std::fill(out, out + count, T(0));
    return;
  }
  std::fill(out, out + (begin - first), T(0));
  read_input(clip, begin - clip.first_sample, end - begin, out + (begin - first));
  std::fill(out + (end - first), out + count, T(0));
}

template <typename T>
const std::vector<T>& taps_of(const Resampler& r);
template <>
const std::vector<float>& taps_of(const Resampler& r) {
  return r.taps_f;
}
template <>
const std::vector<double>& taps_of(const Resampler& r) {
  return r.taps_d;
}

int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }

constexpr int kLanesAtOnce = 4;
constexpr int kTapsOfASum = 12;  // sums of sums err less

// One phase for consecutive j: tap k belongs to x[place[k]] and what follows it.
template <typename T>
MMLM_INLINE void one_phase(const T* __restrict taps, const int64_t* __restrict place, int count, const T* __restrict x,
                           int64_t num_lanes, T* __restrict out) {
  constexpr int w = kWidth<T>;
  for (int64_t lane = 0; lane < num_lanes; lane += kLanesAtOnce * w) {
    Vec<T> sum[kLanesAtOnce] = {};
    for (int k = 0; k < count;) {
      Vec<T> part[kLanesAtOnce] = {};
      for (const int end = std::min(count, k + kTapsOfASum); k < end; ++k) {
        const T* p = x + place[k] + lane;
#pragma GCC unroll 4
        for (int i = 0; i < kLanesAtOnce; ++i) part[i] += load(p + i * w) * taps[k];
      }
#pragma GCC unroll 4
      for (int i = 0; i < kLanesAtOnce; ++i) sum[i] += part[i];
    }
#pragma GCC unroll 4
    for (int i = 0; i < kLanesAtOnce; ++i) store(out + lane + i * w, sum[i]);
  }
}

// x[m][q] = line[old_rate * q + m].
template <int kRate, typename T>
void deinterleave(const T* __restrict line, int64_t columns, T* __restrict x, int64_t x_stride) {
  for (int64_t q = 0; q < columns; ++q) {
#pragma GCC unroll 8
    for (int m = 0; m < kRate; ++m) x[m * x_stride + q] = line[q * kRate + m];
  }
}
template <typename T>
void deinterleave(int64_t old_rate, const T* __restrict line, int64_t columns, T* __restrict x, int64_t x_stride) {
  if (old_rate == 2) return deinterleave<2>(line, columns, x, x_stride);
  if (old_rate == 3) return deinterleave<3>(line, columns, x, x_stride);
  for (int64_t m = 0; m < old_rate; ++m) {
    for (int64_t q = 0; q < columns; ++q) x[m * x_stride + q] = line[q * old_rate + m];
  }
}

// Taps [0, kTapsAtOnce) of a run at t, t + dt, t + 2 dt, …: two sines and two cosines a run, the rest by addition
// theorems, but for the tap next to 0, where the sine's error would be divided by little.
template <typename T>
MMLM_INLINE void sinc_taps(const Resampler& r, double start, T* __restrict taps) {
  constexpr double pi = 3.14159265358979323846264338327950288;
  constexpr int n = Resampler::kTapsAtOnce;
  const double dt = r.base / static_cast<double>(r.old_rate), gain = dt, width = static_cast<double>(r.filter.width);
  const double sine = std::sin(pi * start), cosine = std::cos(pi * start);
  const double *turn = r.turn.data(), *window_turn = r.window_turn.data();
  alignas(64) double window[n];
  if (r.filter.beta < 0) {
    const double window_sine = std::sin(pi * start / width), window_cosine = std::cos(pi * start / width);
    for (int m = 0; m < n; ++m) {
      window[m] = 0.5 + 0.5 * (window_cosine * window_turn[m] - window_sine * window_turn[n + m]);
    }
  } else {
    for (int m = 0; m < n; ++m) {
      const double part = (start + m * dt) / width, inside = 1 - part * part;
      window[m] = inside > 0 ? bessel_i0(r.bessel, r.filter.beta * std::sqrt(inside)) / r.bessel_of_beta : 0.;
    }
  }
  for (int m = 0; m < n; ++m) {
    const double t = start + m * dt;
    const double tap = (sine * turn[m] + cosine * turn[n + m]) / (pi * t) * window[m] * gain;
    taps[m] = std::abs(t) < width ? T(tap) : T(0);
  }
  const double nearest = std::round(-start / dt);
  if (nearest >= 0 && nearest < n) {
    const int m = static_cast<int>(nearest);
    const double angle = pi * (start + m * dt);
    taps[m] = T((angle == 0 ? 1. : std::sin(angle) / angle) * window[m] * gain);
  }
}

// Outputs [first, first + count) of a resampler without a table. Runs of taps that meet no sample are left out, so that
// an output's sum does not depend on what else is in memory.
template <typename T>
void resample_without_table(const SpectralClip& clip, int64_t first, int64_t count, T* out) {
  static thread_local Arena<T> arena;
  const Resampler& r = *clip.resampler;
  constexpr int n = Resampler::kTapsAtOnce;
  const int64_t begin = clip.first_sample - n, end = clip.first_sample + clip.num_input + n;
  const double step = r.base / (static_cast<double>(r.old_rate) * static_cast<double>(r.new_rate));
  const auto centre = [&](int64_t i) { return i / r.new_rate * r.old_rate + i % r.new_rate * r.old_rate / r.new_rate; };
  const int64_t block = std::clamp<int64_t>(32768 * r.new_rate / r.old_rate, 1, 1024);
  alignas(64) T taps[n];
  for (int64_t at = 0; at < count; at += block) {
    const int64_t num = std::min(block, count - at);
    const int64_t low = std::clamp(centre(first + at) - r.reach, begin, end);
    const int64_t high = std::clamp(centre(first + at + num - 1) + r.reach + 2 + n, low, end);
    T* line = arena.at_least(aligned_count(high - low + n));
    read_padded(clip, low, high - low + n, line);
    for (int64_t i = first + at; i < first + at + num; ++i) {
      const int64_t j = i / r.new_rate, p = i % r.new_rate, from = p * r.old_rate / r.new_rate - r.reach;
      T sum = 0;
      for (int64_t k = from; k < from + 2 * r.reach + 2; k += n) {
        const int64_t sample = j * r.old_rate + k;
        if (sample < low || sample <= begin || sample >= end - n) continue;
        sinc_taps(r, static_cast<double>(k * r.new_rate - p * r.old_rate) * step, taps);
        const T* __restrict x = line + (sample - low);
        T part[8] = {};
        for (int m = 0; m < n; m += 8) {
#pragma GCC unroll 8
          for (int l = 0; l < 8; ++l) part[l] += x[m + l] * taps[m + l];
        }
        sum += ((part[0] + part[4]) + (part[2] + part[6])) + ((part[1] + part[5]) + (part[3] + part[7]));
      }
      out[i - first] = sum;
    }
  }
}

// Outputs [first, first + count) of the resampler. Lanes are consecutive j, so that taps are scalars: the input is
// laid out by its index modulo old_rate.
template <typename T>
void resample_range(const SpectralClip& clip, int64_t first, int64_t count, T* out) {
  static thread_local Arena<T> arena;
  static thread_local Arena<int64_t> places;
  const Resampler& r = *clip.resampler;
  if (!r.has_table) return resample_without_table(clip, first, count, out);
  int64_t* place = places.at_least(r.highest - r.lowest);
  constexpr int64_t kStep = kLanesAtOnce * kWidth<T>;
  const int64_t base = floor_div(r.lowest, r.old_rate), span = floor_div(r.highest - 1, r.old_rate) - base;
  const int64_t block = std::clamp<int64_t>(4096 / r.old_rate / kStep * kStep, kStep, 16 * kStep);
  const int64_t x_stride = aligned_count(block + span + 1) + 16;
  T* line = arena.at_least(aligned_count(r.old_rate * (block + span)) + r.old_rate * x_stride + block);
  T* x = line + aligned_count(r.old_rate * (block + span));
  T* y = x + r.old_rate * x_stride;
  const int64_t end = first + count;
  for (int64_t j = first / r.new_rate; j * r.new_rate < end; j += block) {
    const int64_t lanes = std::min(block, (end + r.new_rate - 1) / r.new_rate - j);
    const int64_t columns = lanes + span;
    if (r.old_rate == 1) {
      read_padded(clip, j + base, columns, x);
    } else {
      read_padded(clip, r.old_rate * (j + base), r.old_rate * columns, line);
      deinterleave(r.old_rate, line, columns, x, x_stride);
    }
    for (int64_t phase = 0; phase < r.new_rate; ++phase) {
      const int count_of_phase = r.count[phase];
      int64_t row = r.first[phase] - base * r.old_rate;
      for (int k = 0; k < count_of_phase; ++k, ++row) place[k] = row % r.old_rate * x_stride + row / r.old_rate;
      one_phase(taps_of<T>(r).data() + r.start[phase], place, count_of_phase, x, lanes, y);
      if (r.new_rate == 1) {
        const int64_t from = std::max<int64_t>(first - j, 0), to = std::min(lanes, end - j);
        std::copy(y + from, y + to, out + (j + from - first));
        continue;
      }
      int64_t i = j * r.new_rate + phase - first;
      for (int64_t lane = 0; lane < lanes; ++lane, i += r.new_rate) {
        if (i >= 0 && i < count) out[i] = y[lane];
      }
    }
  }
}

// Samples [first, first + count) of the clip at the plan's rate; all below num_valid.
template <typename T>
void read_valid(const SpectralClip& clip, int64_t first, int64_t count, T* out) {
  if (clip.resampler != nullptr) {
    resample_range(clip, first, count, out);
  } else {
    read_input(clip, first - clip.first_sample, count, out);
  }
}

template <typename T>
void read_emphasised(const SpectralPlan& plan, const SpectralClip& clip, int64_t first, int64_t count, T* out) {
  read_valid(clip, first, count, out);
  if (plan.options.signal_preemphasis == 0 || count == 0) return;
  const T c = T(plan.options.signal_preemphasis);
  T before = 0;
  if (first > 0) read_valid(clip, first - 1, 1, &before);
  int64_t i = count;
  for (; i > kWidth<T>; i -= kWidth<T>)
    store(out + i - kWidth<T>, load(out + i - kWidth<T>) - c * load(out + i - kWidth<T> - 1));
  for (--i; i > 0; --i) out[i] -= c * out[i - 1];
  out[0] -= c * before;
}

// Ascending run of samples, zeros past num_valid.
template <typename T>
void read_run(const SpectralPlan& plan, const SpectralClip& clip, int64_t first, int64_t count, T* out) {
  const int64_t valid = std::clamp<int64_t>(clip.num_valid - first, 0, count);
  if (valid > 0) read_emphasised(plan, clip, first, valid, out);
  std::fill(out + valid, out + count, T(0));
}

// Samples [start, start + count) with what the plan makes up beyond both ends.
template <typename T>
void read_with_edges(const SpectralPlan& plan, const SpectralClip& clip, int64_t start, int64_t count, T* out) {
  const int64_t n = clip.num_samples, repeated = plan.options.edge == Edge::mirror;
  const bool mirrors = plan.options.edge == Edge::reflect || plan.options.edge == Edge::mirror;
  int64_t i = start;
  const int64_t end = start + count;
  const auto before = std::min<int64_t>(std::max<int64_t>(0, -i), count);
  const auto inside = std::clamp<int64_t>(n - std::max<int64_t>(i, 0), 0, count - before);
  const auto after = count - before - inside;
  // A run beyond an end is a run inside, backwards; where the clip is shorter than the run, folded sample by sample.
  const auto backwards = [&](int64_t first, int64_t length, int64_t axis) {
    T* to = out + (first - start);
    const int64_t low = axis - (first + length - 1);
    if (!mirrors || n == 0) {
      std::fill(to, to + length, T(0));
    } else if (low >= 0 && low + length <= n) {
      read_run(plan, clip, low, length, to);
      std::reverse(to, to + length);
    } else {
      const int64_t period = std::max<int64_t>(2 * n - 2 + 2 * repeated, 1);
      for (int64_t k = 0; k < length; ++k) {
        int64_t j = ((first + k) % period + period) % period;
        if (j >= n) j = period - repeated - j;
        read_run(plan, clip, std::clamp<int64_t>(j, 0, n - 1), 1, to + k);
      }
    }
  };
  if (before > 0) backwards(i, before, -repeated);
  if (inside > 0) read_run(plan, clip, i + before, inside, out + before);
  if (after > 0) backwards(end - after, after, 2 * (n - 1) + repeated);
}

}  // namespace
}  // namespace mmlm
