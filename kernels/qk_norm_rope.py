"""Triton kernels for `qk_norm_rope`: RMSNorm of heads and their rotation. Contract: mmlm_fast/ops/qk_norm_rope.py.

Memory-bound. Floor: queries and keys read and written once. One launch for both: programs behind those of the queries
take the keys. A head is held as the two halves that rotate and what stays. Gradients of the weights in two stages.

Legend: B batch, S tokens, H heads, D head size, half = number of rotating pairs.
"""

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmlm_kernels.launch import ceil_div, empty_heads_last, kernel, next_power_of_2, row_strides

HEADS = 8  # of a program, at most
MAX_SPLITS = 512  # of the tokens in the gradient of the weights
MAX_REGISTERS, MAX_REGISTERS_BWD = 128, 168  # unless told so, ptxas stops at 64 and 128 for sm_100 and spills


@triton.jit
def _columns(half, D, INTERLEAVED: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr):
    """Columns of the first and second of each pair and of what stays, and which are there."""
    pair = tl.arange(0, BLOCK_HALF)
    rest = 2 * half + tl.arange(0, BLOCK_REST)
    if INTERLEAVED:
        return 2 * pair, 2 * pair + 1, rest, pair < half, rest < D
    else:
        return pair, pair + half, rest, pair < half, rest < D


@triton.jit
def _load(x_ptr, base, columns, mask):
    return tl.load(x_ptr + base[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _weight(weight_ptr, columns, mask, offset):
    return tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)[None, :] + offset


@triton.jit
def _store(out_ptr, base, columns, mask, x):
    tl.store(out_ptr + base[:, None] + columns[None, :], x.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _fwd_one(x_ptr, out_ptr, weight_ptr, cos_ptr, sin_ptr, token, table, b, s, first_head, H, stride_b, stride_h,
             stride_s, eps, offset, UNIT: tl.constexpr, D: tl.constexpr, half: tl.constexpr, HAS_NORM: tl.constexpr,
             INTERLEAVED: tl.constexpr,
             INVERSE: tl.constexpr, HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr, HAS_REST: tl.constexpr,
             BLOCK_REST: tl.constexpr):  # fmt: skip
    ca, cb, cr, in_half, in_rest = _columns(half, D, INTERLEAVED, BLOCK_HALF, BLOCK_REST)
    heads = first_head + tl.arange(0, HEADS)
    here = (heads < H)[:, None]
    base = (b * stride_b + s * stride_s + heads.to(tl.int64) * stride_h) * UNIT
    out_base = (token * H + heads) * D
    mask, rest_mask = here & in_half[None, :], here & in_rest[None, :]
    first, second = _load(x_ptr, base, ca, mask), _load(x_ptr, base, cb, mask)
    rest = tl.zeros((HEADS, BLOCK_REST), tl.float32)
    if HAS_REST:
        rest = _load(x_ptr, base, cr, rest_mask)
    if HAS_NORM:
        square = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1) + tl.sum(rest * rest, axis=1)
        rstd = tl.rsqrt(square / D + eps)[:, None]
        first *= rstd * _weight(weight_ptr, ca, in_half, offset)
        second *= rstd * _weight(weight_ptr, cb, in_half, offset)
        if HAS_REST:
            rest *= rstd * _weight(weight_ptr, cr, in_rest, offset)
    pair = tl.arange(0, BLOCK_HALF)
    cos = tl.load(cos_ptr + table * half + pair, mask=in_half, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + table * half + pair, mask=in_half, other=0.0).to(tl.float32)[None, :]
    if INVERSE:
        sin = -sin
    _store(out_ptr, out_base, ca, mask, first * cos - second * sin)
    _store(out_ptr, out_base, cb, mask, second * cos + first * sin)
    if HAS_REST:
        _store(out_ptr, out_base, cr, rest_mask, rest)


@kernel(do_not_specialize=["S", "table_stride", "q_stride_b", "q_stride_h", "q_stride_s", "k_stride_b",
                               "k_stride_h", "k_stride_s"])  # fmt: skip
def _fwd_kernel(q_ptr, k_ptr, q_out_ptr, k_out_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, S,
                table_stride, q_heads, k_heads, q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h,
                k_stride_s, eps, offset, UNIT: tl.constexpr, D: tl.constexpr, half: tl.constexpr,
                HAS_NORM: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr,
                HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr, HAS_REST: tl.constexpr,
                BLOCK_REST: tl.constexpr):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    b, s = token // S, token % S
    table = b * table_stride + s
    block, q_blocks = tl.program_id(1), (q_heads + HEADS - 1) // HEADS
    if block < q_blocks:
        _fwd_one(q_ptr, q_out_ptr, q_weight_ptr, cos_ptr, sin_ptr, token, table, b, s, block * HEADS, q_heads,
                 q_stride_b, q_stride_h, q_stride_s, eps, offset, UNIT, D, half, HAS_NORM, INTERLEAVED, INVERSE,
                 HEADS, BLOCK_HALF, HAS_REST, BLOCK_REST)  # fmt: skip
    else:
        _fwd_one(k_ptr, k_out_ptr, k_weight_ptr, cos_ptr, sin_ptr, token, table, b, s, (block - q_blocks) * HEADS,
                 k_heads, k_stride_b, k_stride_h, k_stride_s, eps, offset, UNIT, D, half, HAS_NORM, INTERLEAVED,
                 INVERSE, HEADS, BLOCK_HALF, HAS_REST, BLOCK_REST)  # fmt: skip


@kernel(do_not_specialize=["T", "S", "table_stride", "g_stride_b", "g_stride_h", "g_stride_s", "x_stride_b",
                               "x_stride_h", "x_stride_s", "tokens_per_program"])  # fmt: skip
def _norm_bwd_kernel(grad_ptr, x_ptr, dx_ptr, weight_ptr, dweight_ptr, cos_ptr, sin_ptr, T, S, table_stride,
                     H, g_stride_b, g_stride_h, g_stride_s, x_stride_b, x_stride_h, x_stride_s, tokens_per_program,
                     eps, offset, UNIT: tl.constexpr, D: tl.constexpr, half: tl.constexpr, INTERLEAVED: tl.constexpr,
                     HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr, HAS_REST: tl.constexpr,
                     BLOCK_REST: tl.constexpr):  # fmt: skip
    """Gradient through rotation and norm of some heads of some tokens; dweight[program, D] their part."""
    program = tl.program_id(0).to(tl.int64)
    ca, cb, cr, in_half, in_rest = _columns(half, D, INTERLEAVED, BLOCK_HALF, BLOCK_REST)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    here = (heads < H)[:, None]
    mask, rest_mask = here & in_half[None, :], here & in_rest[None, :]
    wa, wb = _weight(weight_ptr, ca, in_half, offset), _weight(weight_ptr, cb, in_half, offset)
    da, db = tl.zeros((BLOCK_HALF,), tl.float32), tl.zeros((BLOCK_HALF,), tl.float32)
    dr = tl.zeros((BLOCK_REST,), tl.float32)
    pair = tl.arange(0, BLOCK_HALF)
    for token in range(program * tokens_per_program, tl.minimum((program + 1) * tokens_per_program, T)):
        b, s = token // S, token % S
        table = b * table_stride + s
        cos = tl.load(cos_ptr + table * half + pair, mask=in_half, other=0.0).to(tl.float32)[None, :]
        sin = tl.load(sin_ptr + table * half + pair, mask=in_half, other=0.0).to(tl.float32)[None, :]
        g_base = (b * g_stride_b + s * g_stride_s + heads.to(tl.int64) * g_stride_h) * UNIT
        x_base = (b * x_stride_b + s * x_stride_s + heads.to(tl.int64) * x_stride_h) * UNIT
        u, v = _load(grad_ptr, g_base, ca, mask), _load(grad_ptr, g_base, cb, mask)
        first, second = _load(x_ptr, x_base, ca, mask), _load(x_ptr, x_base, cb, mask)
        ga, gb = u * cos + v * sin, v * cos - u * sin
        square = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
        gr = tl.zeros((HEADS, BLOCK_REST), tl.float32)
        rest = tl.zeros((HEADS, BLOCK_REST), tl.float32)
        if HAS_REST:
            gr, rest = _load(grad_ptr, g_base, cr, rest_mask), _load(x_ptr, x_base, cr, rest_mask)
            square += tl.sum(rest * rest, axis=1)
        rstd = tl.rsqrt(square / D + eps)[:, None]
        first *= rstd
        second *= rstd
        da += tl.sum(ga * first, axis=0)
        db += tl.sum(gb * second, axis=0)
        ga *= wa
        gb *= wb
        along = tl.sum(ga * first, axis=1) + tl.sum(gb * second, axis=1)
        if HAS_REST:
            rest *= rstd
            dr += tl.sum(gr * rest, axis=0)
            gr *= _weight(weight_ptr, cr, in_rest, offset)
            along += tl.sum(gr * rest, axis=1)
        along = (along / D)[:, None]
        out_base = (token * H + heads) * D
        _store(dx_ptr, out_base, ca, mask, rstd * (ga - first * along))
        _store(dx_ptr, out_base, cb, mask, rstd * (gb - second * along))
        if HAS_REST:
            _store(dx_ptr, out_base, cr, rest_mask, rstd * (gr - rest * along))
    part = (program * tl.num_programs(1) + tl.program_id(1)) * D
    tl.store(dweight_ptr + part + ca, da, mask=in_half)
    tl.store(dweight_ptr + part + cb, db, mask=in_half)
    if HAS_REST:
        tl.store(dweight_ptr + part + cr, dr, mask=in_rest)


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@cache
def _tile(size: int, half: int, heads: int, interleaved: bool) -> Mapping[str, int]:
    return MappingProxyType(
        {
            "INTERLEAVED": interleaved,
            "HEADS": min(HEADS, next_power_of_2(heads)),
            "BLOCK_HALF": next_power_of_2(max(1, half)),
            "HAS_REST": 2 * half < size,
            "BLOCK_REST": next_power_of_2(max(1, size - 2 * half)),
        }
    )


def _rotate(
    query: Tensor,
    key: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    eps: float,
    offset: float,
    interleaved: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    query, cos, sin = _dense(query), cos.contiguous(), sin.contiguous()
    batch, heads, length, size = query.shape
    out = empty_heads_last(query, batch, heads, length, size)
    k = query if key is None else _dense(key)
    key_heads = 0 if key is None else k.shape[1]
    out_key = query.new_empty(0) if key is None else empty_heads_last(k, batch, key_heads, length, size)
    half = cos.shape[-1]
    tile = _tile(size, half, max(heads, key_heads), interleaved)
    blocks = ceil_div(heads, tile["HEADS"]) + ceil_div(key_heads, tile["HEADS"])
    has_norm, (unit, strides) = query_weight is not None, row_strides(query, k)
    query_weight, key_weight = (None if w is None else w.contiguous() for w in (query_weight, key_weight))
    if batch * length * blocks:
        _fwd_kernel[(batch * length, blocks)](
            query, k, out, out if key is None else out_key, query_weight if has_norm else query,
            query if key_weight is None else key_weight, cos, sin, length,
            0 if cos.shape[0] == 1 else length, heads, key_heads, *strides, eps,
            offset, UNIT=unit, D=size, half=half, HAS_NORM=has_norm, INVERSE=inverse,
            maxnreg=MAX_REGISTERS, **tile,
        )  # fmt: skip
    return out, out_key


def qk_norm_rope_fwd(
    query: Tensor,
    key: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    eps: float,
    offset: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    return _rotate(query, key, cos, sin, query_weight, key_weight, eps, offset, interleaved, False)


def _norm_bwd(
    grad: Tensor, x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor, eps: float, offset: float, interleaved: bool
) -> tuple[Tensor, Tensor]:
    grad, x, cos, sin, weight = _dense(grad), _dense(x), cos.contiguous(), sin.contiguous(), weight.contiguous()
    batch, heads, length, size = grad.shape
    dx = empty_heads_last(grad, batch, heads, length, size)
    half, (unit, strides) = cos.shape[-1], row_strides(grad, x)
    tile = _tile(size, half, heads, interleaved)
    tokens = batch * length
    tokens_per_program = max(1, ceil_div(tokens, MAX_SPLITS))
    grid = (ceil_div(tokens, tokens_per_program), ceil_div(heads, tile["HEADS"]))
    partial = grad.new_empty(*grid, size, dtype=torch.float32)
    if tokens * heads:
        _norm_bwd_kernel[grid](
            grad, x, dx, weight, partial, cos, sin, tokens, length, 0 if cos.shape[0] == 1 else length, heads,
            *strides, tokens_per_program, eps, offset, UNIT=unit, D=size, half=half,
            maxnreg=MAX_REGISTERS_BWD, **tile,
        )  # fmt: skip
    return dx, partial.sum((0, 1)).to(weight.dtype)


def qk_norm_rope_bwd(
    grad: Tensor,
    grad_key: Tensor | None,
    query: Tensor | None,
    key: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    eps: float,
    offset: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if query_weight is None:
        dquery, dkey = _rotate(grad, grad_key, cos, sin, None, None, eps, offset, interleaved, True)
        return dquery, dkey, grad.new_empty(0), grad.new_empty(0)
    dquery, dweight = _norm_bwd(grad, query, cos, sin, query_weight, eps, offset, interleaved)
    if grad_key is None:
        return dquery, grad.new_empty(0), dweight, grad.new_empty(0)
    dkey, dkey_weight = _norm_bwd(grad_key, key, cos, sin, key_weight, eps, offset, interleaved)
    return dquery, dkey, dweight, dkey_weight
