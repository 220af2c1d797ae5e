// Floor: each head read and written once. A head is widened into scratch, where pairs that rotate lie `half` apart.
#pragma once
#include <array>

#include "core/tensor.h"
#include "glue/norm.h"

namespace mmlm {

struct Rope {
  Number type = Number::float32;
  int64_t batch = 0, heads = 0, length = 0;
  int size = 0, half = 0;                      // of a head; pairs that rotate, 2 * half <= size
  bool interleaved = false;                    // pairs are neighbours, else half a rotary size apart
  bool inverse = false;                        // rotate the other way
  const float *cos = nullptr, *sin = nullptr;  // [1 or batch, length, half] dense
  int64_t table_stride = 0;                    // 0 where one table serves all samples
  bool has_norm = false;
  const float* weight = nullptr;  // [size]
  float eps = 0;
  Heads x, out;
  bool stream = false;
};

}  // namespace mmlm

#if defined(MMLM_ISA)
#include "glue/rows.inl"

namespace mmlm::MMLM_ISA {
namespace {

template <typename T>
const T* head_of(const Heads& h, int64_t b, int64_t head, int64_t s) {
  return static_cast<const T*>(h.data) + b * h.stride_b + head * h.stride_h + s * h.stride_s;
}

// v[0, 2 * half) by cos and sin; the rest of the head stays.
MMLM_INLINE void rotate(float* v, const Rope& r, const float* cos, const float* sin, bool inverse) {
  const float sign = inverse ? -1.f : 1.f;
  if (r.interleaved) {
    for (int i = 0; i < r.half; ++i) {
      const float a = v[2 * i], b = v[2 * i + 1], s = sign * sin[i];
      v[2 * i] = a * cos[i] - b * s;
      v[2 * i + 1] = b * cos[i] + a * s;
    }
    return;
  }
  vectors(r.half, [&](int64_t i, int64_t n) {
    const V a = load_part(v + i, n), b = load_part(v + r.half + i, n);
    const V c = load_part(cos + i, n), s = sign * load_part(sin + i, n);
    store_part(v + i, a * c - b * s, n);
    store_part(v + r.half + i, b * c + a * s, n);
  });
}

// Without a norm, pairs half apart and whole vectors: no scratch.
template <typename T>
MMLM_INLINE void rotate_whole(const T* x, T* out, const Rope& r, const float* cos, const float* sin, float sign) {
  const bool stream = streams(out, r.stream) && streams(out + r.half, r.stream);
  for (int i = 0; i < r.half; i += kLanes) {
    const V a = load_floats(x + i), b = load_floats(x + r.half + i), c = load(cos + i), s = sign * load(sin + i);
    store_out(out + i, a * c - b * s, kLanes, stream);
    store_out(out + r.half + i, b * c + a * s, kLanes, stream);
  }
  if (2 * r.half < r.size && x != out) std::memcpy(out + 2 * r.half, x + 2 * r.half, (r.size - 2 * r.half) * sizeof(T));
}

// Tokens [first, last) of batch * length.
template <typename T>
void rope_tokens(const Rope& r, int64_t first, int64_t last) {
  float* v = scratch(r.size, 1);
  const Norm norm{false, r.weight, nullptr, r.eps};
  const bool whole = !r.has_norm && !r.interleaved && r.half % kLanes == 0;
  for (int64_t t = first; t < last; ++t) {
    const int64_t b = t / r.length, s = t % r.length;
    const float *cos = r.cos + b * r.table_stride + s * r.half, *sin = r.sin + b * r.table_stride + s * r.half;
    for (int64_t h = 0; h < r.heads; ++h) {
      const T* x = head_of<T>(r.x, b, h, s);
      T* out = const_cast<T*>(head_of<T>(r.out, b, h, s));
      if (whole) {
        rotate_whole(x, out, r, cos, sin, r.inverse ? -1.f : 1.f);
        continue;
      }
      to_floats(x, r.size, v);
      if (r.has_norm) normalise(v, r.size, norm, stats_of(v, r.size, false, r.eps), v);
      rotate(v, r, cos, sin, r.inverse);
      from_floats(v, r.size, out, r.stream);
    }
  }
}

template <typename T>
void rope_backward_tokens(const Rope& r, const Heads& grads, int64_t first, int64_t last, float* dweight) {
  float *v = scratch(r.size, 2), *g = v + round_up(r.size);
  const Norm norm{false, r.weight, nullptr, r.eps};
  for (int64_t t = first; t < last; ++t) {
    const int64_t b = t / r.length, s = t % r.length;
    const float *cos = r.cos + b * r.table_stride + s * r.half, *sin = r.sin + b * r.table_stride + s * r.half;
    for (int64_t h = 0; h < r.heads; ++h) {
      to_floats(head_of<T>(grads, b, h, s), r.size, g);
      rotate(g, r, cos, sin, !r.inverse);
      to_floats(head_of<T>(r.x, b, h, s), r.size, v);
      norm_backward(v, g, r.size, norm, stats_of(v, r.size, false, r.eps), dweight, nullptr);
      from_floats(g, r.size, const_cast<T*>(head_of<T>(r.out, b, h, s)), r.stream);
    }
  }
}

}  // namespace

void qk_norm_rope_fwd(const Rope& r, int64_t first, int64_t last) { MMLM_BY_TYPE(r.type, rope_tokens, r, first, last); }

void qk_norm_rope_bwd(const Rope& r, const Heads& grad, int64_t first, int64_t last, float* dweight) {
  MMLM_BY_TYPE(r.type, rope_backward_tokens, r, grad, first, last, dweight);
}

}  // namespace mmlm::MMLM_ISA
#else
#include "glue/tasks.h"

namespace mmlm {

MMLM_KERNEL(void, qk_norm_rope_fwd, const Rope&, int64_t, int64_t)
MMLM_KERNEL(void, qk_norm_rope_bwd, const Rope&, const Heads&, int64_t, int64_t, float*)

// sizes: batch, heads, length, head size, half. Without a norm eps is negative.
inline Rope rope_of(Number type, const std::array<int64_t, 5>& sizes, bool interleaved, bool inverse, Address cos,
                    Address sin, int64_t table_stride, Address weight, float eps, Heads x, Heads out) {
  const auto [batch, heads, length, size, half] = sizes;
  if (half < 0 || 2 * half > size) throw std::invalid_argument("tables must not be wider than half a head");
  return {type,
          batch,
          heads,
          length,
          static_cast<int>(size),
          static_cast<int>(half),
          interleaved,
          inverse,
          cos,
          sin,
          table_stride,
          eps >= 0,
          weight,
          eps,
          x,
          out,
          expect_outputs(type, batch * length, heads * size, {out.data})};
}

inline void qk_norm_rope_fwd(Number type, const std::array<int64_t, 5>& sizes, bool interleaved, bool inverse,
                             Address cos, Address sin, int64_t table_stride, Address weight, float eps, Heads x,
                             Heads out, int num_threads) {
  const auto run = MMLM_PICK(qk_norm_rope_fwd);
  const Rope r = rope_of(type, sizes, interleaved, inverse, cos, sin, table_stride, weight, eps, x, out);
  for_rows(r.batch * r.length, r.heads * r.size, num_threads,
           [&](int64_t first, int64_t last) { run(r, first, last); });
}

// x is the input of the forward pass (unused without a norm), dx its gradient, written; `grad` that of the output.
inline void qk_norm_rope_bwd(Number type, const std::array<int64_t, 5>& sizes, bool interleaved, Address cos,
                             Address sin, int64_t table_stride, Address weight, float eps, Heads x, Heads dx,
                             Heads grad, Address dweight, int num_threads) {
  const auto run = MMLM_PICK(qk_norm_rope_bwd);
  const Rope r = rope_of(type, sizes, interleaved, false, cos, sin, table_stride, weight, eps, x, dx);
  sum_rows(r.batch * r.length, r.heads * r.size, r.size, r.heads, {dweight}, num_threads,
           [&](int64_t first, int64_t last, float* sums) { run(r, grad, first, last, sums); });
}

}  // namespace mmlm
#endif
