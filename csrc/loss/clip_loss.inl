// CLIP's loss. Floor: two exponentials a pair and pass; a tile stays in the caches between the product before and the
// one after.
#pragma once
#include "loss/pairs.inl"

namespace mmlm {

// Running statistics of the logits of rows or of columns, updated tile by tile. Start: -inf, 0, 0, 0.
struct Running {
  float *max = nullptr, *sum = nullptr;          // sum of exp(logit - max)
  float *positive = nullptr, *weight = nullptr;  // sums of weight * logit and of the weights of positives
};

// gradient of the logit = softmax * exp(logit - lse) - target * weight, once along rows and once along columns
struct Side {
  const float *lse = nullptr, *softmax = nullptr, *target = nullptr;
};

}  // namespace mmlm

#if defined(MMLM_ISA)

namespace mmlm::MMLM_ISA {
namespace {

MMLM_INLINE void update(float* max_at, float* sum_at, float top, float shift, double sum) {
  const float before = *max_at;
  *sum_at = static_cast<float>((before == -kInf ? 0. : std::exp(static_cast<double>(before) - shift) * *sum_at) + sum);
  *max_at = top;
}

void clip_row(const Pairs& p, const Running& running, int64_t row) {
  const float* dots = p.dots + row * p.stride;
  const auto logits = [&](int64_t j, int64_t n) { return p.scale * load_part(dots + j, n) + p.bias; };
  V m = broadcast(-kInf);
  vectors(p.columns, [&](int64_t j, int64_t n) {
    const V l = logits(j, n);
    m = max(n == kLanes ? l : select(first_lanes(broadcast(1.f), n) > 0.f, l, broadcast(-kInf)), m);
  });
  const float top = std::max(max_of(m), running.max[row]);
  const float shift = top == -kInf ? 0.f : top;
  const double sum = sum_long(p.columns, [&](int64_t j, int64_t n) { return exp_of(logits(j, n) - shift); });
  update(running.max + row, running.sum + row, top, shift, sum);
  if (p.positives == Positives::diagonal) {
    const int64_t j = diagonal_of(p, row);
    if (j >= 0) running.positive[row] += logit_of(p, dots[j]), running.weight[row] += 1;
    return;
  }
  running.positive[row] += static_cast<float>(sum_long(p.columns, [&](int64_t j, int64_t n) {
    const V w = weights_at(p, row, j, n);
    return select(w != 0.f, w * logits(j, n), V{});  // a NaN elsewhere in the row is not this pair's
  }));
  running.weight[row] +=
      static_cast<float>(sum_long(p.columns, [&](int64_t j, int64_t n) { return weights_at(p, row, j, n); }));
}

constexpr int64_t kFewRows = 32;  // of a column's float sum before it is added to the others

// One vector of columns, or the first n of it.
void clip_columns_at(const Pairs& p, const Running& running, int64_t j, int64_t n) {
  const float* dots = p.dots + j;
  const auto logits = [&](int64_t row) { return p.scale * load_part(dots + row * p.stride, n) + p.bias; };
  const V before = load_part(running.max + j, n);
  V top = before;
  for (int64_t row = 0; row < p.rows; ++row) top = max(logits(row), top);
  const V shift = select(top == -kInf, V{}, top);
  V sum = select(before == -kInf, V{}, exp_of(before - shift) * load_part(running.sum + j, n));
  V positive = load_part(running.positive + j, n), weight = load_part(running.weight + j, n);
  const bool dense = p.positives != Positives::diagonal;
  for (int64_t first = 0; first < p.rows; first += kFewRows) {
    V part = {}, part_positive = {}, part_weight = {};
    for (int64_t row = first; row < std::min(p.rows, first + kFewRows); ++row) {
      const V l = logits(row);
      part += exp_of(l - shift);
      if (dense) {
        const V w = weights_at(p, row, j, n);
        part_positive += select(w != 0.f, w * l, V{});
        part_weight += w;
      }
    }
    sum += part, positive += part_positive, weight += part_weight;
  }
  store_part(running.max + j, top, n);
  store_part(running.sum + j, sum, n);
  if (dense) {
    store_part(running.positive + j, positive, n);
    store_part(running.weight + j, weight, n);
  }
}

void clip_gradients_row(const Pairs& p, const Side& rows, const Side& columns, int64_t row, double* sums) {
  float* dots = p.dots + row * p.stride;
  const V lse = broadcast(rows.lse[row]), softmax = broadcast(rows.softmax[row]), target = broadcast(rows.target[row]);
  const int64_t diagonal = diagonal_of(p, row);
  const float at_diagonal = diagonal < 0 ? 0.f : dots[diagonal];
  const bool dense = p.positives != Positives::diagonal;
  double gradient_sum = 0;
  sums[0] += sum_long(p.columns, [&](int64_t j, int64_t n) {
    const V dot = load_part(dots + j, n), l = p.scale * dot + p.bias;
    V g = softmax * exp_of(l - lse) + load_part(columns.softmax + j, n) * exp_of(l - load_part(columns.lse + j, n));
    if (dense) {
      const V w = weights_at(p, row, j, n);
      g -= w * (target + load_part(columns.target + j, n));
    }
    store_part(dots + j, p.scale * g, n);
    gradient_sum += sum_of(first_lanes(g, n));
    return g * dot;
  });
  if (diagonal >= 0) {
    const float g = rows.target[row] + columns.target[diagonal];
    dots[diagonal] -= p.scale * g;
    sums[0] -= static_cast<double>(g) * at_diagonal;
    gradient_sum -= g;
  }
  sums[1] += gradient_sum;
}

}  // namespace

void clip_loss_statistics_of_rows(const Pairs& p, const Running& running, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) clip_row(p, running, row);
}

void clip_loss_statistics_of_columns(const Pairs& p, const Running& running, int64_t first, int64_t last) {
  for (int64_t j = first; j < last; j += kLanes) {
    clip_columns_at(p, running, j, std::min<int64_t>(kLanes, last - j));
  }
  if (p.positives != Positives::diagonal) return;
  for (int64_t row = std::max<int64_t>(0, first - p.offset); row < std::min(p.rows, last - p.offset); ++row) {
    const int64_t j = row + p.offset;
    running.positive[j] += logit_of(p, p.dots[row * p.stride + j]), running.weight[j] += 1;
  }
}

void clip_loss_gradients(const Pairs& p, const Side& rows, const Side& columns, int64_t first, int64_t last,
                         double* sums) {
  for (int64_t row = first; row < last; ++row) clip_gradients_row(p, rows, columns, row, sums);
}

}  // namespace mmlm::MMLM_ISA
#else

namespace mmlm {

MMLM_KERNEL(void, clip_loss_statistics_of_rows, const Pairs&, const Running&, int64_t, int64_t)
MMLM_KERNEL(void, clip_loss_statistics_of_columns, const Pairs&, const Running&, int64_t, int64_t)
MMLM_KERNEL(void, clip_loss_gradients, const Pairs&, const Side&, const Side&, int64_t, int64_t, double*)

inline void clip_loss_statistics(int64_t rows, int64_t columns, Rows dots, float scale, float bias,
                                 const PositivesTuple& positives, const std::array<Address, 4>& row,
                                 const std::array<Address, 4>& column, int num_threads) {
  const auto along_rows = MMLM_PICK(clip_loss_statistics_of_rows);
  const auto along_columns = MMLM_PICK(clip_loss_statistics_of_columns);
  const Pairs p = pairs_of(rows, columns, dots, scale, bias, positives);
  const Running of_rows{row[0], row[1], row[2], row[3]}, of_columns{column[0], column[1], column[2], column[3]};
  in_tasks(rows, kTaskRows, rows * columns, num_threads,
           [&](int64_t, int64_t first, int64_t last) { along_rows(p, of_rows, first, last); });
  in_tasks(columns, kTaskColumns, rows * columns, num_threads,
           [&](int64_t, int64_t first, int64_t last) { along_columns(p, of_columns, first, last); });
}

// sums [2], added to: of gradient * dot and of the gradients.
inline void clip_loss_gradients(int64_t rows, int64_t columns, Rows dots, float scale, float bias,
                                const PositivesTuple& positives, const std::array<Address, 3>& row,
                                const std::array<Address, 3>& column, Address sums, int num_threads) {
  const auto run = MMLM_PICK(clip_loss_gradients);
  const Pairs p = pairs_of(rows, columns, dots, scale, bias, positives);
  const Side of_row{row[0], row[1], row[2]}, of_column{column[0], column[1], column[2]};
  sum_tasks<2>(p, sums, num_threads,
               [&](int64_t first, int64_t last, double* part) { run(p, of_row, of_column, first, last, part); });
}

}  // namespace mmlm
#endif
