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
//
#include "audio/tile.inl"
//
#include "audio/wide.inl"
//
#include "audio/prepare.inl"
//
#include "audio/filters.inl"
//
#include "audio/output.inl"

namespace mmlm::MMLM_ISA {
namespace {

// Elementwise spectrum of one group: |X|^2 or what the plan makes of it.
template <typename T>
struct PowerSink {
  const SpectralPlan& plan;
  T* power;
  bool rounds, adds, is_power;
  explicit PowerSink(const SpectralPlan& p, T* to)
      : plan(p),
        power(to),
        rounds(p.options.round_spectrum),
        adds(p.options.power_add != 0 || p.options.power_floor != 0),
        is_power(p.spectrum == Spectrum::power) {}
  MMLM_INLINE void operator()(int k, Vec<T> re, Vec<T> im) const {
    if (rounds) {
      re = round_to_float(re);
      im = round_to_float(im);
    }
    Vec<T> value = re * re + im * im;
    if (adds)
      value = max(broadcast(T(plan.options.power_floor)), value + T(plan.options.power_add));  // NaN, second, stays
    if (!is_power) {
      if (plan.spectrum == Spectrum::magnitude) {
        value = square_root(value);
      } else {
        for (int i = 0; i < kWidth<T>; ++i) value[i] = std::pow(value[i], T(plan.options.exponent / 2));
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
constexpr SampleType kOwnType = std::is_same_v<T, float> ? SampleType::float32 : SampleType::float64;

template <typename T, typename Out>
SpectralRange frames_of(const SpectralPlan& plan, const SpectralClip& clip, int64_t first, int64_t last,
                        double* tile_min) {
  constexpr int w = kWidth<T>;
  const SpectralOptions& o = plan.options;
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
  if (!plan.options.double_precision) return frames_of<float, float>(plan, clip, first, last, tile_min);
  if (!plan.options.double_output) return frames_of<double, float>(plan, clip, first, last, tile_min);
  return frames_of<double, double>(plan, clip, first, last, tile_min);
}

void read_samples(const SpectralClip& clip, int64_t first, int64_t count, void* out, bool is_double) {
  if (is_double) return read_valid(clip, first, count, static_cast<double*>(out));
  read_valid(clip, first, count, static_cast<float*>(out));
}

}  // namespace mmlm::MMLM_ISA
