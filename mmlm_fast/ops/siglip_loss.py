"""Pairwise sigmoid loss, the loss of SigLIP, in memory linear in the batch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmlm_fast.ops._formed import formed_dtype, wide, with_formed_gradients
from mmlm_fast.ops._native import core
from mmlm_fast.ops._op import LOSS_TYPES, REFERENCE, Op
from mmlm_fast.ops._registry import autocast, register_op
from mmlm_fast.ops.clip_loss import NAMES
from mmlm_fast.ops.contrastive import (
    Exchange,
    Local,
    Positives,
    add_product,
    check_pairs,
    each_tile,
    has_pairs,
    native_positives,
    positives_of,
    scalar_tensor,
)

OP = Op("siglip_loss", native=LOSS_TYPES, smallest=2**15, counts="pairs")


def siglip_loss_ref(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    positives: Positives | None = None,
) -> Tensor:
    logits = logit_scale * (image_features @ text_features.T).to(wide(image_features)) + logit_bias
    weights = (positives or Positives()).dense(logits)
    # −log σ(z·logit) with z = ±1 for weights 1 and 0
    losses = -weights * F.logsigmoid(logits) - (1 - weights) * F.logsigmoid(-logits)
    return losses.sum() / max(1, logits.shape[0])


def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    positive_ids: Tensor | tuple[Tensor, Tensor] | None = None,
    targets: Tensor | None = None,
    offset: int = 0,
) -> Tensor:
    """Compute −1/N·Σᵢⱼ log σ(zᵢⱼ·(logit_scale·imageᵢ·textⱼ + logit_bias)), z = 1 for positive pairs and −1 for others.

    Logits exist for a tile of pairs at a time, gradients are formed in the same pass: 6·N·M·D flops. Over several
    processes: `mmlm_fast.distributed.siglip_loss`.

    Args:
        image_features: ``[N, D]`` rows, normalised by the caller; float32 / float16 / bfloat16 / float64.
        text_features: ``[M, D]`` columns; same dtype. Under autocast both are cast.
        logit_scale: The temperature's inverse, exp already taken (10 at the start); a number, or a tensor of one with
            gradient. Not finite: the loss is NaN.
        logit_bias: Likewise (−10 at the start).
        positive_ids: int64 ids ``[N]``, or a pair ``[N]`` and ``[M]``: every pair of equal ids is positive. None: the
            diagonal.
        targets: ``[N, M]`` in [0, 1], the probability of being positive: binary cross-entropy with soft labels.
        offset: Row i's positive is column i + offset: local rows against gathered columns. Far outside: all negative.

    Returns:
        Scalar in float32 (float64 for float64).

    Raises:
        ValueError: for shapes, dtypes or devices that do not go together.

    Source: SigLIP (Zhai et al. 2023), algorithm 1; transformers' SiglipModel; open_clip's SigLipLoss.
    """
    scalars = {"logit_scale": logit_scale, "logit_bias": logit_bias}
    check_pairs(image_features, text_features, NAMES, scalars, positive_ids, targets)
    x, y = autocast(image_features, text_features)
    assert x is not None
    assert y is not None
    positives = positives_of(x, y, positive_ids, targets, offset)
    scale, bias = scalar_tensor(logit_scale, x), scalar_tensor(logit_bias, x)
    if OP.path(x, x.shape[0] * y.shape[0], fits=has_pairs(x, y)) == REFERENCE:
        return siglip_loss_ref(x, y, scale, bias, positives)

    def forward(inputs: tuple, needed: list[bool]) -> tuple[Tensor, list[Tensor]]:
        loss, *formed = _fwd(*inputs, *positives.arguments(), needed)
        return loss, formed

    return with_formed_gradients("siglip_loss", forward, x, y, scale, bias)


def siglip_over(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    positives: Positives,
    needed: list[bool],
    exchange: Exchange,
    num_rows: Tensor,
) -> list[Tensor]:
    """Loss, and gradients of own rows, own columns and (its share of) scale and bias; `num_rows` of all processes."""
    sums = torch.zeros(3, dtype=torch.float64, device=x.device)
    wanted = any(needed)
    dx = x.new_zeros(x.shape if needed[0] else 0, dtype=torch.float32)
    if wanted:
        blocks = exchange.blocks_with_gradients(y, torch.float32)
    else:
        blocks = ((first, block, block) for first, block in exchange.blocks(y))
    for first, block, dblock in blocks:

        def carry(i, j, dots, x_tile, y_tile, p, dblock=dblock):
            _pairs(dots, scale, bias, wanted, sums, *p.arguments())
            if needed[0]:
                add_product(dx[i], dots, y_tile)
            if needed[1]:
                add_product(dblock[j], dots.T, x_tile)

        each_tile(x, block, positives, exchange.first_row, first, carry)
    dy = exchange.own_gradient() if wanted else x.new_empty(0)
    factor = num_rows.clamp(min=1).reciprocal()
    own = (sums[1:] * factor).to(scale.dtype)
    formed = [dx.mul_(factor).to(formed_dtype(x)), dy.mul_(factor).to(formed_dtype(y)), own[0].clone(), own[1].clone()]
    formed = [g if n else g.new_empty(0) for g, n in zip(formed, needed, strict=True)]
    return [(exchange.sum(sums[0].clone()) * factor).float(), *formed]


def _native_pairs(
    dots: Tensor,
    scale: Tensor,
    bias: Tensor,
    gradients: bool,
    sums: Tensor,
    kind: int,
    offset: int,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    weights: Tensor | None,
) -> None:
    positives, keep = native_positives(Positives(kind, offset, row_ids, column_ids, weights))
    core().siglip_loss_pairs(
        dots.shape[0], dots.shape[1], (dots.data_ptr(), dots.stride(0)), float(scale), float(bias), positives,
        gradients, sums.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    del keep


def _fwd_over_all(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    kind: int,
    offset: int,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    weights: Tensor | None,
    needed: list[bool],
) -> list[Tensor]:
    num_rows = torch.full((), x.shape[0], dtype=torch.float32, device=x.device)
    positives = Positives(kind, offset, row_ids, column_ids, weights)
    return siglip_over(x, y, scale, bias, positives, needed, Local(y.shape[0]), num_rows)


def _fake_fwd(x, y, scale, bias, kind, offset, row_ids, column_ids, weights, needed):
    dtypes = [formed_dtype(x), formed_dtype(y), scale.dtype, bias.dtype]
    formed = [
        t.new_empty(t.shape if n else 0, dtype=dtype)
        for t, n, dtype in zip((x, y, scale, bias), needed, dtypes, strict=True)
    ]
    return [x.new_empty((), dtype=torch.float32), *formed]


_pairs = register_op(
    "siglip_loss_pairs",
    native=_native_pairs,
    mutates=("dots", "sums"),
    fake=lambda *_: None,
)
_fwd = register_op("siglip_loss_fwd", portable=_fwd_over_all, kernel=None, fake=_fake_fwd)
