// Rows of patches gathered, normalised and joined. Floor: each number read once, written once.
#pragma once
#include "core/tensor.h"
#include "glue/norm.h"

namespace mmlm {

enum class NormAt { none = 0, before = 1, after = 2 };

struct Gather {
  Number type = Number::float32;
  int64_t rows = 0, size = 0;      // of the output and of one input row
  int parts = 1;                   // input rows of an output row
  const int64_t* index = nullptr;  // [rows, parts]
  bool channels_first = false;     // [size, parts] within an output row, else [parts, size]
  NormAt norm_at = NormAt::none;   // of each input row or of the whole output row
  Norm norm;
  Rows x, out;
  bool stream = false;
};

}  // namespace mmlm

#if defined(MMLM_ISA)
#include "core/transpose.h"
#include "glue/rows.inl"

namespace mmlm::MMLM_ISA {
namespace {

template <typename T>
void gather_rows(const Gather& g, int64_t first, int64_t last) {
  const int64_t total = g.parts * g.size;
  float* v = scratch(total, 2);
  float* turned = v + round_up(total);
  const bool plain = g.norm_at == NormAt::none && !g.channels_first;
  for (int64_t r = first; r < last; ++r) {
    const int64_t* index = g.index + r * g.parts;
    T* out = row_of<T>(g.out, r);
    for (int k = 0; k < g.parts; ++k) {
      const T* x = row_of<T>(g.x, index[k]);
      float* part = v + k * g.size;
      if (plain) {
        copy_row(x, g.size, out + k * g.size, g.stream);
        continue;
      }
      to_floats(x, g.size, part);
      if (g.norm_at == NormAt::before) {
        const Stats s = stats_of(part, g.size, g.norm.is_layer, g.norm.eps);
        if (g.channels_first) {
          normalise(part, g.size, g.norm, s, part);
        } else {
          normalise(part, g.size, g.norm, s, out + k * g.size, g.stream);
        }
      }
    }
    if (plain || (g.norm_at == NormAt::before && !g.channels_first)) continue;
    const float* row = v;
    if (g.channels_first) {
      transpose(v, g.size, g.parts, g.size, turned, g.parts);
      row = turned;
    }
    if (g.norm_at == NormAt::after) {
      normalise(row, total, g.norm, stats_of(row, total, g.norm.is_layer, g.norm.eps), out, g.stream);
    } else {
      from_floats(row, total, out, g.stream);
    }
  }
}

template <typename T>
void gather_backward_rows(const Gather& g, const Rows& grads, const Rows& dxs, int64_t first, int64_t last,
                          float* dweight, float* dbias) {
  const int64_t total = g.parts * g.size, padded = round_up(total);
  float* v = scratch(total, 3);
  float *d = v + padded, *turned = d + padded;
  for (int64_t r = first; r < last; ++r) {
    const int64_t* index = g.index + r * g.parts;
    if (g.norm_at == NormAt::none && !g.channels_first) {
      for (int k = 0; k < g.parts; ++k) {
        copy_row(row_of<T>(grads, r) + k * g.size, g.size, row_of<T>(dxs, index[k]), g.stream);
      }
      continue;
    }
    to_floats(row_of<T>(grads, r), total, d);
    if (g.norm_at == NormAt::after) {
      float* into = g.channels_first ? turned : v;
      for (int k = 0; k < g.parts; ++k) to_floats(row_of<T>(g.x, index[k]), g.size, into + k * g.size);
      if (g.channels_first) transpose(turned, g.size, g.parts, g.size, v, g.parts);
      norm_backward(v, d, total, g.norm, stats_of(v, total, g.norm.is_layer, g.norm.eps), dweight, dbias);
    }
    float* parts = d;
    if (g.channels_first) {
      transpose(d, g.parts, g.size, g.parts, turned, g.size);
      parts = turned;
    }
    for (int k = 0; k < g.parts; ++k) {
      float* part = parts + k * g.size;
      if (g.norm_at == NormAt::before) {
        to_floats(row_of<T>(g.x, index[k]), g.size, v);
        norm_backward(v, part, g.size, g.norm, stats_of(v, g.size, g.norm.is_layer, g.norm.eps), dweight, dbias);
      }
      from_floats(part, g.size, row_of<T>(dxs, index[k]), g.stream);
    }
  }
}

}  // namespace

void norm_pixel_shuffle_fwd(const Gather& g, int64_t first, int64_t last) {
  MMLM_BY_TYPE(g.type, gather_rows, g, first, last);
}

void norm_pixel_shuffle_bwd(const Gather& g, const Rows& grad, const Rows& dx, int64_t first, int64_t last,
                            float* dweight, float* dbias) {
  MMLM_BY_TYPE(g.type, gather_backward_rows, g, grad, dx, first, last, dweight, dbias);
}

}  // namespace mmlm::MMLM_ISA
#else
#include "glue/tasks.h"

namespace mmlm {

MMLM_KERNEL(void, norm_pixel_shuffle_fwd, const Gather&, int64_t, int64_t)
MMLM_KERNEL(void, norm_pixel_shuffle_bwd, const Gather&, const Rows&, const Rows&, int64_t, int64_t, float*, float*)

// norm_at: 0 none, 1 each input row, 2 the output row.
inline Gather gather_of(Number type, int64_t rows, int64_t size, int parts, Address index, bool channels_first,
                        int norm_at, bool is_layer, Address weight, Address bias, float eps, Rows x, Rows out) {
  if (parts < 1) throw std::invalid_argument("parts must be at least 1");
  const auto at = enum_of<NormAt>("norm_at", norm_at, 3);
  return {type, rows, size, parts, index, channels_first, at, {is_layer, weight, bias, eps}, x, out};
}

inline void norm_pixel_shuffle_fwd(Number type, int64_t rows, int64_t size, int parts, Address index,
                                   bool channels_first, int norm_at, bool is_layer, Address weight, Address bias,
                                   float eps, Rows x, Rows out, int num_threads) {
  const auto run = MMLM_PICK(norm_pixel_shuffle_fwd);
  Gather g = gather_of(type, rows, size, parts, index, channels_first, norm_at, is_layer, weight, bias, eps, x, out);
  g.stream = expect_outputs(type, rows, size * parts, {out.data});
  for_rows(rows, size * parts, num_threads, [&](int64_t first, int64_t last) { run(g, first, last); });
}

inline void norm_pixel_shuffle_bwd(Number type, int64_t rows, int64_t size, int parts, Address index,
                                   bool channels_first, int norm_at, bool is_layer, Address weight, float eps, Rows x,
                                   Rows grad, Rows dx, Address dweight, Address dbias, int num_threads) {
  const auto run = MMLM_PICK(norm_pixel_shuffle_bwd);
  Gather g = gather_of(type, rows, size, parts, index, channels_first, norm_at, is_layer, weight, {}, eps, x, {});
  g.stream = expect_outputs(type, rows, size * parts, {dx.data});
  const bool is_after = g.norm_at == NormAt::after;
  const int64_t width = is_after ? size * parts : size, terms = is_after ? 1 : parts;
  sum_rows(rows, size * parts, width, terms, {dweight, dbias}, num_threads,
           [&](int64_t first, int64_t last, float* sums) {
             run(g, grad, dx, first, last, sums, sums == nullptr ? nullptr : sums + width);
           });
}

}  // namespace mmlm
#endif
