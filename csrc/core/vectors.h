// Loops over the vectors of a row of numbers. Included only by per-ISA files, like simd.h.
#pragma once
#include <cstdint>

#include "core/float_math.h"
#include "core/numbers.h"
#include "core/simd.h"

namespace mmlm {
namespace {

using V = Vec<float>;
constexpr int kLanes = kWidth<float>;

// body(offset, count) for every vector of [0, size); inlined with the constant kLanes for all but the last.
template <typename Body>
MMLM_INLINE void vectors(int64_t size, Body body) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) body(i, int64_t{kLanes});
  if (i < size) body(i, size - i);
}

// The first `count` lanes of x, zero elsewhere.
MMLM_INLINE V first_lanes(V x, int64_t count) {
  if (count >= kLanes) return x;
  for (int i = static_cast<int>(count); i < kLanes; ++i) x[i] = 0;
  return x;
}

// Sum of term(offset, count) over all vectors, in four interleaved sums.
template <typename Term>
MMLM_INLINE float sum_vectors(int64_t size, Term term) {
  V sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= size; i += 4 * kLanes) {
    for (int k = 0; k < 4; ++k) sums[k] += term(i + k * kLanes, int64_t{kLanes});
  }
  for (int k = 0; i + kLanes <= size; i += kLanes, ++k) sums[k] += term(i, int64_t{kLanes});
  if (i < size) sums[3] += first_lanes(term(i, size - i), size - i);
  return sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

}  // namespace
}  // namespace mmlm
