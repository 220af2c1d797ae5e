"""Symmetric InfoNCE, the loss of CLIP, in memory linear in the batch."""

import torch
from torch import Tensor

from mmlm_fast.ops._formed import formed_dtype, wide, with_formed_gradients
from mmlm_fast.ops._native import core
from mmlm_fast.ops._op import LOSS_TYPES, REFERENCE, Op
from mmlm_fast.ops._registry import autocast, register_op
from mmlm_fast.ops.contrastive import (
    IDS,
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

OP = Op("clip_loss", native=LOSS_TYPES, smallest=2**17, counts="pairs")
NAMES = ("image_features", "text_features")


def clip_loss_ref(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    positives: Positives | None = None,
    rows_only: bool = False,
) -> Tensor:
    positives = positives or Positives()
    logits = logit_scale * (image_features @ text_features.T).to(wide(image_features))
    weights = positives.dense(logits)

    def direction(logits: Tensor, weights: Tensor) -> Tensor:
        total = weights.sum(1)
        has_positive = total > 0
        nll = -torch.where(weights != 0, weights * logits.log_softmax(1), 0).sum(1)
        if positives.kind == IDS:
            nll = nll / total.clamp(min=1)
        return torch.where(has_positive, nll, 0).sum() / has_positive.sum().clamp(min=1)

    if rows_only:
        return direction(logits, weights)
    return (direction(logits, weights) + direction(logits.T, weights.T)) / 2


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    positive_ids: Tensor | tuple[Tensor, Tensor] | None = None,
    targets: Tensor | None = None,
    offset: int = 0,
    rows_only: bool = False,
) -> Tensor:
    """Compute ½·(CE of each row over all columns + CE of each column over all rows) of logit_scale·image·textᵀ.

    Logits exist for a tile of pairs at a time. Gradients, where wanted, are formed in the same call: 8·N·M·D flops, 6
    where all pairs are one tile (1,024 on a CPU, 16,384 on CUDA, 8,192 in float32).
    Over several processes: `mmlm_fast.distributed.clip_loss`.

    Args:
        image_features: ``[N, D]`` rows, normalised by the caller; float32 / float16 / bfloat16 / float64.
        text_features: ``[M, D]`` columns; same dtype. Under autocast both are cast.
        logit_scale: The temperature's inverse, exp already taken (100 in a trained CLIP); a number, or a tensor of one
            with gradient. Not finite: the loss is NaN.
        positive_ids: int64 ids ``[N]``, or a pair ``[N]`` and ``[M]``: every pair of equal ids is positive, a row's (or
            column's) positives share its target evenly (UniCL, Yang et al. 2022). None: the diagonal.
        targets: ``[N, M]`` weights ≥ 0 used as they are: row i's loss is −Σⱼ targets[i, j]·log p(j | i), column j's
            −Σᵢ targets[i, j]·log p(i | j).
        offset: Row i's positive is column i + offset: local rows against gathered columns.
        rows_only: The mean over rows alone, open_clip's half of a ``local_loss``.

    Returns:
        Scalar in float32 (float64 for float64). The means are over rows, and columns, that have a positive; none: 0.

    Raises:
        ValueError: for shapes, dtypes or devices that do not go together.

    Source: CLIP (Radford et al. 2021), figure 3; open_clip's ClipLoss; Inf-CL (Cheng et al. 2024) for the tiles.
    """
    check_pairs(image_features, text_features, NAMES, {"logit_scale": logit_scale}, positive_ids, targets)
    x, y = autocast(image_features, text_features)
    assert x is not None
    assert y is not None
    positives = positives_of(x, y, positive_ids, targets, offset)
    scale = scalar_tensor(logit_scale, x)
    if OP.path(x, x.shape[0] * y.shape[0], fits=has_pairs(x, y)) == REFERENCE:
        return clip_loss_ref(x, y, scale, positives, rows_only)

    def forward(inputs: tuple, needed: list[bool]) -> tuple[Tensor, list[Tensor]]:
        loss, *formed = _fwd(*inputs, *positives.arguments(), rows_only, needed)
        return loss, formed

    return with_formed_gradients("clip_loss", forward, x, y, scale)


def clip_over(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    positives: Positives,
    rows_only: bool,
    needed: list[bool],
    exchange: Exchange,
) -> list[Tensor]:
    """Loss, and gradients of own rows, own columns and (its share of) the scale; `x` are this process's rows."""
    num_rows = x.shape[0]
    rows, columns = (_running(size, x.device) for size in (num_rows, exchange.total))
    kept = None
    for first, block in exchange.blocks(y):

        def gather(i, j, dots, x_tile, y_tile, p, first=first):
            there = slice(first + j.start, first + j.stop)
            _statistics(dots, scale, rows[:, i], columns[:, there], *p.arguments())

        kept = each_tile(x, block, positives, exchange.first_row, first, gather)
        kept = kept if len(block) == exchange.total else None
    _combine(columns, exchange)

    row_loss, row_side = _direction(rows, positives, exchange)
    column_loss, column_side = _direction(columns, positives, None)
    if rows_only:
        loss = row_loss
        column_side[0], column_side[1:] = torch.inf, 0  # adds nothing, whatever the columns hold
    else:
        loss = (row_loss + column_loss) / 2
        row_side[1:] /= 2
        column_side[1:] /= 2
    formed = [x.new_empty(0, dtype=formed_dtype(x)) for _ in range(2)] + [scale.new_empty(0)]
    if any(needed):
        dx = x.new_zeros(x.shape, dtype=torch.float32)
        sums = torch.zeros(2, dtype=torch.float64, device=x.device)
        for first, block, dblock in exchange.blocks_with_gradients(y, torch.float32):

            def carry(i, j, dots, x_tile, y_tile, p, first=first, dblock=dblock):
                there = slice(first + j.start, first + j.stop)
                _gradients(dots, scale, row_side[:, i], column_side[:, there], sums, *p.arguments())
                if needed[0]:
                    add_product(dx[i], dots, y_tile)
                if needed[1]:
                    add_product(dblock[j], dots.T, x_tile)

            each_tile(x, block, positives, exchange.first_row, first, carry, kept)
        dy = exchange.own_gradient()
        formed = [dx.to(formed_dtype(x)), dy.to(formed_dtype(y)), sums[0].to(scale.dtype)]
        formed = [g if n else g.new_empty(0) for g, n in zip(formed, needed, strict=True)]
    return [loss, *formed]


def _running(size: int, device: torch.device) -> Tensor:
    """Largest logit, sum of exponentials, and of positives weight·logit and weight: ``[4, size]``."""
    running = torch.zeros(4, size, dtype=torch.float32, device=device)
    running[0] = -torch.inf
    return running


def _combine(running: Tensor, exchange: Exchange) -> None:
    """Statistics over all processes, in place."""
    top = exchange.max(running[0].clone())
    shift = torch.where(top == -torch.inf, 0, top)
    running[1] *= torch.where(running[0] == -torch.inf, 0, (running[0] - shift).exp())
    running[0] = top
    running[1:] = exchange.sum(running[1:].clone())


def _direction(running: Tensor, positives: Positives, exchange: Exchange | None) -> tuple[Tensor, Tensor]:
    """The mean loss, and ``[3, size]``: log-sum-exp, factor of the softmax, factor of a positive's weight.

    `exchange` sums over the processes' rows; columns are known to all.
    """
    top, total, positive, weight = running.double()
    lse = top + total.log()
    has_positive = weight > 0
    share = torch.where(has_positive, 1 / weight, 0) if positives.kind == IDS else has_positive.double()
    losses = torch.where(has_positive, share * (weight * lse - positive), 0)
    both = torch.stack([losses.sum(), has_positive.sum().double()])
    loss, count = both if exchange is None else exchange.sum(both)
    count = count.clamp(min=1)
    side = torch.stack([lse, share * weight / count, share / count])
    return (loss / count).float(), side.float()


def _native_statistics(
    dots: Tensor,
    scale: Tensor,
    rows: Tensor,
    columns: Tensor,
    kind: int,
    offset: int,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    weights: Tensor | None,
) -> None:
    positives, keep = native_positives(Positives(kind, offset, row_ids, column_ids, weights))
    core().clip_loss_statistics(
        dots.shape[0], dots.shape[1], (dots.data_ptr(), dots.stride(0)), float(scale), 0.0, positives,
        tuple(r.data_ptr() for r in rows), tuple(c.data_ptr() for c in columns), torch.get_num_threads(),
    )  # fmt: skip
    del keep


def _native_gradients(
    dots: Tensor,
    scale: Tensor,
    rows: Tensor,
    columns: Tensor,
    sums: Tensor,
    kind: int,
    offset: int,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    weights: Tensor | None,
) -> None:
    positives, keep = native_positives(Positives(kind, offset, row_ids, column_ids, weights))
    core().clip_loss_gradients(
        dots.shape[0], dots.shape[1], (dots.data_ptr(), dots.stride(0)), float(scale), 0.0, positives,
        tuple(r.data_ptr() for r in rows), tuple(c.data_ptr() for c in columns), sums.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    del keep


def _fwd_over_all(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    kind: int,
    offset: int,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    weights: Tensor | None,
    rows_only: bool,
    needed: list[bool],
) -> list[Tensor]:
    positives = Positives(kind, offset, row_ids, column_ids, weights)
    return clip_over(x, y, scale, positives, rows_only, needed, Local(y.shape[0]))


def _fake_fwd(x, y, scale, kind, offset, row_ids, column_ids, weights, rows_only, needed):
    dtypes = [formed_dtype(x), formed_dtype(y), scale.dtype]
    formed = [
        t.new_empty(t.shape if n else 0, dtype=dtype) for t, n, dtype in zip((x, y, scale), needed, dtypes, strict=True)
    ]
    return [x.new_empty((), dtype=torch.float32), *formed]


# Rows of the statistics: see `_running`; of the sides: see `_direction`.
_statistics = register_op(
    "clip_loss_statistics",
    native=_native_statistics,
    mutates=("rows", "columns"),
    fake=lambda *_: None,
)
_gradients = register_op(
    "clip_loss_gradients",
    native=_native_gradients,
    mutates=("dots", "sums"),
    fake=lambda *_: None,
)
_fwd = register_op("clip_loss_fwd", portable=_fwd_over_all, kernel=None, fake=_fake_fwd)
