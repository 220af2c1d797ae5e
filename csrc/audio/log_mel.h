// Whisper's log-mel spectrogram: frames of 400 samples every 160, Hann window, power, sparse mel filters,
// log10, clipping to 8 below the clip's maximum, (x + 4) / 4. Planned once, const afterwards.
#pragma once
#include <cstdint>
#include <vector>

namespace mmlm {

constexpr int kFrameLength = 400;
constexpr int kHopLength = 160;
constexpr int kNumBins = kFrameLength / 2 + 1;
constexpr int kTileFrames = 16;  // frames computed together; a multiple of every ISA's vector width
constexpr float kMelFloor = 1e-10f;

// The 400-point DFT is a 16 x 25 prime-factor transform (Good 1958): sample n = 25a + 16b (mod 400) needs no
// twiddles between the sixteen 25-point and the thirteen 16-point transforms that real input leaves.
constexpr int kOuter = 16;
constexpr int kInner = 25;
constexpr int kColumns = 13;

struct LogMelPlan {
  // `filters`: [num_mel_bins, 201], row-major. Tables are made in double and rounded once.
  LogMelPlan(const double* filters, int num_mel_bins);

  int num_mel_bins;
  int tile_offset[kOuter][kInner];  // where sample 25a + 16b lies in a hop-transposed tile
  float window[kOuter][kInner];
  int power_bin[kColumns][kOuter];  // frequency bin of output q of column c
  // Sparse filters: filter m covers bins [first_bin[m], first_bin[m] + count[m]) with consecutive `weights`.
  std::vector<int> first_bin, count;
  std::vector<float> weights;
};

// One clip. Samples past `num_valid` are zeros up to `num_samples`, which must be at least 201 (reflect padding).
struct LogMelClip {
  const float* samples;
  int64_t num_valid;
  int64_t num_samples;
  float* out;          // [num_mel_bins, num_samples / 160]
  bool finite = true;  // set to false when an output is NaN or infinite
};

// Fill `out` of every clip. Threads are used above ~20 s of audio in all.
void log_mel(const LogMelPlan& plan, LogMelClip* clips, int64_t num_clips, int num_threads);

// ---- the per-ISA kernel behind it -------------------------------------------------------------------------
struct LogMelRange {
  float max_value;  // largest log10 value of the range
  bool finite;
};
// Frames [first, last) of a clip, `first` a multiple of kTileFrames: writes (log10 + 4) / 4 without clipping, and the
// smallest log10 of tile t to tile_min[t]; tiles of zeros are marked there and not written (log_mel_tile.h).
using LogMelFrames = LogMelRange (*)(const LogMelPlan&, const LogMelClip&, int64_t first, int64_t last,
                                     float* tile_min);
LogMelRange log_mel_frames_baseline(const LogMelPlan&, const LogMelClip&, int64_t, int64_t, float*);
LogMelRange log_mel_frames_avx2(const LogMelPlan&, const LogMelClip&, int64_t, int64_t, float*);
LogMelRange log_mel_frames_avx512(const LogMelPlan&, const LogMelClip&, int64_t, int64_t, float*);

}  // namespace mmlm
