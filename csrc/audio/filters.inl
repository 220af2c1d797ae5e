// From the spectrum of a tile to its features: sparse filters, logarithm, cosine transform, energies.

namespace mmlm::MMLM_ISA {
namespace {

template <typename T>
MMLM_INLINE Vec<T> logarithm(const SpectralPlan& plan, Vec<T> x) {
  if (plan.options.log == Log::none) return x;
  if (plan.options.floor <= 0 && plan.options.add <= 0) {  // zeros may arrive
    for (int i = 0; i < kWidth<T>; ++i) x[i] = plan.options.log == Log::natural ? std::log(x[i]) : std::log10(x[i]);
    return x;
  }
  return plan.options.log == Log::natural ? ln_positive<T>(x) : log10_positive<T>(x);
}

constexpr int kTermsOfASum = 8;  // sums of sums: wide filters of long transforms erred more than peers' otherwise

// Filter sums of one tile, floored, in log. Returns zeros, NaN as soon as a sum is not finite.
template <typename T>
__attribute__((noinline)) Vec<T> filter_and_log(const SpectralPlan& plan, const T* __restrict power,
                                                T* __restrict out) {
  constexpr int w = kWidth<T>, groups = kGroups<T>;
  const T* weight = tables_of<T>(plan).weights.data();
  const Vec<T> floor = broadcast(T(plan.options.floor));
  const T add = T(plan.options.add), multiply = T(plan.options.multiply), shift = T(plan.options.shift);
  const bool floors = plan.options.floor != 0 || plan.options.log != Log::none, scales = multiply != 1 || shift != 0;
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
  const double least =
      std::max(plan.options.energy_floor, 1.1920928955078125e-07);  // FLT_EPSILON, as Kaldi and torchaudio
  if (plan.options.raw_energy) energy = energy * T(plan.options.scale * plan.options.scale);
  store(out, ln_positive<T>(max(energy, broadcast(T(least)))));
}

}  // namespace
}  // namespace mmlm::MMLM_ISA
