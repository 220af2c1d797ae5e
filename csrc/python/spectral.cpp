// Audio features: raw pointers in, the GIL released around the work.
#include "audio/spectral.h"

#include <pybind11/numpy.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "audio/cuda.h"
#include "audio/resample.h"
#include "audio/spectral_device.h"
#include "audio/standardize.h"
#include "audio/stream.h"
#include "core/digest.h"
#include "core/turns.h"
#include "python/arguments.h"

namespace py = pybind11;

namespace mmlm {
namespace {

using Array = py::array_t<double, py::array::c_style | py::array::forcecast>;
using MaybeArray = std::optional<Array>;

std::shared_ptr<SpectralPlan> make_plan(const SpectralOptions& o, const Array& window, const MaybeArray& filters,
                                        const MaybeArray& dct) {
  if (o.frame_length < 1 || o.hop_length < 1 || o.n_fft < o.frame_length || o.n_fft > (1 << 24)) {
    throw py::value_error("frame_length and hop_length must be at least 1 and n_fft from frame_length to 2^24");
  }
  if (o.double_output && !o.double_precision) throw py::value_error("double_output needs double_precision");
  const int bins = o.n_fft / 2 + 1;
  if (window.ndim() != 1 || window.shape(0) != o.frame_length) {
    throw py::value_error("window must be [frame_length = " + std::to_string(o.frame_length) + "]");
  }
  if (filters && (filters->ndim() != 2 || filters->shape(1) != bins || filters->shape(0) < 1)) {
    throw py::value_error("filters must be [num_filters, " + std::to_string(bins) + "]");
  }
  const int num_filters = filters ? static_cast<int>(filters->shape(0)) : bins;
  if (dct && (dct->ndim() != 2 || dct->shape(1) != num_filters || dct->shape(0) < 1)) {
    throw py::value_error("dct must be [num_ceps, " + std::to_string(num_filters) + "]");
  }
  return std::make_shared<SpectralPlan>(o, window.data(), filters ? filters->data() : nullptr, num_filters,
                                        dct ? dct->data() : nullptr, dct ? static_cast<int>(dct->shape(0)) : 0);
}

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

SampleType sample_type(int code) {
  if (code < 0 || code > 3) throw py::value_error("sample type must be 0 (int16), 1 (int32), 2 (float32), 3 (float64)");
  return static_cast<SampleType>(code);
}

// Clips that share a format: clip i has `num_input[i]` samples a channel at address `samples[i]`.
struct Format {
  int type, num_channels;
  int64_t channel_stride, sample_stride;
  std::shared_ptr<Resampler> resampler;
};

// A fake tensor's address, or a meta tensor's.
constexpr const char* kNoMemory = "samples and outputs must have memory, got a null pointer";

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

std::vector<int64_t> run_checked(const SpectralPlan& plan, std::vector<SpectralClip>& clips,
                                 const std::vector<int64_t>& num_samples, const std::vector<int64_t>& num_frames,
                                 int64_t out_stride, int num_threads) {
  const SpectralOptions& o = plan.o;
  for (size_t i = 0; i < clips.size(); ++i) {
    SpectralClip& clip = clips[i];
    if (clip.num_valid > num_samples[i]) throw py::value_error("num_samples must be at least the clip's own");
    clip.num_samples = num_samples[i];
    clip.num_frames = num_frames[i];
    clip.out_stride = out_stride;
    if (clip.num_frames > 0 && clip.out == nullptr) throw py::value_error(kNoMemory);
    if (clip.num_frames < 0 || out_stride < (o.bins_first ? clip.num_frames : plan.num_out)) {
      throw py::value_error("num_frames must be at least 0 and out_stride a row of the output");
    }
    const int64_t end = (clip.num_frames - 1) * o.hop_length + o.offset + o.frame_length;
    if (o.edge == Edge::none && clip.num_frames > 0 && (o.offset < 0 || end > clip.num_samples)) {
      throw py::value_error("frames reach beyond the clip");
    }
  }
  {
    py::gil_scoped_release release;
    spectral_features(plan, clips.data(), static_cast<int64_t>(clips.size()), num_threads);
  }
  std::vector<int64_t> bad;
  for (size_t i = 0; i < clips.size(); ++i) {
    if (!clips[i].finite) bad.push_back(static_cast<int64_t>(i));
  }
  return bad;
}

// Features of clips, zeros up to `num_samples[i]` each, to rows of `out_stride` elements at address `out[i]`.
// Returns the clips whose output is not finite.
std::vector<int64_t> run(const SpectralPlan& plan, const Format& format, const std::vector<uintptr_t>& samples,
                         const std::vector<int64_t>& num_input, const std::vector<int64_t>& num_samples,
                         const std::vector<int64_t>& num_frames, const std::vector<uintptr_t>& out, int64_t out_stride,
                         int num_threads) {
  std::vector<SpectralClip> clips = clips_of(format, samples, num_input);
  if (num_samples.size() != clips.size() || num_frames.size() != clips.size() || out.size() != clips.size()) {
    throw py::value_error("samples, num_samples, num_frames and out must be of one length");
  }
  for (size_t i = 0; i < clips.size(); ++i) clips[i].out = reinterpret_cast<void*>(out[i]);
  return run_checked(plan, clips, num_samples, num_frames, out_stride, num_threads);
}

// The same of dense 1-D arrays, one dtype to all, in rows of one dense array [clips, rows, columns].
std::vector<int64_t> run_rows(const SpectralPlan& plan, const std::vector<py::array>& samples,
                              const std::vector<int64_t>& num_samples, const std::vector<int64_t>& num_frames,
                              py::array out, int num_threads) {
  const size_t n = samples.size();
  if (num_samples.size() != n || num_frames.size() != n) {
    throw py::value_error("samples, num_samples and num_frames must be of one length");
  }
  const bool is_right_type =
      plan.o.double_output ? py::isinstance<py::array_t<double>>(out) : py::isinstance<py::array_t<float>>(out);
  const bool is_dense = (out.flags() & py::array::c_style) != 0 && out.writeable();
  const int64_t most = n == 0 ? 0 : *std::max_element(num_frames.begin(), num_frames.end());
  const int64_t needed = plan.o.bins_first ? plan.num_out : most;
  if (out.ndim() != 3 || out.shape(0) != static_cast<py::ssize_t>(n) || out.shape(1) < needed || !is_right_type ||
      !is_dense) {
    throw py::value_error("out must be a dense array [" + std::to_string(n) + ", at least " + std::to_string(needed) +
                          ", ...] of the plan's output type");
  }
  std::vector<SpectralClip> clips(n);
  for (size_t i = 0; i < n; ++i) {
    const py::array& x = samples[i];
    if (x.ndim() != 1 || (x.flags() & py::array::c_style) == 0) throw py::value_error("samples must be dense and 1-D");
    SpectralClip& clip = clips[i];
    clip.type = py::isinstance<py::array_t<float>>(x)     ? SampleType::float32
                : py::isinstance<py::array_t<double>>(x)  ? SampleType::float64
                : py::isinstance<py::array_t<int16_t>>(x) ? SampleType::int16
                : py::isinstance<py::array_t<int32_t>>(x)
                    ? SampleType::int32
                    : throw py::value_error("samples must be int16, int32, float32 or float64");
    clip.samples = x.data();
    clip.num_input = clip.num_valid = x.shape(0);
    clip.out = static_cast<char*>(out.mutable_data()) + static_cast<int64_t>(i) * out.strides(0);
  }
  return run_checked(plan, clips, num_samples, num_frames, out.shape(2), num_threads);
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

void standardize_all(const std::vector<uintptr_t>& features, const std::vector<int64_t>& num_frames,
                     const std::vector<int64_t>& num_valid, int64_t num_bins, bool is_double, int ddof,
                     double eps_inside, double eps_outside, bool means, bool variances, double padding) {
  if (features.size() != num_frames.size() || features.size() != num_valid.size()) {
    throw py::value_error("features, num_frames and num_valid must be of one length");
  }
  for (size_t i = 0; i < features.size(); ++i) {
    if (num_valid[i] < 0 || num_valid[i] > num_frames[i]) throw py::value_error("num_valid must be in [0, num_frames]");
    if (num_frames[i] * num_bins > 0 && features[i] == 0) throw py::value_error(kNoMemory);
  }
  const Standardize how{ddof, eps_inside, eps_outside, means, variances, padding};
  py::gil_scoped_release release;
  for (size_t i = 0; i < features.size(); ++i) {
    if (is_double) {
      standardize(how, reinterpret_cast<double*>(features[i]), num_frames[i], num_valid[i], num_bins);
    } else {
      standardize(how, reinterpret_cast<float*>(features[i]), num_frames[i], num_valid[i], num_bins);
    }
  }
}

std::vector<int> weight_offsets(const SpectralPlan& plan) {
  std::vector<int> offset(plan.count.size());
  for (size_t m = 1; m < offset.size(); ++m) offset[m] = offset[m - 1] + plan.count[m - 1];
  return offset;
}

// The tables as the CUDA kernel reads them, to be copied to a device in this order.
py::tuple device_tables(const SpectralPlan& plan) {
  const auto array = [](const auto& v) {
    using T = typename std::decay_t<decltype(v)>::value_type;
    return py::array_t<T>(static_cast<py::ssize_t>(v.size()), v.data());
  };
  const SpectralTables<float>& t = plan.f;
  return py::make_tuple(array(t.window), array(t.twiddles), array(t.roots), array(t.unpack), array(t.weights),
                        array(t.dct), array(plan.first_bin), array(plan.count), array(weight_offsets(plan)));
}

SpectralCudaArgs device_args(const SpectralPlan& plan, const std::vector<uintptr_t>& tables) {
  if (plan.o.double_precision || plan.is_400) throw py::value_error("not a plan for CUDA");
  if (tables.size() != 9) throw py::value_error("nine tables expected");
  if (plan.passes.size() > kMaxPasses) throw py::value_error("too many passes");
  const SpectralOptions& o = plan.o;
  SpectralCudaArgs a = {};
  a.frame_length = o.frame_length;
  a.hop_length = o.hop_length;
  a.n_fft = o.n_fft;
  a.num_bins = plan.num_bins;
  a.num_filters = plan.num_filters;
  a.num_ceps = plan.num_ceps;
  a.num_out = plan.num_out;
  a.offset = o.offset;
  a.edge = o.edge;
  a.scale = static_cast<float>(o.scale);
  a.signal_preemphasis = static_cast<float>(o.signal_preemphasis);
  a.frame_preemphasis = static_cast<float>(o.frame_preemphasis);
  a.remove_dc_offset = o.remove_dc_offset;
  a.is_packed = plan.packed;
  a.has_filters = plan.has_filters;
  a.bins_first = o.bins_first;
  a.raw_energy = o.raw_energy;
  a.spectrum = plan.spectrum;
  a.exponent = static_cast<float>(o.exponent);
  a.power_add = static_cast<float>(o.power_add);
  a.power_floor = static_cast<float>(o.power_floor);
  a.add = static_cast<float>(o.add);
  a.floor = static_cast<float>(o.floor);
  a.multiply = static_cast<float>(o.multiply);
  a.shift = static_cast<float>(o.shift);
  a.dynamic_range = static_cast<float>(o.dynamic_range);
  a.energy_floor = static_cast<float>(o.energy_floor);
  a.log = o.log;
  a.energy = o.energy;
  a.dft_length = plan.dft_length;
  a.num_passes = static_cast<int>(plan.passes.size());
  std::copy(plan.passes.begin(), plan.passes.end(), a.passes);
  for (int i = 0; i < a.num_passes; ++i) {
    const auto stride = static_cast<uint64_t>(a.passes[i].stride);
    a.stride_inverse[i] = stride == 1 ? 0 : static_cast<uint32_t>((uint64_t{1} << 32) / stride + 1);
  }
  a.window = reinterpret_cast<const float*>(tables[0]);
  a.twiddles = reinterpret_cast<const float*>(tables[1]);
  a.roots = reinterpret_cast<const float*>(tables[2]);
  a.unpack = reinterpret_cast<const float*>(tables[3]);
  a.weights = reinterpret_cast<const float*>(tables[4]);
  a.dct = reinterpret_cast<const float*>(tables[5]);
  a.first_bin = reinterpret_cast<const int32_t*>(tables[6]);
  a.count = reinterpret_cast<const int32_t*>(tables[7]);
  a.weight_offset = reinterpret_cast<const int32_t*>(tables[8]);
  // Several frames a block keep its threads busy; 48 KB is what every device gives without being asked.
  constexpr int kSharedFloats = 48 * 1024 / 4 - 64;
  a.frames_per_block = kMostFrames;
  while (a.frames_per_block > 1 && a.frames_per_block * a.floats_per_frame() > kSharedFloats) a.frames_per_block /= 2;
  return a;
}

// Bytes of shared memory a block needs.
int64_t device_bytes(const SpectralPlan& plan) {
  const SpectralCudaArgs a = device_args(plan, std::vector<uintptr_t>(9));
  return static_cast<int64_t>(a.frames_per_block) * a.floats_per_frame() * 4;
}

// Clips of mono float32 or int16 samples, all pointers on the device, or all on the host when `on_host`.
void run_device(const SpectralPlan& plan, const std::vector<uintptr_t>& tables, const std::vector<uintptr_t>& samples,
                const std::vector<int64_t>& num_valid, const std::vector<int64_t>& num_samples,
                const std::vector<int64_t>& num_frames, const std::vector<uintptr_t>& out, int64_t sample_stride,
                bool is_int16, int out_type, int64_t out_stride, uintptr_t clip_max, uintptr_t stream, int device,
                bool on_host) {
  SpectralCudaArgs args = device_args(plan, tables);
  const size_t n = samples.size();
  if (num_valid.size() != n || num_samples.size() != n || num_frames.size() != n || out.size() != n) {
    throw py::value_error("samples, num_valid, num_samples, num_frames and out must be of one length");
  }
  if (out_type < 0 || out_type > 2 || (on_host && out_type != 0)) throw py::value_error("no such output type");
  args.is_int16 = is_int16;
  args.out_type = static_cast<OutType>(out_type);
  args.out_stride = out_stride;
  args.clip_max = reinterpret_cast<uint32_t*>(clip_max);
  std::vector<DeviceClip> clips(n);
  for (size_t i = 0; i < n; ++i) {
    clips[i] = {reinterpret_cast<const void*>(samples[i]),
                sample_stride,
                num_valid[i],
                num_samples[i],
                num_frames[i],
                reinterpret_cast<void*>(out[i])};
  }
  int error = 0;
  {
    py::gil_scoped_release release;
    if (on_host) {
      spectral_on_host(args, clips.data(), static_cast<int64_t>(n));
    } else {
      error = spectral_cuda(args, clips.data(), static_cast<int64_t>(n), reinterpret_cast<void*>(stream), device);
    }
  }
  if (error != 0) throw std::runtime_error(std::string("spectral features on CUDA: ") + cuda_error_text(error));
}

py::tuple stream_state(const SpectralStream& stream) {
  const SpectralStream::State state = stream.state();
  return py::make_tuple(state.received, state.next_frame, state.first_kept,
                        py::array_t<double>(static_cast<py::ssize_t>(state.kept.size()), state.kept.data()));
}

void set_stream_state(SpectralStream& stream, int64_t received, int64_t next_frame, int64_t first_kept,
                      const Array& kept) {
  if (received < 0 || next_frame < 0 || first_kept < 0 || first_kept + kept.size() < received) {
    throw py::value_error("not the state of a stream");
  }
  stream.set_state({received, next_frame, first_kept, {kept.data(), kept.data() + kept.size()}});
}

void bind_options(py::module_& m) {
  py::enum_<Edge>(m, "Edge")
      .value("none", Edge::none)
      .value("zero", Edge::zero)
      .value("reflect", Edge::reflect)
      .value("mirror", Edge::mirror);
  py::enum_<Log>(m, "Log").value("none", Log::none).value("natural", Log::natural).value("decimal", Log::decimal);
  py::enum_<Energy>(m, "Energy")
      .value("none", Energy::none)
      .value("first", Energy::first)
      .value("last", Energy::last)
      .value("replace_first", Energy::replace_first)
      .value("replace_last", Energy::replace_last);
  using O = SpectralOptions;
  py::class_<O>(m, "SpectralOptions")
      .def(py::init<>())
      .def_readwrite("frame_length", &O::frame_length)
      .def_readwrite("hop_length", &O::hop_length)
      .def_readwrite("n_fft", &O::n_fft)
      .def_readwrite("offset", &O::offset)
      .def_readwrite("edge", &O::edge)
      .def_readwrite("scale", &O::scale)
      .def_readwrite("signal_preemphasis", &O::signal_preemphasis)
      .def_readwrite("frame_preemphasis", &O::frame_preemphasis)
      .def_readwrite("remove_dc_offset", &O::remove_dc_offset)
      .def_readwrite("exponent", &O::exponent)
      .def_readwrite("power_add", &O::power_add)
      .def_readwrite("power_floor", &O::power_floor)
      .def_readwrite("round_spectrum", &O::round_spectrum)
      .def_readwrite("add", &O::add)
      .def_readwrite("floor", &O::floor)
      .def_readwrite("log", &O::log)
      .def_readwrite("multiply", &O::multiply)
      .def_readwrite("shift", &O::shift)
      .def_readwrite("dynamic_range", &O::dynamic_range)
      .def_readwrite("energy", &O::energy)
      .def_readwrite("raw_energy", &O::raw_energy)
      .def_readwrite("energy_floor", &O::energy_floor)
      .def_readwrite("bins_first", &O::bins_first)
      .def_readwrite("double_precision", &O::double_precision)
      .def_readwrite("double_output", &O::double_output)
      .def_readwrite("prime_factor_400", &O::prime_factor_400);
}

py::tuple digest(const py::array& table) {
  if ((table.flags() & py::array::c_style) == 0) throw py::value_error("a table must be dense");
  const Digest found = digest_of(static_cast<const unsigned char*>(table.data()), table.nbytes());
  return py::make_tuple(found.high, found.low);
}

uintptr_t address_of(const py::array& array) { return reinterpret_cast<uintptr_t>(array.data()); }

}  // namespace

void bind_spectral(py::module_& m) {
  py::class_<Resampler, std::shared_ptr<Resampler>>(m, "Resampler")
      .def(py::init(&resampler_from_table))
      .def(py::init(&resampler_without_table))
      .def("num_output", &Resampler::num_output)
      .def_property_readonly("num_bytes", &Resampler::num_bytes);
  bind_options(m);
  py::class_<Format>(m, "Format").def(py::init<int, int, int64_t, int64_t, std::shared_ptr<Resampler>>());
  py::class_<SpectralPlan, std::shared_ptr<SpectralPlan>>(m, "SpectralPlan")
      .def(py::init(&make_plan), py::arg("options"), py::arg("window"), py::arg("filters") = py::none(),
           py::arg("dct") = py::none())
      .def_readonly("num_out", &SpectralPlan::num_out)
      .def_readonly("largest_sample", &SpectralPlan::largest_sample)
      .def_property_readonly("num_bytes", &SpectralPlan::num_bytes)
      .def_property_readonly("bins_first", [](const SpectralPlan& p) { return p.o.bins_first; })
      .def_property_readonly("double_precision", [](const SpectralPlan& p) { return p.o.double_precision; })
      .def_property_readonly("double_output", [](const SpectralPlan& p) { return p.o.double_output; })
      .def("run", &run)
      .def("run_rows", &run_rows)
      .def("device_tables", &device_tables)
      .def("device_bytes", &device_bytes)
      .def("run_device", &run_device);
  py::class_<SpectralStream>(m, "SpectralStream")
      .def(py::init(
          [](std::shared_ptr<SpectralPlan> plan) { return std::make_unique<SpectralStream>(std::move(plan)); }))
      .def("push",
           [](SpectralStream& s, uintptr_t samples, int type, int64_t count) {
             const SampleType checked = sample_type(type);
             if (count > 0 && samples == 0) throw py::value_error(kNoMemory);
             py::gil_scoped_release release;
             const int64_t ready = s.push(reinterpret_cast<const void*>(samples), checked, count);
             if (ready == SpectralStream::kNotFinite) {
               throw py::value_error("samples must be finite, got NaN or infinity");
             }
             if (ready == SpectralStream::kTooLarge) {
               throw py::value_error("samples must not be too large for their squares, got an overflow");
             }
             return ready;
           })
      .def("finish", &SpectralStream::finish)
      .def("pull",
           [](SpectralStream& s, uintptr_t out, int64_t out_stride, int64_t count) {
             if (count > 0 && out == 0) throw py::value_error(kNoMemory);
             py::gil_scoped_release release;
             return s.pull(reinterpret_cast<void*>(out), out_stride, count);
           })
      .def_property_readonly("num_received", &SpectralStream::num_received)
      .def_property_readonly("next_frame", &SpectralStream::next_frame)
      .def("state", &stream_state)
      .def("set_state", &set_stream_state);
  m.def("read_samples", &read_all);
  m.def("read_range", &read_range);
  m.def("standardize", &standardize_all);
  m.def("digest", &digest);
  m.def("turns", [] {
    const TurnCounts counts = turn_counts();
    py::dict out;
    out["running"] = counts.running;
    out["taken"] = counts.taken;
    out["waited"] = counts.waited;
    out["helped"] = counts.helped;
    return out;
  });
  m.def("address_of", &address_of);
}

}  // namespace mmlm
