// A tile's features to the clip's output, and their extremes.

namespace mmlm::MMLM_ISA {
namespace {

// Every sample the frames see is zero.
bool is_silent(const SpectralPlan& plan, const SpectralClip& clip, int64_t start, int num_frames) {
  const int64_t last = start + int64_t{plan.options.hop_length} * (num_frames - 1) + plan.options.frame_length - 1;
  if (start < clip.num_valid || start < 0) return false;
  if (last < clip.num_samples) return true;
  if (plan.options.edge != Edge::reflect && plan.options.edge != Edge::mirror) return true;
  return 2 * (clip.num_samples - 1) + (plan.options.edge == Edge::mirror) - last >= clip.num_valid;
}

template <typename T, typename Out>
MMLM_INLINE void write_tile(const SpectralPlan& plan, const SpectralClip& clip, const T* values, int64_t frame,
                            int num_frames) {
  Out* out = static_cast<Out*>(clip.out);
  if (!plan.options.bins_first) {
    out += frame * clip.out_stride;
    if (num_frames == kTileFrames) {
      transpose(values, kTileFrames, plan.num_out, kTileFrames, out, clip.out_stride);
    } else {
      transpose(values, kTileFrames, plan.num_out, num_frames, out, clip.out_stride);
    }
    return;
  }
  for (int m = 0; m < plan.num_out; ++m, values += kTileFrames) {
    Out* row = out + m * clip.out_stride + frame;
    if (std::is_same_v<T, Out> && num_frames == kTileFrames) {
      for (int g = 0; g < kGroups<T>; ++g)
        store(reinterpret_cast<T*>(row) + g * kWidth<T>, load(values + g * kWidth<T>));
    } else {
      for (int l = 0; l < num_frames; ++l) row[l] = static_cast<Out>(values[l]);
    }
  }
}

// Smallest and largest of a tile's values, lanes past the last frame left out.
template <typename T>
MMLM_INLINE void extremes(const T* values, int num_rows, int num_frames, double& smallest, double& largest) {
  Vec<T> low = load(values), high = low;
  T least = values[0], most = values[0];
  if (num_frames == kTileFrames) {
    for (int64_t i = 0; i < int64_t{num_rows} * kTileFrames; i += kWidth<T>) {
      low = min(load(values + i), low);
      high = max(load(values + i), high);
    }
    for (int i = 0; i < kWidth<T>; ++i) {
      least = low[i] < least ? low[i] : least;
      most = high[i] > most ? high[i] : most;
    }
  } else {
    for (int m = 0; m < num_rows; ++m) {
      for (int l = 0; l < num_frames; ++l) {
        const T v = values[m * kTileFrames + l];
        least = v < least ? v : least;
        most = v > most ? v : most;
      }
    }
  }
  smallest = static_cast<double>(least);
  largest = std::max(largest, static_cast<double>(most));
}

}  // namespace
}  // namespace mmlm::MMLM_ISA
