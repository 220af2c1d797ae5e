// Pixels into patches. Floor: each number read once, written once.
#pragma once
#include <array>

#include "core/tensor.h"

namespace mmlm {

struct Patchify {
  Number type = Number::float32;
  int64_t batch = 0, channels = 0, height = 0, width = 0;  // in pixels
  int64_t stride_b = 0, stride_c = 0, stride_y = 0, stride_x = 0;
  int patch = 1, merge = 1, repeats = 1;  // merge x merge patches follow each other; repeats: frames in time
  const uint8_t* pixels = nullptr;
  const float *scale = nullptr, *shift = nullptr;  // [channels]
  void* out = nullptr;                             // [batch, patches, channels, repeats, patch, patch] dense
};

}  // namespace mmlm

#if defined(MMLM_ISA)
#include "glue/rows.inl"

namespace mmlm::MMLM_ISA {
namespace {

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

void patchify(const Patchify& p, int64_t first, int64_t last) {
  MMLM_BY_TYPE(p.type, patchify_patches, p, first, last);
}

}  // namespace mmlm::MMLM_ISA
#else
#include "glue/tasks.h"

namespace mmlm {

MMLM_KERNEL(void, patchify, const Patchify&, int64_t, int64_t)

// sizes, strides: batch, channels, height, width.
inline void patchify(Number type, const std::array<int64_t, 4>& sizes, const std::array<int64_t, 4>& strides, int patch,
                     int merge, int repeats, Address pixels, Address scale, Address shift, Address out,
                     int num_threads) {
  if (patch < 1 || merge < 1 || repeats < 1) {
    throw std::invalid_argument("patch, merge and repeats must be at least 1");
  }
  const auto run = MMLM_PICK(patchify);
  const auto [batch, channels, height, width] = sizes;
  const Patchify p{type,       batch, channels, height,  width,  strides[0], strides[1], strides[2],
                   strides[3], patch, merge,    repeats, pixels, scale,      shift,      out};
  const int64_t rows = batch * (height / patch) * (width / patch), size = channels * repeats * patch * patch;
  expect_outputs(type, rows, size, {out});
  for_rows(rows, size, num_threads, [&](int64_t first, int64_t last) { run(p, first, last); });
}

}  // namespace mmlm
#endif
