#include "audio/log_mel.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "audio/isa.h"
#include "audio/log_mel_tile.h"
#include "audio/thread_pool.h"

namespace mmlm {
namespace {

constexpr int64_t kSerialSamples = 20 * 16000;        // below this, waking a thread costs more than it saves
constexpr int64_t kHugePageBytes = int64_t{1} << 21;  // worth asking for when the output spans several
constexpr int64_t kTilesPerTask = 64;                 // 10 s of audio
constexpr float kDynamicRange = 8.f;

LogMelFrames frames_kernel() {
#if defined(__x86_64__)
  switch (active_isa()) {
    case Isa::avx512:
      return log_mel_frames_avx512;
    case Isa::avx2:
      return log_mel_frames_avx2;
    default:
      return log_mel_frames_baseline;
  }
#else
  return log_mel_frames_baseline;
#endif
}

// First touch of a fresh output costs more than the arithmetic of its pages: take it in 2 MiB steps.
void ask_for_huge_pages(void* begin, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes < 2 * kHugePageBytes) return;
  const auto first = (reinterpret_cast<uintptr_t>(begin) + kHugePageBytes - 1) & ~uintptr_t(kHugePageBytes - 1);
  const auto last = (reinterpret_cast<uintptr_t>(begin) + bytes) & ~uintptr_t(kHugePageBytes - 1);
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)begin;
  (void)bytes;
#endif
}

int64_t num_tiles_of(const LogMelClip& clip) { return (clip.num_samples / kHopLength + kTileFrames - 1) / kTileFrames; }

// Raise every value of the tiles that reach below `max_value` - 8 to that floor, and write the silent ones.
void clip_range(const LogMelPlan& plan, const LogMelClip& clip, const float* tile_min, int64_t first_tile,
                int64_t last_tile, float max_value) {
  const float log_floor = max_value - kDynamicRange;
  const float floor = (log_floor + 4.f) * 0.25f;
  const float silent = (std::max(kSilentLog, log_floor) + 4.f) * 0.25f;
  const int64_t num_frames = clip.num_samples / kHopLength;
  for (int64_t tile = first_tile, end; tile < last_tile; tile = end) {
    end = tile + 1;
    if (tile_min[tile] >= log_floor) continue;
    const bool is_silent = tile_min[tile] == kSilentTile;
    // Neighbours that need the same: one pass along each row.
    while (end < last_tile && tile_min[end] < log_floor && (tile_min[end] == kSilentTile) == is_silent) ++end;
    const int64_t first = tile * kTileFrames, last = std::min(num_frames, end * kTileFrames);
    for (int m = 0; m < plan.num_mel_bins; ++m) {
      float* row = clip.out + m * num_frames;
      if (is_silent) {
        std::fill(row + first, row + last, silent);
      } else {
        for (int64_t t = first; t < last; ++t) row[t] = row[t] < floor ? floor : row[t];
      }
    }
  }
}

void whole_clip(const LogMelPlan& plan, LogMelClip& clip, LogMelFrames frames, std::vector<float>& tile_min) {
  const int64_t num_tiles = num_tiles_of(clip);
  tile_min.resize(num_tiles);
  const LogMelRange range = frames(plan, clip, 0, clip.num_samples / kHopLength, tile_min.data());
  clip.finite = range.finite;
  clip_range(plan, clip, tile_min.data(), 0, num_tiles, range.max_value);
}

// One clip on several threads: all frames, then, the maximum known, the clipping.
void split_clip(const LogMelPlan& plan, LogMelClip& clip, LogMelFrames frames, int num_threads) {
  const int64_t num_frames = clip.num_samples / kHopLength, num_tiles = num_tiles_of(clip);
  const int64_t num_tasks = (num_tiles + kTilesPerTask - 1) / kTilesPerTask;
  std::vector<float> tile_min(num_tiles);
  std::vector<LogMelRange> ranges(num_tasks);
  parallel_for(num_tasks, num_threads, [&](int64_t i) {
    const int64_t first = i * kTilesPerTask * kTileFrames;
    ranges[i] = frames(plan, clip, first, std::min(num_frames, first + kTilesPerTask * kTileFrames), tile_min.data());
  });
  float max_value = -std::numeric_limits<float>::infinity();
  for (const LogMelRange& range : ranges) {
    max_value = std::max(max_value, range.max_value);
    clip.finite = clip.finite && range.finite;
  }
  parallel_for(num_tasks, num_threads, [&](int64_t i) {
    clip_range(plan, clip, tile_min.data(), i * kTilesPerTask, std::min(num_tiles, (i + 1) * kTilesPerTask), max_value);
  });
}

}  // namespace

LogMelPlan::LogMelPlan(const double* filters, int num_filters) : num_mel_bins(num_filters) {
  constexpr double kPi = 3.14159265358979323846;
  for (int a = 0; a < kOuter; ++a) {
    for (int b = 0; b < kInner; ++b) {
      const int n = (kInner * a + kOuter * b) % kFrameLength;
      tile_offset[a][b] = (n % kHopLength) * kTileStride + n / kHopLength;
      window[a][b] = static_cast<float>(0.5 - 0.5 * std::cos(2 * kPi * n / kFrameLength));
    }
  }
  for (int c = 0; c < kColumns; ++c) {
    for (int q = 0; q < kOuter; ++q) {
      for (int k = 0; k < kFrameLength; ++k) {
        if (k % kOuter == q && k % kInner == kColumnFrequency[c]) {
          power_bin[c][q] = k < kNumBins ? k : kFrameLength - k;  // real input: X[400 - k] is X[k] conjugated
        }
      }
    }
  }
  for (int m = 0; m < num_mel_bins; ++m) {
    const double* row = filters + static_cast<int64_t>(m) * kNumBins;
    int first = 0, last = kNumBins;
    while (first < last && row[first] == 0) ++first;
    while (last > first && row[last - 1] == 0) --last;
    first_bin.push_back(first);
    count.push_back(last - first);
    for (int k = first; k < last; ++k) weights.push_back(static_cast<float>(row[k]));
  }
}

void log_mel(const LogMelPlan& plan, LogMelClip* clips, int64_t num_clips, int num_threads) {
  const LogMelFrames frames = frames_kernel();
  int64_t total = 0;
  for (int64_t i = 0; i < num_clips; ++i) {
    const int64_t num_values = plan.num_mel_bins * (clips[i].num_samples / kHopLength);
    ask_for_huge_pages(clips[i].out, num_values * static_cast<int64_t>(sizeof(float)));
    total += clips[i].num_valid;
  }
  if (total < kSerialSamples) num_threads = 1;

  if (num_threads > 1 && num_clips < 2 * num_threads) {
    for (int64_t i = 0; i < num_clips; ++i) split_clip(plan, clips[i], frames, num_threads);
    return;
  }
  parallel_for(num_clips, num_threads, [&](int64_t i) {
    static thread_local std::vector<float> tile_min;  // kept: a short clip should not pay for malloc
    whole_clip(plan, clips[i], frames, tile_min);
  });
}

}  // namespace mmlm
