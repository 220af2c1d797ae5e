// Floor: two features and the gate's logits read, the mixture and the gate written.
#pragma once
#include "core/tensor.h"

namespace mmlm {

struct Mix {
  Number type = Number::float32;
  int64_t rows = 0, size = 0;
  Rows first, second, logits;
  const uint8_t* present = nullptr;  // [rows, 2] or null
  Rows out, gate;
  bool stream = false;
};

}  // namespace mmlm

#if defined(MMLM_ISA)
#include "glue/rows.inl"

namespace mmlm::MMLM_ISA {
namespace {

// The gate of a row: given by the logits, or 1 or 0 where a modality is missing.
MMLM_INLINE V gate_of(V logits, int kind) { return kind == 3 ? sigmoid_of(logits) : broadcast(kind == 1 ? 1.f : 0.f); }

// Bit 0: the first is there, bit 1: the second.
MMLM_INLINE int who_is_there(const Mix& m, int64_t r) {
  return m.present == nullptr ? 3 : (m.present[2 * r] != 0 ? 1 : 0) + (m.present[2 * r + 1] != 0 ? 2 : 0);
}

template <typename T>
void mix_rows(const Mix& m, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const T *first = row_of<T>(m.first, r), *second = row_of<T>(m.second, r), *logits = row_of<T>(m.logits, r);
    T *out = row_of<T>(m.out, r), *gate = row_of<T>(m.gate, r);
    const int kind = who_is_there(m, r);
    const bool stream = streams(out, m.stream) && streams(gate, true);
    vectors(m.size, [&](int64_t i, int64_t n) {
      const V g = gate_of(load_part(logits + i, n), kind);
      store_out(gate + i, g, n, stream);
      store_out(out + i, g * load_part(first + i, n) + (1.f - g) * load_part(second + i, n), n, stream);
    });
  }
}

template <typename T>
void mix_backward_rows(const Mix& m, const Rows& grads, const Rows& dfirsts, const Rows& dseconds, const Rows& dlogits,
                       int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const T *first = row_of<T>(m.first, r), *second = row_of<T>(m.second, r), *logits = row_of<T>(m.logits, r);
    const T* grad = row_of<T>(grads, r);
    T *dfirst = row_of<T>(dfirsts, r), *dsecond = row_of<T>(dseconds, r), *dlogit = row_of<T>(dlogits, r);
    const int kind = who_is_there(m, r);
    const bool stream = streams(dfirst, m.stream) && streams(dsecond, true) && streams(dlogit, true);
    vectors(m.size, [&](int64_t i, int64_t n) {
      const V g = gate_of(load_part(logits + i, n), kind), d = load_part(grad + i, n);
      const V difference = load_part(first + i, n) - load_part(second + i, n);
      store_out(dfirst + i, d * g, n, stream);
      store_out(dsecond + i, d * (1.f - g), n, stream);
      store_out(dlogit + i, d * difference * g * (1.f - g), n, stream);
    });
  }
}

}  // namespace

void gated_mix_fwd(const Mix& m, int64_t first, int64_t last) { MMLM_BY_TYPE(m.type, mix_rows, m, first, last); }

void gated_mix_bwd(const Mix& m, const Rows& grad, const Rows& dfirst, const Rows& dsecond, const Rows& dlogits,
                   int64_t first, int64_t last) {
  MMLM_BY_TYPE(m.type, mix_backward_rows, m, grad, dfirst, dsecond, dlogits, first, last);
}

}  // namespace mmlm::MMLM_ISA
#else
#include "glue/tasks.h"

namespace mmlm {

MMLM_KERNEL(void, gated_mix_fwd, const Mix&, int64_t, int64_t)
MMLM_KERNEL(void, gated_mix_bwd, const Mix&, const Rows&, const Rows&, const Rows&, const Rows&, int64_t, int64_t)

inline void gated_mix_fwd(Number type, int64_t rows, int64_t size, Rows first, Rows second, Rows logits,
                          Address present, Rows out, Rows gate, int num_threads) {
  const auto run = MMLM_PICK(gated_mix_fwd);
  const bool stream = expect_outputs(type, rows, size, {out.data, gate.data});
  const Mix m{type, rows, size, first, second, logits, present, out, gate, stream};
  for_rows(rows, size, num_threads, [&](int64_t begin, int64_t end) { run(m, begin, end); });
}

inline void gated_mix_bwd(Number type, int64_t rows, int64_t size, Rows first, Rows second, Rows logits,
                          Address present, Rows grad, Rows dfirst, Rows dsecond, Rows dlogits, int num_threads) {
  const auto run = MMLM_PICK(gated_mix_bwd);
  const bool stream = expect_outputs(type, rows, size, {dfirst.data, dsecond.data, dlogits.data});
  const Mix m{type, rows, size, first, second, logits, present, {}, {}, stream};
  for_rows(rows, size, num_threads,
           [&](int64_t begin, int64_t end) { run(m, grad, dfirst, dsecond, dlogits, begin, end); });
}

}  // namespace mmlm
#endif
