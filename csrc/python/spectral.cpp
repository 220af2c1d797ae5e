// Plans of audio features and their runs: raw pointers and arrays in, the GIL released around the work.
#include "audio/spectral.h"

#include <algorithm>
#include <string>

#include "audio/standardize.h"
#include "core/digest.h"
#include "core/turns.h"
#include "python/audio.h"

namespace py = pybind11;

namespace mmlm {
namespace {

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

std::vector<int64_t> run_checked(const SpectralPlan& plan, std::vector<SpectralClip>& clips,
                                 const std::vector<int64_t>& num_samples, const std::vector<int64_t>& num_frames,
                                 int64_t out_stride, int num_threads) {
  const SpectralOptions& o = plan.options;
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
      plan.options.double_output ? py::isinstance<py::array_t<double>>(out) : py::isinstance<py::array_t<float>>(out);
  const bool is_dense = (out.flags() & py::array::c_style) != 0 && out.writeable();
  const int64_t most = n == 0 ? 0 : *std::max_element(num_frames.begin(), num_frames.end());
  const int64_t needed = plan.options.bins_first ? plan.num_out : most;
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
  bind_options(m);
  py::class_<SpectralPlan, std::shared_ptr<SpectralPlan>> plan(m, "SpectralPlan");
  plan.def(py::init(&make_plan), py::arg("options"), py::arg("window"), py::arg("filters") = py::none(),
           py::arg("dct") = py::none())
      .def_readonly("num_out", &SpectralPlan::num_out)
      .def_readonly("largest_sample", &SpectralPlan::largest_sample)
      .def_property_readonly("num_bytes", &SpectralPlan::num_bytes)
      .def_property_readonly("bins_first", [](const SpectralPlan& p) { return p.options.bins_first; })
      .def_property_readonly("double_precision", [](const SpectralPlan& p) { return p.options.double_precision; })
      .def_property_readonly("double_output", [](const SpectralPlan& p) { return p.options.double_output; })
      .def("run", &run)
      .def("run_rows", &run_rows);
  bind_device(plan);
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
