"""Triton kernels for `norm_pixel_shuffle`: rows gathered, joined, normalised.

Contract: mmlm_fast/ops/norm_pixel_shuffle.py.

Memory-bound. Floor: each number read once, written once. A program holds one output row, or one input row where the
norm comes before; without a norm, a block of one input row. Gradients of weight and bias in two stages.

Legend: M output rows, K input rows in each, C size of an input row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmlm_kernels.launch import ceil_div, kernel, next_power_of_2

BLOCK = 1024
MAX_PROGRAMS = 256  # of the backward pass of a norm: each makes one row of partial sums
AT = {"none": 0, "before": 1, "after": 2}


@kernel()
def _move_kernel(x_ptr, index_ptr, out_ptr, C, stride_x, K: tl.constexpr, CHANNELS_FIRST: tl.constexpr,
                 BACKWARD: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """out row m from its K input rows; backward: from out (here x) to the rows of dx (here out)."""
    pair = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < C
    row = tl.load(index_ptr + pair)
    m, k = pair // K, pair % K
    joined = m * (K * C) + (columns * K + k if CHANNELS_FIRST else k * C + columns)
    if BACKWARD:
        tl.store(out_ptr + row * C + columns, tl.load(x_ptr + joined, mask=mask, other=0.0), mask=mask)
    else:
        tl.store(out_ptr + joined, tl.load(x_ptr + row * stride_x + columns, mask=mask, other=0.0), mask=mask)


@triton.jit
def _positions(part, columns, C, K: tl.constexpr, CHANNELS_FIRST: tl.constexpr):
    """Where [KP, BLOCK_C] lies in an output row."""
    if CHANNELS_FIRST:
        return columns[None, :] * K + part[:, None]
    else:
        return part[:, None] * C + columns[None, :]


@triton.jit
def _rows_of(index_ptr, unit, part, here, BEFORE: tl.constexpr, K: tl.constexpr):
    """The input rows of an output row, or of one pair where the norm comes before."""
    if BEFORE:
        return tl.load(index_ptr + unit + part, mask=here, other=0)
    else:
        return tl.load(index_ptr + unit * K + part, mask=here, other=0)


@kernel()
def _norm_kernel(x_ptr, index_ptr, weight_ptr, bias_ptr, out_ptr, C, stride_x, eps, K: tl.constexpr,
                 KP: tl.constexpr, BEFORE: tl.constexpr, LAYER: tl.constexpr, CHANNELS_FIRST: tl.constexpr,
                 HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    unit = tl.program_id(0).to(tl.int64)  # output row; a pair of output row and part where BEFORE (then KP is 1)
    part, columns = tl.arange(0, KP), tl.arange(0, BLOCK_C)
    here = part < (1 if BEFORE else K)
    mask = here[:, None] & (columns < C)[None, :]
    rows = _rows_of(index_ptr, unit, part, here, BEFORE, K)
    x = tl.load(x_ptr + rows[:, None] * stride_x + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    count = C * (1 if BEFORE else K)
    mean = 0.0
    if LAYER:
        mean = tl.sum(x) / count
    centred = tl.where(mask, x - mean, 0.0)
    y = centred * tl.rsqrt(tl.sum(centred * centred) / count + eps)
    if BEFORE:
        at = part[:, None] + columns[None, :]
        k = unit % K
        to = (unit // K) * (K * C) + _positions(part + k, columns, C, K, CHANNELS_FIRST)
    else:
        at = _positions(part, columns, C, K, CHANNELS_FIRST)
        to = unit * (K * C) + at
    if HAS_WEIGHT:
        y *= tl.load(weight_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + to, y.to(out_ptr.dtype.element_ty), mask=mask)


@kernel(do_not_specialize=["units", "units_per_program"])
def _norm_bwd_kernel(grad_ptr, x_ptr, index_ptr, weight_ptr, dx_ptr, dweight_ptr, dbias_ptr, units, C, stride_x,
                     units_per_program, eps, K: tl.constexpr, KP: tl.constexpr, BEFORE: tl.constexpr,
                     LAYER: tl.constexpr, CHANNELS_FIRST: tl.constexpr, HAS_WEIGHT: tl.constexpr,
                     HAS_BIAS: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    part, columns = tl.arange(0, KP), tl.arange(0, BLOCK_C)
    here = part < (1 if BEFORE else K)
    mask = here[:, None] & (columns < C)[None, :]
    count = C * (1 if BEFORE else K)
    if BEFORE:
        at = part[:, None] + columns[None, :]
    else:
        at = _positions(part, columns, C, K, CHANNELS_FIRST)
    dweight = tl.zeros((KP, BLOCK_C), tl.float32)
    dbias = tl.zeros((KP, BLOCK_C), tl.float32)
    for unit in range(program * units_per_program, tl.minimum((program + 1) * units_per_program, units)):
        rows = _rows_of(index_ptr, unit, part, here, BEFORE, K)
        x = tl.load(x_ptr + rows[:, None] * stride_x + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        if BEFORE:
            k = unit % K
            to = (unit // K) * (K * C) + _positions(part + k, columns, C, K, CHANNELS_FIRST)
        else:
            to = unit * (K * C) + at
        g = tl.load(grad_ptr + to, mask=mask, other=0.0).to(tl.float32)
        mean = 0.0
        if LAYER:
            mean = tl.sum(x) / count
        centred = tl.where(mask, x - mean, 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred) / count + eps)
        unit_row = centred * rstd
        if HAS_BIAS:
            dbias += g
        if HAS_WEIGHT:
            dweight += g * unit_row
            g *= tl.load(weight_ptr + at, mask=mask, other=0.0).to(tl.float32)
        d = g - unit_row * (tl.sum(g * unit_row) / count)
        if LAYER:
            d -= tl.sum(g) / count
        d = (d * rstd).to(dx_ptr.dtype.element_ty)
        tl.store(dx_ptr + rows[:, None] * C + columns[None, :], d, mask=mask)
    width = C if BEFORE else K * C
    if HAS_WEIGHT:
        tl.store(dweight_ptr + program * width + at, dweight, mask=mask)
    if HAS_BIAS:
        tl.store(dbias_ptr + program * width + at, dbias, mask=mask)


def _tile(index: Tensor, size: int, norm_at: str, channels_first: bool, is_layer: bool) -> dict:
    parts = 1 if norm_at == "before" else index.shape[1]
    block, padded = next_power_of_2(size), next_power_of_2(parts)
    return {
        "K": index.shape[1],
        "KP": padded,
        "BEFORE": norm_at == "before",
        "LAYER": is_layer,
        "CHANNELS_FIRST": channels_first,
        "BLOCK_C": block,
        "num_warps": 4 if block * padded <= 2048 else 8 if block * padded <= 4096 else 16,
    }


def norm_pixel_shuffle_fwd(
    x: Tensor,
    index: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    norm_at: str,
    is_layer: bool,
    channels_first: bool,
    eps: float,
) -> Tensor:
    x, index = x if x.stride(-1) == 1 else x.contiguous(), index.contiguous()
    weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
    size = x.shape[1]
    out = x.new_empty(index.shape[0], index.shape[1] * size)
    if not out.numel():
        return out
    if norm_at == "none":
        _move_kernel[(index.numel(), ceil_div(size, BLOCK))](
            x, index, out, size, x.stride(0), K=index.shape[1], CHANNELS_FIRST=channels_first, BACKWARD=False,
            BLOCK=BLOCK,
        )  # fmt: skip
        return out
    _norm_kernel[(index.numel() if norm_at == "before" else index.shape[0],)](
        x, index, x if weight is None else weight, x if bias is None else bias, out, size, x.stride(0), eps,
        HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None,
        **_tile(index, size, norm_at, channels_first, is_layer),
    )  # fmt: skip
    return out


def norm_pixel_shuffle_bwd(
    grad: Tensor,
    x: Tensor | None,
    index: Tensor,
    weight: Tensor | None,
    bias_dtype: torch.dtype | None,
    norm_at: str,
    is_layer: bool,
    channels_first: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grad, index = grad.contiguous(), index.contiguous()
    weight = None if weight is None else weight.contiguous()
    size = grad.shape[1] // index.shape[1]
    dx = grad.new_empty(index.numel(), size)
    if norm_at == "none":
        if dx.numel():
            _move_kernel[(index.numel(), ceil_div(size, BLOCK))](
                grad, index, dx, size, 0, K=index.shape[1], CHANNELS_FIRST=channels_first, BACKWARD=True, BLOCK=BLOCK
            )
        return dx, grad.new_empty(0), grad.new_empty(0)
    x = x if x.stride(-1) == 1 else x.contiguous()
    units = index.numel() if norm_at == "before" else index.shape[0]
    units_per_program = max(1, ceil_div(units, MAX_PROGRAMS))
    programs = ceil_div(units, units_per_program)
    shape = (programs, size if norm_at == "before" else grad.shape[1])
    dweight = None if weight is None else grad.new_empty(shape, dtype=torch.float32)
    dbias = None if bias_dtype is None else grad.new_empty(shape, dtype=torch.float32)
    if units:
        _norm_bwd_kernel[(programs,)](
            grad, x, index, x if weight is None else weight, dx, dx if dweight is None else dweight,
            dx if dbias is None else dbias, units, size, x.stride(0), units_per_program, eps,
            HAS_WEIGHT=weight is not None, HAS_BIAS=bias_dtype is not None,
            **_tile(index, size, norm_at, channels_first, is_layer),
        )  # fmt: skip
    return (
        dx,
        grad.new_empty(0) if dweight is None else dweight.sum(0).to(weight.dtype),
        grad.new_empty(0) if dbias is None else dbias.sum(0).to(bias_dtype),
    )
