// A tile of the logits of a contrastive loss: rows against columns, and which of them belong together.
#pragma once
#include <array>
#include <cstdint>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "core/tensor.h"

namespace mmlm {

enum class Positives { diagonal = 0, ids = 1, weights = 2 };

struct Pairs {
  int64_t rows = 0, columns = 0, stride = 0;
  float* dots = nullptr;      // [rows, columns], rewritten with `scale` times the gradients of the logits
  float scale = 1, bias = 0;  // logit = scale * dot + bias
  Positives positives = Positives::diagonal;
  int64_t offset = 0;                                       // diagonal: row i belongs to column i + offset
  const int64_t *row_ids = nullptr, *column_ids = nullptr;  // ids: pairs of equal ids
  const float* weights = nullptr;                           // weights: [rows, columns]
  int64_t weights_stride = 0;
};

}  // namespace mmlm

#if defined(MMLM_ISA)
#include "loss/long_rows.inl"

namespace mmlm {
namespace {

// Weights of positives at the columns from j on of one row.
MMLM_INLINE V weights_at(const Pairs& p, int64_t row, int64_t j, int64_t n) {
  if (p.positives == Positives::weights) return load_part(p.weights + row * p.weights_stride + j, n);
  V w = {};
  const int64_t id = p.row_ids[row];
  for (int64_t k = 0; k < n; ++k) w[k] = p.column_ids[j + k] == id ? 1.f : 0.f;
  return w;
}

// Column of the row's positive on the diagonal, -1 where it lies outside the tile.
MMLM_INLINE int64_t diagonal_of(const Pairs& p, int64_t row) {
  const int64_t j = row + p.offset;
  return p.positives == Positives::diagonal && j >= 0 && j < p.columns ? j : -1;
}

MMLM_INLINE float logit_of(const Pairs& p, float dot) { return p.scale * dot + p.bias; }

}  // namespace
}  // namespace mmlm
#else
#include "loss/tasks.h"

namespace mmlm {

// Kind, offset, addresses of row ids, column ids and weights, and the stride of the weights.
using PositivesTuple = std::tuple<int, int64_t, Address, Address, Address, int64_t>;

inline Pairs pairs_of(int64_t rows, int64_t columns, Rows dots, float scale, float bias,
                      const PositivesTuple& positives) {
  const auto [kind, offset, row_ids, column_ids, weights, weights_stride] = positives;
  const auto checked = enum_of<Positives>("kind of positives", kind, 3);
  return {rows,       columns, dots.stride,   static_cast<float*>(dots.data), scale, bias, checked, offset, row_ids,
          column_ids, weights, weights_stride};
}

// body(first, last, sums of this task); the tasks' sums are added to `sums` in order.
template <int N, typename Body>
void sum_tasks(const Pairs& p, double* sums, int num_threads, Body body) {
  std::vector<std::array<double, N> > parts((p.rows + kTaskRows - 1) / kTaskRows, std::array<double, N>{});
  in_tasks(p.rows, kTaskRows, p.rows * p.columns, num_threads,
           [&](int64_t task, int64_t first, int64_t last) { body(first, last, parts[task].data()); });
  for (const auto& part : parts) {
    for (int k = 0; k < N; ++k) sums[k] += part[k];
  }
}

}  // namespace mmlm
#endif
