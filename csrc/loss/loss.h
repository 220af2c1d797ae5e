// The losses on CPUs: what lies between the matrix products. Logits come a chunk or a tile at a time, in float32; they
// are overwritten by their gradients, which the next products read. What each loss means: the reference in
// mmlm_fast/ops/<name>.py. Sums are made in a fixed order, so the bits do not depend on the number of threads.
#pragma once
#include <cstdint>

namespace mmlm {

// ---- linear_cross_entropy: rows over the whole vocabulary ----------------------------------------------------------

struct TokenLoss {
  int64_t rows = 0, vocab = 0, stride = 0;
  float* logits = nullptr;          // [rows, vocab]; with `factor` their gradients afterwards
  const int64_t* target = nullptr;  // [rows], each in [0, vocab)
  float scale = 1, softcap = 0;     // z = scale * logit, then softcap * tanh(z / softcap) unless 0
  float smoothing = 0, z_loss = 0;
  const float* factor = nullptr;  // [rows]: of each row's gradient; null: no gradients wanted
  float* loss = nullptr;          // [rows], written
};
void token_loss(const TokenLoss& t, int num_threads);

// ---- contrastive losses: tiles of rows against columns -------------------------------------------------------------

enum class Positives { diagonal = 0, ids = 1, weights = 2 };

struct Pairs {
  int64_t rows = 0, columns = 0, stride = 0;
  float* dots = nullptr;      // [rows, columns], rewritten with `scale` times the gradients of the logits
  float scale = 1, bias = 0;  // logit = scale * dot + bias
  Positives positives = Positives::diagonal;
  int64_t offset = 0;                                       // diagonal: row i belongs to column i + offset
  const int64_t *row_ids = nullptr, *column_ids = nullptr;  // ids: pairs of equal ids
  const float* weights = nullptr;                           // weights: [rows, columns]
  int64_t weights_stride = 0;
};

// Running statistics of the logits of rows or of columns, updated tile by tile. Start: -inf, 0, 0, 0.
struct Running {
  float *max = nullptr, *sum = nullptr;          // sum of exp(logit - max)
  float *positive = nullptr, *weight = nullptr;  // sums of weight * logit and of the weights of positives
};
void clip_statistics(const Pairs& p, const Running& rows, const Running& columns, int num_threads);

// gradient of the logit = softmax * exp(logit - lse) - target * weight, once along rows and once along columns
struct Side {
  const float *lse = nullptr, *softmax = nullptr, *target = nullptr;
};
// sums [2], added to: of gradient * dot and of the gradients.
void clip_gradients(const Pairs& p, const Side& rows, const Side& columns, double* sums, int num_threads);

// sums [3], added to: of the losses, of gradient * dot and of the gradients. Without `gradients` dots stay as they are.
void siglip_pairs(const Pairs& p, bool gradients, double* sums, int num_threads);

}  // namespace mmlm
