// Floor: two exponentials a pair and pass; a tile stays in the caches between the product before and the one after.
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

void siglip_row(const Pairs& p, bool gradients, int64_t row, double* sums) {
  float* dots = p.dots + row * p.stride;
  const int64_t diagonal = diagonal_of(p, row);
  const bool dense = p.positives != Positives::diagonal;
  double along = 0, gradient_sum = 0;
  // softplus(l) - w l, with the cancelling part first; where the positive is on the diagonal it follows.
  sums[0] += sum_long(p.columns, [&](int64_t j, int64_t n) {
    const V dot = load_part(dots + j, n), l = p.scale * dot + p.bias;
    V w = {};
    if (dense) {
      w = weights_at(p, row, j, n);
    } else if (diagonal >= j && diagonal < j + n) {
      w[diagonal - j] = 1.f;
    }
    const V e = exp_of(-max(l, -l));
    if (gradients) {
      const V small = e / (1.f + e), g = select(l < 0.f, small, 1.f / (1.f + e)) - w;
      // where w is 1 and l > 0: 1/(1+e) - 1 without its rounding
      const V exact = select((l >= 0.f) & (w == 1.f), -small, g);
      along += sum_of(first_lanes(exact * dot, n));
      gradient_sum += sum_of(first_lanes(exact, n));
      store_part(dots + j, p.scale * exact, n);
    }
    return log1p_of(e) + (max(V{}, l) - w * l);
  });
  sums[1] += along, sums[2] += gradient_sum;
}

}  // namespace

void MMLM_JOIN(clip_rows, MMLM_ISA)(const Pairs& p, const Running& running, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) clip_row(p, running, row);
}

void MMLM_JOIN(clip_columns, MMLM_ISA)(const Pairs& p, const Running& running, int64_t first, int64_t last) {
  for (int64_t j = first; j < last; j += kLanes) {
    clip_columns_at(p, running, j, std::min<int64_t>(kLanes, last - j));
  }
  if (p.positives != Positives::diagonal) return;
  for (int64_t row = std::max<int64_t>(0, first - p.offset); row < std::min(p.rows, last - p.offset); ++row) {
    const int64_t j = row + p.offset;
    running.positive[j] += logit_of(p, p.dots[row * p.stride + j]), running.weight[j] += 1;
  }
}

void MMLM_JOIN(clip_gradients, MMLM_ISA)(const Pairs& p, const Side& rows, const Side& columns, int64_t first,
                                         int64_t last, double* sums) {
  for (int64_t row = first; row < last; ++row) clip_gradients_row(p, rows, columns, row, sums);
}

void MMLM_JOIN(siglip_pairs, MMLM_ISA)(const Pairs& p, bool gradients, int64_t first, int64_t last, double* sums) {
  for (int64_t row = first; row < last; ++row) siglip_row(p, gradients, row, sums);
}

}  // namespace mmlm
