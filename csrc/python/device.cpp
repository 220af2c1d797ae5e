// The audio kernel on a GPU, and its code on the host.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "audio/cuda.h"
#include "audio/spectral_device.h"
#include "python/audio.h"

namespace py = pybind11;

namespace mmlm {
namespace {

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
  const SpectralTables<float>& t = plan.float32;
  return py::make_tuple(array(t.window), array(t.twiddles), array(t.roots), array(t.unpack), array(t.weights),
                        array(t.dct), array(plan.first_bin), array(plan.count), array(weight_offsets(plan)));
}

SpectralCudaArgs device_args(const SpectralPlan& plan, const std::vector<uintptr_t>& tables) {
  if (plan.options.double_precision || plan.is_400) throw py::value_error("not a plan for CUDA");
  if (tables.size() != 9) throw py::value_error("nine tables expected");
  if (plan.passes.size() > kMaxPasses) throw py::value_error("too many passes");
  const SpectralOptions& o = plan.options;
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

}  // namespace

void bind_device(py::class_<SpectralPlan, std::shared_ptr<SpectralPlan>>& plan) {
  plan.def("device_tables", &device_tables).def("device_bytes", &device_bytes).def("run_device", &run_device);
}

}  // namespace mmlm
