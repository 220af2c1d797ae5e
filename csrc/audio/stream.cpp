#include "audio/stream.h"

#include <algorithm>
#include <cmath>

#include "audio/resample.h"

namespace mmlm {
namespace {

template <typename T>
void drop(std::vector<T>& kept, int64_t count) {
  kept.erase(kept.begin(), kept.begin() + std::min<int64_t>(count, kept.size()));
}

}  // namespace

template <typename T>
int64_t SpectralStream::append(const void* samples, SampleType type, int64_t count, std::vector<T>& kept) {
  SpectralClip clip;
  clip.samples = samples;
  clip.type = type;
  clip.num_input = clip.num_valid = clip.num_samples = count;
  const size_t before = kept.size();
  kept.resize(before + count);
  clip.out = kept.data() + before;
  read_samples(&clip, 1, 0, sizeof(T) == sizeof(double), 1);
  T check = 0, largest = 0;
  for (size_t i = before; i < kept.size(); ++i) {
    check += kept[i] - kept[i];  // NaN as soon as one is not finite
    largest = std::max(largest, std::abs(kept[i]));
  }
  if (check == 0 && largest <= plan_->largest_sample) return count;
  kept.resize(before);
  return check == 0 ? kTooLarge : kNotFinite;
}

int64_t SpectralStream::num_received() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return received_;
}

int64_t SpectralStream::next_frame() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return next_frame_;
}

int64_t SpectralStream::num_ready() const {
  const SpectralOptions& o = plan_->options;
  // Frame f needs the samples before offset + f * hop + frame_length, and those that its left edge mirrors.
  const int64_t mirrored = o.edge == Edge::reflect ? -o.offset : o.edge == Edge::mirror ? -o.offset - 1 : -1;
  if (received_ <= mirrored) return 0;
  const int64_t room = received_ - o.offset - o.frame_length;
  return room < 0 ? 0 : std::max<int64_t>(0, room / o.hop_length + 1 - next_frame_);
}

int64_t SpectralStream::push(const void* samples, SampleType type, int64_t count) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (count > 0) {
    const int64_t taken =
        plan_->options.double_precision ? append(samples, type, count, kept_) : append(samples, type, count, kept_f_);
    if (taken < 0) return taken;
    received_ += count;
  }
  return ready_ = num_ready();
}

int64_t SpectralStream::finish(int64_t total_frames) {
  std::lock_guard<std::mutex> lock(mutex_);
  return ready_ = std::max<int64_t>(0, total_frames - next_frame_);
}

bool SpectralStream::pull(void* out, int64_t out_stride, int64_t count) {
  std::lock_guard<std::mutex> lock(mutex_);
  count = std::min(count, ready_);
  SpectralClip clip;
  const bool is_double = plan_->options.double_precision;
  clip.samples = is_double ? static_cast<const void*>(kept_.data()) : kept_f_.data();
  clip.type = is_double ? SampleType::float64 : SampleType::float32;
  clip.first_sample = first_kept_;
  clip.num_input = static_cast<int64_t>(is_double ? kept_.size() : kept_f_.size());
  clip.num_valid = clip.num_samples = received_;
  clip.first_frame = next_frame_;
  clip.num_frames = count;
  clip.out = out;
  clip.out_stride = out_stride;
  const SpectralRange range =
      count > 0 ? MMLM_PICK(spectral_features)(*plan_, clip, 0, count, nullptr) : SpectralRange{0, true};
  next_frame_ += count;
  ready_ -= count;
  forget();
  return range.finite;
}

// Keep what the next frame sees, what a right edge may mirror, and the sample before (pre-emphasis).
void SpectralStream::forget() {
  const SpectralOptions& o = plan_->options;
  const int64_t next = next_frame_ * o.hop_length + o.offset;
  const int64_t from = std::max(first_kept_, std::min(next, received_ - o.frame_length - o.hop_length) - 1);
  drop(kept_, from - first_kept_);
  drop(kept_f_, from - first_kept_);
  first_kept_ = from;
}

SpectralStream::State SpectralStream::state() const {
  std::lock_guard<std::mutex> lock(mutex_);
  State state{received_, next_frame_, first_kept_, kept_};
  if (!plan_->options.double_precision) state.kept.assign(kept_f_.begin(), kept_f_.end());
  return state;
}

void SpectralStream::set_state(const State& state) {
  std::lock_guard<std::mutex> lock(mutex_);
  received_ = state.received;
  next_frame_ = state.next_frame;
  first_kept_ = state.first_kept;
  ready_ = 0;
  kept_.clear();
  kept_f_.clear();
  if (plan_->options.double_precision) {
    kept_ = state.kept;
  } else {
    kept_f_.assign(state.kept.begin(), state.kept.end());
  }
}

}  // namespace mmlm
