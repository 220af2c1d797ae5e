// Floor: gate and up read, the product written; backward reads the gradient too and writes two.
#pragma once
#include "core/tensor.h"

namespace mmlm {

enum class Activation { silu = 0, gelu = 1, gelu_tanh = 2, quick_gelu = 3, relu = 4 };

struct Glu {
  Number type = Number::float32;
  Activation activation = Activation::silu;
  int64_t rows = 0, size = 0;
  Rows gate, up;                // up may be null: the activation alone
  const float* bias = nullptr;  // [size] or null, added to gate
  Rows out;
  bool stream = false;
};

}  // namespace mmlm

#if defined(MMLM_ISA)
#include "glue/rows.inl"

namespace mmlm::MMLM_ISA {
namespace {

// y = act(x); slope = act'(x) where asked for.
template <Activation kind, bool with_slope>
MMLM_INLINE V activate(V x, V& slope) {
  if (kind == Activation::relu) {
    if (with_slope) slope = select((Lanes<float>::Int)(x > 0.f), broadcast(1.f), V{});
    return max(V{}, x);  // NaN is the second operand: it passes
  }
  if (kind == Activation::gelu) {
    const V phi = 0.5f + 0.5f * erf_of(x * 0.70710678118654752f);
    if (with_slope) slope = phi + x * 0.39894228040143268f * exp_of(-0.5f * (x * x));
    return x * phi;
  }
  V u = x, du = broadcast(1.f);  // x * sigmoid(u)
  if (kind == Activation::quick_gelu) {
    u = 1.702f * x;
    du = broadcast(1.702f);
  } else if (kind == Activation::gelu_tanh) {      // (1 + tanh(z)) / 2 = sigmoid(2z)
    const V square = min(broadcast(1e6f), x * x);  // u is beyond +-88 by then, and finite numbers stay finite
    u = 1.5957691216057308f * (x * (1.f + 0.044715f * square));
    if (with_slope) du = 1.5957691216057308f * (1.f + 0.134145f * square);
  }
  V e;
  const V s = sigmoid_of(u, e), y = x * s;
  if (with_slope) slope = s + y * (e * s) * du;  // e * s is 1 - s without its rounding error where s is near 1
  return y;
}

template <typename T, Activation kind>
void glu_rows(const Glu& g, int64_t first, int64_t last) {
  for (int64_t r = first; r < last; ++r) {
    const T *gate = row_of<T>(g.gate, r), *up = row_of<T>(g.up, r);
    T* out = row_of<T>(g.out, r);
    const bool stream = streams(out, g.stream);
    vectors(g.size, [&](int64_t i, int64_t n) {
      V x = load_part(gate + i, n), unused;
      if (g.bias != nullptr) x += load_part(g.bias + i, n);
      V y = activate<kind, false>(x, unused);
      if (up != nullptr) y *= load_part(up + i, n);
      store_out(out + i, y, n, stream);
    });
  }
}

template <typename T, Activation kind>
void glu_backward_rows(const Glu& g, const Rows& grads, const Rows& dgates, const Rows& dups, int64_t first,
                       int64_t last, float* dbias) {
  for (int64_t r = first; r < last; ++r) {
    const T *gate = row_of<T>(g.gate, r), *up = row_of<T>(g.up, r), *grad = row_of<T>(grads, r);
    T *dgate = row_of<T>(dgates, r), *dup = row_of<T>(dups, r);
    const bool stream = streams(dgate, g.stream) && streams(dup, g.stream);
    vectors(g.size, [&](int64_t i, int64_t n) {
      V x = load_part(gate + i, n), slope, d = load_part(grad + i, n);
      if (g.bias != nullptr) x += load_part(g.bias + i, n);
      const V y = activate<kind, true>(x, slope);
      if (up != nullptr) {
        store_out(dup + i, d * y, n, stream);
        d *= load_part(up + i, n);
      }
      d *= slope;
      store_out(dgate + i, d, n, stream);
      if (dbias != nullptr) store_part(dbias + i, load_part(dbias + i, n) + d, n);
    });
  }
}

#define MMLM_FOR_ACTIVATION(call)   \
  switch (g.activation) {           \
    case Activation::silu:          \
      call(Activation::silu);       \
    case Activation::gelu:          \
      call(Activation::gelu);       \
    case Activation::gelu_tanh:     \
      call(Activation::gelu_tanh);  \
    case Activation::quick_gelu:    \
      call(Activation::quick_gelu); \
    case Activation::relu:          \
      call(Activation::relu);       \
  }

template <typename T>
void glu_any(const Glu& g, int64_t first, int64_t last) {
#define MMLM_CALL(kind) return glu_rows<T, kind>(g, first, last)
  MMLM_FOR_ACTIVATION(MMLM_CALL)
#undef MMLM_CALL
}

template <typename T>
void glu_backward_any(const Glu& g, const Rows& grad, const Rows& dgate, const Rows& dup, int64_t first, int64_t last,
                      float* dbias) {
#define MMLM_CALL(kind) return glu_backward_rows<T, kind>(g, grad, dgate, dup, first, last, dbias)
  MMLM_FOR_ACTIVATION(MMLM_CALL)
#undef MMLM_CALL
}

#undef MMLM_FOR_ACTIVATION

}  // namespace

void glu_fwd(const Glu& g, int64_t first, int64_t last) { MMLM_BY_TYPE(g.type, glu_any, g, first, last); }

void glu_bwd(const Glu& g, const Rows& grad, const Rows& dgate, const Rows& dup, int64_t first, int64_t last,
             float* dbias) {
  MMLM_BY_TYPE(g.type, glu_backward_any, g, grad, dgate, dup, first, last, dbias);
}

}  // namespace mmlm::MMLM_ISA
#else
#include "glue/tasks.h"

namespace mmlm {

MMLM_KERNEL(void, glu_fwd, const Glu&, int64_t, int64_t)
MMLM_KERNEL(void, glu_bwd, const Glu&, const Rows&, const Rows&, const Rows&, int64_t, int64_t, float*)

inline void glu_fwd(Number type, int activation, int64_t rows, int64_t size, Rows gate, Rows up, Address bias, Rows out,
                    int num_threads) {
  const auto run = MMLM_PICK(glu_fwd);
  const auto kind = enum_of<Activation>("activation", activation, 5);
  const Glu g{type, kind, rows, size, gate, up, bias, out, expect_outputs(type, rows, size, {out.data})};
  for_rows(rows, size, num_threads, [&](int64_t first, int64_t last) { run(g, first, last); });
}

inline void glu_bwd(Number type, int activation, int64_t rows, int64_t size, Rows gate, Rows up, Address bias,
                    Rows grad, Rows dgate, Rows dup, Address dbias, int num_threads) {
  const auto run = MMLM_PICK(glu_bwd);
  const auto kind = enum_of<Activation>("activation", activation, 5);
  const Glu g{type, kind, rows, size, gate, up, bias, {}, expect_outputs(type, rows, size, {dgate.data, dup.data})};
  sum_rows(rows, size, size, 1, {dbias}, num_threads,
           [&](int64_t first, int64_t last, float* sums) { run(g, grad, dgate, dup, first, last, sums); });
}

}  // namespace mmlm
#endif
