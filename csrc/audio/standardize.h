// Features standardised over time.
#pragma once
#include <cstdint>

namespace mmlm {

// Standardise features [num_frames, num_bins] in place over the first `num_valid` frames, bin by bin; later frames
// become `padding`. y = (x - mean) / (sqrt(var + eps_inside) + eps_outside), var with `ddof` degrees less.
struct Standardize {
  int ddof = 0;
  double eps_inside = 0, eps_outside = 0;
  bool means = true, variances = true;
  double padding = 0;
};
template <typename T>
void standardize(const Standardize& how, T* features, int64_t num_frames, int64_t num_valid, int64_t num_bins);

}  // namespace mmlm
