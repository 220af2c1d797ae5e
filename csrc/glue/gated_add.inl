// Floor: x and residual read, their sum written.
namespace mmlm {
namespace {

template <typename T>
void gated_add_rows(const GatedAdd& a, int64_t first, int64_t last) {
  for (int64_t r = first; r < last; ++r) {
    const T *x = row_of<T>(a.x, r), *residual = row_of<T>(a.residual, r);
    T* out = row_of<T>(a.out, r);
    if (a.keep != nullptr && a.keep[r] == 0) {
      copy_row(residual, a.size, out, a.stream);
      continue;
    }
    const bool stream = streams(out, a.stream);
    vectors(a.size, [&](int64_t i, int64_t n) {
      store_out(out + i, load_part(residual + i, n) + load_part(a.gate + i, n) * load_part(x + i, n), n, stream);
    });
  }
}

template <typename T>
void gated_add_backward_rows(const GatedAdd& a, const Rows& grads, const Rows& dxs, int64_t first, int64_t last,
                             float* sums) {
  for (int64_t r = first; r < last; ++r) {
    const T *x = row_of<T>(a.x, r), *grad = row_of<T>(grads, r);
    T* dx = row_of<T>(dxs, r);
    if (a.keep != nullptr && a.keep[r] == 0) {
      std::memset(static_cast<void*>(dx), 0, a.size * sizeof(T));
      continue;
    }
    const bool stream = streams(dx, a.stream);
    vectors(a.size, [&](int64_t i, int64_t n) {
      const V g = load_part(grad + i, n);
      store_part(sums + i, load_part(sums + i, n) + g * load_part(x + i, n), n);
      store_out(dx + i, g * load_part(a.gate + i, n), n, stream);
    });
  }
}

}  // namespace

void MMLM_JOIN(gated_add_forward, MMLM_ISA)(const GatedAdd& a, int64_t first, int64_t last) {
  a.type == Number::float32 ? gated_add_rows<float>(a, first, last) : gated_add_rows<BFloat16>(a, first, last);
}

void MMLM_JOIN(gated_add_backward, MMLM_ISA)(const GatedAdd& a, const Rows& grad, const Rows& dx, int64_t first,
                                             int64_t last, float* sums) {
  a.type == Number::float32 ? gated_add_backward_rows<float>(a, grad, dx, first, last, sums)
                            : gated_add_backward_rows<BFloat16>(a, grad, dx, first, last, sums);
}

}  // namespace mmlm
