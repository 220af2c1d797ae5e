"""Launchers of the Triton kernels of `interval_attention`. Contract: mmlm_fast/ops/interval_attention.py.

Compute-bound. Floor forward: 4·D flops for each visible pair of query and key, and head; backward 10·D (ours does
14·D: scores and dP are computed once for dK, dV and once for dQ, so that no output is accumulated atomically). With few
queries the keys and values are read once: then memory is the floor, and the keys are split among programs.

A tile of queries needs the keys from its least `lo` to its largest `hi`; between its largest `lo` and least `hi`
nothing is masked. For a tile of keys a small kernel finds the queries that see it.

The kernels are in interval_attention_forward.py and interval_attention_backward.py, what they share in
interval_attention_parts.py, and the blocks they are launched with in interval_attention_tiles.py.
"""

import torch
import triton
from torch import Tensor

from mmlm_kernels.interval_attention_backward import delta_kernel, dkv_kernel, dq_kernel, ranges_kernel
from mmlm_kernels.interval_attention_forward import combine_kernel, fwd_kernel
from mmlm_kernels.interval_attention_tiles import (
    OLD_TRITON,
    blocks,
    kernels_of_keys,
    loads_as_columns,
    pieces,
    registers,
    sizes,
)
from mmlm_kernels.tiles import architecture

RANGE_BLOCK = 1024
DECODE_ROWS = 64  # at most so many rows (queries × heads that share keys) are split over the keys
MIN_SPLIT_KEYS = 256
MAX_SPLITS = 64
PROGRAMS_WANTED = 2 * 132  # two for each multiprocessor of a large GPU
HEADS_TOGETHER = 8  # whose tiles run side by side (`place` in interval_attention_parts.py)


def _rows_aligned(x: Tensor) -> Tensor:
    """The kernels want neighbours in the last dimension; anything else is copied."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _unit(*tensors: Tensor) -> int:
    """8 where all strides are multiples of it, which lets loads be 16 bytes wide."""
    return 8 if all(s % 8 == 0 for t in tensors for s in t.stride()[:-1]) else 1


def _strides(x: Tensor, unit: int = 1) -> tuple[int, int, int]:
    return x.stride(0) // unit, x.stride(1) // unit, x.stride(2) // unit


def _precision(dtype: torch.dtype) -> str:
    """Float32 on tensor cores in three tf32 products, unless one is allowed: IEEE tiles of a whole head size spill."""
    if dtype != torch.float32:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


def _heads_last(batch: int, heads: int, length: int, size: int, like: Tensor) -> Tensor:
    """``[B, H, S, D]`` whose memory is ``[B, S, H, D]``: what the linear layer after it reads."""
    return like.new_empty(batch, length, heads, size).transpose(1, 2)


def _mask_options(
    lo: Tensor | None, hi: Tensor | None, q_len: int, kv_len: int, like: Tensor
) -> tuple[Tensor, Tensor, int]:
    """Bounds in every case: a variant of the kernels without any would spill on sm_100, and is hardly ever called."""
    if lo is None or hi is None:
        hi = torch.full((1, q_len), kv_len, dtype=torch.int32, device=like.device)
        return torch.zeros_like(hi), hi, 0
    lo, hi = lo.contiguous(), hi.contiguous()
    return lo, hi, 0 if lo.shape[0] == 1 else lo.shape[1]


def interval_attention_fwd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lo: Tensor | None,
    hi: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    (batch, heads, q_len, size), (kv_heads, kv_len, value_size) = query.shape, value.shape[1:]
    out = _heads_last(batch, heads, q_len, value_size, query)
    largest, total = (torch.empty(batch, heads, q_len, dtype=torch.float32, device=query.device) for _ in range(2))
    if out.numel() == 0:
        return out, largest, total
    query, key, value = (_rows_aligned(x) for x in (query, key, value))
    group, unit = heads // kv_heads, _unit(query, key, value, out)
    block_m, block_n, warps, stages = blocks("fwd", query, size, value_size)
    if softcap:  # the polynomial needs registers too
        warps, block_n = 8, min(block_n, 32 if max(size, value_size) > 128 else 64)
    pack, splits, together, (_, second_piece, third_piece) = 1, 1, HEADS_TOGETHER, pieces(size, query.dtype)
    if group * q_len <= DECODE_ROWS:
        pack, together = group, 1
        block_m = max(16, min(block_m, triton.next_power_of_2(group * q_len)))
        programs = batch * kv_heads * triton.cdiv(group * q_len, block_m)
        splits = max(1, min(MAX_SPLITS, kv_len // MIN_SPLIT_KEYS, triton.cdiv(PROGRAMS_WANTED, programs)))
        splits = triton.next_power_of_2(splits)  # few variants to compile
        warps = 4 if max(size, value_size) <= 128 else 8
        if OLD_TRITON and architecture() == 100 and query.dtype == torch.float32:  # 4 spill there
            warps = 8
        block_n = min(block_n, 16 if third_piece else 32 if second_piece else 64)  # more pieces need more registers
    num_tiles = triton.cdiv(pack * q_len, block_m)
    lo, hi, mask_stride = _mask_options(lo, hi, q_len, kv_len, query)
    target, statistics = out, (largest, total)
    if splits > 1:
        target = torch.empty(splits, batch, heads, q_len, value_size, dtype=torch.float32, device=query.device)
        statistics = torch.empty(2, splits, batch, heads, q_len, dtype=torch.float32, device=query.device).unbind()
    has_sinks = sinks is not None
    fwd_kernel[(splits * num_tiles * batch * (heads // pack),)](
        query, key, value, lo, hi, sinks.contiguous() if has_sinks else query, target, *statistics,
        *_strides(query, unit), *_strides(key, unit), *_strides(value, unit),
        *((s // unit for s in target.stride()[:4]) if splits > 1 else (0, *_strides(target, unit))),
        mask_stride, num_tiles, batch, q_len, kv_len, scale, softcap if softcap else 1.0,
        H=heads, GROUP=group, PACK=pack, SPLITS=splits, UNIT=unit, HAS_SINKS=has_sinks,
        SOFTCAP=bool(softcap), TOGETHER=together, **sizes(size, value_size, query.dtype),
        PRECISION=_precision(query.dtype), M=block_m, N=block_n, num_warps=warps, num_stages=stages,
        **registers(query.dtype == torch.float32 or max(size, value_size) > 128 or third_piece > 0),
    )  # fmt: skip
    if splits > 1:
        combine_kernel[(batch * heads * q_len,)](
            target, *statistics, sinks.contiguous() if has_sinks else query, out, largest, total,
            *_strides(out, unit), batch * heads * q_len, q_len, H=heads, UNIT=unit, HAS_SINKS=has_sinks, SPLITS=splits,
            SPLITS_POW2=triton.next_power_of_2(splits), DV=value_size, DV_POW2=triton.next_power_of_2(value_size),
        )  # fmt: skip
    return out, largest, total


def interval_attention_bwd(
    grad: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lo: Tensor | None,
    hi: Tensor | None,
    out: Tensor,
    largest: Tensor,
    total: Tensor,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (batch, heads, q_len, size), (kv_heads, kv_len, value_size) = query.shape, value.shape[1:]
    dq = _heads_last(batch, heads, q_len, size, query)
    dk = _heads_last(batch, kv_heads, kv_len, size, key)
    dv = _heads_last(batch, kv_heads, kv_len, value_size, value)
    delta = torch.empty(batch, heads, q_len, dtype=torch.float32, device=query.device)
    if dq.numel() == 0 or dk.numel() == 0 or dv.numel() == 0:
        delta = delta.zero_() if grad_lse is None else -grad_lse
        return dq.zero_(), dk.zero_(), dv.zero_(), delta
    grad, query, key, value = (_rows_aligned(x) for x in (grad, query, key, value))
    group, unit = heads // kv_heads, _unit(grad, query, key, value, out, dq, dk, dv)
    lo, hi, mask_stride = _mask_options(lo, hi, q_len, kv_len, query)
    exact = query.dtype == torch.float32
    shift = torch.empty_like(delta)
    factor = torch.empty_like(delta) if exact else shift
    num_rows, rows = batch * heads * q_len, 16
    delta_kernel[(triton.cdiv(num_rows, rows),)](
        grad, out, query if grad_lse is None else grad_lse.contiguous(), largest, total, delta, shift, factor,
        *_strides(grad, unit), *_strides(out, unit), num_rows, q_len, H=heads, UNIT=unit, DV=value_size,
        DV_POW2=triton.next_power_of_2(value_size), HAS_GRAD_LSE=grad_lse is not None, EXACT=exact, ROWS=rows,
    )  # fmt: skip
    shared = {"H": heads, "GROUP": group, "UNIT": unit, "SOFTCAP": bool(softcap), "EXACT": exact}
    shared |= {"TOGETHER": HEADS_TOGETHER}
    shared |= {"PRECISION": _precision(query.dtype), **sizes(size, value_size, query.dtype)}
    shared |= registers(exact or size > 256 or pieces(size, query.dtype)[1] > 16)
    inputs = (*_strides(grad, unit), *_strides(query, unit), *_strides(key, unit), *_strides(value, unit))
    softcap = softcap if softcap else 1.0

    for kernel in kernels_of_keys(query, size, value_size):
        block_m, block_n, warps, stages = blocks(kernel, query, size, value_size, softcap=shared["SOFTCAP"])
        num_tiles = triton.cdiv(kv_len, block_n)
        ranges = lo.new_empty(lo.shape[0], num_tiles + triton.cdiv(q_len, block_m), 2, dtype=torch.int32)
        range_stride = ranges.stride(0)
        ranges_kernel[(ranges.shape[1], lo.shape[0])](
            lo, hi, ranges, num_tiles, range_stride, q_len, kv_len, M=block_m, N=block_n, BLOCK=RANGE_BLOCK
        )
        dkv_kernel[(num_tiles * batch * kv_heads,)](
            grad, query, key, value, lo, hi, ranges, shift, factor, delta, dk, dv, *inputs, *_strides(dk, unit),
            *_strides(dv, unit),
            mask_stride, range_stride if mask_stride else 0, num_tiles, q_len, kv_len, scale, softcap,
            **shared, AS_COLUMN=loads_as_columns(stages), WANTS_DK="k" in kernel, WANTS_DV="v" in kernel,
            M=block_m, N=block_n, num_warps=warps, num_stages=stages,
        )  # fmt: skip

    block_m, block_n, warps, stages = blocks("dq", query, size, value_size)
    num_tiles = triton.cdiv(q_len, block_m)
    dq_kernel[(num_tiles * batch * heads,)](
        grad, query, key, value, lo, hi, shift, factor, delta, dq, *inputs, *_strides(dq, unit),
        mask_stride, num_tiles, q_len, kv_len, scale, softcap,
        **shared, M=block_m, N=block_n, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return dq, dk, dv, delta
