// The spectral kernel, one frame per vector lane. Included once per ISA with MMLM_ISA naming the symbols' suffix.
//
// A tile of 16 frames goes through L1 and L2: transposed samples -> DFT -> spectrum -> sparse filters -> log (-> DCT).
// Floor for Whisper's shape with AVX2: about 950 vector instructions for 8 frames; see CONTRIBUTING, measured facts.
#include "core/simd.h"
#include "core/transpose.h"
//
#include "audio/source.inl"
//
#include "audio/dft.inl"
//
#include "audio/dft400.inl"

namespace mmlm::MMLM_ISA {
namespace {

template <typename T>
constexpr int kGroups = kTileFrames / kWidth<T>;
static_assert(kTileFrames % kWidth<float> == 0, "whole vectors fill a tile");

template <typename T>
const SpectralTables<T>& tables_of(const SpectralPlan& plan);
template <>
const SpectralTables<float>& tables_of(const SpectralPlan& plan) {
  return plan.f;
}
template <>
const SpectralTables<double>& tables_of(const SpectralPlan& plan) {
  return plan.d;
}

template <typename T>
struct Scratch {
  T *stage, *tile, *frame, *dft, *power, *filtered, *out;
};

template <typename T>
Scratch<T> scratch_of(const SpectralPlan& plan) {
  static thread_local Arena<T> arena;
  const int64_t w = kWidth<T>;
  const int64_t stage = aligned_count(plan.tile_samples + 16);
  const int64_t tile = aligned_count(int64_t{plan.tile_rows} * plan.tile_stride);
  const int64_t unrolled = int64_t{plan.o.frame_length} * kTileFrames;
  const int64_t emphasised = int64_t{plan.tile_rows + 3} * plan.tile_stride;  // first samples, two rows of sums
  const int64_t frame = plan.prepares_frames ? unrolled : plan.prepares_tile ? emphasised : 0;
  const int64_t dft =
      plan.is_400 ? kColumns400 * kOuter400 * 2 * w : (2 * int64_t{plan.dft_length} + plan.largest_radix) * 2 * w;
  const int64_t power = int64_t{plan.num_bins} * kTileFrames;
  const int64_t filtered = plan.num_ceps > 0 ? int64_t{plan.num_filters} * kTileFrames : 0;
  const int64_t out = int64_t{plan.num_out} * kTileFrames;
  Scratch<T> s;
  s.stage = arena.at_least(stage + tile + frame + dft + power + filtered + out);
  s.tile = s.stage + stage;
  s.frame = s.tile + tile;
  s.dft = s.frame + frame;
  s.power = s.dft + dft;
  s.filtered = s.power + power;
  s.out = s.filtered + filtered;
  return s;
}

template <typename T>
constexpr bool kWidens = !kFuses && std::is_same_v<T, float>;
typedef double WideVec __attribute__((vector_size(2 * kVectorBytes)));  // as many lanes as a vector of floats
template <typename T>
using SumOf = std::conditional_t<kWidens<T>, WideVec, Vec<T>>;
template <typename T>
MMLM_INLINE void add_product(SumOf<T>& sum, Vec<T> x, T weight) {
  if constexpr (kWidens<T>) {
    sum += __builtin_convertvector(x, WideVec) * static_cast<double>(weight);
  } else {
    sum += x * weight;
  }
}
template <typename T>
MMLM_INLINE Vec<T> rounded(const SumOf<T>& sum) {
  if constexpr (kWidens<T>) {
    return __builtin_convertvector(sum, Vec<T>);
  } else {
    return sum;
  }
}
// x - c * before, of vectors and of numbers.
template <typename T>
MMLM_INLINE Vec<T> emphasis(Vec<T> x, T c, Vec<T> before) {
  if constexpr (kWidens<T>) {
    return __builtin_convertvector(
        __builtin_convertvector(x, WideVec) - static_cast<double>(c) * __builtin_convertvector(before, WideVec),
        Vec<T>);
  } else {
    return x - c * before;
  }
}
template <typename T>
MMLM_INLINE T emphasis_of(T x, T c, T before) {
  using Wide = std::conditional_t<kWidens<T>, double, T>;
  return static_cast<T>(static_cast<Wide>(x) - static_cast<Wide>(c) * static_cast<Wide>(before));
}

// Frames of one group, unrolled from the tile and prepared before the window: mean removed, pre-emphasised. Returns
// the energy (sum of squares) of the frames, before or after the rest as the plan says.
template <typename T>
__attribute__((noinline)) Vec<T> prepare_frames(const SpectralPlan& plan, const T* __restrict tile,
                                                T* __restrict frame) {
  const SpectralTables<T>& tables = tables_of<T>(plan);
  const int n = plan.o.frame_length;
  const int* offset = plan.offset.data();
  Vec<T> mean{};
  if (plan.o.remove_dc_offset) {
    Vec<T> sum[4] = {};
    int i = 0;
    for (; i + 4 <= n; i += 4) {
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) sum[k] += load(tile + offset[i + k]);
    }
    for (; i < n; ++i) sum[0] += load(tile + offset[i]);
    mean = ((sum[0] + sum[1]) + (sum[2] + sum[3])) / T(n);
  }
  const T c = T(plan.o.frame_preemphasis);
  const bool wants_raw = plan.o.energy != Energy::none && plan.o.raw_energy;
  const bool wants_windowed = plan.o.energy != Energy::none && !plan.o.raw_energy;
  Vec<T> energy[2] = {};
  Vec<T> before = load(tile + offset[0]) - mean;
  for (int i = 0; i < n; ++i) {
    const Vec<T> x = load(tile + offset[i]) - mean, y = emphasis<T>(x, c, before);
    if (wants_raw) energy[i & 1] += x * x;
    if (wants_windowed) energy[i & 1] += (y * tables.plain_window[i]) * (y * tables.plain_window[i]);
    store(frame + i * kTileFrames, y);
    before = x;
  }
  return energy[0] + energy[1];
}

// Sums of the first `rows` rows of a tile, column by column. Whole vectors: `stride` is a multiple of their lanes.
template <typename T>
MMLM_INLINE void column_sums(const T* __restrict tile, int rows, int columns, int stride, T* __restrict sums) {
  for (int l = 0; l < columns; l += kWidth<T>) {
    Vec<T> sum[4] = {};
    int m = 0;
    for (; m + 4 <= rows; m += 4) {
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) sum[k] += load(tile + static_cast<int64_t>(m + k) * stride + l);
    }
    for (; m < rows; ++m) sum[0] += load(tile + static_cast<int64_t>(m) * stride + l);
    store(sums + l, (sum[0] + sum[1]) + (sum[2] + sum[3]));
  }
}

// What frames share of mean and pre-emphasis, done once a tile: y[n] = x[n] - c x[n-1] less (1 - c) times the mean,
// with x[-1] = x[0]. Writes (1 - c) times the frames' means to `means` and the pre-emphasised tile, with a row for the
// frames' first samples, to `emphasised`. The sums of whole hops are those of columns.
template <typename T>
__attribute__((noinline)) void prepare_tile(const SpectralPlan& plan, const T* __restrict tile,
                                            T* __restrict emphasised, T* __restrict sums, T* __restrict means) {
  const int stride = plan.tile_stride, columns = plan.tile_columns, rows = plan.tile_rows;
  const int hop = plan.o.hop_length, length = plan.o.frame_length;
  const T c = T(plan.o.frame_preemphasis);
  std::fill(means, means + kTileFrames, T(0));
  if (plan.o.remove_dc_offset) {
    const int whole = length / hop, rest = length % hop;
    T* part = sums + stride;
    column_sums(tile, whole > 0 ? rows : 0, columns, stride, sums);
    column_sums(tile, rest, columns, stride, part);
    for (int f = 0; f < kTileFrames; ++f) {
      T sum = rest > 0 ? part[f + whole] : T(0);
      for (int j = 0; j < whole; ++j) sum += sums[f + j];
      means[f] = sum / T(length) * (1 - c);
    }
  }
  if (c == 0) return;
  T* first = emphasised + static_cast<int64_t>(rows) * stride;
  for (int l = 0; l < columns; l += kWidth<T>) store(first + l, load(tile + l) * (1 - c));
  // A column's first sample follows the last one of the column before; nothing comes before column 0, whose frame's
  // first sample is in `first`.
  const T* last = tile + static_cast<int64_t>(rows - 1) * stride;
  emphasised[0] = 0;
  for (int l = 1; l < columns; ++l) emphasised[l] = emphasis_of<T>(tile[l], c, last[l - 1]);
  for (int m = 1; m < rows; ++m) {
    const T* row = tile + static_cast<int64_t>(m) * stride;
    T* to = emphasised + static_cast<int64_t>(m) * stride;
    for (int l = 0; l < columns; l += kWidth<T>) store(to + l, emphasis<T>(load(row + l), c, load(row - stride + l)));
  }
}

// Elementwise spectrum of one group: |X|^2 or what the plan makes of it.
template <typename T>
struct PowerSink {
  const SpectralPlan& plan;
  T* power;
  bool rounds, adds, is_power;
  explicit PowerSink(const SpectralPlan& p, T* to)
      : plan(p),
        power(to),
        rounds(p.o.round_spectrum),
        adds(p.o.power_add != 0 || p.o.power_floor != 0),
        is_power(p.spectrum == Spectrum::power) {}
  MMLM_INLINE void operator()(int k, Vec<T> re, Vec<T> im) const {
    if (rounds) {
      re = round_to_float(re);
      im = round_to_float(im);
    }
    Vec<T> value = re * re + im * im;
    if (adds) value = max(broadcast(T(plan.o.power_floor)), value + T(plan.o.power_add));  // NaN, second, stays
    if (!is_power) {
      if (plan.spectrum == Spectrum::magnitude) {
        value = square_root(value);
      } else {
        for (int i = 0; i < kWidth<T>; ++i) value[i] = std::pow(value[i], T(plan.o.exponent / 2));
      }
    }
    store(power + static_cast<int64_t>(k) * kTileFrames, value);
  }
};
// The plain |X|^2, without a branch a bin.
template <typename T>
struct PlainPowerSink {
  T* power;
  MMLM_INLINE void operator()(int k, Vec<T> re, Vec<T> im) const {
    store(power + static_cast<int64_t>(k) * kTileFrames, re * re + im * im);
  }
};

template <typename T, typename Sink>
__attribute__((noinline)) void spectrum_of(const SpectralPlan& plan, const T* samples, const int* offset, Vec<T> mean,
                                           T* buffers, const Sink& sink) {
  if (plan.is_400) {
    dft_400(plan, tables_of<T>(plan), samples, offset, buffers, sink);
  } else {
    dft_real(plan, tables_of<T>(plan), samples, offset, mean, buffers, sink);
  }
}

template <typename T>
MMLM_INLINE Vec<T> logarithm(const SpectralPlan& plan, Vec<T> x) {
  if (plan.o.log == Log::none) return x;
  if (plan.o.floor <= 0 && plan.o.add <= 0) {  // zeros may arrive
    for (int i = 0; i < kWidth<T>; ++i) x[i] = plan.o.log == Log::natural ? std::log(x[i]) : std::log10(x[i]);
    return x;
  }
  return plan.o.log == Log::natural ? ln_positive<T>(x) : log10_positive<T>(x);
}

constexpr int kTermsOfASum = 8;  // sums of sums: wide filters of long transforms erred more than peers' otherwise

// Filter sums of one tile, floored, in log. Returns zeros, NaN as soon as a sum is not finite.
template <typename T>
__attribute__((noinline)) Vec<T> filter_and_log(const SpectralPlan& plan, const T* __restrict power,
                                                T* __restrict out) {
  constexpr int w = kWidth<T>, groups = kGroups<T>;
  const T* weight = tables_of<T>(plan).weights.data();
  const Vec<T> floor = broadcast(T(plan.o.floor));
  const T add = T(plan.o.add), multiply = T(plan.o.multiply), shift = T(plan.o.shift);
  const bool floors = plan.o.floor != 0 || plan.o.log != Log::none, scales = multiply != 1 || shift != 0;
  Vec<T> total{};
  for (int m = 0; m < plan.num_filters; ++m) {
    SumOf<T> sums[groups] = {};
    Vec<T> sum[groups];
    if (plan.has_filters) {
      const T* p = power + static_cast<int64_t>(plan.first_bin[m]) * kTileFrames;
      for (int left = plan.count[m]; left > 0; left -= kTermsOfASum) {
        SumOf<T> part[groups] = {};
        for (int k = std::min(left, kTermsOfASum); k > 0; --k, ++weight, p += kTileFrames) {
#pragma GCC unroll 8
          for (int g = 0; g < groups; ++g) add_product<T>(part[g], load(p + g * w), *weight);
        }
#pragma GCC unroll 8
        for (int g = 0; g < groups; ++g) sums[g] += part[g];
      }
#pragma GCC unroll 8
      for (int g = 0; g < groups; ++g) sum[g] = rounded<T>(sums[g]);
    } else {
#pragma GCC unroll 8
      for (int g = 0; g < groups; ++g) sum[g] = load(power + static_cast<int64_t>(m) * kTileFrames + g * w);
    }
#pragma GCC unroll 8
    for (int g = 0; g < groups; ++g) {
      total += sum[g] - sum[g];
      Vec<T> value = sum[g] + add;
      if (floors) value = max(value, floor);
      value = logarithm<T>(plan, value);
      if (scales) value = value * multiply + shift;
      store(out + static_cast<int64_t>(m) * kTileFrames + g * w, value);
    }
  }
  return total;
}

template <typename T>
__attribute__((noinline)) void cosine_transform(const SpectralPlan& plan, const T* __restrict x, T* __restrict out) {
  constexpr int w = kWidth<T>;
  const T* row = tables_of<T>(plan).dct.data();
  for (int c = 0; c < plan.num_ceps; ++c, row += plan.num_filters) {
    for (int g = 0; g < kGroups<T>; ++g) {
      SumOf<T> even{}, odd{};
      int m = 0;
      for (; m + 2 <= plan.num_filters; m += 2) {
        add_product<T>(even, load(x + m * kTileFrames + g * w), row[m]);
        add_product<T>(odd, load(x + (m + 1) * kTileFrames + g * w), row[m + 1]);
      }
      if (m < plan.num_filters) add_product<T>(even, load(x + m * kTileFrames + g * w), row[m]);
      store(out + c * kTileFrames + g * w, rounded<T>(even + odd));
    }
  }
}

template <typename T>
MMLM_INLINE void put_energy(const SpectralPlan& plan, Vec<T> energy, T* out) {
  const double least = std::max(plan.o.energy_floor, 1.1920928955078125e-07);  // FLT_EPSILON, as Kaldi and torchaudio
  if (plan.o.raw_energy) energy = energy * T(plan.o.scale * plan.o.scale);
  store(out, ln_positive<T>(max(energy, broadcast(T(least)))));
}

// Every sample the frames see is zero.
bool is_silent(const SpectralPlan& plan, const SpectralClip& clip, int64_t start, int num_frames) {
  const int64_t last = start + int64_t{plan.o.hop_length} * (num_frames - 1) + plan.o.frame_length - 1;
  if (start < clip.num_valid || start < 0) return false;
  if (last < clip.num_samples) return true;
  if (plan.o.edge != Edge::reflect && plan.o.edge != Edge::mirror) return true;
  return 2 * (clip.num_samples - 1) + (plan.o.edge == Edge::mirror) - last >= clip.num_valid;
}

template <typename T, typename Out>
MMLM_INLINE void write_tile(const SpectralPlan& plan, const SpectralClip& clip, const T* values, int64_t frame,
                            int num_frames) {
  Out* out = static_cast<Out*>(clip.out);
  if (!plan.o.bins_first) {
    out += frame * clip.out_stride;
    if (num_frames == kTileFrames) {
      transpose(values, kTileFrames, plan.num_out, kTileFrames, out, clip.out_stride);
    } else {
      transpose(values, kTileFrames, plan.num_out, num_frames, out, clip.out_stride);
    }
    return;
  }
  for (int m = 0; m < plan.num_out; ++m, values += kTileFrames) {
    Out* row = out + m * clip.out_stride + frame;
    if (std::is_same_v<T, Out> && num_frames == kTileFrames) {
      for (int g = 0; g < kGroups<T>; ++g)
        store(reinterpret_cast<T*>(row) + g * kWidth<T>, load(values + g * kWidth<T>));
    } else {
      for (int l = 0; l < num_frames; ++l) row[l] = static_cast<Out>(values[l]);
    }
  }
}

// Smallest and largest of a tile's values, lanes past the last frame left out.
template <typename T>
MMLM_INLINE void extremes(const T* values, int num_rows, int num_frames, double& smallest, double& largest) {
  Vec<T> low = load(values), high = low;
  T least = values[0], most = values[0];
  if (num_frames == kTileFrames) {
    for (int64_t i = 0; i < int64_t{num_rows} * kTileFrames; i += kWidth<T>) {
      low = min(load(values + i), low);
      high = max(load(values + i), high);
    }
    for (int i = 0; i < kWidth<T>; ++i) {
      least = low[i] < least ? low[i] : least;
      most = high[i] > most ? high[i] : most;
    }
  } else {
    for (int m = 0; m < num_rows; ++m) {
      for (int l = 0; l < num_frames; ++l) {
        const T v = values[m * kTileFrames + l];
        least = v < least ? v : least;
        most = v > most ? v : most;
      }
    }
  }
  smallest = static_cast<double>(least);
  largest = std::max(largest, static_cast<double>(most));
}

template <typename T>
constexpr SampleType kOwnType = std::is_same_v<T, float> ? SampleType::float32 : SampleType::float64;

template <typename T, typename Out>
SpectralRange frames_of(const SpectralPlan& plan, const SpectralClip& clip, int64_t first, int64_t last,
                        double* tile_min) {
  constexpr int w = kWidth<T>;
  const SpectralOptions& o = plan.o;
  const Scratch<T> s = scratch_of<T>(plan);
  const bool is_plain = plan.spectrum == Spectrum::power && !o.round_spectrum && o.power_add == 0 && o.power_floor == 0;
  const bool in_place = clip.type == kOwnType<T> && clip.num_channels == 1 && clip.sample_stride == 1 &&
                        clip.resampler == nullptr && o.signal_preemphasis == 0;
  const T* memory = static_cast<const T*>(clip.samples);
  T* values = s.out + (o.energy == Energy::first ? kTileFrames : 0);
  const bool energy_is_last = o.energy == Energy::last || o.energy == Energy::replace_last;
  T* energy_row = s.out + (energy_is_last ? int64_t{plan.num_out - 1} * kTileFrames : 0);
  alignas(64) T energy[kTileFrames] = {}, means[kTileFrames] = {};
  double largest = -1e300;
  Vec<T> total{};
  for (int64_t f = first; f < last; f += kTileFrames) {
    const int num_frames = static_cast<int>(std::min<int64_t>(kTileFrames, last - f));
    const int64_t start = (clip.first_frame + f) * o.hop_length + o.offset;
    if (tile_min != nullptr && is_silent(plan, clip, start, num_frames)) {
      tile_min[f / kTileFrames] = kSilentTile;
      continue;
    }
    const bool direct = in_place && start >= clip.first_sample && start + plan.tile_samples <= clip.num_valid;
    const T* samples = direct ? memory + (start - clip.first_sample) : s.stage;
    if (!direct) {
      const int64_t needed = int64_t{o.hop_length} * (num_frames - 1) + o.frame_length;
      read_with_edges(plan, clip, start, needed, s.stage);
      // Lanes past the last frame: zeros, so that nothing stale can pass for a sample that is not finite.
      std::fill(s.stage + needed, s.stage + std::max(needed, plan.tile_samples), T(0));
    }
    transpose(samples, o.hop_length, plan.tile_columns, plan.tile_rows, s.tile, plan.tile_stride);
    // The next tile's samples come in while this one is transformed: half the time of a cold clip was waiting.
    const int64_t next = start + plan.tile_samples - clip.first_sample;
    const int64_t fresh = int64_t{kTileFrames} * o.hop_length;
    if (direct && next + fresh <= clip.num_valid - clip.first_sample) {
      for (int64_t i = 0; i < fresh; i += 64 / static_cast<int>(sizeof(T))) __builtin_prefetch(memory + next + i, 0, 3);
    }
    const T* shared = s.tile;  // what the frames are read from
    if (plan.prepares_tile) {
      prepare_tile(plan, s.tile, s.frame, s.frame + int64_t{plan.tile_rows + 1} * plan.tile_stride, means);
      if (o.frame_preemphasis != 0) shared = s.frame;
    }
    for (int g = 0; g < kGroups<T>; ++g) {
      const T* frames = shared + g * w;
      const int* offset = plan.is_400 ? plan.offset_400.data() : plan.offset.data();
      if (shared == s.frame) offset += 2 * o.n_fft;
      if (plan.prepares_frames) {
        const Vec<T> sums = prepare_frames(plan, frames, s.frame + g * w);
        if (o.energy != Energy::none) put_energy<T>(plan, sums, energy + g * w);
        frames = s.frame + g * w;
        offset += o.n_fft;
      }
      if (is_plain) {
        spectrum_of(plan, frames, offset, load(means + g * w), s.dft, PlainPowerSink<T>{s.power + g * w});
      } else {
        spectrum_of(plan, frames, offset, load(means + g * w), s.dft, PowerSink<T>(plan, s.power + g * w));
      }
    }
    total += filter_and_log(plan, s.power, plan.num_ceps > 0 ? s.filtered : values);
    if (plan.num_ceps > 0) cosine_transform(plan, s.filtered, values);
    if (o.energy != Energy::none) std::copy(energy, energy + kTileFrames, energy_row);
    if (o.dynamic_range > 0) {
      double smallest;
      extremes(s.out, plan.num_out, num_frames, smallest, largest);
      if (tile_min != nullptr) tile_min[f / kTileFrames] = smallest;
    } else if (tile_min != nullptr) {
      tile_min[f / kTileFrames] = 0;
    }
    write_tile<T, Out>(plan, clip, s.out, f, num_frames);
  }
  T sum = 0;
  for (int i = 0; i < w; ++i) sum += total[i];
  return {largest, sum == 0};
}

}  // namespace

SpectralRange spectral_features(const SpectralPlan& plan, const SpectralClip& clip, int64_t first, int64_t last,
                                double* tile_min) {
  if (!plan.o.double_precision) return frames_of<float, float>(plan, clip, first, last, tile_min);
  if (!plan.o.double_output) return frames_of<double, float>(plan, clip, first, last, tile_min);
  return frames_of<double, double>(plan, clip, first, last, tile_min);
}

void read_samples(const SpectralClip& clip, int64_t first, int64_t count, void* out, bool is_double) {
  if (is_double) return read_valid(clip, first, count, static_cast<double*>(out));
  read_valid(clip, first, count, static_cast<float*>(out));
}

}  // namespace mmlm::MMLM_ISA
