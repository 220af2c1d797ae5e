// How Python hands over tensors: addresses as integers, rows and heads as tuples of them.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <utility>

#include "core/arguments.h"

namespace mmlm {

// `name` in Python is `function`, which runs without the GIL.
template <typename Function>
void bind(pybind11::module_& m, const char* name, Function function) {
  m.def(name, function, pybind11::call_guard<pybind11::gil_scoped_release>());
}

void bind_attention(pybind11::module_& m);
void bind_glue(pybind11::module_& m);
void bind_loss(pybind11::module_& m);
void bind_resample(pybind11::module_& m);
void bind_spectral(pybind11::module_& m);
void bind_stream(pybind11::module_& m);

}  // namespace mmlm

namespace pybind11::detail {

// 0: not given.
template <>
struct type_caster<mmlm::Address> {
  PYBIND11_TYPE_CASTER(mmlm::Address, const_name("int"));
  bool load(handle given, bool convert) {
    make_caster<uintptr_t> address;
    if (!address.load(given, convert)) return false;
    value.data = reinterpret_cast<void*>(cast_op<uintptr_t>(address));
    return true;
  }
};

// (address, stride)
template <>
struct type_caster<mmlm::Rows> {
  PYBIND11_TYPE_CASTER(mmlm::Rows, const_name("tuple[int, int]"));
  bool load(handle given, bool convert) {
    make_caster<std::pair<mmlm::Address, int64_t>> rows;
    if (!rows.load(given, convert)) return false;
    const auto [address, stride] = cast_op<std::pair<mmlm::Address, int64_t>>(rows);
    value = {address.data, stride};
    return true;
  }
};

// (address, strides of batch, heads and length)
template <>
struct type_caster<mmlm::Heads> {
  PYBIND11_TYPE_CASTER(mmlm::Heads, const_name("tuple[int, int, int, int]"));
  bool load(handle given, bool convert) {
    using Four = std::tuple<mmlm::Address, int64_t, int64_t, int64_t>;
    make_caster<Four> heads;
    if (!heads.load(given, convert)) return false;
    const auto [address, stride_b, stride_h, stride_s] = cast_op<Four>(heads);
    value = {address.data, stride_b, stride_h, stride_s};
    return true;
  }
};

template <>
struct type_caster<mmlm::Number> {
  PYBIND11_TYPE_CASTER(mmlm::Number, const_name("int"));
  bool load(handle given, bool convert) {
    make_caster<int> type;
    if (!type.load(given, convert)) return false;
    const int number = cast_op<int>(type);
    if (number != 0 && number != 1) throw value_error("type must be 0 (float32) or 1 (bfloat16)");
    value = static_cast<mmlm::Number>(number);
    return true;
  }
};

}  // namespace pybind11::detail
