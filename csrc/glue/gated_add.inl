// Floor: x and residual read, their sum written.
#pragma once
#include "core/tensor.h"

namespace mmlm {

struct GatedAdd {
  Number type = Number::float32;
  int64_t rows = 0, size = 0;
  Rows x, residual;
  const float* gate = nullptr;    // [size]: out = residual + gate * x
  const uint8_t* keep = nullptr;  // [rows] or null: where 0, out = residual
  Rows out;
  bool stream = false;
};

}  // namespace mmlm

#if defined(MMLM_ISA)
#include "glue/rows.inl"

namespace mmlm::MMLM_ISA {
namespace {

template <typename T>
void gated_add_rows(const GatedAdd& a, int64_t first, int64_t last) {
  for (int64_t r = first; r < last; ++r) {
    const T *x = row_of<T>(a.x, r), *residual = row_of<T>(a.residual, r);
    T* out = row_of<T>(a.out, r);
    if (a.keep != nullptr && a.keep[r] == 0) {
      copy_row(residual, a.size, out, a.stream);
      continue;
    }
    const bool stream = streams(out, a.stream);
    vectors(a.size, [&](int64_t i, int64_t n) {
      store_out(out + i, load_part(residual + i, n) + load_part(a.gate + i, n) * load_part(x + i, n), n, stream);
    });
  }
}

template <typename T>
void gated_add_backward_rows(const GatedAdd& a, const Rows& grads, const Rows& dxs, int64_t first, int64_t last,
                             float* sums) {
  for (int64_t r = first; r < last; ++r) {
    const T *x = row_of<T>(a.x, r), *grad = row_of<T>(grads, r);
    T* dx = row_of<T>(dxs, r);
    if (a.keep != nullptr && a.keep[r] == 0) {
      std::memset(static_cast<void*>(dx), 0, a.size * sizeof(T));
      continue;
    }
    const bool stream = streams(dx, a.stream);
    vectors(a.size, [&](int64_t i, int64_t n) {
      const V g = load_part(grad + i, n);
      store_part(sums + i, load_part(sums + i, n) + g * load_part(x + i, n), n);
      store_out(dx + i, g * load_part(a.gate + i, n), n, stream);
    });
  }
}

}  // namespace

void gated_add_fwd(const GatedAdd& a, int64_t first, int64_t last) {
  MMLM_BY_TYPE(a.type, gated_add_rows, a, first, last);
}

void gated_add_bwd(const GatedAdd& a, const Rows& grad, const Rows& dx, int64_t first, int64_t last, float* sums) {
  MMLM_BY_TYPE(a.type, gated_add_backward_rows, a, grad, dx, first, last, sums);
}

}  // namespace mmlm::MMLM_ISA
#else
#include "glue/tasks.h"

namespace mmlm {

MMLM_KERNEL(void, gated_add_fwd, const GatedAdd&, int64_t, int64_t)
MMLM_KERNEL(void, gated_add_bwd, const GatedAdd&, const Rows&, const Rows&, int64_t, int64_t, float*)

inline void gated_add_fwd(Number type, int64_t rows, int64_t size, Rows x, Rows residual, Address gate, Address keep,
                          Rows out, int num_threads) {
  const auto run = MMLM_PICK(gated_add_fwd);
  const bool stream = expect_outputs(type, rows, size, {out.data});
  const GatedAdd a{type, rows, size, x, residual, gate, keep, out, stream};
  for_rows(rows, size, num_threads, [&](int64_t first, int64_t last) { run(a, first, last); });
}

// sums [size]: of grad * x over the rows kept.
inline void gated_add_bwd(Number type, int64_t rows, int64_t size, Rows x, Address gate, Address keep, Rows grad,
                          Rows dx, Address sums, int num_threads) {
  const auto run = MMLM_PICK(gated_add_bwd);
  const bool stream = expect_outputs(type, rows, size, {dx.data});
  const GatedAdd a{type, rows, size, x, {}, gate, keep, {}, stream};
  sum_rows(rows, size, size, 1, {sums}, num_threads,
           [&](int64_t first, int64_t last, float* part) { run(a, grad, dx, first, last, part); });
}

}  // namespace mmlm
#endif
