// What is done to frames before their window: mean removed, pre-emphasised, energies taken.

namespace mmlm::MMLM_ISA {
namespace {

// Frames of one group, unrolled from the tile and prepared before the window: mean removed, pre-emphasised. Returns
// the energy (sum of squares) of the frames, before or after the rest as the plan says.
template <typename T>
__attribute__((noinline)) Vec<T> prepare_frames(const SpectralPlan& plan, const T* __restrict tile,
                                                T* __restrict frame) {
  const SpectralTables<T>& tables = tables_of<T>(plan);
  const int n = plan.options.frame_length;
  const int* offset = plan.offset.data();
  Vec<T> mean{};
  if (plan.options.remove_dc_offset) {
    Vec<T> sum[4] = {};
    int i = 0;
    for (; i + 4 <= n; i += 4) {
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) sum[k] += load(tile + offset[i + k]);
    }
    for (; i < n; ++i) sum[0] += load(tile + offset[i]);
    mean = ((sum[0] + sum[1]) + (sum[2] + sum[3])) / T(n);
  }
  const T c = T(plan.options.frame_preemphasis);
  const bool wants_raw = plan.options.energy != Energy::none && plan.options.raw_energy;
  const bool wants_windowed = plan.options.energy != Energy::none && !plan.options.raw_energy;
  Vec<T> energy[2] = {};
  Vec<T> before = load(tile + offset[0]) - mean;
  for (int i = 0; i < n; ++i) {
    const Vec<T> x = load(tile + offset[i]) - mean, y = emphasis<T>(x, c, before);
    if (wants_raw) energy[i & 1] += x * x;
    if (wants_windowed) energy[i & 1] += (y * tables.plain_window[i]) * (y * tables.plain_window[i]);
    store(frame + i * kTileFrames, y);
    before = x;
  }
  return energy[0] + energy[1];
}

// Sums of the first `rows` rows of a tile, column by column. Whole vectors: `stride` is a multiple of their lanes.
template <typename T>
MMLM_INLINE void column_sums(const T* __restrict tile, int rows, int columns, int stride, T* __restrict sums) {
  for (int l = 0; l < columns; l += kWidth<T>) {
    Vec<T> sum[4] = {};
    int m = 0;
    for (; m + 4 <= rows; m += 4) {
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) sum[k] += load(tile + static_cast<int64_t>(m + k) * stride + l);
    }
    for (; m < rows; ++m) sum[0] += load(tile + static_cast<int64_t>(m) * stride + l);
    store(sums + l, (sum[0] + sum[1]) + (sum[2] + sum[3]));
  }
}

// What frames share of mean and pre-emphasis, done once a tile: y[n] = x[n] - c x[n-1] less (1 - c) times the mean,
// with x[-1] = x[0]. Writes (1 - c) times the frames' means to `means` and the pre-emphasised tile, with a row for the
// frames' first samples, to `emphasised`. The sums of whole hops are those of columns.
template <typename T>
__attribute__((noinline)) void prepare_tile(const SpectralPlan& plan, const T* __restrict tile,
                                            T* __restrict emphasised, T* __restrict sums, T* __restrict means) {
  const int stride = plan.tile_stride, columns = plan.tile_columns, rows = plan.tile_rows;
  const int hop = plan.options.hop_length, length = plan.options.frame_length;
  const T c = T(plan.options.frame_preemphasis);
  std::fill(means, means + kTileFrames, T(0));
  if (plan.options.remove_dc_offset) {
    const int whole = length / hop, rest = length % hop;
    T* part = sums + stride;
    column_sums(tile, whole > 0 ? rows : 0, columns, stride, sums);
    column_sums(tile, rest, columns, stride, part);
    for (int f = 0; f < kTileFrames; ++f) {
      T sum = rest > 0 ? part[f + whole] : T(0);
      for (int j = 0; j < whole; ++j) sum += sums[f + j];
      means[f] = sum / T(length) * (1 - c);
    }
  }
  if (c == 0) return;
  T* first = emphasised + static_cast<int64_t>(rows) * stride;
  for (int l = 0; l < columns; l += kWidth<T>) store(first + l, load(tile + l) * (1 - c));
  // A column's first sample follows the last one of the column before; nothing comes before column 0, whose frame's
  // first sample is in `first`.
  const T* last = tile + static_cast<int64_t>(rows - 1) * stride;
  emphasised[0] = 0;
  for (int l = 1; l < columns; ++l) emphasised[l] = emphasis_of<T>(tile[l], c, last[l - 1]);
  for (int m = 1; m < rows; ++m) {
    const T* row = tile + static_cast<int64_t>(m) * stride;
    T* to = emphasised + static_cast<int64_t>(m) * stride;
    for (int l = 0; l < columns; l += kWidth<T>) store(to + l, emphasis<T>(load(row + l), c, load(row - stride + l)));
  }
}

}  // namespace
}  // namespace mmlm::MMLM_ISA
