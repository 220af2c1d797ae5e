"""Triton kernels for `clip_loss`: passes over a tile of dot products. Contract: mmlm_fast/ops/clip_loss.py.

The products before and after a pass are cuBLAS's, which no plain Triton product beats.
Floor of a pass: the tile read once (statistics, twice: rows and columns), or read and written once (gradients).

Legend: N rows and M columns of the tile, S scale; a positive pair's weight: `_weight`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmlm_kernels.launch import ceil_div, kernel

BLOCK = 1024  # columns of one step along a row
MAX_REGISTERS = 128  # unless told so, ptxas stops earlier for sm_100 and spills
COLUMNS, ROWS = 32, 64  # of a step along columns: few columns a program, or a tile would occupy too few processors
DIAGONAL, IDS, WEIGHTS = 0, 1, 2


@triton.jit
def _weight(row, columns, mask, row_ids_ptr, column_ids_ptr, weights_ptr, stride_w, offset, KIND: tl.constexpr):
    """Weights of the positives among (row, columns): vectors, or a row vector and a column vector that broadcast."""
    if KIND == 0:
        return tl.where(row + offset == columns, 1.0, 0.0)
    if KIND == 1:
        ids = tl.load(column_ids_ptr + columns, mask=mask, other=0)
        return tl.where(tl.load(row_ids_ptr + row) == ids, 1.0, 0.0)
    return tl.load(weights_ptr + row.to(tl.int64) * stride_w + columns, mask=mask, other=0.0).to(tl.float32)


@kernel(do_not_specialize=["M", "stride_d", "stride_r", "stride_w", "offset"])
def _rows_kernel(dots_ptr, scale_ptr, running_ptr, row_ids_ptr, column_ids_ptr, weights_ptr, M, stride_d, stride_r,
                 stride_w, offset, UNIT: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    M, stride_d, stride_w = M * UNIT, stride_d * UNIT, stride_w * UNIT
    row = tl.program_id(0)
    scale = tl.load(scale_ptr)
    dots_ptr += row.to(tl.int64) * stride_d
    top = tl.full((BLOCK,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    positive, weight = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for first in range(0, M, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        mask = columns < M
        logits = scale * tl.load(dots_ptr + columns, mask=mask, other=0.0).to(tl.float32)
        w = tl.where(
            mask,
            _weight(row, columns, mask, row_ids_ptr, column_ids_ptr, weights_ptr, stride_w, offset, KIND),
            0.0,
        )
        positive += tl.where(w != 0, w * logits, 0.0)
        weight += w
        logits = tl.where(mask, logits, -float("inf"))
        new = tl.maximum(top, logits)
        shift = tl.where(new == -float("inf"), 0.0, new)
        total = total * tl.exp(top - shift) + tl.exp(logits - shift)
        top = new
    before = tl.load(running_ptr + row)
    new = tl.maximum(before, tl.max(top, axis=0))
    shift = tl.where(new == -float("inf"), 0.0, new)
    total = tl.sum(total * tl.exp(top - shift), axis=0)
    total += tl.load(running_ptr + stride_r + row) * tl.exp(before - shift)
    tl.store(running_ptr + row, new)
    tl.store(running_ptr + stride_r + row, total)
    place = running_ptr + 2 * stride_r + row
    tl.store(place, tl.load(place) + tl.sum(positive, axis=0))
    tl.store(place + stride_r, tl.load(place + stride_r) + tl.sum(weight, axis=0))


@kernel(do_not_specialize=["N", "M", "stride_d", "stride_r", "stride_w", "offset"])
def _columns_kernel(dots_ptr, scale_ptr, running_ptr, row_ids_ptr, column_ids_ptr, weights_ptr, N, M, stride_d,
                    stride_r, stride_w, offset, UNIT: tl.constexpr, KIND: tl.constexpr,
                    ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    M, stride_d, stride_r, stride_w = M * UNIT, stride_d * UNIT, stride_r * UNIT, stride_w * UNIT
    scale = tl.load(scale_ptr)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < M
    top = tl.full((ROWS, COLUMNS), -float("inf"), tl.float32)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    positive, weight = tl.zeros((ROWS, COLUMNS), tl.float32), tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, N, ROWS):
        rows = first + tl.arange(0, ROWS)
        mask = (rows < N)[:, None] & inside[None, :]
        places = dots_ptr + rows[:, None].to(tl.int64) * stride_d + columns[None, :]
        logits = scale * tl.load(places, mask=mask, other=0.0).to(tl.float32)
        safe = tl.where(rows < N, rows, 0)
        w = _weight(
            safe[:, None], columns[None, :], mask, row_ids_ptr, column_ids_ptr, weights_ptr, stride_w, offset, KIND
        )
        w = tl.where(mask, w, 0.0)
        positive += tl.where(w != 0, w * logits, 0.0)
        weight += w
        logits = tl.where(mask, logits, -float("inf"))
        new = tl.maximum(top, logits)
        shift = tl.where(new == -float("inf"), 0.0, new)
        total = total * tl.exp(top - shift) + tl.exp(logits - shift)
        top = new
    before = tl.load(running_ptr + columns, mask=inside, other=0.0)
    new = tl.maximum(before, tl.max(top, axis=0))
    shift = tl.where(new == -float("inf"), 0.0, new)
    sums = tl.sum(total * tl.exp(top - shift[None, :]), axis=0)
    sums += tl.load(running_ptr + stride_r + columns, mask=inside, other=0.0) * tl.exp(before - shift)
    tl.store(running_ptr + columns, new, mask=inside)
    tl.store(running_ptr + stride_r + columns, sums, mask=inside)
    place = running_ptr + 2 * stride_r + columns
    tl.store(place, tl.load(place, mask=inside, other=0.0) + tl.sum(positive, axis=0), mask=inside)
    place += stride_r
    tl.store(place, tl.load(place, mask=inside, other=0.0) + tl.sum(weight, axis=0), mask=inside)


@kernel(do_not_specialize=["M", "stride_d", "stride_rows", "stride_columns", "stride_w", "offset"])
def _gradients_kernel(dots_ptr, scale_ptr, rows_ptr, columns_ptr, sums_ptr, row_ids_ptr, column_ids_ptr, weights_ptr, M,
                      stride_d, stride_rows, stride_columns, stride_w, offset, UNIT: tl.constexpr, KIND: tl.constexpr,
                      BLOCK: tl.constexpr):  # fmt: skip
    """dots = S · gradient of the logits; sums [N, 2] of gradient · dot and of the gradient."""
    M, stride_d, stride_columns, stride_w = M * UNIT, stride_d * UNIT, stride_columns * UNIT, stride_w * UNIT
    row = tl.program_id(0)
    scale = tl.load(scale_ptr)
    dots_ptr += row.to(tl.int64) * stride_d
    lse, softmax = tl.load(rows_ptr + row), tl.load(rows_ptr + stride_rows + row)
    target = tl.load(rows_ptr + 2 * stride_rows + row)
    along, total = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for first in range(0, M, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        mask = columns < M
        dots = tl.load(dots_ptr + columns, mask=mask, other=0.0).to(tl.float32)
        logits = scale * dots
        column_lse = tl.load(columns_ptr + columns, mask=mask, other=0.0)
        column_softmax = tl.load(columns_ptr + stride_columns + columns, mask=mask, other=0.0)
        column_target = tl.load(columns_ptr + 2 * stride_columns + columns, mask=mask, other=0.0)
        w = _weight(row, columns, mask, row_ids_ptr, column_ids_ptr, weights_ptr, stride_w, offset, KIND)
        g = softmax * tl.exp(logits - lse) + column_softmax * tl.exp(logits - column_lse) - w * (target + column_target)
        g = tl.where(mask, g, 0.0)
        along += g * dots
        total += g
        tl.store(dots_ptr + columns, (scale * g).to(dots_ptr.dtype.element_ty), mask=mask)
    tl.store(sums_ptr + 2 * row, tl.sum(along, axis=0))
    tl.store(sums_ptr + 2 * row + 1, tl.sum(total, axis=0))


def _pointers(dots: Tensor, row_ids: Tensor | None, column_ids: Tensor | None, weights: Tensor | None) -> tuple:
    """Addresses of the positives, whatever they are, and the stride of the weights."""
    if weights is not None:
        weights = weights if weights.stride(1) == 1 else weights.contiguous()
        return (dots, dots, weights), weights.stride(0)
    if row_ids is not None:
        return (row_ids, column_ids, dots), 0
    return (dots, dots, dots), 0


def _unit(*numbers: int) -> int:
    """16 where the numbers of columns and all strides are multiples of it, which lets loads be wide."""
    return 16 if all(number % 16 == 0 for number in numbers) else 1


def clip_loss_statistics(
    dots: Tensor, scale: Tensor, rows: Tensor, columns: Tensor, kind: int, offset: int,
    row_ids: Tensor | None, column_ids: Tensor | None, weights: Tensor | None,
) -> None:  # fmt: skip
    num_rows, num_columns = dots.shape
    if dots.numel() == 0:
        return
    pointers, stride_w = _pointers(dots, row_ids, column_ids, weights)
    unit = _unit(num_columns, dots.stride(0), columns.stride(0), stride_w)
    num_columns_, stride_d, stride_w = num_columns // unit, dots.stride(0) // unit, stride_w // unit
    _rows_kernel[(num_rows,)](
        dots, scale, rows, *pointers, num_columns_, stride_d, rows.stride(0), stride_w, offset, UNIT=unit, KIND=kind,
        BLOCK=BLOCK, num_warps=4, maxnreg=MAX_REGISTERS,
    )  # fmt: skip
    _columns_kernel[(ceil_div(num_columns, COLUMNS),)](
        dots, scale, columns, *pointers, num_rows, num_columns_, stride_d, columns.stride(0) // unit, stride_w, offset,
        UNIT=unit, KIND=kind, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4,
    )  # fmt: skip


def clip_loss_gradients(
    dots: Tensor, scale: Tensor, rows: Tensor, columns: Tensor, sums: Tensor, kind: int, offset: int,
    row_ids: Tensor | None, column_ids: Tensor | None, weights: Tensor | None,
) -> None:  # fmt: skip
    num_rows, num_columns = dots.shape
    if dots.numel() == 0:
        return
    pointers, stride_w = _pointers(dots, row_ids, column_ids, weights)
    partial = torch.empty(num_rows, 2, dtype=torch.float32, device=dots.device)
    unit = _unit(num_columns, dots.stride(0), columns.stride(0), stride_w)
    _gradients_kernel[(num_rows,)](
        dots, scale, rows, columns, partial, *pointers, num_columns // unit, dots.stride(0) // unit, rows.stride(0),
        columns.stride(0) // unit, stride_w // unit, offset, UNIT=unit, KIND=kind, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    sums += partial.sum(0, dtype=torch.float64)
