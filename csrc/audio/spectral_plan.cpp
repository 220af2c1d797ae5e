// The tables of a plan.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "audio/spectral.h"

namespace mmlm {
namespace {

constexpr double kPi = 3.14159265358979323846264338327950288;

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
  const SpectralOptions& o = plan.options;
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
  const SpectralOptions& o = plan.options;
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
  const double exponent = o.exponent;
  const double largest = std::min(std::sqrt(most), std::pow(most / row_sum, 1 / exponent)) / std::max(weight, 1.);
  return std::min(largest, std::sqrt(most / o.frame_length)) / gain;
}

template <typename T>
void fill_tables(const SpectralPlan& plan, const double* filters, const double* dct, SpectralTables<T>& t) {
  const SpectralOptions& o = plan.options;
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
  clip.out_stride = plan.options.bins_first ? 1 : plan.num_out;
  if (o.double_precision && !o.double_output) {
    std::vector<float> out(plan.num_out);
    clip.out = out.data();
    MMLM_PICK(spectral_features)(plan, clip, 0, 1, nullptr);
    t.silent.assign(out.begin(), out.end());
  } else {
    t.silent.resize(plan.num_out);
    clip.out = t.silent.data();
    MMLM_PICK(spectral_features)(plan, clip, 0, 1, nullptr);
  }
}

void plan_dft(SpectralPlan& plan) {
  const SpectralOptions& o = plan.options;
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

}  // namespace

SpectralPlan::SpectralPlan(const SpectralOptions& o, const double* window, const double* filters, int filter_count,
                           const double* dct, int ceps)
    : options(o),
      spectrum(spectrum_of(o.exponent)),
      num_bins(o.n_fft / 2 + 1),
      num_filters(filters != nullptr ? filter_count : num_bins),
      num_ceps(dct != nullptr ? ceps : 0),
      has_filters(filters != nullptr),
      is_400(o.n_fft == 400 && o.prime_factor_400),
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
    fill_dft_tables(*this, window, float64);
    fill_tables(*this, filters, dct, float64);
  } else {
    fill_dft_tables(*this, window, float32);
    fill_tables(*this, filters, dct, float32);
  }
}

}  // namespace mmlm
