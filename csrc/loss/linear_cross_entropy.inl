// The loss of rows over the whole vocabulary. Floor: a row's logits read once and their gradients written; a row stays
// in the second-level cache between passes.
#pragma once
#include <array>
#include <cstdint>

#include "core/tensor.h"

namespace mmlm {

struct TokenLoss {
  int64_t rows = 0, vocab = 0, stride = 0;
  float* logits = nullptr;          // [rows, vocab]; with `factor` their gradients afterwards
  const int64_t* target = nullptr;  // [rows], each in [0, vocab)
  float scale = 1, softcap = 0;     // z = scale * logit, then softcap * tanh(z / softcap) unless 0
  float smoothing = 0, z_loss = 0;
  const float* factor = nullptr;  // [rows]: of each row's gradient; null: no gradients wanted
  float* loss = nullptr;          // [rows], written
};

}  // namespace mmlm

#if defined(MMLM_ISA)
#include "loss/long_rows.inl"

namespace mmlm::MMLM_ISA {
namespace {

void token_loss_row(const TokenLoss& t, int64_t row) {
  float* z = t.logits + row * t.stride;
  const int64_t vocab = t.vocab, target = t.target[row];
  if (t.softcap != 0) {
    const float inner = t.scale / t.softcap, cap = t.softcap;
    vectors(vocab, [&](int64_t i, int64_t n) { store_part(z + i, cap * tanh_of(inner * load_part(z + i, n)), n); });
  } else if (t.scale != 1) {
    vectors(vocab, [&](int64_t i, int64_t n) { store_part(z + i, t.scale * load_part(z + i, n), n); });
  }
  const float top = max_of(z, vocab);
  const float shift = top == -kInf ? 0.f : top;
  const double sum = sum_long(vocab, [&](int64_t i, int64_t n) { return exp_of(load_part(z + i, n) - shift); });
  const double log_sum = std::log(sum), lse = shift + log_sum;
  const float hit = z[target];
  double loss = (1. - t.smoothing) * ((static_cast<double>(shift) - hit) + log_sum) + t.z_loss * lse * lse;
  if (t.smoothing != 0) {
    loss += t.smoothing * (lse - sum_long(vocab, [&](int64_t i, int64_t n) { return load_part(z + i, n); }) / vocab);
  }
  t.loss[row] = static_cast<float>(loss);
  if (t.factor == nullptr) return;

  // d loss / dz = (1 + 2 z_loss lse) softmax - (1 - smoothing) [target] - smoothing / vocab
  const float factor = t.factor[row] * t.scale;
  const float softmax = factor * static_cast<float>((1 + 2 * t.z_loss * lse) / sum);
  const float uniform = factor * t.smoothing / vocab, at_target = factor * (1 - t.smoothing);
  if (t.softcap == 0) {
    vectors(vocab, [&](int64_t i, int64_t n) {
      store_part(z + i, softmax * exp_of(load_part(z + i, n) - shift) - uniform, n);
    });
    z[target] -= at_target;
  } else {
    const float inverse = 1 / t.softcap, cut = hit * inverse;
    vectors(vocab, [&](int64_t i, int64_t n) {
      const V x = load_part(z + i, n), capped = x * inverse;
      store_part(z + i, (softmax * exp_of(x - shift) - uniform) * (1.f - capped * capped), n);
    });
    z[target] -= at_target * (1 - cut * cut);
  }
}

}  // namespace

void linear_cross_entropy_rows(const TokenLoss& t, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) token_loss_row(t, row);
}

}  // namespace mmlm::MMLM_ISA
#else
#include "loss/tasks.h"

namespace mmlm {

MMLM_KERNEL(void, linear_cross_entropy_rows, const TokenLoss&, int64_t, int64_t)

// options: scale, soft cap, smoothing, z-loss.
inline void linear_cross_entropy_rows(int64_t rows, int64_t vocab, Rows logits, Address target,
                                      const std::array<float, 4>& options, Address factor, Address loss,
                                      int num_threads) {
  const auto run = MMLM_PICK(linear_cross_entropy_rows);
  const auto [scale, softcap, smoothing, z_loss] = options;
  const TokenLoss t{rows,   vocab,  logits.stride, static_cast<float*>(logits.data), target, scale, softcap, smoothing,
                    z_loss, factor, loss};
  in_tasks(rows, 1, rows * vocab, num_threads, [&](int64_t, int64_t first, int64_t last) { run(t, first, last); });
}

}  // namespace mmlm
#endif
