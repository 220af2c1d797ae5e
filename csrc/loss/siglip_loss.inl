// SigLIP's loss. Floor: an exponential and a logarithm a pair; a tile stays in the caches.
#pragma once
#include "loss/pairs.inl"

#if defined(MMLM_ISA)

namespace mmlm::MMLM_ISA {
namespace {

void siglip_row(const Pairs& p, bool gradients, int64_t row, double* sums) {
  float* dots = p.dots + row * p.stride;
  const int64_t diagonal = diagonal_of(p, row);
  const bool dense = p.positives != Positives::diagonal;
  double along = 0, gradient_sum = 0;
  // softplus(l) - w l, with the cancelling part first; where the positive is on the diagonal it follows.
  sums[0] += sum_long(p.columns, [&](int64_t j, int64_t n) {
    const V dot = load_part(dots + j, n), l = p.scale * dot + p.bias;
    V w = {};
    if (dense) {
      w = weights_at(p, row, j, n);
    } else if (diagonal >= j && diagonal < j + n) {
      w[diagonal - j] = 1.f;
    }
    const V e = exp_of(-max(l, -l));
    if (gradients) {
      const V small = e / (1.f + e), g = select(l < 0.f, small, 1.f / (1.f + e)) - w;
      // where w is 1 and l > 0: 1/(1+e) - 1 without its rounding
      const V exact = select((l >= 0.f) & (w == 1.f), -small, g);
      along += sum_of(first_lanes(exact * dot, n));
      gradient_sum += sum_of(first_lanes(exact, n));
      store_part(dots + j, p.scale * exact, n);
    }
    return log1p_of(e) + (max(V{}, l) - w * l);
  });
  sums[1] += along, sums[2] += gradient_sum;
}

}  // namespace

void siglip_loss_pairs(const Pairs& p, bool gradients, int64_t first, int64_t last, double* sums) {
  for (int64_t row = first; row < last; ++row) siglip_row(p, gradients, row, sums);
}

}  // namespace mmlm::MMLM_ISA
#else

namespace mmlm {

MMLM_KERNEL(void, siglip_loss_pairs, const Pairs&, bool, int64_t, int64_t, double*)

// sums [3], added to: of the losses, of gradient * dot and of the gradients. Without `gradients` dots stay as they are.
inline void siglip_loss_pairs(int64_t rows, int64_t columns, Rows dots, float scale, float bias,
                              const PositivesTuple& positives, bool gradients, Address sums, int num_threads) {
  const auto run = MMLM_PICK(siglip_loss_pairs);
  const Pairs p = pairs_of(rows, columns, dots, scale, bias, positives);
  sum_tasks<3>(p, sums, num_threads,
               [&](int64_t first, int64_t last, double* part) { run(p, gradients, first, last, part); });
}

}  // namespace mmlm
#endif
