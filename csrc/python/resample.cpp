// Samples read, mixed down and resampled: raw pointers in, the GIL released around the work.
#include "audio/resample.h"

#include <string>

#include "python/audio.h"

namespace py = pybind11;

namespace mmlm {

SampleType sample_type(int code) {
  if (code < 0 || code > 3) throw py::value_error("sample type must be 0 (int16), 1 (int32), 2 (float32), 3 (float64)");
  return static_cast<SampleType>(code);
}

std::vector<SpectralClip> clips_of(const Format& format, const std::vector<uintptr_t>& samples,
                                   const std::vector<int64_t>& num_input) {
  if (samples.size() != num_input.size()) throw py::value_error("samples and num_input must be of one length");
  if (format.num_channels < 1) throw py::value_error("num_channels must be at least 1");
  std::vector<SpectralClip> clips(samples.size());
  for (size_t i = 0; i < clips.size(); ++i) {
    SpectralClip& clip = clips[i];
    if (num_input[i] < 0) throw py::value_error("num_input must not be negative");
    clip.samples = reinterpret_cast<const void*>(samples[i]);
    clip.type = sample_type(format.type);
    clip.num_channels = format.num_channels;
    clip.channel_stride = format.channel_stride;
    clip.sample_stride = format.sample_stride;
    clip.resampler = format.resampler.get();
    clip.num_input = num_input[i];
    if (num_input[i] > 0 && samples[i] == 0) throw py::value_error(kNoMemory);
    clip.num_valid = clip.resampler != nullptr ? clip.resampler->num_output(num_input[i]) : num_input[i];
  }
  return clips;
}

namespace {

using Indices = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

std::shared_ptr<Resampler> resampler_from_table(int64_t old_rate, int64_t new_rate, const Array& taps,
                                                const Indices& first) {
  if (old_rate < 1 || new_rate < 1) throw py::value_error("rates must be at least 1");
  if (taps.ndim() != 2 || taps.shape(0) != new_rate || taps.shape(1) < 1 || first.size() != new_rate) {
    throw py::value_error("taps must be [new_rate, num_taps], and first [new_rate]");
  }
  return std::make_shared<Resampler>(old_rate, new_rate, taps.data(), taps.shape(1), first.data());
}

std::shared_ptr<Resampler> resampler_without_table(int64_t old_rate, int64_t new_rate, int64_t width, double rolloff,
                                                   double beta) {
  constexpr int64_t limit = int64_t{1} << 31;  // products of rates fit 64 bits
  if (old_rate < 1 || new_rate < 1 || old_rate >= limit || new_rate >= limit) {
    throw py::value_error("rates must be from 1 to 2^31 - 1");
  }
  if (width < 1 || width > 65536 || !(rolloff > 0 && rolloff <= 1))
    throw py::value_error("width or rolloff out of range");
  return std::make_shared<Resampler>(old_rate, new_rate, SincFilter{rolloff, beta, width});
}

// Samples converted, mixed down and resampled, to address `out[i]` as float32 or float64.
void read_all(const Format& format, const std::vector<uintptr_t>& samples, const std::vector<int64_t>& num_input,
              const std::vector<uintptr_t>& out, bool is_double, int num_threads) {
  std::vector<SpectralClip> clips = clips_of(format, samples, num_input);
  if (out.size() != clips.size()) throw py::value_error("samples and out must be of one length");
  for (size_t i = 0; i < clips.size(); ++i) {
    if (clips[i].num_valid > 0 && out[i] == 0) throw py::value_error(kNoMemory);
    clips[i].out = reinterpret_cast<void*>(out[i]);
  }
  py::gil_scoped_release release;
  read_samples(clips.data(), static_cast<int64_t>(clips.size()), 0, is_double, num_threads);
}

// The same for samples [first, first + count) of a signal of which `num_input` are in memory, from `first_input` on.
void read_range(const Format& format, uintptr_t samples, int64_t first_input, int64_t num_input, int64_t first,
                int64_t count, uintptr_t out, bool is_double, int num_threads) {
  if (first_input < 0 || first < 0 || count < 0) throw py::value_error("a range of samples must not be negative");
  SpectralClip clip = clips_of(format, {samples}, {num_input})[0];
  if (clip.resampler == nullptr && (first < first_input || first + count > first_input + num_input)) {
    throw py::value_error("the range is not in memory");
  }
  if (count > 0 && out == 0) throw py::value_error(kNoMemory);
  clip.first_sample = first_input;
  clip.num_valid = first + count;
  clip.out = reinterpret_cast<void*>(out);
  py::gil_scoped_release release;
  read_samples(&clip, 1, first, is_double, num_threads);
}

}  // namespace

void bind_resample(py::module_& m) {
  py::class_<Resampler, std::shared_ptr<Resampler>>(m, "Resampler")
      .def(py::init(&resampler_from_table))
      .def(py::init(&resampler_without_table))
      .def("num_output", &Resampler::num_output)
      .def_property_readonly("num_bytes", &Resampler::num_bytes);
  py::class_<Format>(m, "Format").def(py::init<int, int, int64_t, int64_t, std::shared_ptr<Resampler>>());
  m.def("read_samples", &read_all);
  m.def("read_range", &read_range);
}

}  // namespace mmlm
