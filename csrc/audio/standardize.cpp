#include "audio/standardize.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace mmlm {

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

}  // namespace mmlm
