#include "audio/resample.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "core/memory.h"
#include "core/thread_pool.h"
#include "core/turns.h"

namespace mmlm {
namespace {

constexpr double kPi = 3.14159265358979323846264338327950288;

}  // namespace

Resampler::Resampler(int64_t from, int64_t to, const double* taps, int64_t num_taps, const int64_t* first_samples)
    : old_rate(from), new_rate(to), has_table(true) {
  lowest = std::numeric_limits<int64_t>::max();
  highest = -lowest;
  for (int64_t p = 0; p < new_rate; ++p) {
    const double* row = taps + p * num_taps;
    int64_t begin = 0, end = num_taps;
    while (begin < end - 1 && row[begin] == 0) ++begin;
    while (end > begin + 1 && row[end - 1] == 0) --end;
    first.push_back(first_samples[p] + begin);
    start.push_back(static_cast<int64_t>(taps_d.size()));
    count.push_back(static_cast<int>(end - begin));
    taps_d.insert(taps_d.end(), row + begin, row + end);
    lowest = std::min(lowest, first.back());
    highest = std::max(highest, first.back() + count.back());
  }
  taps_f.assign(taps_d.begin(), taps_d.end());
}

Resampler::Resampler(int64_t from, int64_t to, const SincFilter& how)
    : old_rate(from), new_rate(to), has_table(false), filter(how) {
  base = static_cast<double>(std::min(old_rate, new_rate)) * filter.rolloff;
  const double width = static_cast<double>(filter.width), step = base / static_cast<double>(old_rate);
  reach = static_cast<int64_t>(std::ceil(width / step));
  turn.resize(2 * kTapsAtOnce);
  window_turn.resize(2 * kTapsAtOnce);
  for (int m = 0; m < kTapsAtOnce; ++m) {
    turn[m] = std::cos(kPi * m * step);
    turn[kTapsAtOnce + m] = std::sin(kPi * m * step);
    window_turn[m] = std::cos(kPi * m * step / width);
    window_turn[kTapsAtOnce + m] = std::sin(kPi * m * step / width);
  }
  for (int k = 1; filter.beta >= 0 && k <= 2000; ++k) bessel.push_back(1. / (static_cast<double>(k) * k));
  bessel_of_beta = bessel_i0(bessel, std::max(filter.beta, 0.));
}

void read_samples(SpectralClip* clips, int64_t num_clips, int64_t first, bool is_double, int num_threads) {
  const auto range = MMLM_PICK(read_samples);
  constexpr int64_t kPerTask = 65536;
  struct Task {
    int64_t clip, first, count;
  };
  std::vector<Task> tasks;
  int64_t total = 0;
  const int64_t bytes = is_double ? sizeof(double) : sizeof(float);
  for (int64_t i = 0; i < num_clips; ++i) {
    const int64_t wanted = std::max<int64_t>(0, clips[i].num_valid - first);
    ask_for_huge_pages(clips[i].out, wanted * bytes);
    total += wanted;
    for (int64_t at = first; at < clips[i].num_valid; at += kPerTask) {
      tasks.push_back({i, at, std::min(kPerTask, clips[i].num_valid - at)});
    }
  }
  const Turn turn(total >= kSerialSamples, num_threads);
  parallel_for(static_cast<int64_t>(tasks.size()), turn.num_threads(), [&](int64_t i) {
    const Task& task = tasks[i];
    char* out = static_cast<char*>(clips[task.clip].out) + (task.first - first) * bytes;
    range(clips[task.clip], task.first, task.count, out, is_double);
  });
}

}  // namespace mmlm
