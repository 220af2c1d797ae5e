// Short-time spectral features: frames -> window -> DFT -> power -> filters -> log (-> DCT), for every family of
// audio features there is here. A plan is made once from plain options and tables, const afterwards and shared.
#pragma once
#include <cstdint>
#include <vector>

#include "core/dispatch.h"

namespace mmlm {

// How samples outside the clip are made up: not at all (no frame reaches there), zeros, mirrored about the first and
// last sample ("reflect"), or mirrored including them (Kaldi's snip_edges=false).
enum class Edge { none, zero, reflect, mirror };
enum class Spectrum { power, magnitude, exponent };  // |X|^2, |X|, (|X|^2)^(exponent/2)
inline Spectrum spectrum_of(double exponent) {
  return exponent == 2 ? Spectrum::power : exponent == 1 ? Spectrum::magnitude : Spectrum::exponent;
}
enum class Log { none, natural, decimal };
// Where a frame's log energy goes: a row of its own, or in place of the first or last one.
enum class Energy { none, first, last, replace_first, replace_last };

struct SpectralOptions {
  int frame_length = 400;  // samples a frame has
  int hop_length = 160;
  int n_fft = 400;     // at least frame_length; frames are padded with zeros
  int64_t offset = 0;  // index of the first sample of frame 0, negative where frames are centred
  Edge edge = Edge::none;
  double scale = 1;                       // samples are multiplied by this
  double signal_preemphasis = 0;          // y[t] = x[t] - c x[t-1] on the whole signal, x[-1] = 0
  double frame_preemphasis = 0;           // the same inside each frame, with x[-1] = x[0]
  bool remove_dc_offset = false;          // subtract each frame's mean first
  double exponent = 2;                    // of |X|
  double power_add = 0, power_floor = 0;  // |X|^2 becomes max(|X|^2 + add, floor)
  bool round_spectrum = false;            // round X to complex64 first, as float64 peers do
  double add = 0, floor = 0;              // filter sums become max(sum + add, floor)
  Log log = Log::none;
  double multiply = 1, shift = 0;  // y = multiply * log(...) + shift
  double dynamic_range = 0;        // raise values to the clip's largest less this; 0: do not. In units of y.
  Energy energy = Energy::none;
  bool raw_energy = true;         // before pre-emphasis and window, else after
  double energy_floor = 0;        // energies are floored at this and at FLT_EPSILON before the log
  bool bins_first = true;         // out is [bins, frames], else [frames, bins]
  bool double_precision = false;  // compute in float64
  bool double_output = false;     // only with double_precision
  bool prime_factor_400 = true;   // the faster transform for n_fft = 400; the CUDA side reads the others' tables
};

constexpr int kTileFrames = 16;  // frames computed together; a multiple of every ISA's vector width

template <typename T>
struct SpectralTables {
  std::vector<T> window;        // [n_fft], zeros past frame_length; times scale, and 1/2 for even n_fft (see unpack)
  std::vector<T> plain_window;  // [frame_length], times scale
  std::vector<T> twiddles;      // per pass [points][radix - 1][cos, sin]
  std::vector<T> roots;         // for radices without a butterfly of their own: [radix][cos, sin], per such pass
  std::vector<T> unpack;        // [n / 2 + 1][cos, sin]
  std::vector<T> weights;       // of the sparse filters
  std::vector<T> dct;           // [num_ceps][num_filters]
  std::vector<T> silent;        // [num_out], what a frame of zeros gives, before the clipping

  int64_t size() const {
    return static_cast<int64_t>(window.size() + plain_window.size() + twiddles.size() + roots.size() + unpack.size() +
                                weights.size() + dct.size() + silent.size());
  }
};

struct DftPass {
  int radix, points, stride;  // points: butterflies along the transform; stride: transforms side by side
  int64_t twiddle, root;      // offsets into the tables
};

struct SpectralPlan {
  // `window`: [frame_length]. `filters`: row-major [num_filters, n_fft / 2 + 1], or null: the spectrum itself.
  // `dct`: [num_ceps, num_filters], or null.
  SpectralPlan(const SpectralOptions& options, const double* window, const double* filters, int num_filters,
               const double* dct, int num_ceps);

  SpectralOptions options;
  Spectrum spectrum;
  int num_bins, num_filters, num_ceps, num_out;
  bool has_filters;

  // Layout of a tile: the samples of kTileFrames frames, transposed by hop, tile[m][l] = x[hop * l + m], so that
  // sample n of consecutive frames is one vector at [n % hop][n / hop].
  int tile_rows, tile_columns, tile_stride;
  int64_t tile_samples;
  bool prepares_frames;  // energies are wanted, or the 400-point transform: frames are unrolled from the tile first
  bool prepares_tile;    // else: mean and pre-emphasis are applied to the tile, which frames share

  bool is_400;  // the prime-factor transform of dft400.inl
  // [3][n_fft]: where sample n of a frame lies in the tile, among unrolled frames, and in the pre-emphasised tile,
  // whose extra last row holds the frames' first samples.
  std::vector<int> offset;
  std::vector<int> offset_400, bin_400;  // [2][16][25] likewise; [13][16]: the bin of output q of column c
  bool packed;                           // even n_fft: a complex transform of half the length
  int dft_length;
  std::vector<DftPass> passes;
  int largest_radix;

  double largest_sample;  // whatever surrounds a sample, nothing overflows up to this one

  std::vector<int> first_bin, count;  // filter m covers bins [first_bin[m], first_bin[m] + count[m])
  SpectralTables<float> float32;
  SpectralTables<double> float64;

  int64_t num_bytes() const {  // of its tables
    return sizeof(SpectralPlan) + 4 * float32.size() + 8 * float64.size() +
           4 * static_cast<int64_t>(offset.size() + offset_400.size() + bin_400.size() + 2 * count.size());
  }
  int64_t bytes_of_output(int64_t num_frames) const {
    return num_frames * num_out * (options.double_output ? sizeof(double) : sizeof(float));
  }
};

enum class SampleType { int16, int32, float32, float64 };

struct Resampler;

// One clip. After resampling, samples [first_sample, num_valid) are given and the rest up to `num_samples` are zeros.
// With a resampler, first_sample counts samples before it.
struct SpectralClip {
  const void* samples = nullptr;
  SampleType type = SampleType::float32;
  int num_channels = 1;  // averaged
  int64_t channel_stride = 0, sample_stride = 1;
  const Resampler* resampler = nullptr;
  int64_t num_input = 0;     // samples in memory, per channel
  int64_t first_sample = 0;  // index of the first one in memory; of streams, which forget what they do not need
  int64_t num_valid = 0, num_samples = 0;
  int64_t first_frame = 0;  // index of the frame that goes to out[0]
  int64_t num_frames = 0;
  void* out = nullptr;
  int64_t out_stride = 0;  // elements between rows (bins_first: between bins; else between frames)
  bool finite = true;      // set to false when an output is NaN or infinite
};

constexpr int64_t kSerialSamples = 20 * 16000;  // below this, waking a thread costs more than it saves

// Fill `out` of every clip. Threads are used above ~20 s of audio in all.
void spectral_features(const SpectralPlan& plan, SpectralClip* clips, int64_t num_clips, int num_threads);

// ---- the per-ISA kernel behind it -------------------------------------------------------------------------
struct SpectralRange {
  double max_value;  // largest output of the range
  bool finite;
};
// In place of a tile's minimum: the tile sees zeros only and is not written; its values are the plan's `silent`.
constexpr double kSilentTile = -1e300;

// Frames [first, last) of a clip, relative to its first_frame, `first` a multiple of kTileFrames: writes them without
// the clipping to the dynamic range, and the smallest value of tile t to tile_min[t] (may be null).
using SpectralFrames = SpectralRange (*)(const SpectralPlan&, const SpectralClip&, int64_t first, int64_t last,
                                         double* tile_min);
MMLM_KERNEL(SpectralRange, spectral_features, const SpectralPlan&, const SpectralClip&, int64_t, int64_t, double*)

// Column c of the 400-point transform's first stage holds this frequency modulo 25; the other twelve are their
// conjugates.
constexpr int kOuter400 = 16, kInner400 = 25, kColumns400 = 13;
constexpr int kColumnFrequency400[kColumns400] = {0, 5, 10, 1, 6, 11, 16, 21, 2, 7, 12, 17, 22};

}  // namespace mmlm
