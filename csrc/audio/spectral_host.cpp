// The CUDA kernel's phases run on the host, lane by lane with a barrier after each: a check of the kernel's arithmetic
// and indexing on machines without a GPU.
#include <algorithm>
#include <vector>

#include "audio/spectral_device.h"

namespace mmlm {
namespace {

// A block's frames from `first` on, of which `frames` exist; returns the largest output.
template <int kLength>
float one_block(const SpectralCudaArgs& a, const DeviceClip& clip, float* shared, int64_t first, int frames) {
  const auto in_turn = [&](const auto& phase) {
    for (int frame = 0; frame < frames; ++frame) {
      for (int lane = 0; lane < a.lanes(); ++lane) {
        phase(Frame{a, clip, shared + frame * a.floats_per_frame(), first + frame, lane, a.lanes()});
      }
    }
  };
  in_turn([](const Frame& f) { stage_samples(f); });
  if (!a.is_plain()) {
    in_turn([](const Frame& f) { partial_means(f); });
    in_turn([](const Frame& f) { partial_energies(f); });
    in_turn([](const Frame& f) { apply_window(f); });
  }
  for (int pass = 0; pass < num_passes<kLength>(a); ++pass)
    in_turn([&](const Frame& f) { dft_pass<kLength>(f, pass); });
  in_turn([](const Frame& f) { powers<kLength>(f); });
  in_turn([](const Frame& f) { filters(f); });
  float largest = -INFINITY;
  for (int thread = 0; thread < kDeviceThreads; ++thread) {
    largest = std::max(largest, write_outputs({a, clip, shared, first, 0, a.lanes()}, frames, thread));
  }
  return largest;
}

}  // namespace

void spectral_on_host(SpectralCudaArgs& args, const DeviceClip* clips, int64_t num_clips) {
  std::vector<float> shared(static_cast<size_t>(args.frames_per_block) * args.floats_per_frame());
  const auto block = args.dft_length == 200 ? one_block<200> : args.dft_length == 256 ? one_block<256> : one_block<0>;
  for (int64_t c = 0; c < num_clips; ++c) {
    float largest = -INFINITY;
    for (int64_t f = 0; f < clips[c].num_frames; f += args.frames_per_block) {
      const int frames = static_cast<int>(std::min<int64_t>(args.frames_per_block, clips[c].num_frames - f));
      std::fill(shared.begin(), shared.end(), NAN);  // nothing may be read that was not written
      largest = std::max(largest, block(args, clips[c], shared.data(), f, frames));
    }
    if (args.dynamic_range <= 0) continue;
    const int64_t columns = args.bins_first ? clips[c].num_frames : args.num_out;
    for (int64_t column = 0; column <= columns; ++column) {  // one more than there are
      for (int row = 0; row < 3; ++row) clip_outputs(args, clips[c], ordered(largest), column, row, 3);
    }
  }
}

}  // namespace mmlm
