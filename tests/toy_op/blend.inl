// Floor: x and y read, their mixture written.
#pragma once
#include "core/tensor.h"

namespace mmlm {

struct Blend {
  Number type = Number::float32;
  int64_t rows = 0, size = 0;
  Rows x, y;
  float t = 0;
  Rows out;
  bool stream = false;
};

}  // namespace mmlm

#if defined(MMLM_ISA)
#include "glue/rows.inl"

namespace mmlm::MMLM_ISA {
namespace {

template <typename T>
void blend_rows(const Blend& a, int64_t first, int64_t last) {
  for (int64_t r = first; r < last; ++r) {
    const T *x = row_of<T>(a.x, r), *y = row_of<T>(a.y, r);
    T* out = row_of<T>(a.out, r);
    const bool stream = streams(out, a.stream);
    vectors(a.size, [&](int64_t i, int64_t n) {
      store_out(out + i, (1.f - a.t) * load_part(x + i, n) + a.t * load_part(y + i, n), n, stream);
    });
  }
}

}  // namespace

void blend_fwd(const Blend& a, int64_t first, int64_t last) { MMLM_BY_TYPE(a.type, blend_rows, a, first, last); }

}  // namespace mmlm::MMLM_ISA
#else
#include "glue/tasks.h"

namespace mmlm {

MMLM_KERNEL(void, blend_fwd, const Blend&, int64_t, int64_t)

inline void blend_fwd(Number type, int64_t rows, int64_t size, Rows x, Rows y, float t, Rows out, int num_threads) {
  const auto run = MMLM_PICK(blend_fwd);
  const Blend a{type, rows, size, x, y, t, out, expect_outputs(type, rows, size, {out.data})};
  for_rows(rows, size, num_threads, [&](int64_t first, int64_t last) { run(a, first, last); });
}

}  // namespace mmlm
#endif
