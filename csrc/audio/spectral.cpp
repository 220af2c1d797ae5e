#include "audio/spectral.h"

#include <algorithm>
#include <cstdint>

#include "core/memory.h"
#include "core/thread_pool.h"
#include "core/turns.h"

namespace mmlm {
namespace {

constexpr int64_t kTilesPerTask = 64;  // 10 s of audio at 16 kHz and 10 ms

int64_t num_tiles_of(const SpectralClip& clip) { return (clip.num_frames + kTileFrames - 1) / kTileFrames; }

template <typename Out>
void clip_range(const SpectralPlan& plan, const std::vector<double>& silent, const SpectralClip& clip,
                const double* tile_min, int64_t first_tile, int64_t last_tile, double max_value) {
  const double lowest = plan.options.dynamic_range > 0 ? max_value - plan.options.dynamic_range : -1e299;
  const Out floor = static_cast<Out>(lowest);
  Out* out = static_cast<Out*>(clip.out);
  for (int64_t tile = first_tile, end; tile < last_tile; tile = end) {
    end = tile + 1;
    if (tile_min[tile] >= lowest) continue;
    const bool is_silent = tile_min[tile] == kSilentTile;
    // Neighbours that need the same: one pass along each row.
    while (end < last_tile && tile_min[end] < lowest && (tile_min[end] == kSilentTile) == is_silent) ++end;
    const int64_t first = tile * kTileFrames, last = std::min(clip.num_frames, end * kTileFrames);
    const auto value_of = [&](int m) { return std::max(static_cast<Out>(silent[m]), floor); };
    if (plan.options.bins_first) {
      for (int m = 0; m < plan.num_out; ++m) {
        Out* row = out + m * clip.out_stride;
        if (is_silent) {
          std::fill(row + first, row + last, value_of(m));
        } else {
          for (int64_t t = first; t < last; ++t) row[t] = row[t] < floor ? floor : row[t];
        }
      }
    } else {
      for (int64_t t = first; t < last; ++t) {
        Out* row = out + t * clip.out_stride;
        for (int m = 0; m < plan.num_out; ++m) {
          row[m] = is_silent ? value_of(m) : row[m] < floor ? floor : row[m];
        }
      }
    }
  }
}

void finish(const SpectralPlan& plan, const SpectralClip& clip, const double* tile_min, int64_t first_tile,
            int64_t last_tile, double max_value) {
  const std::vector<double> silent = plan.options.double_precision
                                         ? plan.float64.silent
                                         : std::vector<double>(plan.float32.silent.begin(), plan.float32.silent.end());
  if (plan.options.double_output) {
    clip_range<double>(plan, silent, clip, tile_min, first_tile, last_tile, max_value);
  } else {
    clip_range<float>(plan, silent, clip, tile_min, first_tile, last_tile, max_value);
  }
}

// The largest value of a clip, its silent tiles counted.
double largest_with_silence(const SpectralPlan& plan, double max_value, const double* tile_min, int64_t num_tiles) {
  if (std::find(tile_min, tile_min + num_tiles, kSilentTile) == tile_min + num_tiles) return max_value;
  const auto most = [](const auto& v) { return static_cast<double>(*std::max_element(v.begin(), v.end())); };
  return std::max(max_value, plan.options.double_precision ? most(plan.float64.silent) : most(plan.float32.silent));
}

void whole_clip(const SpectralPlan& plan, SpectralClip& clip, SpectralFrames frames, std::vector<double>& tile_min) {
  const int64_t num_tiles = num_tiles_of(clip);
  if (num_tiles == 0) return;
  tile_min.resize(num_tiles);
  const SpectralRange range = frames(plan, clip, 0, clip.num_frames, tile_min.data());
  clip.finite = range.finite;
  finish(plan, clip, tile_min.data(), 0, num_tiles,
         largest_with_silence(plan, range.max_value, tile_min.data(), num_tiles));
}

// One clip on several threads: all frames, then, the maximum known, the clipping.
void split_clip(const SpectralPlan& plan, SpectralClip& clip, SpectralFrames frames, int num_threads) {
  const int64_t num_tiles = num_tiles_of(clip), num_tasks = (num_tiles + kTilesPerTask - 1) / kTilesPerTask;
  if (num_tiles == 0) return;
  std::vector<double> tile_min(num_tiles);
  std::vector<SpectralRange> ranges(num_tasks);
  parallel_for(num_tasks, num_threads, [&](int64_t i) {
    const int64_t first = i * kTilesPerTask * kTileFrames;
    ranges[i] =
        frames(plan, clip, first, std::min(clip.num_frames, first + kTilesPerTask * kTileFrames), tile_min.data());
  });
  double max_value = -1e300;
  for (const SpectralRange& range : ranges) {
    max_value = std::max(max_value, range.max_value);
    clip.finite = clip.finite && range.finite;
  }
  max_value = largest_with_silence(plan, max_value, tile_min.data(), num_tiles);
  parallel_for(num_tasks, num_threads, [&](int64_t i) {
    finish(plan, clip, tile_min.data(), i * kTilesPerTask, std::min(num_tiles, (i + 1) * kTilesPerTask), max_value);
  });
}

}  // namespace

void spectral_features(const SpectralPlan& plan, SpectralClip* clips, int64_t num_clips, int num_threads) {
  const SpectralFrames frames = MMLM_PICK(spectral_features);
  int64_t total = 0;
  for (int64_t i = 0; i < num_clips; ++i) {
    ask_for_huge_pages(clips[i].out, plan.bytes_of_output(clips[i].num_frames));
    total += clips[i].num_valid;
  }
  const Turn turn(total >= kSerialSamples, num_threads);
  num_threads = turn.num_threads();

  if (num_threads > 1 && num_clips < 2 * num_threads) {
    for (int64_t i = 0; i < num_clips; ++i) split_clip(plan, clips[i], frames, num_threads);
    return;
  }
  parallel_for(num_clips, num_threads, [&](int64_t i) {
    static thread_local std::vector<double> tile_min;  // kept: a short clip should not pay for malloc
    whole_clip(plan, clips[i], frames, tile_min);
  });
}

}  // namespace mmlm
