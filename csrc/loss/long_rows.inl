// Maxima and sums of long rows, for kernels.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>

#include "core/vectors.h"

namespace mmlm {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr int64_t kBlock = 2048;  // numbers of a float sum before it goes on in double: 256 terms a lane on AVX2

MMLM_INLINE float max_of(V x) {
  float m = x[0];
  for (int i = 1; i < kLanes; ++i) m = x[i] > m ? x[i] : m;
  return m;
}

// Largest of the numbers; NaN may be passed over, the sum of exponentials finds it.
MMLM_INLINE float max_of(const float* p, int64_t size) {
  V m = broadcast(-kInf);
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) m = max(load(p + i), m);
  float best = max_of(m);
  for (; i < size; ++i) best = p[i] > best ? p[i] : best;
  return best;
}

// Sum of term(offset, count) over all vectors of a long row: float32 within a block, double over the blocks.
template <typename Term>
MMLM_INLINE double sum_long(int64_t size, Term term) {
  double total = 0;
  for (int64_t first = 0; first < size; first += kBlock) {
    total += sum_vectors(std::min(kBlock, size - first), [&](int64_t i, int64_t n) { return term(first + i, n); });
  }
  return total;
}

// ln(1 + e) for e in [0, 1].
MMLM_INLINE V log1p_of(V e) {
  return select((Lanes<float>::Int)(e < 0.41f), log1p_fraction(e), ln_positive<float>(1.f + e));
}

}  // namespace
}  // namespace mmlm
