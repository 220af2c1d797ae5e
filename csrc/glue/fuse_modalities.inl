// Floor: every feature read once, the output written once; attention reads a row again from L1.
namespace mmlm {
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

void MMLM_JOIN(fuse_forward, MMLM_ISA)(const Fuse& f, int64_t first, int64_t last) {
  f.type == Number::float32 ? fuse_rows<float>(f, first, last) : fuse_rows<BFloat16>(f, first, last);
}

void MMLM_JOIN(fuse_backward, MMLM_ISA)(const Fuse& f, const Rows* dfeatures, float* dscores, int64_t first,
                                        int64_t last, float* dquery) {
  f.type == Number::float32 ? fuse_backward_rows<float>(f, dfeatures, dscores, first, last, dquery)
                            : fuse_backward_rows<BFloat16>(f, dfeatures, dscores, first, last, dquery);
}

void MMLM_JOIN(mix_forward, MMLM_ISA)(const Mix& m, int64_t first, int64_t last) {
  m.type == Number::float32 ? mix_rows<float>(m, first, last) : mix_rows<BFloat16>(m, first, last);
}

void MMLM_JOIN(mix_backward, MMLM_ISA)(const Mix& m, const Rows& grad, const Rows& dfirst, const Rows& dsecond,
                                       const Rows& dlogits, int64_t first, int64_t last) {
  m.type == Number::float32 ? mix_backward_rows<float>(m, grad, dfirst, dsecond, dlogits, first, last)
                            : mix_backward_rows<BFloat16>(m, grad, dfirst, dsecond, dlogits, first, last);
}

}  // namespace mmlm
