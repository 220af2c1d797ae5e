// Spectral features of a signal that arrives in pieces: the frames are computed as soon as their samples are there,
// by the same kernel on the same numbers, so that they have the bits of the whole signal's.
#pragma once
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "audio/spectral.h"

namespace mmlm {

class SpectralStream {
 public:
  // The plan's dynamic_range is not applied: a stream does not know the largest value to come.
  explicit SpectralStream(std::shared_ptr<const SpectralPlan> plan) : plan_(std::move(plan)) {}

  // Take `count` samples; returns the number of frames that are ready and not yet pulled. Takes nothing where one is
  // not finite (kNotFinite) or so large that a frame to come might overflow (kTooLarge).
  static constexpr int64_t kNotFinite = -1, kTooLarge = -2;
  int64_t push(const void* samples, SampleType type, int64_t count);
  // The signal has ended and has `total_frames` frames in all: the rest is ready, its edge made up as the plan says.
  int64_t finish(int64_t total_frames);
  // Write `count` of the frames that are ready to `out` (rows of `out_stride` elements); false when one is not finite.
  bool pull(void* out, int64_t out_stride, int64_t count);

  int64_t num_received() const;
  int64_t next_frame() const;

  // Everything that a later call depends on, for pickling.
  struct State {
    int64_t received = 0, next_frame = 0, first_kept = 0;
    std::vector<double> kept;
  };
  State state() const;
  void set_state(const State& state);

 private:
  int64_t num_ready() const;
  template <typename T>
  int64_t append(const void* samples, SampleType type, int64_t count, std::vector<T>& kept);
  void forget();

  std::shared_ptr<const SpectralPlan> plan_;
  mutable std::mutex mutex_;   // the GIL is released around calls
  std::vector<double> kept_;   // samples not yet done with, of double-precision plans
  std::vector<float> kept_f_;  // and of the others
  int64_t received_ = 0, next_frame_ = 0, first_kept_ = 0, ready_ = 0;
};

}  // namespace mmlm
