#include "attention/interval_attention.h"

#include <algorithm>
#include <memory>

#include "core/isa.h"
#include "core/memory.h"
#include "core/thread_pool.h"

namespace mmlm {

#define MMLM_DECLARE(isa)                                                                                       \
  int64_t attention_lanes_##isa();                                                                              \
  void attention_forward_##isa(const Attention&, int64_t b, int64_t head, int64_t pack, int64_t tile);          \
  void attention_backward_##isa(const Attention&, const AttentionGradient&, int64_t b, int64_t head, float* dk, \
                                float* dv);                                                                     \
  void attention_store_##isa(const Attention&, const Heads& to, int64_t b, int64_t kv_head, int size,           \
                             const float* from, int64_t padded, int64_t parts, int64_t part_stride);
MMLM_EACH_ISA(MMLM_DECLARE)

namespace {

struct Functions {
  decltype(&attention_lanes_baseline) lanes;
  decltype(&attention_forward_baseline) forward;
  decltype(&attention_backward_baseline) backward;
  decltype(&attention_store_baseline) store;
};

#define MMLM_TABLE(isa)                                                                                       \
  Functions functions_##isa() {                                                                               \
    return {attention_lanes_##isa, attention_forward_##isa, attention_backward_##isa, attention_store_##isa}; \
  }
MMLM_EACH_ISA(MMLM_TABLE)

// Waking a thread takes some microseconds; below this many multiply-adds one thread is faster.
constexpr double kSerialWork = 5e5;

int threads_for(const Attention& a, int num_threads) {
  const double work = 1.0 * a.batch * a.heads * a.q_len * a.kv_len * (a.size + a.value_size);
  return work < kSerialWork ? 1 : num_threads;
}

// Outputs are dense, whatever their order of dimensions.
void expect_output(const Attention& a, const Heads& h, int64_t heads, int64_t length, int size) {
  ask_for_huge_pages(h.data, a.batch * heads * length * size * (a.type == Number::float32 ? 4 : 2));
}

}  // namespace

void attention_forward(const Attention& a, int num_threads) {
  const Functions f = MMLM_PICK(functions)();
  const int64_t group = a.heads / a.kv_heads;
  const int64_t pack = group * a.q_len <= kAttentionTile ? group : 1;
  const int64_t tiles = (pack * a.q_len + kAttentionTile - 1) / kAttentionTile, heads = a.heads / pack;
  expect_output(a, a.out, a.heads, a.q_len, a.value_size);
  parallel_for(a.batch * heads * tiles, threads_for(a, num_threads), [&](int64_t task) {
    const int64_t tile = tiles - 1 - task / (a.batch * heads);  // the last ones see most keys under a causal mask
    const int64_t rest = task % (a.batch * heads);
    f.forward(a, rest / heads, rest % heads * pack, pack, tile * kAttentionTile);
  });
}

void attention_backward(const Attention& a, const AttentionGradient& g, int num_threads) {
  const Functions f = MMLM_PICK(functions)();
  num_threads = threads_for(a, num_threads);
  const int64_t lanes = f.lanes(), group = a.heads / a.kv_heads;
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
      f.backward(a, g, b, pair % a.kv_heads * group + task % group, dk, dk + a.kv_len * padded);
    });
    parallel_for(count * 2, num_threads, [&](int64_t task) {
      const int64_t pair = first + task / 2, b = pair / a.kv_heads, kv_head = pair % a.kv_heads;
      const float* dk = sums.get() + task / 2 * group * part;
      if (task % 2 == 0) {
        f.store(a, g.dk, b, kv_head, a.size, dk, padded, group, part);
      } else {
        f.store(a, g.dv, b, kv_head, a.value_size, dk + a.kv_len * padded, value_padded, group, part);
      }
    });
  }
}

}  // namespace mmlm
