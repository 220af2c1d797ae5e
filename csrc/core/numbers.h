// Numbers as they lie in memory: float32 and bfloat16. Included only by per-ISA files, like simd.h.
#pragma once
#include <cstdint>
#include <cstring>

#include "core/simd.h"

namespace mmlm {
namespace {

struct BFloat16 {
  uint16_t bits;
};

MMLM_INLINE float to_float(float x) { return x; }
MMLM_INLINE float to_float(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
MMLM_INLINE void put(float* p, float x) { *p = x; }
MMLM_INLINE void put(BFloat16* p, float x) {  // to nearest even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  p->bits = x != x ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// A vector of float32 from either, and back.
typedef uint16_t Halfwords __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));

MMLM_INLINE Vec<float> load_floats(const float* p) { return load(p); }
MMLM_INLINE Vec<float> load_floats(const BFloat16* p) {
#if MMLM_INSTRUCTIONS == 32
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (Vec<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16);
#else
  Halfwords half;
  std::memcpy(&half, p, sizeof(half));
  return (Vec<float>)(__builtin_convertvector(half, Words) << 16);
#endif
}
MMLM_INLINE void store_floats(float* p, Vec<float> x) { store(p, x); }
// To nearest even, in the upper half of each word; the lower half is whatever it was.
MMLM_INLINE Words rounded(Vec<float> x) {
  const Words bits = (Words)x, up = bits + (0x7fff + ((bits >> 16) & 1));
  const Words nan = (Words)(x != x);
#if MMLM_INSTRUCTIONS == 32
  return (Words)_mm256_blendv_epi8((__m256i)up, (__m256i)(bits | 0x400000), (__m256i)nan);
#else
  return (up & ~nan) | ((bits | 0x400000) & nan);
#endif
}
MMLM_INLINE void store_upper_halves(BFloat16* p, Words words) {
  words >>= 16;
#if MMLM_INSTRUCTIONS == 32  // GCC narrows with a dozen shuffles
  const __m256i w = (__m256i)words;
  const __m128i half = _mm_packus_epi32(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1));
#else
  const Halfwords half = __builtin_convertvector(words, Halfwords);
#endif
  std::memcpy(p, &half, sizeof(half));
}
MMLM_INLINE void store_floats(BFloat16* p, Vec<float> x) { store_upper_halves(p, rounded(x)); }

// The first `count` lanes, the others zero.
template <typename T>
MMLM_INLINE Vec<float> load_first(const T* p, int count) {
  T part[kWidth<float>] = {};
  std::memcpy(part, p, count * sizeof(T));
  return load_floats(part);
}
template <typename T>
MMLM_INLINE void store_first(T* p, Vec<float> x, int count) {
  T part[kWidth<float>];
  store_floats(part, x);
  std::memcpy(p, part, count * sizeof(T));
}

// A whole vector where `count` numbers are left, else the rest.
template <typename T>
MMLM_INLINE Vec<float> load_part(const T* p, int64_t count) {
  return count >= kWidth<float> ? load_floats(p) : load_first(p, static_cast<int>(count));
}
template <typename T>
MMLM_INLINE void store_part(T* p, Vec<float> x, int64_t count) {
  if (count >= kWidth<float>) {
    store_floats(p, x);
  } else {
    store_first(p, x, static_cast<int>(count));
  }
}

// Past the caches, for outputs larger than these: a store through them reads the line first. Aligned vectors only.
MMLM_INLINE void stream_floats(float* p, Vec<float> x) {
#if MMLM_INSTRUCTIONS == 64
  _mm512_stream_ps(p, (__m512)x);
#elif MMLM_INSTRUCTIONS == 32
  _mm256_stream_ps(p, (__m256)x);
#else
  store_floats(p, x);
#endif
}
MMLM_INLINE void stream_floats(BFloat16* p, Vec<float> x) {
#if MMLM_INSTRUCTIONS >= 32
  typedef long long Quads __attribute__((vector_size(kVectorBytes / 2)));
  Quads half;
  store_floats(reinterpret_cast<BFloat16*>(&half), x);
#if MMLM_INSTRUCTIONS == 64
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)half);
#else
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)half);
#endif
#else
  store_floats(p, x);
#endif
}

// What x becomes when stored and read again.
MMLM_INLINE Vec<float> as_stored(const float*, Vec<float> x) { return x; }
MMLM_INLINE Vec<float> as_stored(const BFloat16*, Vec<float> x) { return (Vec<float>)(rounded(x) & 0xffff0000u); }

}  // namespace
}  // namespace mmlm
