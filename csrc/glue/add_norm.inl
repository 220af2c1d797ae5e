// Floor: x and residual read, their sum and its norm written; the row stays in L1 between.
#pragma once
#include "core/tensor.h"
#include "glue/norm.h"

namespace mmlm {

struct AddNorm {
  Number type = Number::float32;
  int64_t rows = 0, size = 0;
  Norm norm;
  Rows x, residual;  // residual may be null
  Rows sum, out;     // sum = x + residual where there is one
  bool stream = false;
};

struct AddNormGradient {
  Rows sum;             // of the forward pass, or x
  Rows grad, grad_sum;  // of out and of sum; either may be null
  Rows dx;              // of x and of the residual
};

}  // namespace mmlm

#if defined(MMLM_ISA)
#include "glue/rows.inl"

namespace mmlm::MMLM_ISA {
namespace {

template <typename T>
void add_norm_rows(const AddNorm& a, int64_t first, int64_t last) {
  float* v = scratch(a.size, 1);
  for (int64_t r = first; r < last; ++r) {
    const T *x = row_of<T>(a.x, r), *residual = row_of<T>(a.residual, r);
    if (residual != nullptr) {
      T* sum = row_of<T>(a.sum, r);
      const bool stream = streams(sum, a.stream);
      vectors(a.size, [&](int64_t i, int64_t n) {
        const V s = as_stored(sum, load_part(x + i, n) + load_part(residual + i, n));
        store_out(sum + i, s, n, stream);
        store_part(v + i, s, n);
      });
    } else {
      to_floats(x, a.size, v);
    }
    normalise(v, a.size, a.norm, stats_of(v, a.size, a.norm.is_layer, a.norm.eps), row_of<T>(a.out, r), a.stream);
  }
}

template <typename T>
void add_norm_backward_rows(const AddNorm& a, const AddNormGradient& d, int64_t first, int64_t last, float* dweight,
                            float* dbias) {
  const int64_t padded = round_up(a.size);
  float *v = scratch(a.size, 2), *g = v + padded;
  for (int64_t r = first; r < last; ++r) {
    T* dx = row_of<T>(d.dx, r);
    const bool stream = streams(dx, a.stream);
    const T *grad = row_of<T>(d.grad, r), *grad_sum = row_of<T>(d.grad_sum, r);
    if (grad != nullptr) {
      to_floats(row_of<T>(d.sum, r), a.size, v);
      to_floats(grad, a.size, g);
      norm_backward(v, g, a.size, a.norm, stats_of(v, a.size, a.norm.is_layer, a.norm.eps), dweight, dbias);
    } else {
      std::fill(g, g + a.size, 0.f);
    }
    vectors(a.size, [&](int64_t i, int64_t n) {
      V sum = load_part(g + i, n);
      if (grad_sum != nullptr) sum += load_part(grad_sum + i, n);
      store_out(dx + i, sum, n, stream);
    });
  }
}

}  // namespace

void add_norm_fwd(const AddNorm& a, int64_t first, int64_t last) {
  MMLM_BY_TYPE(a.type, add_norm_rows, a, first, last);
}

void add_norm_bwd(const AddNorm& a, const AddNormGradient& d, int64_t first, int64_t last, float* dweight,
                  float* dbias) {
  MMLM_BY_TYPE(a.type, add_norm_backward_rows, a, d, first, last, dweight, dbias);
}

}  // namespace mmlm::MMLM_ISA
#else
#include "glue/tasks.h"

namespace mmlm {

MMLM_KERNEL(void, add_norm_fwd, const AddNorm&, int64_t, int64_t)
MMLM_KERNEL(void, add_norm_bwd, const AddNorm&, const AddNormGradient&, int64_t, int64_t, float*, float*)

inline void add_norm_fwd(Number type, int64_t rows, int64_t size, bool is_layer, Address weight, Address bias,
                         float eps, Rows x, Rows residual, Rows sum, Rows out, int num_threads) {
  const auto run = MMLM_PICK(add_norm_fwd);
  const bool stream = expect_outputs(type, rows, size, {sum.data, out.data});
  const AddNorm a{type, rows, size, {is_layer, weight, bias, eps}, x, residual, sum, out, stream};
  for_rows(rows, size, num_threads, [&](int64_t first, int64_t last) { run(a, first, last); });
}

// dweight, dbias [size], or null; written.
inline void add_norm_bwd(Number type, int64_t rows, int64_t size, bool is_layer, Address weight, float eps, Rows sum,
                         Rows grad, Rows grad_sum, Rows dx, Address dweight, Address dbias, int num_threads) {
  const auto run = MMLM_PICK(add_norm_bwd);
  const bool stream = expect_outputs(type, rows, size, {dx.data});
  const AddNorm a{type, rows, size, {is_layer, weight, nullptr, eps}, {}, {}, {}, {}, stream};
  const AddNormGradient g{sum, grad, grad_sum, dx};
  sum_rows(rows, size, size, 1, {dweight, dbias}, num_threads, [&](int64_t first, int64_t last, float* sums) {
    run(a, g, first, last, sums, sums == nullptr ? nullptr : sums + size);
  });
}

}  // namespace mmlm
#endif
