// Floor: every feature read once, the output written once; attention reads a row again from L1.
#pragma once
#include <vector>

#include "core/tensor.h"
#include "glue/modalities.h"

namespace mmlm {

struct Fuse {
  Number type = Number::float32;
  int64_t rows = 0, size = 0, tokens = 0;
  int num = 0;
  Rows features[kMaxModalities];
  bool broadcast[kMaxModalities] = {};  // one row serves `tokens` rows
  const float* query = nullptr;         // [size], scaled: attention; null: the weights are given
  const uint8_t* present = nullptr;     // [rows, num] or null
  float* weights = nullptr;             // [rows, num]; written where there is a query
  Rows out;                             // backward: its gradient, read
  bool stream = false;
};

}  // namespace mmlm

#if defined(MMLM_ISA)
#include "glue/rows.inl"

namespace mmlm::MMLM_ISA {
namespace {

// Row r of every modality; null where it is missing.
template <typename T>
MMLM_INLINE void features_of(const Fuse& f, int64_t r, const T** x) {
  for (int m = 0; m < f.num; ++m) {
    const bool there = f.present == nullptr || f.present[r * f.num + m] != 0;
    x[m] = there ? row_of<T>(f.features[m], f.broadcast[m] ? r / f.tokens : r) : nullptr;
  }
}

template <typename T>
MMLM_INLINE float dot(const T* x, const float* y, int64_t size) {
  return sum_vectors(size, [&](int64_t i, int64_t n) { return load_part(x + i, n) * load_part(y + i, n); });
}

template <typename T>
void fuse_rows(const Fuse& f, int64_t first, int64_t last) {
  const T* x[kMaxModalities];
  for (int64_t r = first; r < last; ++r) {
    features_of(f, r, x);
    float* w = f.weights + r * f.num;
    if (f.query != nullptr) {
      float largest = -INFINITY, total = 0;
      for (int m = 0; m < f.num; ++m) {
        w[m] = x[m] == nullptr ? -INFINITY : dot(x[m], f.query, f.size);
        if (!(w[m] <= largest)) largest = w[m];  // NaN stays
      }
      if (largest == -INFINITY) largest = 0;
      for (int m = 0; m < f.num; ++m) total += w[m] = std::exp(w[m] - largest);
      for (int m = 0; m < f.num; ++m) w[m] = x[m] == nullptr ? 0 : w[m] / total;
    }
    int num = 0;
    float kept[kMaxModalities];
    for (int m = 0; m < f.num; ++m) {
      if (x[m] == nullptr) continue;
      kept[num] = w[m];
      x[num++] = x[m];
    }
    T* out = row_of<T>(f.out, r);
    const bool stream = streams(out, f.stream);
    vectors(f.size, [&](int64_t i, int64_t n) {
      V sum = V{};
      for (int m = 0; m < num; ++m) sum += load_part(x[m] + i, n) * kept[m];
      store_out(out + i, sum, n, stream);
    });
  }
}

template <typename T>
void fuse_backward_rows(const Fuse& f, const Rows* dfeatures, float* dscores, int64_t first, int64_t last,
                        float* dquery) {
  const T* x[kMaxModalities];
  T* dx[kMaxModalities];
  float ds[kMaxModalities];
  float* g = scratch(f.size, 1);
  for (int64_t r = first; r < last; ++r) {
    features_of(f, r, x);
    const float* w = f.weights + r * f.num;
    to_floats(row_of<T>(f.out, r), f.size, g);
    bool stream = f.stream;
    for (int m = 0; m < f.num; ++m) {
      dx[m] = row_of<T>(dfeatures[m], r);
      stream = stream && streams(dx[m], true);
    }
    if (dscores != nullptr) {
      float mean = 0;
      for (int m = 0; m < f.num; ++m) {
        ds[m] = x[m] == nullptr ? 0 : dot(x[m], g, f.size);
        mean += w[m] * ds[m];
      }
      for (int m = 0; m < f.num; ++m) dscores[r * f.num + m] = ds[m] = x[m] == nullptr ? 0 : w[m] * (ds[m] - mean);
    }
    vectors(f.size, [&](int64_t i, int64_t n) {
      const V grad = load_part(g + i, n), query = f.query == nullptr ? V{} : load_part(f.query + i, n);
      V sum = V{};
      for (int m = 0; m < f.num; ++m) {
        V d = V{};
        if (x[m] != nullptr) {
          d = grad * w[m];
          if (f.query != nullptr) d += query * ds[m];
          if (dquery != nullptr) sum += load_part(x[m] + i, n) * ds[m];
        }
        store_out(dx[m] + i, d, n, stream);
      }
      if (dquery != nullptr) store_part(dquery + i, load_part(dquery + i, n) + sum, n);
    });
  }
}

}  // namespace

void fuse_modalities_fwd(const Fuse& f, int64_t first, int64_t last) {
  MMLM_BY_TYPE(f.type, fuse_rows, f, first, last);
}

void fuse_modalities_bwd(const Fuse& f, const Rows* dfeatures, float* dscores, int64_t first, int64_t last,
                         float* dquery) {
  MMLM_BY_TYPE(f.type, fuse_backward_rows, f, dfeatures, dscores, first, last, dquery);
}

}  // namespace mmlm::MMLM_ISA
#else
#include "glue/tasks.h"

namespace mmlm {

MMLM_KERNEL(void, fuse_modalities_fwd, const Fuse&, int64_t, int64_t)
MMLM_KERNEL(void, fuse_modalities_bwd, const Fuse&, const Rows*, float*, int64_t, int64_t, float*)

inline Fuse fuse_of(Number type, int64_t rows, int64_t size, int64_t tokens, const std::vector<Rows>& features,
                    const std::vector<bool>& broadcast, Address query, Address present, Address weights, Rows out) {
  check_modalities(features.size());
  Fuse f;
  f.type = type, f.rows = rows, f.size = size, f.tokens = tokens;
  f.num = static_cast<int>(features.size());
  for (int m = 0; m < f.num; ++m) f.features[m] = features[m], f.broadcast[m] = broadcast[m];
  f.query = query, f.present = present, f.weights = weights, f.out = out;
  return f;
}

inline void fuse_modalities_fwd(Number type, int64_t rows, int64_t size, int64_t tokens,
                                const std::vector<Rows>& features, const std::vector<bool>& broadcast, Address query,
                                Address present, Address weights, Rows out, int num_threads) {
  const auto run = MMLM_PICK(fuse_modalities_fwd);
  Fuse f = fuse_of(type, rows, size, tokens, features, broadcast, query, present, weights, out);
  f.stream = expect_outputs(type, rows, size, {out.data});
  for_rows(rows, size * f.num, num_threads, [&](int64_t first, int64_t last) { run(f, first, last); });
}

// dscores [rows, num] is written where given; dfeatures have all rows.
inline void fuse_modalities_bwd(Number type, int64_t rows, int64_t size, int64_t tokens,
                                const std::vector<Rows>& features, const std::vector<bool>& broadcast, Address query,
                                Address present, Address weights, Rows grad, const std::vector<Rows>& dfeatures,
                                Address dscores, Address dquery, int num_threads) {
  const auto run = MMLM_PICK(fuse_modalities_bwd);
  Fuse f = fuse_of(type, rows, size, tokens, features, broadcast, query, present, weights, grad);
  if (dfeatures.size() != features.size()) throw std::invalid_argument("one gradient a feature");
  f.stream = rows * size * f.num * bytes_of(type) >= kStreamBytes;
  sum_rows(rows, size * f.num, size, f.num, {dquery}, num_threads,
           [&](int64_t first, int64_t last, float* sums) { run(f, dfeatures.data(), dscores, first, last, sums); });
}

}  // namespace mmlm
#endif
