"""Triton kernels for `add_norm`: r = x + residual, y = norm(r)·weight + bias. Contract: mmlm_fast/ops/add_norm.py.

Memory-bound. Floor forward: two tensors read, two written; backward: r and two gradients read, one written. A row stays
in registers, so a program holds whole rows. Gradients of weight and bias in two stages, without atomics.

Legend: R rows, H hidden size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmlm_kernels.launch import ceil_div, kernel, next_power_of_2
from mmlm_kernels.tiles import architecture

TILE_VALUES = 2048  # values a program holds of short rows
# In the backward pass, with 8 warps: more rows under way hide the loads of the next ones. On an H100 two rows of 3,584
# take 0.159 ms for 16,384, one 0.188; of a layer norm of 1,152 two with 8 warps 0.068 ms for 8,192, one with 4 0.088.
TILE_VALUES_BWD = {False: 8192, True: 4096}  # by whether it is a layer norm, which holds more for each value
MAX_PROGRAMS = 256  # of the backward pass: each makes one row of partial sums; two waves on 132 multiprocessors
MAX_REGISTERS = 128  # unless told so, ptxas stops earlier for sm_100 and spills


@triton.jit
def _statistics(r, mask, H, eps, LAYER: tl.constexpr):
    """Mean and 1/√(var + eps) of rows [ROWS, BLOCK_H], zero where masked."""
    mean = tl.sum(r, axis=1) * 0.0
    if LAYER:
        mean = tl.sum(r, axis=1) / H
    centred = tl.where(mask, r - mean[:, None], 0.0)
    return mean, tl.rsqrt(tl.sum(centred * centred, axis=1) / H + eps)


@kernel(do_not_specialize=["R"])
def _fwd_kernel(x_ptr, residual_ptr, weight_ptr, bias_ptr, out_ptr, total_ptr, R, H, eps, offset,
                LAYER: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
                ROWS: tl.constexpr, BLOCK_H: tl.constexpr):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_H)
    mask = (rows < R)[:, None] & (columns < H)[None, :]
    offsets = rows[:, None] * H + columns[None, :]
    r = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        r += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        stored = r.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + offsets, stored, mask=mask)
        r = stored.to(tl.float32)
    mean, rstd = _statistics(r, mask, H, eps, LAYER)
    y = (r - mean[:, None]) * rstd[:, None]
    if HAS_WEIGHT:
        y *= (tl.load(weight_ptr + columns, mask=columns < H, other=0.0).to(tl.float32) + offset)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + columns, mask=columns < H, other=0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + offsets, y.to(out_ptr.dtype.element_ty), mask=mask)


@kernel(do_not_specialize=["R", "rows_per_program"])
def _bwd_kernel(grad_ptr, grad_total_ptr, total_ptr, weight_ptr, dx_ptr, dweight_ptr, dbias_ptr, R, H,
                rows_per_program, eps, offset, LAYER: tl.constexpr, HAS_GRAD_TOTAL: tl.constexpr,
                HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr,
                BLOCK_H: tl.constexpr):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_H)
    dweight = tl.zeros((BLOCK_H,), tl.float32)
    dbias = tl.zeros((BLOCK_H,), tl.float32)
    last = tl.minimum((program + 1) * rows_per_program, R)
    for start in range(program * rows_per_program, last, ROWS):
        rows = start + tl.arange(0, ROWS).to(tl.int64)
        mask = (rows < last)[:, None] & (columns < H)[None, :]
        offsets = rows[:, None] * H + columns[None, :]
        r = tl.load(total_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        mean, rstd = _statistics(r, mask, H, eps, LAYER)
        unit = tl.where(mask, (r - mean[:, None]) * rstd[:, None], 0.0)
        if HAS_WEIGHT:
            dweight += tl.sum(g * unit, axis=0)
        if HAS_BIAS:
            dbias += tl.sum(g, axis=0)
        if HAS_WEIGHT:  # read anew for each tile: there are no registers to keep it in
            g *= (tl.load(weight_ptr + columns, mask=columns < H, other=0.0).to(tl.float32) + offset)[None, :]
        d = g - unit * (tl.sum(g * unit, axis=1) / H)[:, None]
        if LAYER:
            d -= (tl.sum(g, axis=1) / H)[:, None]
        d *= rstd[:, None]
        if HAS_GRAD_TOTAL:
            d += tl.load(grad_total_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + offsets, d.to(dx_ptr.dtype.element_ty), mask=mask)
    if HAS_WEIGHT:
        tl.store(dweight_ptr + program * H + columns, dweight, mask=columns < H)
    if HAS_BIAS:
        tl.store(dbias_ptr + program * H + columns, dbias, mask=columns < H)


def _tile(hidden_size: int) -> dict:
    block_h = next_power_of_2(hidden_size)
    warps = 4 if block_h <= 2048 else 8 if block_h <= 4096 else 16
    return {"ROWS": max(1, TILE_VALUES // block_h), "BLOCK_H": block_h, "num_warps": warps}


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def add_norm_fwd(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    is_layer: bool,
    eps: float,
    offset: float,
) -> tuple[Tensor, Tensor]:
    x, residual, weight, bias = x.contiguous(), _dense(residual), _dense(weight), _dense(bias)
    out, total = torch.empty_like(x), x.new_empty(0) if residual is None else torch.empty_like(x)
    hidden_size = x.shape[-1]
    rows, tile = x.numel() // hidden_size, _tile(hidden_size)
    if rows:
        _fwd_kernel[(ceil_div(rows, tile["ROWS"]),)](
            x, x if residual is None else residual, x if weight is None else weight, x if bias is None else bias,
            out, out if residual is None else total, rows, hidden_size, eps, offset, LAYER=is_layer,
            HAS_RESIDUAL=residual is not None, HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, **tile,
        )  # fmt: skip
    return out, total


def add_norm_bwd(
    grad: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor | None,
    bias_dtype: torch.dtype | None,
    is_layer: bool,
    eps: float,
    offset: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grad, total, grad_total, weight = grad.contiguous(), total.contiguous(), _dense(grad_total), _dense(weight)
    dx = torch.empty_like(total)
    hidden_size = total.shape[-1]
    rows, tile = total.numel() // hidden_size, _tile(hidden_size)
    if total.dtype != torch.float32 and architecture() != 100 and 1024 <= tile["BLOCK_H"] <= 4096:  # there it spills
        tile |= {"ROWS": TILE_VALUES_BWD[is_layer] // tile["BLOCK_H"], "num_warps": 8}
    if total.dtype == torch.float32 and hidden_size > 4096:  # what a thread of 16 warps holds spills
        tile["num_warps"] = 32
    tile["maxnreg"] = min(MAX_REGISTERS, 2**16 // (32 * tile["num_warps"]))
    rows_per_program = max(tile["ROWS"], ceil_div(rows, MAX_PROGRAMS))
    programs = ceil_div(rows, rows_per_program)
    shape = (programs, hidden_size)
    dweight = None if weight is None else total.new_empty(shape, dtype=torch.float32)
    dbias = None if bias_dtype is None else total.new_empty(shape, dtype=torch.float32)
    if rows:
        _bwd_kernel[(programs,)](
            grad, grad if grad_total is None else grad_total, total, total if weight is None else weight, dx,
            dx if weight is None else dweight, dx if bias_dtype is None else dbias, rows, hidden_size,
            rows_per_program, eps, offset, LAYER=is_layer, HAS_GRAD_TOTAL=grad_total is not None,
            HAS_WEIGHT=weight is not None, HAS_BIAS=bias_dtype is not None, **tile,
        )  # fmt: skip
    return (
        dx,
        total.new_empty(0) if dweight is None else dweight.sum(0).to(weight.dtype),
        total.new_empty(0) if dbias is None else dbias.sum(0).to(bias_dtype),
    )
