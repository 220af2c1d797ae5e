// Rows of patches gathered, normalised and joined; pixels into patches. Floor: each number read once, written once.
namespace mmlm {
namespace {

// [parts, size] to [size, parts], or back with the two exchanged.
inline void transpose(const float* from, int64_t rows, int64_t columns, float* to) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) to[j * rows + i] = from[i * columns + j];
  }
}

template <typename T>
void gather_rows(const Gather& g, int64_t first, int64_t last) {
  const int64_t total = g.parts * g.size;
  float* v = scratch(total, 2);
  float* turned = v + round_up(total);
  const bool plain = g.norm_at == NormAt::none && !g.channels_first;
  for (int64_t r = first; r < last; ++r) {
    const int64_t* index = g.index + r * g.parts;
    T* out = row_of<T>(g.out, r);
    for (int k = 0; k < g.parts; ++k) {
      const T* x = row_of<T>(g.x, index[k]);
      float* part = v + k * g.size;
      if (plain) {
        copy_row(x, g.size, out + k * g.size, g.stream);
        continue;
      }
      to_floats(x, g.size, part);
      if (g.norm_at == NormAt::before) {
        const Stats s = stats_of(part, g.size, g.norm.is_layer, g.norm.eps);
        if (g.channels_first) {
          normalise(part, g.size, g.norm, s, part);
        } else {
          normalise(part, g.size, g.norm, s, out + k * g.size, g.stream);
        }
      }
    }
    if (plain || (g.norm_at == NormAt::before && !g.channels_first)) continue;
    const float* row = v;
    if (g.channels_first) {
      transpose(v, g.parts, g.size, turned);
      row = turned;
    }
    if (g.norm_at == NormAt::after) {
      normalise(row, total, g.norm, stats_of(row, total, g.norm.is_layer, g.norm.eps), out, g.stream);
    } else {
      from_floats(row, total, out, g.stream);
    }
  }
}

template <typename T>
void gather_backward_rows(const Gather& g, const Rows& grads, const Rows& dxs, int64_t first, int64_t last,
                          float* dweight, float* dbias) {
  const int64_t total = g.parts * g.size, padded = round_up(total);
  float* v = scratch(total, 3);
  float *d = v + padded, *turned = d + padded;
  for (int64_t r = first; r < last; ++r) {
    const int64_t* index = g.index + r * g.parts;
    if (g.norm_at == NormAt::none && !g.channels_first) {
      for (int k = 0; k < g.parts; ++k) {
        copy_row(row_of<T>(grads, r) + k * g.size, g.size, row_of<T>(dxs, index[k]), g.stream);
      }
      continue;
    }
    to_floats(row_of<T>(grads, r), total, d);
    if (g.norm_at == NormAt::after) {
      float* into = g.channels_first ? turned : v;
      for (int k = 0; k < g.parts; ++k) to_floats(row_of<T>(g.x, index[k]), g.size, into + k * g.size);
      if (g.channels_first) transpose(turned, g.parts, g.size, v);
      norm_backward(v, d, total, g.norm, stats_of(v, total, g.norm.is_layer, g.norm.eps), dweight, dbias);
    }
    float* parts = d;
    if (g.channels_first) {
      transpose(d, g.size, g.parts, turned);
      parts = turned;
    }
    for (int k = 0; k < g.parts; ++k) {
      float* part = parts + k * g.size;
      if (g.norm_at == NormAt::before) {
        to_floats(row_of<T>(g.x, index[k]), g.size, v);
        norm_backward(v, part, g.size, g.norm, stats_of(v, g.size, g.norm.is_layer, g.norm.eps), dweight, dbias);
      }
      from_floats(part, g.size, row_of<T>(dxs, index[k]), g.stream);
    }
  }
}

MMLM_INLINE V from_bytes(const uint8_t* p) {
  typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
  typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));
  Bytes bytes;
  std::memcpy(&bytes, p, kLanes);
  return __builtin_convertvector(__builtin_convertvector(bytes, Ints), V);
}

// Patches [first, last) of batch * patches.
template <typename T>
void patchify_patches(const Patchify& p, int64_t first, int64_t last) {
  const int64_t grid_x = p.width / p.patch, grid_y = p.height / p.patch, patches = grid_x * grid_y;
  const int64_t area = int64_t{p.patch} * p.patch, block = int64_t{p.merge} * p.merge;
  for (int64_t t = first; t < last; ++t) {
    const int64_t n = t % patches, inside = n % block, blocks_x = grid_x / p.merge;
    const int64_t y = (n / block / blocks_x * p.merge + inside / p.merge) * p.patch;
    const int64_t x = (n / block % blocks_x * p.merge + inside % p.merge) * p.patch;
    const uint8_t* corner = p.pixels + t / patches * p.stride_b + y * p.stride_y + x * p.stride_x;
    T* out = static_cast<T*>(p.out) + t * p.channels * p.repeats * area;
    for (int64_t c = 0; c < p.channels; ++c, out += p.repeats * area) {
      const float scale = p.scale[c], shift = p.shift[c];
      for (int i = 0; i < p.patch; ++i) {
        const uint8_t* line = corner + c * p.stride_c + i * p.stride_y;
        T* to = out + i * p.patch;
        int j = 0;
        if (p.stride_x == 1) {
          for (; j + kLanes <= p.patch; j += kLanes) store_floats(to + j, from_bytes(line + j) * scale + shift);
        }
        for (; j < p.patch; ++j) put(to + j, static_cast<float>(line[j * p.stride_x]) * scale + shift);
      }
      for (int k = 1; k < p.repeats; ++k) std::memcpy(out + k * area, out, area * sizeof(T));
    }
  }
}

}  // namespace

void MMLM_JOIN(gather_forward, MMLM_ISA)(const Gather& g, int64_t first, int64_t last) {
  g.type == Number::float32 ? gather_rows<float>(g, first, last) : gather_rows<BFloat16>(g, first, last);
}

void MMLM_JOIN(gather_backward, MMLM_ISA)(const Gather& g, const Rows& grad, const Rows& dx, int64_t first,
                                          int64_t last, float* dweight, float* dbias) {
  g.type == Number::float32 ? gather_backward_rows<float>(g, grad, dx, first, last, dweight, dbias)
                            : gather_backward_rows<BFloat16>(g, grad, dx, first, last, dweight, dbias);
}

void MMLM_JOIN(patchify, MMLM_ISA)(const Patchify& p, int64_t first, int64_t last) {
  p.type == Number::float32 ? patchify_patches<float>(p, first, last) : patchify_patches<BFloat16>(p, first, last);
}

}  // namespace mmlm
