// Polyphase resampling with a windowed sinc, the phases' filters trimmed to what is not zero.
#pragma once
#include <cstdint>
#include <vector>

#include "audio/spectral.h"

namespace mmlm {

struct Resampler {
  // Output `new_rate` * j + p is the sum of taps(p)[k] * x[old_rate * j + first(p) + k]. The rates are coprime.
  // `taps`: row-major [new_rate, num_taps], tap k of phase p belonging to sample old_rate * j + k - `before`.
  Resampler(int64_t old_rate, int64_t new_rate, const double* taps, int64_t num_taps, int64_t before);

  int64_t old_rate, new_rate;
  std::vector<int64_t> first, start;  // first sample of a phase's filter relative to old_rate * j; where its taps are
  std::vector<int> count;
  std::vector<float> taps_f;
  std::vector<double> taps_d;
  int64_t lowest, highest;  // over all phases: samples [lowest, highest) relative to old_rate * j are needed

  int64_t num_output(int64_t num_input) const { return (num_input * new_rate + old_rate - 1) / old_rate; }
};

// Whole clips, without features: out[i] of type float (or double) for i in [0, num_output).
using ResampleRange = void (*)(const SpectralClip& source, int64_t first, int64_t count, void* out, bool is_double);
#define MMLM_DECLARE(isa) void resample_range_##isa(const SpectralClip&, int64_t, int64_t, void*, bool);
MMLM_EACH_ISA(MMLM_DECLARE)
#undef MMLM_DECLARE

// Samples [0, num_valid) of every clip (converted, mixed down, resampled) to its `out`.
void read_samples(SpectralClip* clips, int64_t num_clips, bool is_double, int num_threads);

}  // namespace mmlm
