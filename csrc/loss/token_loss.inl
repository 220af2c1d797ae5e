// Floor: a row's logits read once and their gradients written; a row stays in the second-level cache between passes.
namespace mmlm {
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

void MMLM_JOIN(token_loss, MMLM_ISA)(const TokenLoss& t, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) token_loss_row(t, row);
}

}  // namespace mmlm
