// A tile's tables and scratch.

namespace mmlm::MMLM_ISA {
namespace {

template <typename T>
constexpr int kGroups = kTileFrames / kWidth<T>;
static_assert(kTileFrames % kWidth<float> == 0, "whole vectors fill a tile");

template <typename T>
const SpectralTables<T>& tables_of(const SpectralPlan& plan);
template <>
const SpectralTables<float>& tables_of(const SpectralPlan& plan) {
  return plan.float32;
}
template <>
const SpectralTables<double>& tables_of(const SpectralPlan& plan) {
  return plan.float64;
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
  const int64_t unrolled = int64_t{plan.options.frame_length} * kTileFrames;
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

}  // namespace
}  // namespace mmlm::MMLM_ISA
