// Features of a signal that arrives in pieces.
#include "audio/stream.h"

#include "python/audio.h"

namespace py = pybind11;

namespace mmlm {
namespace {

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

}  // namespace

void bind_stream(py::module_& m) {
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
}

}  // namespace mmlm
