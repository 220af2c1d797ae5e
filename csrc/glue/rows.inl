// Rows of numbers and their norms, for kernels.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/arena.h"
#include "core/tensor.h"
#include "core/vectors.h"
#include "glue/norm.h"

namespace mmlm {
namespace {

inline int64_t round_up(int64_t x) { return (x + kLanes - 1) / kLanes * kLanes; }

template <typename T>
T* row_of(const Rows& rows, int64_t i) {
  return rows.data == nullptr ? nullptr : static_cast<T*>(rows.data) + i * rows.stride;
}

// Whether the row at p can be written past the caches, where `wanted`.
template <typename T>
MMLM_INLINE bool streams(const T* p, bool wanted) {
  return wanted && reinterpret_cast<uintptr_t>(p) % (kLanes * sizeof(T)) == 0;
}

// Into an output: past the caches where `stream`.
template <typename T>
MMLM_INLINE void store_out(T* p, V x, int64_t count, bool stream) {
  if (stream && count >= kLanes) {
    stream_floats(p, x);
  } else {
    store_part(p, x, count);
  }
}

template <typename T>
MMLM_INLINE void to_floats(const T* from, int64_t size, float* to) {
  vectors(size, [&](int64_t i, int64_t n) { store_part(to + i, load_part(from + i, n), n); });
}
template <typename T>
MMLM_INLINE void from_floats(const float* from, int64_t size, T* to, bool stream) {
  stream = streams(to, stream);
  vectors(size, [&](int64_t i, int64_t n) { store_out(to + i, load_part(from + i, n), n, stream); });
}
template <typename T>
MMLM_INLINE void copy_row(const T* from, int64_t size, T* to, bool stream) {
  if (streams(to, stream)) {
    vectors(size, [&](int64_t i, int64_t n) { store_out(to + i, load_part(from + i, n), n, true); });
  } else {
    std::memcpy(to, from, size * sizeof(T));
  }
}

struct Stats {
  float mean = 0, rstd = 1;
};

MMLM_INLINE Stats stats_of(const float* v, int64_t size, bool is_layer, float eps) {
  Stats s;
  if (is_layer) s.mean = sum_vectors(size, [&](int64_t i, int64_t n) { return load_part(v + i, n); }) / size;
  const V mean = broadcast(s.mean);
  const float square = sum_vectors(size, [&](int64_t i, int64_t n) {
    const V d = load_part(v + i, n) - mean;
    return d * d;
  });
  s.rstd = 1.f / std::sqrt(square / size + eps);
  return s;
}

// The normalised row times the weight plus the bias; to may be v.
template <typename T>
MMLM_INLINE void normalise(const float* v, int64_t size, const Norm& norm, Stats s, T* to, bool stream = false) {
  stream = streams(to, stream);
  const V mean = broadcast(s.mean), rstd = broadcast(s.rstd);
  const float *w = norm.weight, *b = norm.bias;
  vectors(size, [&](int64_t i, int64_t n) {
    V y = (load_part(v + i, n) - mean) * rstd;
    if (w != nullptr) y = y * load_part(w + i, n);
    if (b != nullptr) y = y + load_part(b + i, n);
    store_out(to + i, y, n, stream);
  });
}

// g becomes the gradient of the row v instead of that of its norm; dweight and dbias, where given, are added to.
MMLM_INLINE void norm_backward(const float* v, float* g, int64_t size, const Norm& norm, Stats s, float* dweight,
                               float* dbias) {
  const V mean = broadcast(s.mean), rstd = broadcast(s.rstd);
  const float* w = norm.weight;
  const float along = sum_vectors(size, [&](int64_t i, int64_t n) {
    const V wg = w == nullptr ? load_part(g + i, n) : load_part(g + i, n) * load_part(w + i, n);
    return wg * ((load_part(v + i, n) - mean) * rstd);
  });
  float level = 0;
  if (norm.is_layer) {
    level = sum_vectors(size, [&](int64_t i, int64_t n) {
      return w == nullptr ? load_part(g + i, n) : load_part(g + i, n) * load_part(w + i, n);
    });
  }
  const V c1 = broadcast(along / size), c2 = broadcast(level / size);
  vectors(size, [&](int64_t i, int64_t n) {
    const V grad = load_part(g + i, n), unit = (load_part(v + i, n) - mean) * rstd;
    const V wg = w == nullptr ? grad : grad * load_part(w + i, n);
    if (dweight != nullptr) store_part(dweight + i, load_part(dweight + i, n) + grad * unit, n);
    if (dbias != nullptr) store_part(dbias + i, load_part(dbias + i, n) + grad, n);
    store_part(g + i, rstd * (wg - c2 - unit * c1), n);
  });
}

// Scratch of this thread: `count` arrays of at least `size` floats, aligned.
inline float* scratch(int64_t size, int count) {
  thread_local Arena<float> arena;
  return arena.at_least(round_up(size) * count);
}

}  // namespace
}  // namespace mmlm
