#include "attention/interval_attention.h"

#include <algorithm>
#include <memory>
#include <stdexcept>

#include "core/dispatch.h"
#include "core/memory.h"
#include "core/thread_pool.h"

namespace mmlm {

MMLM_KERNEL(int64_t, attention_lanes, )
// Rows from `tile` on of heads [head, head + pack), which share their keys.
MMLM_KERNEL(void, interval_attention_fwd, const Attention&, int64_t b, int64_t head, int64_t pack, int64_t tile)
MMLM_KERNEL(void, interval_attention_bwd, const Attention&, const AttentionGradient&, int64_t b, int64_t head,
            float* dk, float* dv)
MMLM_KERNEL(void, interval_attention_store, const Attention&, const Heads& to, int64_t b, int64_t kv_head, int size,
            const float* from, int64_t padded, int64_t parts, int64_t part_stride)

namespace {

// Waking a thread takes some microseconds; below this many multiply-adds one thread is faster.
constexpr double kSerialWork = 5e5;

int threads_for(const Attention& a, int num_threads) {
  const double work = 1.0 * a.batch * a.heads * a.q_len * a.kv_len * (a.size + a.value_size);
  return work < kSerialWork ? 1 : num_threads;
}

// Outputs are dense, whatever their order of dimensions.
void expect_output(const Attention& a, const Heads& h, int64_t heads, int64_t length, int size) {
  ask_for_huge_pages(h.data, a.batch * heads * length * size * bytes_of(a.type));
}

Attention attention_of(Number type, const std::array<int64_t, 7>& sizes, float scale, float softcap,
                       const std::array<Heads, 4>& tensors, Address lo, Address hi, int64_t mask_stride, Address sinks,
                       Address largest, Address total) {
  const auto [batch, heads, kv_heads, q_len, kv_len, size, value_size] = sizes;
  if (*std::min_element(sizes.begin(), sizes.end()) < 1 || heads % kv_heads != 0) {
    throw std::invalid_argument("sizes must be positive, and kv_heads must divide heads");
  }
  const auto& [query, key, value, out] = tensors;
  return {type,
          batch,
          heads,
          kv_heads,
          q_len,
          kv_len,
          static_cast<int>(size),
          static_cast<int>(value_size),
          scale,
          softcap,
          query,
          key,
          value,
          lo,
          hi,
          mask_stride,
          sinks,
          out,
          largest,
          total};
}

}  // namespace

void interval_attention_fwd(Number type, const std::array<int64_t, 7>& sizes, float scale, float softcap,
                            const std::array<Heads, 4>& tensors, Address lo, Address hi, int64_t mask_stride,
                            Address sinks, Address largest, Address total, int num_threads) {
  const auto run = MMLM_PICK(interval_attention_fwd);
  const Attention a = attention_of(type, sizes, scale, softcap, tensors, lo, hi, mask_stride, sinks, largest, total);
  const int64_t group = a.heads / a.kv_heads;
  const int64_t pack = group * a.q_len <= kAttentionTile ? group : 1;
  const int64_t tiles = (pack * a.q_len + kAttentionTile - 1) / kAttentionTile, heads = a.heads / pack;
  expect_output(a, a.out, a.heads, a.q_len, a.value_size);
  parallel_for(a.batch * heads * tiles, threads_for(a, num_threads), [&](int64_t task) {
    const int64_t tile = tiles - 1 - task / (a.batch * heads);  // the last ones see most keys under a causal mask
    const int64_t rest = task % (a.batch * heads);
    run(a, rest / heads, rest % heads * pack, pack, tile * kAttentionTile);
  });
}

void interval_attention_bwd(Number type, const std::array<int64_t, 7>& sizes, float scale, float softcap,
                            const std::array<Heads, 4>& tensors, Address lo, Address hi, int64_t mask_stride,
                            Address largest, Address total, const std::array<Heads, 4>& gradients, Address grad_lse,
                            Address delta, int num_threads) {
  const auto run = MMLM_PICK(interval_attention_bwd);
  const auto store = MMLM_PICK(interval_attention_store);
  const Attention a = attention_of(type, sizes, scale, softcap, tensors, lo, hi, mask_stride, {}, largest, total);
  const AttentionGradient g{gradients[0], grad_lse, gradients[1], gradients[2], gradients[3], delta};
  num_threads = threads_for(a, num_threads);
  const int64_t lanes = MMLM_PICK(attention_lanes)(), group = a.heads / a.kv_heads;
  const int64_t padded = (a.size + lanes - 1) / lanes * lanes,
                value_padded = (a.value_size + lanes - 1) / lanes * lanes;
  const int64_t part = a.kv_len * (padded + value_padded);
  // Each head has sums of its own, added in order of heads: the bits do not depend on the number of threads. A wave is
  // as many key heads as keep the threads busy, which bounds the memory.
  const int64_t pairs = a.batch * a.kv_heads;
  const int64_t wave = std::min<int64_t>(pairs, std::max<int64_t>(1, (2 * num_threads + group - 1) / group));
  expect_output(a, g.dq, a.heads, a.q_len, a.size);
  expect_output(a, g.dk, a.kv_heads, a.kv_len, a.size);
  expect_output(a, g.dv, a.kv_heads, a.kv_len, a.value_size);
  const std::unique_ptr<float[]> sums(new float[wave * group * part]);
  for (int64_t first = 0; first < pairs; first += wave) {
    const int64_t count = std::min(wave, pairs - first);
    parallel_for(count * group, num_threads, [&](int64_t task) {
      const int64_t pair = first + task / group, b = pair / a.kv_heads;
      float* dk = sums.get() + task * part;
      std::fill(dk, dk + part, 0.f);
      run(a, g, b, pair % a.kv_heads * group + task % group, dk, dk + a.kv_len * padded);
    });
    parallel_for(count * 2, num_threads, [&](int64_t task) {
      const int64_t pair = first + task / 2, b = pair / a.kv_heads, kv_head = pair % a.kv_heads;
      const float* dk = sums.get() + task / 2 * group * part;
      if (task % 2 == 0) {
        store(a, g.dk, b, kv_head, a.size, dk, padded, group, part);
      } else {
        store(a, g.dv, b, kv_head, a.value_size, dk + a.kv_len * padded, value_padded, group, part);
      }
    });
  }
}

}  // namespace mmlm
