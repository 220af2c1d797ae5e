// Floor: each output row written once from the row it comes from.
namespace mmlm {
namespace {

template <typename T>
T* feature_row(const Merge& m, int64_t row) {  // null where there are not so many
  int k = 0;
  while (k < m.num_features && row >= m.first[k + 1]) ++k;
  return k == m.num_features ? nullptr : row_of<T>(m.features[k], row - m.first[k]);
}

template <typename T>
void merge_rows(const Merge& m, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; ++i) {
    const int64_t source = m.source[i];
    const T* feature = source < 0 ? feature_row<T>(m, -1 - source) : nullptr;
    const T* base = source < 0 && !m.add ? nullptr : row_of<T>(m.base, m.base_is_rows ? i : source);
    T* out = row_of<T>(m.out, i);
    if (base == nullptr && feature == nullptr) {
      std::memset(static_cast<void*>(out), 0, m.size * sizeof(T));
      continue;
    }
    if (base == nullptr || (feature == nullptr && m.scale == 1.f)) {
      copy_row(base == nullptr ? feature : base, m.size, out, m.stream);
      continue;
    }
    const V scale = broadcast(m.scale);
    const bool stream = streams(out, m.stream);
    vectors(m.size, [&](int64_t j, int64_t n) {
      V x = load_part(base + j, n) * scale;
      if (feature != nullptr) x += load_part(feature + j, n);
      store_out(out + j, x, n, stream);
    });
  }
}

template <typename T>
void merge_backward_rows(const Merge& m, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; ++i) {
    if (m.source[i] >= 0) continue;
    T* feature = feature_row<T>(m, -1 - m.source[i]);
    if (feature != nullptr) copy_row(row_of<T>(m.out, i), m.size, feature, m.stream);
  }
}

}  // namespace

void MMLM_JOIN(merge_forward, MMLM_ISA)(const Merge& m, int64_t first, int64_t last) {
  m.type == Number::float32 ? merge_rows<float>(m, first, last) : merge_rows<BFloat16>(m, first, last);
}

void MMLM_JOIN(merge_backward, MMLM_ISA)(const Merge& m, int64_t first, int64_t last) {
  m.type == Number::float32 ? merge_backward_rows<float>(m, first, last)
                            : merge_backward_rows<BFloat16>(m, first, last);
}

}  // namespace mmlm
