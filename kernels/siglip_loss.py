"""Triton kernel for `siglip_loss`: one pass over a tile of dot products. Contract: mmlm_fast/ops/siglip_loss.py.

Floor: the tile read and, for gradients, written once; see kernels/clip_loss.py for what is around it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmlm_kernels.launch import kernel

BLOCK = 512  # columns of one step along a row; with 1024 the kernel for sm_100 spills


@triton.jit
def _log1p(e):
    """ln(1 + e) for e of [0, 1], by ln(1 + e) / e as a polynomial that errs by at most 7·10⁻¹⁰ of it.

    In float32 the mean error is 0.7 times that of a logarithm of 1 + e with what rounding took from the sum given back
    (Kahan), which costs a logarithm, a division and four selections more.
    """
    p = 0.002030228031799197 * e - 0.013407466933131218
    p = p * e + 0.041478101164102554
    p = p * e - 0.08244161307811737
    p = p * e + 0.1241842731833458
    p = p * e - 0.16105687618255615
    p = p * e + 0.19890746474266052
    p = p * e - 0.24987271428108215
    p = p * e + 0.33332559466362
    p = p * e - 0.4999998211860657
    return (p * e + 1.0) * e


@kernel(do_not_specialize=["M", "stride_d", "stride_w", "offset"])
def _pairs_kernel(dots_ptr, scale_ptr, bias_ptr, sums_ptr, row_ids_ptr, column_ids_ptr, weights_ptr, M, stride_d,
                  stride_w, offset, UNIT: tl.constexpr, GRADIENTS: tl.constexpr, KIND: tl.constexpr,
                  BLOCK: tl.constexpr):  # fmt: skip
    """sums [N, 3] of the losses, of gradient · dot and of the gradients; dots = scale · gradient of the logits."""
    M, stride_d, stride_w = M * UNIT, stride_d * UNIT, stride_w * UNIT
    row = tl.program_id(0)
    scale, bias = tl.load(scale_ptr), tl.load(bias_ptr)
    dots_ptr += row.to(tl.int64) * stride_d
    losses, along, total = (
        tl.zeros((BLOCK,), tl.float32),
        tl.zeros((BLOCK,), tl.float32),
        tl.zeros((BLOCK,), tl.float32),
    )
    for first in range(0, M, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        mask = columns < M
        dots = tl.load(dots_ptr + columns, mask=mask, other=0.0).to(tl.float32)
        logits = scale * dots + bias
        if KIND == 0:
            w = tl.where(row + offset == columns, 1.0, 0.0)
        elif KIND == 1:
            ids = tl.load(column_ids_ptr + columns, mask=mask, other=0)
            w = tl.where(tl.load(row_ids_ptr + row) == ids, 1.0, 0.0)
        else:
            w = tl.load(weights_ptr + row.to(tl.int64) * stride_w + columns, mask=mask, other=0.0).to(tl.float32)
        e = tl.exp(tl.where(logits > 0, -logits, logits))
        # softplus(logit) - w · logit, with the cancelling part first
        loss = _log1p(e) + (tl.where(logits < 0, 0.0, logits) - w * logits)
        losses += tl.where(mask, loss, 0.0)
        if GRADIENTS:
            large = 1 / (1 + e)
            small = e * large
            g = tl.where(logits < 0, small, large) - w
            g = tl.where(logits >= 0, tl.where(w == 1, -small, g), g)  # 1/(1+e) - 1 without its rounding
            g = tl.where(mask, g, 0.0)
            along += g * dots
            total += g
            tl.store(dots_ptr + columns, (scale * g).to(dots_ptr.dtype.element_ty), mask=mask)
    tl.store(sums_ptr + 3 * row, tl.sum(losses, axis=0))
    tl.store(sums_ptr + 3 * row + 1, tl.sum(along, axis=0))
    tl.store(sums_ptr + 3 * row + 2, tl.sum(total, axis=0))


def siglip_loss_pairs(
    dots: Tensor, scale: Tensor, bias: Tensor, gradients: bool, sums: Tensor, kind: int, offset: int,
    row_ids: Tensor | None, column_ids: Tensor | None, weights: Tensor | None,
) -> None:  # fmt: skip
    num_rows, num_columns = dots.shape
    if dots.numel() == 0:
        return
    if weights is not None and weights.stride(1) != 1:
        weights = weights.contiguous()
    stride_w = 0 if weights is None else weights.stride(0)
    # multiples of 16 let loads be wide
    unit = 16 if all(number % 16 == 0 for number in (num_columns, dots.stride(0), stride_w)) else 1
    partial = torch.empty(num_rows, 3, dtype=torch.float32, device=dots.device)
    _pairs_kernel[(num_rows,)](
        dots, scale, bias, partial, dots if row_ids is None else row_ids, dots if column_ids is None else column_ids,
        dots if weights is None else weights, num_columns // unit, dots.stride(0) // unit, stride_w // unit, offset,
        UNIT=unit, GRADIENTS=gradients, KIND=kind, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    sums += partial.sum(0, dtype=torch.float64)
