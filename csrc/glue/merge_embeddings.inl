// Floor: each output row written once from the row it comes from.
#pragma once
#include <array>
#include <stdexcept>
#include <vector>

#include "core/tensor.h"
#include "glue/modalities.h"

namespace mmlm {

struct Merge {
  Number type = Number::float32;
  int64_t rows = 0, size = 0;
  const int64_t* source = nullptr;  // [rows]: row of the table, or -1 - row of the features, counted over all of them
  Rows base;                        // table[source[i]], or where `base_is_rows` base[i]
  bool base_is_rows = false, add = false;  // add: features are added to the base
  float scale = 1;                         // of the base
  int num_features = 0;
  Rows features[kMaxModalities];
  int64_t first[kMaxModalities + 1] = {};  // row at which each begins, and their number
  Rows out;
  bool stream = false;
};

}  // namespace mmlm

#if defined(MMLM_ISA)
#include "glue/rows.inl"

namespace mmlm::MMLM_ISA {
namespace {

template <typename T>
T* feature_row(const Merge& m, int64_t row) {  // null where there are not so many
  int k = 0;
  while (k < m.num_features && row >= m.first[k + 1]) ++k;
  return k == m.num_features ? nullptr : row_of<T>(m.features[k], row - m.first[k]);
}

template <typename T>
void merge_rows(const Merge& m, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; ++i) {
    const int64_t source = m.source[i];
    const T* feature = source < 0 ? feature_row<T>(m, -1 - source) : nullptr;
    const T* base = source < 0 && !m.add ? nullptr : row_of<T>(m.base, m.base_is_rows ? i : source);
    T* out = row_of<T>(m.out, i);
    if (base == nullptr && feature == nullptr) {
      std::memset(static_cast<void*>(out), 0, m.size * sizeof(T));
      continue;
    }
    if (base == nullptr || (feature == nullptr && m.scale == 1.f)) {
      copy_row(base == nullptr ? feature : base, m.size, out, m.stream);
      continue;
    }
    const V scale = broadcast(m.scale);
    const bool stream = streams(out, m.stream);
    vectors(m.size, [&](int64_t j, int64_t n) {
      V x = load_part(base + j, n) * scale;
      if (feature != nullptr) x += load_part(feature + j, n);
      store_out(out + j, x, n, stream);
    });
  }
}

template <typename T>
void merge_backward_rows(const Merge& m, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; ++i) {
    if (m.source[i] >= 0) continue;
    T* feature = feature_row<T>(m, -1 - m.source[i]);
    if (feature != nullptr) copy_row(row_of<T>(m.out, i), m.size, feature, m.stream);
  }
}

}  // namespace

void merge_embeddings_fwd(const Merge& m, int64_t first, int64_t last) {
  MMLM_BY_TYPE(m.type, merge_rows, m, first, last);
}

void merge_embeddings_bwd(const Merge& m, int64_t first, int64_t last) {
  MMLM_BY_TYPE(m.type, merge_backward_rows, m, first, last);
}

}  // namespace mmlm::MMLM_ISA
#else
#include "glue/tasks.h"

namespace mmlm {

MMLM_KERNEL(void, merge_embeddings_fwd, const Merge&, int64_t, int64_t)
MMLM_KERNEL(void, merge_embeddings_bwd, const Merge&, int64_t, int64_t)

// features: address, row stride, rows of each.
inline Merge merge_of(Number type, int64_t rows, int64_t size, Address source,
                      const std::vector<std::array<int64_t, 3> >& features, Rows out) {
  check_modalities(features.size());
  Merge m;
  m.type = type, m.rows = rows, m.size = size, m.source = source, m.out = out;
  for (const auto& f : features) {
    m.features[m.num_features] = {reinterpret_cast<void*>(f[0]), f[1]};
    m.first[m.num_features + 1] = m.first[m.num_features] + f[2];
    ++m.num_features;
  }
  return m;
}

inline void merge_embeddings_fwd(Number type, int64_t rows, int64_t size, Address source, Rows base, bool base_is_rows,
                                 bool add, float scale, const std::vector<std::array<int64_t, 3> >& features, Rows out,
                                 int num_threads) {
  const auto run = MMLM_PICK(merge_embeddings_fwd);
  Merge m = merge_of(type, rows, size, source, features, out);
  m.base = base, m.base_is_rows = base_is_rows, m.add = add, m.scale = scale;
  m.stream = expect_outputs(type, rows, size, {out.data});
  for_rows(rows, size, num_threads, [&](int64_t first, int64_t last) { run(m, first, last); });
}

// `grad` of the output is read, features are written.
inline void merge_embeddings_bwd(Number type, int64_t rows, int64_t size, Address source,
                                 const std::vector<std::array<int64_t, 3> >& features, Rows grad, int num_threads) {
  const auto run = MMLM_PICK(merge_embeddings_bwd);
  const Merge m = merge_of(type, rows, size, source, features, grad);
  for_rows(rows, size, num_threads, [&](int64_t first, int64_t last) { run(m, first, last); });
}

}  // namespace mmlm
#endif
