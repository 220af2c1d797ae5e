// Attention on CPUs where each query sees one interval of keys. What it means: mmlm_fast/ops/interval_attention.py.
//
// One vector lane is one query: scores and weights of a block of queries stand transposed, [keys][queries], so that
// maxima and sums over keys need no shuffles, K and V are read as they lie (one broadcast a number), and a block sees
// exactly the keys from its least lo to its largest hi.
#pragma once
#include <array>
#include <cstdint>

#include "core/arguments.h"

namespace mmlm {

constexpr int kAttentionTile = 128;  // queries of a task of the forward pass, which share the copies of K and V

struct Attention {
  Number type = Number::float32;
  int64_t batch = 0, heads = 0, kv_heads = 0, q_len = 0, kv_len = 0;
  int size = 0, value_size = 0;  // of a head: queries and keys, values
  float scale = 1, softcap = 0;  // softcap 0: none
  Heads query, key, value;
  const int32_t *lo = nullptr, *hi = nullptr;  // [1 or batch, q_len] dense, or null: every query sees every key
  int64_t mask_stride = 0;                     // 0 where one row of bounds serves all samples
  const float* sinks = nullptr;                // [heads] or null
  Heads out;
  // Of each row's scores, sinks included, the largest and sum exp(score - largest): [batch, heads, q_len] dense. Their
  // log-sum-exp alone would cost the weights of the backward pass its rounding error, which is larger than their own.
  float *largest = nullptr, *total = nullptr;
};

struct AttentionGradient {
  Heads grad;                       // of the output
  const float* grad_lse = nullptr;  // [batch, heads, q_len] dense, or null
  Heads dq, dk, dv;
  float* delta = nullptr;  // [batch, heads, q_len]: sum of grad * out - grad_lse; written
};

// Softmax(scale * Q K^T) V, and largest and total, on up to num_threads threads.
// sizes: batch, heads, kv_heads, q_len, kv_len, head size, value's head size. tensors: query, key, value, out.
void interval_attention_fwd(Number type, const std::array<int64_t, 7>& sizes, float scale, float softcap,
                            const std::array<Heads, 4>& tensors, Address lo, Address hi, int64_t mask_stride,
                            Address sinks, Address largest, Address total, int num_threads);

// Gradients of the same; out, largest and total are read, `delta` is written. gradients: of out (read), of query, key
// and value. The bits do not depend on num_threads.
void interval_attention_bwd(Number type, const std::array<int64_t, 7>& sizes, float scale, float softcap,
                            const std::array<Heads, 4>& tensors, Address lo, Address hi, int64_t mask_stride,
                            Address largest, Address total, const std::array<Heads, 4>& gradients, Address grad_lse,
                            Address delta, int num_threads);

}  // namespace mmlm
