#include "audio/spectral.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "audio/resample.h"
#include "core/isa.h"
#include "core/memory.h"
#include "core/thread_pool.h"

namespace mmlm {
namespace {

constexpr int64_t kSerialSamples = 20 * 16000;  // below this, waking a thread costs more than it saves
constexpr int64_t kTilesPerTask = 64;           // 10 s of audio at 16 kHz and 10 ms
constexpr double kPi = 3.14159265358979323846264338327950288;

int64_t num_tiles_of(const SpectralClip& clip) { return (clip.num_frames + kTileFrames - 1) / kTileFrames; }

// ---- tables -----------------------------------------------------------------------------------------------

// Radices of the passes, in order. Measured: small passes first err least on speech; passes of 16 were not faster.
std::vector<int> factors_of(int n) {
  std::vector<int> radices;
  int twos = 0;
  for (; n % 2 == 0; n /= 2) ++twos;
  switch (twos % 3) {
    case 1:
      if (twos >= 4) {
        radices = {4, 4};
        twos -= 4;
      } else {
        radices = {2};
        twos -= 1;
      }
      break;
    case 2:
      radices = {4};
      twos -= 2;
      break;
    default:
      break;
  }
  for (; twos > 0; twos -= 3) radices.push_back(8);
  for (int r : {5, 3}) {
    for (; n % r == 0; n /= r) radices.push_back(r);
  }
  for (int r = 7; n > 1; r += 2) {
    for (; n % r == 0; n /= r) radices.push_back(r);
    if (n > 1 && static_cast<int64_t>(r) * r > n) r = n - 2;  // what is left is prime
  }
  return radices;
}

template <typename T>
void push_turn(std::vector<T>& table, int64_t numerator, int64_t denominator) {  // cos, sin of 2 pi num / den
  const double angle = 2 * kPi * static_cast<double>(numerator % denominator) / static_cast<double>(denominator);
  table.push_back(static_cast<T>(std::cos(angle)));
  table.push_back(static_cast<T>(std::sin(angle)));
}

template <typename T>
void fill_dft_tables(const SpectralPlan& plan, const double* window, SpectralTables<T>& t) {
  const SpectralOptions& o = plan.o;
  const auto weight_of = [&](int n) { return n < o.frame_length ? window[n] * o.scale : 0.; };
  for (int n = 0; n < o.frame_length; ++n) t.plain_window.push_back(static_cast<T>(weight_of(n)));
  if (plan.is_400) {
    for (int a = 0; a < kOuter400; ++a) {
      for (int b = 0; b < kInner400; ++b) {
        t.window.push_back(static_cast<T>(weight_of((kInner400 * a + kOuter400 * b) % 400)));
      }
    }
  } else {
    for (int n = 0; n < o.n_fft; ++n) t.window.push_back(static_cast<T>(weight_of(n) * (plan.packed ? 0.5 : 1)));
    for (const DftPass& pass : plan.passes) {
      for (int p = 0; p < pass.points; ++p) {
        for (int j = 1; j < pass.radix; ++j) {
          push_turn(t.twiddles, static_cast<int64_t>(p) * j, static_cast<int64_t>(pass.points) * pass.radix);
        }
      }
      if (pass.root >= 0) {
        for (int k = 0; k < pass.radix; ++k) push_turn(t.roots, k, pass.radix);
      }
    }
    for (int k = 0; plan.packed && k <= plan.dft_length / 2; ++k) push_turn(t.unpack, k, o.n_fft);
  }
}

// A bound on samples below which neither a transform nor its power, an energy or a filter's sum can overflow.
double largest_sample_of(const SpectralPlan& plan, const double* window, const double* filters) {
  const SpectralOptions& o = plan.o;
  const double most = o.double_precision ? std::numeric_limits<double>::max() : std::numeric_limits<float>::max();
  double weight = 0, row_sum = 1;
  for (int n = 0; n < o.frame_length; ++n) weight += std::abs(window[n]);
  for (int m = 0; filters != nullptr && m < plan.num_filters; ++m) {
    const double* row = filters + static_cast<int64_t>(m) * plan.num_bins;
    double sum = 0;
    for (int k = 0; k < plan.num_bins; ++k) sum += std::abs(row[k]);
    row_sum = std::max(row_sum, sum);
  }
  // What a sample may become before the window; 4 for sums within the transform.
  const double gain = 4 * std::max(std::abs(o.scale), 1e-30) * (1 + std::abs(o.signal_preemphasis)) *
                      (1 + std::abs(o.frame_preemphasis)) * (o.remove_dc_offset ? 2 : 1);
  const double exponent = o.spectrum == Spectrum::magnitude ? 1 : o.spectrum == Spectrum::power ? 2 : o.exponent;
  const double largest = std::min(std::sqrt(most), std::pow(most / row_sum, 1 / exponent)) / std::max(weight, 1.);
  return std::min(largest, std::sqrt(most / o.frame_length)) / gain;
}

template <typename T>
void fill_tables(const SpectralPlan& plan, const double* filters, const double* dct, SpectralTables<T>& t) {
  const SpectralOptions& o = plan.o;
  for (int m = 0; plan.has_filters && m < plan.num_filters; ++m) {
    for (int k = 0; k < plan.count[m]; ++k) {
      t.weights.push_back(static_cast<T>(filters[static_cast<int64_t>(m) * plan.num_bins + plan.first_bin[m] + k]));
    }
  }
  for (int64_t i = 0; i < static_cast<int64_t>(plan.num_ceps) * plan.num_filters; ++i) {
    t.dct.push_back(static_cast<T>(dct[i]));
  }
  // What a frame of zeros gives, by running one.
  const std::vector<T> zeros(plan.tile_samples + std::max<int64_t>(o.offset, 0) + 1, T(0));
  SpectralClip clip;
  clip.samples = zeros.data();
  clip.type = std::is_same_v<T, float> ? SampleType::float32 : SampleType::float64;
  clip.num_input = clip.num_valid = clip.num_samples = static_cast<int64_t>(zeros.size());
  clip.num_frames = 1;
  clip.out_stride = plan.o.bins_first ? 1 : plan.num_out;
  if (o.double_precision && !o.double_output) {
    std::vector<float> out(plan.num_out);
    clip.out = out.data();
    spectral_frames()(plan, clip, 0, 1, nullptr);
    t.silent.assign(out.begin(), out.end());
  } else {
    t.silent.resize(plan.num_out);
    clip.out = t.silent.data();
    spectral_frames()(plan, clip, 0, 1, nullptr);
  }
}

void plan_dft(SpectralPlan& plan) {
  const SpectralOptions& o = plan.o;
  plan.packed = o.n_fft % 2 == 0;
  plan.dft_length = plan.packed ? o.n_fft / 2 : o.n_fft;
  int64_t twiddle = 0, root = 0;
  int points = plan.dft_length, stride = 1;
  for (int radix : factors_of(plan.dft_length)) {
    points /= radix;
    const bool needs_roots = radix > 5 && radix != 8;
    plan.passes.push_back({radix, points, stride, twiddle, needs_roots ? root : -1});
    twiddle += static_cast<int64_t>(points) * (radix - 1) * 2;
    root += needs_roots ? 2 * radix : 0;
    stride *= radix;
    plan.largest_radix = std::max(plan.largest_radix, radix);
  }
}

void plan_400(SpectralPlan& plan) {
  plan.offset_400.resize(2 * 400);
  for (int half = 0; half < 2; ++half) {
    for (int a = 0; a < kOuter400; ++a) {
      for (int b = 0; b < kInner400; ++b) {
        plan.offset_400[half * 400 + a * kInner400 + b] =
            plan.offset[half * 400 + (kInner400 * a + kOuter400 * b) % 400];
      }
    }
  }
  for (int c = 0; c < kColumns400; ++c) {
    for (int q = 0; q < kOuter400; ++q) {
      for (int k = 0; k < 400; ++k) {
        if (k % kOuter400 == q && k % kInner400 == kColumnFrequency400[c]) {
          plan.bin_400.push_back(k < plan.num_bins ? k : 400 - k);  // real input: X[400 - k] is X[k] conjugated
        }
      }
    }
  }
}

// ---- running ----------------------------------------------------------------------------------------------

template <typename Out>
void clip_range(const SpectralPlan& plan, const std::vector<double>& silent, const SpectralClip& clip,
                const double* tile_min, int64_t first_tile, int64_t last_tile, double max_value) {
  const double lowest = plan.o.dynamic_range > 0 ? max_value - plan.o.dynamic_range : -1e299;
  const Out floor = static_cast<Out>(lowest);
  Out* out = static_cast<Out*>(clip.out);
  for (int64_t tile = first_tile, end; tile < last_tile; tile = end) {
    end = tile + 1;
    if (tile_min[tile] >= lowest) continue;
    const bool is_silent = tile_min[tile] == kSilentTile;
    // Neighbours that need the same: one pass along each row.
    while (end < last_tile && tile_min[end] < lowest && (tile_min[end] == kSilentTile) == is_silent) ++end;
    const int64_t first = tile * kTileFrames, last = std::min(clip.num_frames, end * kTileFrames);
    const auto value_of = [&](int m) { return std::max(static_cast<Out>(silent[m]), floor); };
    if (plan.o.bins_first) {
      for (int m = 0; m < plan.num_out; ++m) {
        Out* row = out + m * clip.out_stride;
        if (is_silent) {
          std::fill(row + first, row + last, value_of(m));
        } else {
          for (int64_t t = first; t < last; ++t) row[t] = row[t] < floor ? floor : row[t];
        }
      }
    } else {
      for (int64_t t = first; t < last; ++t) {
        Out* row = out + t * clip.out_stride;
        for (int m = 0; m < plan.num_out; ++m) {
          row[m] = is_silent ? value_of(m) : row[m] < floor ? floor : row[m];
        }
      }
    }
  }
}

void finish(const SpectralPlan& plan, const SpectralClip& clip, const double* tile_min, int64_t first_tile,
            int64_t last_tile, double max_value) {
  const std::vector<double> silent =
      plan.o.double_precision ? plan.d.silent : std::vector<double>(plan.f.silent.begin(), plan.f.silent.end());
  if (plan.o.double_output) {
    clip_range<double>(plan, silent, clip, tile_min, first_tile, last_tile, max_value);
  } else {
    clip_range<float>(plan, silent, clip, tile_min, first_tile, last_tile, max_value);
  }
}

// The largest value of a clip, its silent tiles counted.
double largest_with_silence(const SpectralPlan& plan, double max_value, const double* tile_min, int64_t num_tiles) {
  if (std::find(tile_min, tile_min + num_tiles, kSilentTile) == tile_min + num_tiles) return max_value;
  const auto most = [](const auto& v) { return static_cast<double>(*std::max_element(v.begin(), v.end())); };
  return std::max(max_value, plan.o.double_precision ? most(plan.d.silent) : most(plan.f.silent));
}

void whole_clip(const SpectralPlan& plan, SpectralClip& clip, SpectralFrames frames, std::vector<double>& tile_min) {
  const int64_t num_tiles = num_tiles_of(clip);
  if (num_tiles == 0) return;
  tile_min.resize(num_tiles);
  const SpectralRange range = frames(plan, clip, 0, clip.num_frames, tile_min.data());
  clip.finite = range.finite;
  finish(plan, clip, tile_min.data(), 0, num_tiles,
         largest_with_silence(plan, range.max_value, tile_min.data(), num_tiles));
}

// One clip on several threads: all frames, then, the maximum known, the clipping.
void split_clip(const SpectralPlan& plan, SpectralClip& clip, SpectralFrames frames, int num_threads) {
  const int64_t num_tiles = num_tiles_of(clip), num_tasks = (num_tiles + kTilesPerTask - 1) / kTilesPerTask;
  if (num_tiles == 0) return;
  std::vector<double> tile_min(num_tiles);
  std::vector<SpectralRange> ranges(num_tasks);
  parallel_for(num_tasks, num_threads, [&](int64_t i) {
    const int64_t first = i * kTilesPerTask * kTileFrames;
    ranges[i] =
        frames(plan, clip, first, std::min(clip.num_frames, first + kTilesPerTask * kTileFrames), tile_min.data());
  });
  double max_value = -1e300;
  for (const SpectralRange& range : ranges) {
    max_value = std::max(max_value, range.max_value);
    clip.finite = clip.finite && range.finite;
  }
  max_value = largest_with_silence(plan, max_value, tile_min.data(), num_tiles);
  parallel_for(num_tasks, num_threads, [&](int64_t i) {
    finish(plan, clip, tile_min.data(), i * kTilesPerTask, std::min(num_tiles, (i + 1) * kTilesPerTask), max_value);
  });
}

}  // namespace

SpectralFrames spectral_frames() { return MMLM_PICK(spectral_frames); }

SpectralPlan::SpectralPlan(const SpectralOptions& options, const double* window, const double* filters,
                           int filter_count, const double* dct, int ceps)
    : o(options),
      num_bins(options.n_fft / 2 + 1),
      num_filters(filters != nullptr ? filter_count : num_bins),
      num_ceps(dct != nullptr ? ceps : 0),
      has_filters(filters != nullptr),
      is_400(options.n_fft == 400 && options.prime_factor_400),
      packed(false),
      dft_length(0),
      largest_radix(1) {
  num_out = num_ceps > 0 ? num_ceps : num_filters;
  if (o.energy == Energy::first || o.energy == Energy::last) ++num_out;
  const bool changes_frames = o.remove_dc_offset || o.frame_preemphasis != 0;
  prepares_frames = o.energy != Energy::none || (changes_frames && is_400);
  prepares_tile = changes_frames && !prepares_frames;
  tile_rows = std::min(o.hop_length, o.frame_length);
  tile_columns = kTileFrames + (o.frame_length - 1) / o.hop_length;
  // A prepared tile is written in whole vectors, which must not reach into the next row, nor from the last row into the
  // frames' first samples behind it. What is only transposed is written within tile_columns: 15 KB for Whisper.
  const int number_bytes = o.double_precision ? sizeof(double) : sizeof(float);
  const int lanes = prepares_tile ? kWidestVectorBytes / number_bytes : 8;
  tile_stride = (tile_columns + lanes - 1) / lanes * lanes;
  tile_samples = static_cast<int64_t>(o.hop_length) * (tile_columns - 1) + tile_rows;
  offset.assign(3 * static_cast<size_t>(o.n_fft), 0);  // padding has weight 0: any finite sample does
  for (int n = 0; n < o.frame_length; ++n) {
    offset[n] = n % o.hop_length * tile_stride + n / o.hop_length;
    offset[o.n_fft + n] = n * kTileFrames;
    offset[2 * o.n_fft + n] = n > 0 ? offset[n] : tile_rows * tile_stride;
  }
  for (int m = 0; has_filters && m < num_filters; ++m) {
    const double* row = filters + static_cast<int64_t>(m) * num_bins;
    int first = 0, last = num_bins;
    while (first < last && row[first] == 0) ++first;
    while (last > first && row[last - 1] == 0) --last;
    first_bin.push_back(first == last ? 0 : first);
    count.push_back(last - first);
  }
  largest_sample = largest_sample_of(*this, window, filters);
  if (is_400) {
    plan_400(*this);
  } else {
    plan_dft(*this);
  }
  if (o.double_precision) {
    fill_dft_tables(*this, window, d);
    fill_tables(*this, filters, dct, d);
  } else {
    fill_dft_tables(*this, window, f);
    fill_tables(*this, filters, dct, f);
  }
}

void spectral_features(const SpectralPlan& plan, SpectralClip* clips, int64_t num_clips, int num_threads) {
  const SpectralFrames frames = spectral_frames();
  int64_t total = 0;
  for (int64_t i = 0; i < num_clips; ++i) {
    ask_for_huge_pages(clips[i].out, plan.bytes_of_output(clips[i].num_frames));
    total += clips[i].num_valid;
  }
  if (total < kSerialSamples) num_threads = 1;

  if (num_threads > 1 && num_clips < 2 * num_threads) {
    for (int64_t i = 0; i < num_clips; ++i) split_clip(plan, clips[i], frames, num_threads);
    return;
  }
  parallel_for(num_clips, num_threads, [&](int64_t i) {
    static thread_local std::vector<double> tile_min;  // kept: a short clip should not pay for malloc
    whole_clip(plan, clips[i], frames, tile_min);
  });
}

template <typename T>
void standardize(const Standardize& how, T* features, int64_t num_frames, int64_t num_valid, int64_t num_bins) {
  std::vector<double> mean(num_bins, 0.), square(num_bins, 0.);
  std::vector<T> shift(num_bins), scale(num_bins);
  for (int64_t t = 0; t < num_valid; ++t) {
    const T* row = features + t * num_bins;
    for (int64_t m = 0; m < num_bins; ++m) mean[m] += row[m];
  }
  for (int64_t m = 0; m < num_bins; ++m) mean[m] /= static_cast<double>(num_valid);
  if (how.variances) {
    for (int64_t t = 0; t < num_valid; ++t) {
      const T* row = features + t * num_bins;
      for (int64_t m = 0; m < num_bins; ++m) square[m] += (row[m] - mean[m]) * (row[m] - mean[m]);
    }
  }
  for (int64_t m = 0; m < num_bins; ++m) {
    const double variance = square[m] / static_cast<double>(num_valid - how.ddof);
    const double deviation = std::sqrt(variance + how.eps_inside) + how.eps_outside;
    shift[m] = static_cast<T>(how.means ? mean[m] : 0.);
    scale[m] = static_cast<T>(how.variances ? deviation : 1.);
  }
  for (int64_t t = 0; t < num_valid; ++t) {
    T* row = features + t * num_bins;
    for (int64_t m = 0; m < num_bins; ++m) row[m] = (row[m] - shift[m]) / scale[m];
  }
  std::fill(features + num_valid * num_bins, features + num_frames * num_bins, static_cast<T>(how.padding));
}
template void standardize(const Standardize&, float*, int64_t, int64_t, int64_t);
template void standardize(const Standardize&, double*, int64_t, int64_t, int64_t);

// ---- resampling -------------------------------------------------------------------------------------------

Resampler::Resampler(int64_t from, int64_t to, const double* taps, int64_t num_taps, const int64_t* first_samples)
    : old_rate(from), new_rate(to), has_table(true) {
  lowest = std::numeric_limits<int64_t>::max();
  highest = -lowest;
  for (int64_t p = 0; p < new_rate; ++p) {
    const double* row = taps + p * num_taps;
    int64_t begin = 0, end = num_taps;
    while (begin < end - 1 && row[begin] == 0) ++begin;
    while (end > begin + 1 && row[end - 1] == 0) --end;
    first.push_back(first_samples[p] + begin);
    start.push_back(static_cast<int64_t>(taps_d.size()));
    count.push_back(static_cast<int>(end - begin));
    taps_d.insert(taps_d.end(), row + begin, row + end);
    lowest = std::min(lowest, first.back());
    highest = std::max(highest, first.back() + count.back());
  }
  taps_f.assign(taps_d.begin(), taps_d.end());
}

Resampler::Resampler(int64_t from, int64_t to, const SincFilter& how)
    : old_rate(from), new_rate(to), has_table(false), filter(how) {
  base = static_cast<double>(std::min(old_rate, new_rate)) * filter.rolloff;
  const double width = static_cast<double>(filter.width), step = base / static_cast<double>(old_rate);
  reach = static_cast<int64_t>(std::ceil(width / step));
  turn.resize(2 * kTapsAtOnce);
  window_turn.resize(2 * kTapsAtOnce);
  for (int m = 0; m < kTapsAtOnce; ++m) {
    turn[m] = std::cos(kPi * m * step);
    turn[kTapsAtOnce + m] = std::sin(kPi * m * step);
    window_turn[m] = std::cos(kPi * m * step / width);
    window_turn[kTapsAtOnce + m] = std::sin(kPi * m * step / width);
  }
  for (int k = 1; filter.beta >= 0 && k <= 2000; ++k) bessel.push_back(1. / (static_cast<double>(k) * k));
  bessel_of_beta = bessel_i0(bessel, std::max(filter.beta, 0.));
}

void read_samples(SpectralClip* clips, int64_t num_clips, int64_t first, bool is_double, int num_threads) {
  const ResampleRange range = MMLM_PICK(resample_range);
  constexpr int64_t kPerTask = 65536;
  struct Task {
    int64_t clip, first, count;
  };
  std::vector<Task> tasks;
  int64_t total = 0;
  const int64_t bytes = is_double ? sizeof(double) : sizeof(float);
  for (int64_t i = 0; i < num_clips; ++i) {
    const int64_t wanted = std::max<int64_t>(0, clips[i].num_valid - first);
    ask_for_huge_pages(clips[i].out, wanted * bytes);
    total += wanted;
    for (int64_t at = first; at < clips[i].num_valid; at += kPerTask) {
      tasks.push_back({i, at, std::min(kPerTask, clips[i].num_valid - at)});
    }
  }
  parallel_for(static_cast<int64_t>(tasks.size()), total < kSerialSamples ? 1 : num_threads, [&](int64_t i) {
    const Task& task = tasks[i];
    char* out = static_cast<char*>(clips[task.clip].out) + (task.first - first) * bytes;
    range(clips[task.clip], task.first, task.count, out, is_double);
  });
}

}  // namespace mmlm
