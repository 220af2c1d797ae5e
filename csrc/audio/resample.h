// Polyphase resampling with a windowed sinc: from a table of the phases' filters, trimmed to what is not zero, or,
// where there are so many phases that a table would be larger than the clip, with taps made anew for every output.
#pragma once
#include <cstdint>
#include <vector>

#include "audio/spectral.h"

namespace mmlm {

// sinc(t) times a window that is 0 from |t| = width on: a Kaiser window of shape `beta`, or, for a beta below 0,
// Hann's.
struct SincFilter {
  double rolloff = 1, beta = -1;
  int64_t width = 6;
};

struct Resampler {
  // Output `new_rate` * j + p is the sum of taps(p)[k] * x[old_rate * j + first(p) + k]. The rates are coprime.
  // `taps`: row-major [new_rate, num_taps]; `first_samples`: [new_rate].
  Resampler(int64_t old_rate, int64_t new_rate, const double* taps, int64_t num_taps, const int64_t* first_samples);
  // The same without a table: tap k of phase p is sinc and window at base * (k / old_rate - p / new_rate).
  Resampler(int64_t old_rate, int64_t new_rate, const SincFilter& filter);

  int64_t old_rate, new_rate;
  std::vector<int64_t> first, start;  // first sample of a phase's filter relative to old_rate * j; where its taps are
  std::vector<int> count;
  std::vector<float> taps_f;
  std::vector<double> taps_d;
  int64_t lowest = 0, highest = 0;  // over all phases: samples [lowest, highest) relative to old_rate * j are needed

  // Without a table.
  static constexpr int kTapsAtOnce = 48;
  bool has_table;
  SincFilter filter;
  int64_t reach = 0;  // taps on each side of an output
  double base = 0;    // cut-off, in the coprime rates' unit
  // [2][kTapsAtOnce]: cos and sin of what the m-th tap of a run adds to an angle
  std::vector<double> turn, window_turn;
  std::vector<double> bessel;  // 1 / k^2: the terms of I0
  double bessel_of_beta = 1;

  int64_t num_bytes() const {
    return sizeof(Resampler) + 12 * static_cast<int64_t>(taps_d.size()) + 20 * static_cast<int64_t>(first.size());
  }
  int64_t num_output(int64_t num_input) const {
    return static_cast<int64_t>((static_cast<__int128>(num_input) * new_rate + old_rate - 1) / old_rate);
  }
};

// I0, the modified Bessel function, by its series: every term is positive, so that nothing cancels.
static inline double bessel_i0(const std::vector<double>& inverse_squares, double x) {
  const double q = 0.25 * x * x;
  double sum = 1, term = 1;
  for (const double inverse_square : inverse_squares) {
    term *= q * inverse_square;
    sum += term;
    if (term < 1e-17 * sum) break;
  }
  return sum;
}

// Samples [first, first + count) of a clip to `out`, of type float (or double).
MMLM_KERNEL(void, read_samples, const SpectralClip&, int64_t first, int64_t count, void* out, bool is_double)

// Samples [first, num_valid) of every clip (converted, mixed down, resampled) to its `out`.
void read_samples(SpectralClip* clips, int64_t num_clips, int64_t first, bool is_double, int num_threads);

}  // namespace mmlm
