// Included once per ISA with MMLM_ISA naming the symbols' suffix. Layouts and idea: interval_attention.h.
//
// Every sum over keys, queries or the head size is a sum of sums of at most 128 terms, which keeps the error of long
// sequences at that of matrix products in blocks.
//
// Floor: 2 * size + 2 * value_size flops a visible pair forward, 2.5 times that backward. The inner loops keep
// kRows x 2 vectors of sums in registers: on AVX2 12 multiply-adds for 8 loads.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "attention/interval_attention.h"
#include "core/arena.h"
#include "core/float_math.h"
#include "core/numbers.h"
#include "core/simd.h"
#include "core/transpose.h"

namespace mmlm::MMLM_ISA {
namespace {

// One copy each: inlined everywhere, with a variant for each number of rows, they took minutes to compile.
#define MMLM_OUTLINE static __attribute__((noinline))

using V = Vec<float>;
constexpr int kLanes = kWidth<float>;
constexpr int kBlock = 2 * kLanes;                                           // queries of a block
constexpr int kRows = kVectorBytes == 64 ? 12 : kVectorBytes == 32 ? 6 : 4;  // kRows x 2 vectors stay in registers
constexpr int kTerms = 96;  // at most, of a sum over the head size before it is added to the others
constexpr int kKeys = 128;  // keys of a tile: K and V of it stay in L2, scores of a block in L1
constexpr int kTile = kAttentionTile;
constexpr int kFewRows = kLanes / 2;  // up to so many rows, lanes along queries would be half idle
constexpr float kInf = std::numeric_limits<float>::infinity();
static_assert(kTile % kBlock == 0 && kKeys % kLanes == 0 && kBlock % 8 == 0, "whole blocks and vectors fill a tile");

int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// ---- rows in memory ------------------------------------------------------------------------------------------------

template <typename T>
T* row_of(const Heads& h, int64_t b, int64_t head, int64_t i) {
  return static_cast<T*>(h.data) + b * h.stride_b + head * h.stride_h + i * h.stride_s;
}

// Rows as float32, `padded` numbers each, zeros behind the first `size`; rows after `count` are zeros.
template <typename T>
void copy_rows(const T* from, int64_t stride, int64_t count, int64_t rows, int size, int64_t padded, float* to) {
  for (int64_t i = 0; i < count; ++i, to += padded, from += stride) {
    for (int d = 0; d < size; ++d) to[d] = to_float(from[d]);
    std::fill(to + size, to + padded, 0.f);
  }
  if (rows > count) std::fill(to, to + (rows - count) * padded, 0.f);
}

// Calls f with the number of rows as a constant: kRows at a time, the last two times about equally many, since few rows
// leave the multiply-adds waiting for each other.
template <int R, typename F>
MMLM_INLINE void exactly(int count, const F& f) {
  if (count == R) {
    f(std::integral_constant<int, R>{});
  } else if constexpr (R > 1) {
    exactly<R - 1>(count, f);
  }
}
template <typename F>
MMLM_INLINE void in_rows(int begin, int end, const F& f) {
  for (; end - begin >= 2 * kRows || end - begin == kRows; begin += kRows) {
    f(std::integral_constant<int, kRows>{}, begin);
  }
  while (begin < end) {
    const int rest = end - begin, count = rest > kRows ? (rest + 1) / 2 : rest;
    exactly<kRows>(count, [&](auto rows) { f(rows, begin); });
    begin += count;
  }
}

// ---- products ------------------------------------------------------------------------------------------------------

// out[n][lane] = scale * sum_d a[n][d] * b[d][lane] for n in [begin, end): scores from K and a transposed block of
// queries.
MMLM_OUTLINE void product(const float* a, int64_t a_stride, const float* b, int depth, float scale, int begin, int end,
                          float* out) {
  const int parts = (depth + kTerms - 1) / kTerms, terms = (depth + parts - 1) / parts;
  in_rows(begin, end, [&](auto rows, int n) {
    constexpr int R = decltype(rows)::value;
    const float* from = a + n * a_stride;
    for (int first = 0; first < depth; first += terms) {
      V acc[R][2] = {};
      const int last = std::min(first + terms, depth);
      for (int d = first; d < last; ++d) {
        const V b0 = load(b + d * kBlock), b1 = load(b + d * kBlock + kLanes);
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
          const V x = broadcast(from[r * a_stride + d]);
          acc[r][0] += x * b0;
          acc[r][1] += x * b1;
        }
      }
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        float* to = out + (n + r) * kBlock;
        if (first == 0) {
          store(to, acc[r][0] * scale);
          store(to + kLanes, acc[r][1] * scale);
        } else {
          store(to, load(to) + acc[r][0] * scale);
          store(to + kLanes, load(to + kLanes) + acc[r][1] * scale);
        }
      }
    }
  });
}

// acc[d][lane] += sum over n in [begin, end) of a[n][d] * w[n][lane]: weighted values, transposed.
MMLM_OUTLINE void accumulate_transposed(const float* a, int64_t a_stride, const float* w, int begin, int end, int depth,
                                        float* acc_out) {
  in_rows(0, depth, [&](auto rows, int d) {
    constexpr int R = decltype(rows)::value;
    V acc[R][2] = {};
    const float* from = a + begin * a_stride + d;
    for (int n = begin; n < end; ++n, from += a_stride) {
      const V w0 = load(w + n * kBlock), w1 = load(w + n * kBlock + kLanes);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const V x = broadcast(from[r]);
        acc[r][0] += x * w0;
        acc[r][1] += x * w1;
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      float* to = acc_out + (d + r) * kBlock;
      store(to, load(to) + acc[r][0]);
      store(to + kLanes, load(to + kLanes) + acc[r][1]);
    }
  });
}

// acc[n][d] += sum_lane w[n][lane] * b[lane][d] for n in [begin, end): gradients of keys and values.
// `padded` is the row length of b and acc, a multiple of kLanes.
MMLM_OUTLINE void accumulate_rows(const float* w, const float* b, int lanes, int begin, int end, int64_t padded,
                                  float* acc_out) {
  const auto columns = [&](auto vectors, int64_t d) {
    constexpr int W = decltype(vectors)::value;
    in_rows(begin, end, [&](auto rows, int n) {
      constexpr int R = decltype(rows)::value;
      V acc[R][W] = {};
      for (int lane = 0; lane < lanes; ++lane) {
        V x[W];
        for (int v = 0; v < W; ++v) x[v] = load(b + lane * padded + d + v * kLanes);
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
          const V s = broadcast(w[(n + r) * kBlock + lane]);
          for (int v = 0; v < W; ++v) acc[r][v] += s * x[v];
        }
      }
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        for (int v = 0; v < W; ++v) {
          float* to = acc_out + (n + r) * padded + d + v * kLanes;
          store(to, load(to) + acc[r][v]);
        }
      }
    });
  };
  int64_t d = 0;
  for (; d + 2 * kLanes <= padded; d += 2 * kLanes) columns(std::integral_constant<int, 2>{}, d);
  if (d < padded) columns(std::integral_constant<int, 1>{}, d);
}

// ---- one block of queries ------------------------------------------------------------------------------------------

struct Bounds {
  int32_t lo[kBlock], hi[kBlock];
  int64_t first, last;   // keys that some query of the block sees lie in [first, last)
  int64_t inner, outer;  // every query of the block sees the keys in [inner, outer)
};

// The rows' intervals; rows from `count` on see none.
Bounds bounds_of(const Attention& a, int64_t b, const int64_t* queries, int count) {
  Bounds out;
  bool sees_none = false;
  out.first = a.kv_len, out.last = 0, out.inner = 0, out.outer = a.kv_len;
  for (int i = 0; i < kBlock; ++i) {
    int64_t lo = 0, hi = i < count ? a.kv_len : 0;
    if (i < count && a.lo != nullptr) {
      lo = std::max<int64_t>(a.lo[b * a.mask_stride + queries[i]], 0);
      hi = std::min<int64_t>(a.hi[b * a.mask_stride + queries[i]], a.kv_len);
    }
    out.lo[i] = static_cast<int32_t>(lo);
    out.hi[i] = static_cast<int32_t>(std::max<int64_t>(hi, 0));
    if (hi <= lo) {
      sees_none |= i < count;
      continue;
    }
    out.first = std::min(out.first, lo), out.last = std::max(out.last, hi);
    out.inner = std::max(out.inner, lo), out.outer = std::min(out.outer, hi);
  }
  if (sees_none) out.inner = a.kv_len, out.outer = 0;  // all is masked: a query that sees nothing may hold NaN
  if (out.last <= out.first) out.first = out.last = 0;
  return out;
}

// Scores of keys [begin, end) of a tile that starts at `tile`: capped, -inf where not visible. The derivative of the
// cap goes to `slopes`, unless null.
MMLM_OUTLINE void finish_scores(const Attention& a, const Bounds& bounds, int64_t tile, int begin, int end, float* s,
                                float* slopes) {
  using Int = Lanes<float>::Int;
  const bool masked = tile + begin < bounds.inner || tile + end > bounds.outer;
  if (!masked && a.softcap == 0) return;
  for (int v = 0; v < 2; ++v) {
    Int lo, hi;
    std::memcpy(&lo, bounds.lo + v * kLanes, sizeof lo);
    std::memcpy(&hi, bounds.hi + v * kLanes, sizeof hi);
    for (int n = begin; n < end; ++n) {
      float* p = s + n * kBlock + v * kLanes;
      V x = load(p), slope = {};
      if (a.softcap > 0) {
        const V t = tanh_of(x / a.softcap);
        x = t * a.softcap, slope = 1.f - t * t;
      }
      if (masked) {
        const int32_t key = static_cast<int32_t>(tile + n);
        const Int visible = (Int)(lo <= key) & (Int)(hi > key);
        x = select(visible, x, broadcast(-kInf)), slope = select(visible, slope, V{});
      }
      store(p, x);
      if (a.softcap > 0 && slopes != nullptr) store(slopes + n * kBlock + v * kLanes, slope);
    }
  }
}

// Softmax over [begin, end) joined to what came before: s becomes weights; acc is rescaled where a maximum grew.
MMLM_OUTLINE void softmax_step(int begin, int end, float* s, float* largest, float* total, float* acc, int depth) {
  bool grew = false;
  V alpha[2];
  for (int v = 0; v < 2; ++v) {
    V m = load(largest + v * kLanes);
    const V before = m;
    for (int n = begin; n < end; ++n) m = max(m, load(s + n * kBlock + v * kLanes));
    const V shift = select((Lanes<float>::Int)(m == -kInf), V{}, m);
    V sum = {};
    for (int n = begin; n < end; ++n) {
      const V p = exp_of(load(s + n * kBlock + v * kLanes) - shift);
      sum += p;
      store(s + n * kBlock + v * kLanes, p);
    }
    alpha[v] = exp_of(before - shift);
    store(total + v * kLanes, load(total + v * kLanes) * alpha[v] + sum);
    store(largest + v * kLanes, m);
    for (int i = 0; i < kLanes; ++i) grew |= alpha[v][i] != 1.f;
  }
  if (!grew) return;
  for (int d = 0; d < depth; ++d) {
    for (int v = 0; v < 2; ++v) {
      float* p = acc + d * kBlock + v * kLanes;
      store(p, load(p) * alpha[v]);
    }
  }
}

// ---- forward -------------------------------------------------------------------------------------------------------

// One task: up to kTile rows of one key head. With few queries a row is a query of one of the heads that share the
// keys.
template <typename T>
void forward_task(const Attention& a, int64_t b, int64_t first_head, int64_t pack, int64_t tile) {
  const int64_t num_rows = std::min<int64_t>(kTile, pack * a.q_len - tile);
  const int num_blocks = static_cast<int>((num_rows + kBlock - 1) / kBlock);
  const int64_t group = a.heads / a.kv_heads, kv_head = first_head / group;
  const int size = a.size, value_size = a.value_size;
  static thread_local Arena<float> arena;
  const int64_t widest = std::max(size, value_size);
  float* queries = arena.at_least(kTile * int64_t{size} + kTile * int64_t{value_size} + kKeys * kBlock +
                                  kKeys * (int64_t{size} + value_size) + kBlock * round_up(widest, 8) + 2 * kTile);
  float* acc = queries + kTile * int64_t{size};
  float* s = acc + kTile * int64_t{value_size};
  float* k_copy = s + kKeys * kBlock;
  float* v_copy = k_copy + kKeys * int64_t{size};
  float* rows = v_copy + kKeys * int64_t{value_size};
  float* largest = rows + kBlock * round_up(widest, 8);
  float* total = largest + kTile;

  Bounds bounds[kTile / kBlock];
  int64_t first = a.kv_len, last = 0;
  std::fill(acc, acc + kTile * int64_t{value_size}, 0.f);
  for (int block = 0; block < num_blocks; ++block) {
    const int count = static_cast<int>(std::min<int64_t>(kBlock, num_rows - block * kBlock));
    int64_t query[kBlock], head[kBlock];
    for (int i = 0; i < count; ++i) {
      const int64_t row = tile + block * kBlock + i;
      query[i] = row % a.q_len, head[i] = first_head + row / a.q_len;
      copy_rows(row_of<T>(a.query, b, head[i], query[i]), 0, 1, 1, size, size, rows + i * size);
      const float sink = a.sinks != nullptr ? a.sinks[head[i]] : -kInf;
      largest[block * kBlock + i] = sink, total[block * kBlock + i] = a.sinks != nullptr ? 1.f : 0.f;
    }
    for (int i = count; i < kBlock; ++i) largest[block * kBlock + i] = -kInf, total[block * kBlock + i] = 0.f;
    std::fill(rows + count * size, rows + kBlock * size, 0.f);
    transpose(rows, size, kBlock, size, queries + block * kBlock * int64_t{size}, kBlock);
    bounds[block] = bounds_of(a, b, query, count);
    if (bounds[block].last > bounds[block].first) {
      first = std::min(first, bounds[block].first), last = std::max(last, bounds[block].last);
    }
  }

  for (int64_t key = first; key < last; key += kKeys) {
    const int64_t count = std::min<int64_t>(kKeys, last - key);
    const float *k = k_copy, *v = v_copy;
    int64_t k_stride = size, v_stride = value_size;
    if (std::is_same_v<T, float>) {  // keys are read along their rows: where the next one lies does not matter
      k = reinterpret_cast<const float*>(row_of<T>(a.key, b, kv_head, key)), k_stride = a.key.stride_s;
    } else {
      copy_rows(row_of<T>(a.key, b, kv_head, key), a.key.stride_s, count, count, size, size, k_copy);
    }
    if (std::is_same_v<T, float> && a.value.stride_s == value_size) {
      v = reinterpret_cast<const float*>(row_of<T>(a.value, b, kv_head, key));
    } else {
      copy_rows(row_of<T>(a.value, b, kv_head, key), a.value.stride_s, count, count, value_size, value_size, v_copy);
    }
    for (int block = 0; block < num_blocks; ++block) {
      const Bounds& own = bounds[block];
      const int begin = static_cast<int>(std::max<int64_t>(own.first - key, 0));
      const int end = static_cast<int>(std::min<int64_t>(own.last - key, count));
      if (end <= begin) continue;
      float* own_acc = acc + block * kBlock * int64_t{value_size};
      product(k, k_stride, queries + block * kBlock * int64_t{size}, size, a.scale, begin, end, s);
      finish_scores(a, own, key, begin, end, s, nullptr);
      softmax_step(begin, end, s, largest + block * kBlock, total + block * kBlock, own_acc, value_size);
      accumulate_transposed(v, v_stride, s, begin, end, value_size, own_acc);
    }
  }

  for (int block = 0; block < num_blocks; ++block) {
    float* own_acc = acc + block * kBlock * int64_t{value_size};
    const int count = static_cast<int>(std::min<int64_t>(kBlock, num_rows - block * kBlock));
    float factor[kBlock];
    for (int i = 0; i < kBlock; ++i) {
      const bool alive = bounds[block].hi[i] > bounds[block].lo[i];
      factor[i] = alive ? 1.f / total[block * kBlock + i] : 0.f;
    }
    for (int d = 0; d < value_size; ++d) {
      for (int v = 0; v < 2; ++v) {
        float* p = own_acc + d * kBlock + v * kLanes;
        store(p, load(p) * load(factor + v * kLanes));
      }
    }
    transpose(own_acc, kBlock, value_size, kBlock, rows, value_size);
    for (int i = 0; i < count; ++i) {
      const int64_t row = tile + block * kBlock + i, query = row % a.q_len, head = first_head + row / a.q_len;
      T* out = row_of<T>(a.out, b, head, query);
      for (int d = 0; d < value_size; ++d) put(out + d, rows[i * value_size + d]);
      const int64_t lane = block * kBlock + i, at = (b * a.heads + head) * a.q_len + query;
      const bool alive = bounds[block].hi[i] > bounds[block].lo[i];
      a.largest[at] = alive ? largest[lane] : a.sinks != nullptr ? a.sinks[head] : -kInf;
      a.total[at] = alive ? total[lane] : a.sinks != nullptr ? 1.f : 0.f;
    }
  }
}

// As forward_task for at most kFewRows rows: lanes along the head size, since lanes along queries would be idle. Each
// key and value is read once for all rows.
template <typename T>
void few_rows_task(const Attention& a, int64_t b, int64_t first_head, int64_t num_rows) {
  const int64_t kv_head = first_head / (a.heads / a.kv_heads);
  const int64_t padded = round_up(a.size, kLanes), value_padded = round_up(a.value_size, kLanes);
  static thread_local Arena<float> arena;
  float* queries = arena.at_least((kFewRows + kKeys) * (padded + value_padded) + kFewRows * kKeys);
  float* acc = queries + kFewRows * padded;
  float* k_copy = acc + kFewRows * value_padded;
  float* v_copy = k_copy + kKeys * padded;
  float* s = v_copy + kKeys * value_padded;
  int64_t lo[kFewRows], hi[kFewRows], first = a.kv_len, last = 0;
  float largest[kFewRows], total[kFewRows];
  std::fill(acc, acc + kFewRows * value_padded, 0.f);
  for (int r = 0; r < num_rows; ++r) {
    const int64_t query = r % a.q_len, head = first_head + r / a.q_len;
    copy_rows(row_of<T>(a.query, b, head, query), 0, 1, 1, a.size, padded, queries + r * padded);
    lo[r] = 0, hi[r] = a.kv_len;
    if (a.lo != nullptr) {
      lo[r] = std::max<int64_t>(a.lo[b * a.mask_stride + query], 0);
      hi[r] = std::min<int64_t>(a.hi[b * a.mask_stride + query], a.kv_len);
    }
    largest[r] = a.sinks != nullptr ? a.sinks[head] : -kInf, total[r] = a.sinks != nullptr ? 1.f : 0.f;
    if (hi[r] > lo[r]) first = std::min(first, lo[r]), last = std::max(last, hi[r]);
  }
  for (int64_t key = first; key < last; key += kKeys) {
    const int64_t count = std::min<int64_t>(kKeys, last - key);
    const float *k = k_copy, *v = v_copy;
    int64_t k_stride = padded, v_stride = value_padded;
    if (std::is_same_v<T, float> && padded == a.size) {
      k = reinterpret_cast<const float*>(row_of<T>(a.key, b, kv_head, key)), k_stride = a.key.stride_s;
    } else {
      copy_rows(row_of<T>(a.key, b, kv_head, key), a.key.stride_s, count, count, a.size, padded, k_copy);
    }
    if (std::is_same_v<T, float> && value_padded == a.value_size) {
      v = reinterpret_cast<const float*>(row_of<T>(a.value, b, kv_head, key)), v_stride = a.value.stride_s;
    } else {
      copy_rows(row_of<T>(a.value, b, kv_head, key), a.value.stride_s, count, count, a.value_size, value_padded,
                v_copy);
    }
    for (int r = 0; r < num_rows; ++r) {
      const int begin = static_cast<int>(std::max<int64_t>(lo[r] - key, 0));
      const int end = static_cast<int>(std::min<int64_t>(hi[r] - key, count));
      if (end <= begin) continue;
      const float* q = queries + r * padded;
      float* w = s + r * kKeys;
      V tile_max = broadcast(-kInf);
      std::fill(w + begin / kLanes * kLanes, w + begin, -kInf);
      std::fill(w + end, w + round_up(end, kLanes), -kInf);
      int n = begin;
      for (; n + 4 <= end; n += 4) {
        V sums[4] = {};
        for (int64_t d = 0; d < padded; d += kLanes) {
          const V x = load(q + d);
          for (int j = 0; j < 4; ++j) sums[j] += x * load(k + (n + j) * k_stride + d);
        }
        for (int j = 0; j < 4; ++j) w[n + j] = sum_of(sums[j]);
      }
      for (; n < end; ++n) {
        V sum = {};
        for (int64_t d = 0; d < padded; d += kLanes) sum += load(q + d) * load(k + n * k_stride + d);
        w[n] = sum_of(sum);
      }
      const int from = begin / kLanes * kLanes, to = static_cast<int>(round_up(end, kLanes));
      for (int i = from; i < to; i += kLanes) {
        V x = load(w + i) * a.scale;
        if (a.softcap > 0) {
          const V capped = tanh_of(x / a.softcap) * a.softcap;
          x = select((Lanes<float>::Int)(x == -kInf), x, capped);  // what is masked stays so
        }
        store(w + i, x);
        tile_max = max(tile_max, x);
      }
      float m = largest[r];
      for (int i = 0; i < kLanes; ++i) m = tile_max[i] > m || tile_max[i] != tile_max[i] ? tile_max[i] : m;
      const V alpha = exp_of(broadcast(largest[r] - (m == -kInf ? 0.f : m)));
      V sum = {};
      for (int i = from; i < to; i += kLanes) {
        const V p = exp_of(load(w + i) - (m == -kInf ? 0.f : m));
        store(w + i, p);
        sum += p;
      }
      total[r] = total[r] * alpha[0] + sum_of(sum);
      largest[r] = m;
      float* out = acc + r * value_padded;
      for (int64_t d = 0; d < value_padded; d += 4 * kLanes) {
        const int width = static_cast<int>(std::min<int64_t>(4, (value_padded - d) / kLanes));
        V sums[4] = {};
        for (int i = 0; i < width; ++i) sums[i] = load(out + d + i * kLanes) * alpha;
        for (int j = begin; j < end; ++j) {
          const V weight = broadcast(w[j]);
          const float* value = v + j * v_stride + d;
          if (width == 4) {
            for (int i = 0; i < 4; ++i) sums[i] += weight * load(value + i * kLanes);
          } else {
            for (int i = 0; i < width; ++i) sums[i] += weight * load(value + i * kLanes);
          }
        }
        for (int i = 0; i < width; ++i) store(out + d + i * kLanes, sums[i]);
      }
    }
  }
  for (int r = 0; r < num_rows; ++r) {
    const int64_t query = r % a.q_len, head = first_head + r / a.q_len;
    const bool alive = hi[r] > lo[r];
    T* out = row_of<T>(a.out, b, head, query);
    for (int d = 0; d < a.value_size; ++d) put(out + d, alive ? acc[r * value_padded + d] / total[r] : 0.f);
    const int64_t at = (b * a.heads + head) * a.q_len + query;
    a.largest[at] = alive ? largest[r] : a.sinks != nullptr ? a.sinks[head] : -kInf;
    a.total[at] = alive ? total[r] : a.sinks != nullptr ? 1.f : 0.f;
  }
}

// ---- backward ------------------------------------------------------------------------------------------------------

// Gradients through one head: dq is written; dk and dv, float32 [kv_len][padded], are added to.
//
// A tile of keys stays in L2 with its gradients while the blocks of queries that see it pass by.
template <typename T>
void backward_head(const Attention& a, const AttentionGradient& g, int64_t b, int64_t head, float* dk, float* dv) {
  const int size = a.size, value_size = a.value_size;
  const int64_t padded = round_up(size, kLanes), value_padded = round_up(value_size, kLanes);
  const int64_t kv_head = head / (a.heads / a.kv_heads);
  const int64_t num_blocks = (a.q_len + kBlock - 1) / kBlock;
  static thread_local Arena<float> arena;
  float* q_rows = arena.at_least((2 * kBlock + kKeys) * (padded + value_padded) + 3 * kKeys * kBlock);
  float* g_rows = q_rows + kBlock * padded;
  float* q_t = g_rows + kBlock * value_padded;
  float* g_t = q_t + kBlock * padded;
  float* k = g_t + kBlock * value_padded;
  float* v = k + kKeys * padded;
  float* p = v + kKeys * value_padded;
  float* dp = p + kKeys * kBlock;
  float* slopes = dp + kKeys * kBlock;
  std::vector<float> dq(num_blocks * kBlock * size);  // transposed, block by block
  std::vector<Bounds> bounds(num_blocks);

  float* delta = g.delta + (b * a.heads + head) * a.q_len;
  const float *largest = a.largest + (b * a.heads + head) * a.q_len, *total = a.total + (b * a.heads + head) * a.q_len;
  for (int64_t i = 0; i < a.q_len; ++i) {
    const T *out = row_of<T>(a.out, b, head, i), *grad = row_of<T>(g.grad, b, head, i);
    float sum = 0;
    for (int d = 0; d < value_size; ++d) sum += to_float(out[d]) * to_float(grad[d]);
    delta[i] = sum - (g.grad_lse != nullptr ? g.grad_lse[(b * a.heads + head) * a.q_len + i] : 0.f);
  }
  int64_t first = a.kv_len, last = 0;
  for (int64_t block = 0; block < num_blocks; ++block) {
    int64_t query[kBlock];
    const int count = static_cast<int>(std::min<int64_t>(kBlock, a.q_len - block * kBlock));
    for (int i = 0; i < count; ++i) query[i] = block * kBlock + i;
    bounds[block] = bounds_of(a, b, query, count);
    if (bounds[block].last <= bounds[block].first) continue;
    first = std::min(first, bounds[block].first), last = std::max(last, bounds[block].last);
  }

  for (int64_t key = first; key < last; key += kKeys) {
    const int64_t num_keys = std::min<int64_t>(kKeys, last - key);
    copy_rows(row_of<T>(a.key, b, kv_head, key), a.key.stride_s, num_keys, num_keys, size, padded, k);
    copy_rows(row_of<T>(a.value, b, kv_head, key), a.value.stride_s, num_keys, num_keys, value_size, value_padded, v);
    for (int64_t block = 0; block < num_blocks; ++block) {
      const Bounds& own = bounds[block];
      const int begin = static_cast<int>(std::max<int64_t>(own.first - key, 0));
      const int end = static_cast<int>(std::min<int64_t>(own.last - key, num_keys));
      if (end <= begin) continue;
      const int64_t begin_query = block * kBlock;
      const int count = static_cast<int>(std::min<int64_t>(kBlock, a.q_len - begin_query));
      copy_rows(row_of<T>(a.query, b, head, begin_query), a.query.stride_s, count, kBlock, size, padded, q_rows);
      copy_rows(row_of<T>(g.grad, b, head, begin_query), g.grad.stride_s, count, kBlock, value_size, value_padded,
                g_rows);
      transpose(q_rows, padded, kBlock, size, q_t, kBlock);
      transpose(g_rows, value_padded, kBlock, value_size, g_t, kBlock);
      product(k, padded, q_t, size, a.scale, begin, end, p);
      finish_scores(a, own, key, begin, end, p, slopes);
      product(v, value_padded, g_t, value_size, 1.f, begin, end, dp);
      for (int half = 0; half < 2; ++half) {
        float largest_of[kLanes], factor_of[kLanes], delta_of[kLanes];
        for (int i = 0; i < kLanes; ++i) {
          const int row = half * kLanes + i;
          const bool alive = own.hi[row] > own.lo[row];
          largest_of[i] = alive ? largest[begin_query + row] : 0.f;
          factor_of[i] = alive ? 1.f / total[begin_query + row] : 0.f;
          delta_of[i] = alive ? delta[begin_query + row] : 0.f;
        }
        const V own_largest = load(largest_of), factor = load(factor_of), own_delta = load(delta_of);
        for (int n = begin; n < end; ++n) {
          const int64_t at = n * kBlock + half * kLanes;
          const V weight = exp_of(load(p + at) - own_largest) * factor;
          V ds = weight * (load(dp + at) - own_delta) * a.scale;
          if (a.softcap > 0) ds *= load(slopes + at);
          store(p + at, weight);
          store(dp + at, ds);
        }
      }
      accumulate_rows(p, g_rows, count, begin, end, value_padded, dv + key * value_padded);
      accumulate_rows(dp, q_rows, count, begin, end, padded, dk + key * padded);
      accumulate_transposed(k, padded, dp, begin, end, size, dq.data() + block * kBlock * size);
    }
  }

  for (int64_t block = 0; block < num_blocks; ++block) {
    transpose(dq.data() + block * kBlock * size, kBlock, size, kBlock, q_rows, size);
    const int64_t count = std::min<int64_t>(kBlock, a.q_len - block * kBlock);
    for (int64_t i = 0; i < count; ++i) {
      T* out = row_of<T>(g.dq, b, head, block * kBlock + i);
      for (int d = 0; d < size; ++d) put(out + d, q_rows[i * size + d]);
    }
  }
}

// Keys' and values' gradients, summed over `parts` in order, to their dtype. Part j is at dk + j * part_stride.
template <typename T>
void store_sum(const Heads& to, int64_t b, int64_t kv_head, int64_t length, int size, const float* from, int64_t padded,
               int64_t parts, int64_t part_stride) {
  for (int64_t i = 0; i < length; ++i) {
    T* out = row_of<T>(to, b, kv_head, i);
    for (int d = 0; d < size; ++d) {
      float sum = from[i * padded + d];
      for (int64_t j = 1; j < parts; ++j) sum += from[j * part_stride + i * padded + d];
      put(out + d, sum);
    }
  }
}

}  // namespace

int64_t attention_lanes() { return kLanes; }

void interval_attention_fwd(const Attention& a, int64_t b, int64_t head, int64_t pack, int64_t tile) {
  const int64_t num_rows = pack * a.q_len;
  if (num_rows <= kFewRows) {
    MMLM_BY_TYPE(a.type, few_rows_task, a, b, head, num_rows);
  } else {
    MMLM_BY_TYPE(a.type, forward_task, a, b, head, pack, tile);
  }
}

void interval_attention_bwd(const Attention& a, const AttentionGradient& g, int64_t b, int64_t head, float* dk,
                            float* dv) {
  MMLM_BY_TYPE(a.type, backward_head, a, g, b, head, dk, dv);
}

void interval_attention_store(const Attention& a, const Heads& to, int64_t b, int64_t kv_head, int size,
                              const float* from, int64_t padded, int64_t parts, int64_t part_stride) {
  MMLM_BY_TYPE(a.type, store_sum, to, b, kv_head, a.kv_len, size, from, padded, parts, part_stride);
}

}  // namespace mmlm::MMLM_ISA
