// What the bindings of the audio core share.
#pragma once
#include <pybind11/numpy.h>

#include <memory>
#include <optional>
#include <vector>

#include "audio/resample.h"
#include "audio/spectral.h"
#include "python/arguments.h"

namespace mmlm {

using Array = pybind11::array_t<double, pybind11::array::c_style | pybind11::array::forcecast>;
using MaybeArray = std::optional<Array>;

// A fake tensor's address, or a meta tensor's.
inline constexpr const char* kNoMemory = "samples and outputs must have memory, got a null pointer";

// Clips that share a format: clip i has `num_input[i]` samples a channel at address `samples[i]`.
struct Format {
  int type, num_channels;
  int64_t channel_stride, sample_stride;
  std::shared_ptr<Resampler> resampler;
};

// The sample type of a code, or an error.
SampleType sample_type(int code);

// Clip i has `num_input[i]` samples a channel at address `samples[i]`.
std::vector<SpectralClip> clips_of(const Format& format, const std::vector<uintptr_t>& samples,
                                   const std::vector<int64_t>& num_input);

// Adds what runs on a GPU.
void bind_device(pybind11::class_<SpectralPlan, std::shared_ptr<SpectralPlan>>& plan);

}  // namespace mmlm
