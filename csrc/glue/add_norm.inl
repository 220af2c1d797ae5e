// Floor: x and residual read, their sum and its norm written; the row stays in L1 between.
namespace mmlm {
namespace {

template <typename T>
void add_norm_rows(const AddNorm& a, int64_t first, int64_t last) {
  float* v = scratch(a.size, 1);
  for (int64_t r = first; r < last; ++r) {
    const T *x = row_of<T>(a.x, r), *residual = row_of<T>(a.residual, r);
    if (residual != nullptr) {
      T* sum = row_of<T>(a.sum, r);
      const bool stream = streams(sum, a.stream);
      vectors(a.size, [&](int64_t i, int64_t n) {
        const V s = as_stored(sum, load_part(x + i, n) + load_part(residual + i, n));
        store_out(sum + i, s, n, stream);
        store_part(v + i, s, n);
      });
    } else {
      to_floats(x, a.size, v);
    }
    normalise(v, a.size, a.norm, stats_of(v, a.size, a.norm.is_layer, a.norm.eps), row_of<T>(a.out, r), a.stream);
  }
}

template <typename T>
void add_norm_backward_rows(const AddNorm& a, const AddNormGradient& d, int64_t first, int64_t last, float* dweight,
                            float* dbias) {
  const int64_t padded = round_up(a.size);
  float *v = scratch(a.size, 2), *g = v + padded;
  for (int64_t r = first; r < last; ++r) {
    T* dx = row_of<T>(d.dx, r);
    const bool stream = streams(dx, a.stream);
    const T *grad = row_of<T>(d.grad, r), *grad_sum = row_of<T>(d.grad_sum, r);
    if (grad != nullptr) {
      to_floats(row_of<T>(d.sum, r), a.size, v);
      to_floats(grad, a.size, g);
      norm_backward(v, g, a.size, a.norm, stats_of(v, a.size, a.norm.is_layer, a.norm.eps), dweight, dbias);
    } else {
      std::fill(g, g + a.size, 0.f);
    }
    vectors(a.size, [&](int64_t i, int64_t n) {
      V sum = load_part(g + i, n);
      if (grad_sum != nullptr) sum += load_part(grad_sum + i, n);
      store_out(dx + i, sum, n, stream);
    });
  }
}

}  // namespace

void MMLM_JOIN(add_norm_forward, MMLM_ISA)(const AddNorm& a, int64_t first, int64_t last) {
  a.type == Number::float32 ? add_norm_rows<float>(a, first, last) : add_norm_rows<BFloat16>(a, first, last);
}

void MMLM_JOIN(add_norm_backward, MMLM_ISA)(const AddNorm& a, const AddNormGradient& d, int64_t first, int64_t last,
                                            float* dweight, float* dbias) {
  a.type == Number::float32 ? add_norm_backward_rows<float>(a, d, first, last, dweight, dbias)
                            : add_norm_backward_rows<BFloat16>(a, d, first, last, dweight, dbias);
}

}  // namespace mmlm
