// The CUDA kernel's phases run on the host, thread by thread with a barrier after each: a check of the kernel's
// arithmetic and indexing on machines without a GPU.
#include <algorithm>
#include <vector>

#include "audio/spectral_device.h"

namespace mmlm {
namespace {

template <typename Phase>
void every_thread(const Phase& phase) {
  for (int thread = 0; thread < kDeviceThreads; ++thread) phase(thread, kDeviceThreads);
}

float one_tile(const Tile& t) {
  every_thread([&](int i, int n) { stage_samples(t, i, n); });
  every_thread([&](int i, int n) { partial_means(t, i, n); });
  every_thread([&](int i, int n) { means(t, i, n); });
  if (t.a.energy != Energy::none) {
    every_thread([&](int i, int n) { partial_energies(t, i, n); });
    every_thread([&](int i, int n) { energies(t, i, n); });
  }
  every_thread([&](int i, int n) { apply_window(t, i, n); });
  for (int pass = 0; pass < t.a.num_passes; ++pass) every_thread([&](int i, int n) { dft_pass(t, pass, i, n); });
  every_thread([&](int i, int n) { powers(t, i, n); });
  every_thread([&](int i, int n) { filters(t, i, n); });
  float largest = -INFINITY;
  every_thread([&](int i, int n) { largest = std::max(largest, write_outputs(t, i, n)); });
  return largest;
}

}  // namespace

void spectral_on_host(SpectralCudaArgs& args, const DeviceClip* clips, int64_t num_clips) {
  std::vector<float> shared(static_cast<size_t>(args.frames_per_block) * args.floats_per_frame());
  for (int64_t c = 0; c < num_clips; ++c) {
    float largest = -INFINITY;
    for (int64_t f = 0; f < clips[c].num_frames; f += args.frames_per_block) {
      const int frames = static_cast<int>(std::min<int64_t>(args.frames_per_block, clips[c].num_frames - f));
      std::fill(shared.begin(), shared.end(), NAN);  // nothing may be read that was not written
      largest = std::max(largest, one_tile({args, clips[c], shared.data(), f, frames}));
    }
    if (args.dynamic_range <= 0) continue;
    every_thread([&](int i, int n) { clip_outputs(args, clips[c], ordered(largest), i, n); });
  }
}

}  // namespace mmlm
