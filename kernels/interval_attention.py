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
from mmlm_kernels.launch import ceil_div, empty_heads_last, next_power_of_2, row_strides
from mmlm_kernels.tiles import architecture

RANGE_BLOCK = 1024
DECODE_ROWS = 64  # at most so many rows (queries × heads that share keys) are split over the keys
MIN_SPLIT_KEYS = 256
MAX_SPLITS = 64
PROGRAMS_WANTED = 2 * 132  # two for each multiprocessor of a large GPU
FULL = 132  # programs that keep a large GPU busy, where each takes a multiprocessor
ROWS_WORTH_PARTS = 4096  # queries × heads of a tile of keys below which two sums cost more than more programs gain
HEADS_TOGETHER = 8  # whose tiles run side by side (`place` in interval_attention_parts.py)


def _rows_aligned(x: Tensor) -> Tensor:
    """The kernels want neighbours in the last dimension; anything else is copied."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _precision(dtype: torch.dtype) -> str:
    """Float32 on tensor cores in three tf32 products, unless one is allowed: IEEE tiles of a whole head size spill."""
    if dtype != torch.float32:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


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
    out = empty_heads_last(query, batch, heads, q_len, value_size)
    largest, total = (torch.empty(batch, heads, q_len, dtype=torch.float32, device=query.device) for _ in range(2))
    if out.numel() == 0:
        return out, largest, total
    query, key, value = _rows_aligned(query), _rows_aligned(key), _rows_aligned(value)
    group, arch, dtype = heads // kv_heads, architecture(), query.dtype
    unit, strides = row_strides(query, key, value, out)
    block_m, block_n, warps, stages = blocks("fwd", arch, dtype, size, value_size)
    if softcap:  # the polynomial needs registers too
        warps, block_n = 8, min(block_n, 32 if max(size, value_size) > 128 else 64)
    pack, splits, together, (_, second_piece, third_piece) = 1, 1, HEADS_TOGETHER, pieces(size, dtype)
    if group * q_len <= DECODE_ROWS:
        pack, together = group, 1
        block_m = max(16, min(block_m, next_power_of_2(group * q_len)))
        programs = batch * kv_heads * ceil_div(group * q_len, block_m)
        splits = max(1, min(MAX_SPLITS, kv_len // MIN_SPLIT_KEYS, ceil_div(PROGRAMS_WANTED, programs)))
        splits = next_power_of_2(splits)  # few variants to compile
        warps = 4 if max(size, value_size) <= 128 else 8
        if OLD_TRITON and arch == 100 and dtype == torch.float32:  # 4 spill there
            warps = 8
        block_n = min(block_n, 16 if third_piece else 32 if second_piece else 64)  # more pieces need more registers
    num_tiles = ceil_div(pack * q_len, block_m)
    lo, hi, mask_stride = _mask_options(lo, hi, q_len, kv_len, query)
    target, target_largest, target_total, target_strides = out, largest, total, [0, *strides[9:]]
    if splits > 1:
        target = torch.empty(splits, batch, heads, q_len, value_size, dtype=torch.float32, device=query.device)
        target_largest, target_total = torch.empty(2, *target.shape[:-1], dtype=torch.float32, device=query.device)
        target_strides = [stride // unit for stride in target.stride()[:4]]
    has_sinks = sinks is not None
    fwd_kernel[(splits * num_tiles * batch * (heads // pack),)](
        query, key, value, lo, hi, sinks.contiguous() if has_sinks else query, target, target_largest, target_total,
        *strides[:9], *target_strides,
        mask_stride, num_tiles, batch, q_len, kv_len, scale, softcap if softcap else 1.0,
        H=heads, GROUP=group, PACK=pack, SPLITS=splits, UNIT=unit, HAS_SINKS=has_sinks,
        SOFTCAP=bool(softcap), TOGETHER=together, **sizes(size, value_size, dtype),
        PRECISION=_precision(dtype), M=block_m, N=block_n, num_warps=warps, num_stages=stages,
        **registers(dtype == torch.float32 or max(size, value_size) > 128 or third_piece > 0),
    )  # fmt: skip
    if splits > 1:
        combine_kernel[(batch * heads * q_len,)](
            target, target_largest, target_total, sinks.contiguous() if has_sinks else query, out, largest, total,
            *strides[9:], batch * heads * q_len, q_len, H=heads, UNIT=unit, HAS_SINKS=has_sinks, SPLITS=splits,
            SPLITS_POW2=next_power_of_2(splits), DV=value_size, DV_POW2=next_power_of_2(value_size),
        )  # fmt: skip
    return out, largest, total


def _parts_of_heads(group: int, q_len: int, programs: int) -> int:
    """Programs among which the heads that share a tile of keys are divided: one, but for few tiles of much work."""
    wanted = ceil_div(FULL, programs) if group * q_len >= ROWS_WORTH_PARTS else 1
    return next((n for n in range(wanted, group) if group % n == 0), group)


def _in_parts(like: Tensor, parts: int) -> Tensor:
    """``[parts, B, H, S, D]`` in float32, laid out as `like`."""
    batch, heads, length, size = like.shape
    return empty_heads_last(like, parts * batch, heads, length, size, torch.float32).unflatten(0, (parts, batch))


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
    dq = empty_heads_last(query, batch, heads, q_len, size)
    dk = empty_heads_last(key, batch, kv_heads, kv_len, size)
    dv = empty_heads_last(value, batch, kv_heads, kv_len, value_size)
    delta = torch.empty(batch, heads, q_len, dtype=torch.float32, device=query.device)
    if dq.numel() == 0 or dk.numel() == 0 or dv.numel() == 0:
        delta = delta.zero_() if grad_lse is None else -grad_lse
        return dq.zero_(), dk.zero_(), dv.zero_(), delta
    grad, query, key, value = _rows_aligned(grad), _rows_aligned(query), _rows_aligned(key), _rows_aligned(value)
    group, arch, dtype = heads // kv_heads, architecture(), query.dtype
    unit, strides = row_strides(grad, query, key, value, out, dq, dk, dv)
    inputs, of_out, of_dq, of_keys = strides[:12], strides[12:15], strides[15:18], strides[18:]
    lo, hi, mask_stride = _mask_options(lo, hi, q_len, kv_len, query)
    exact = dtype == torch.float32
    shift = torch.empty_like(delta)
    factor = torch.empty_like(delta) if exact else shift
    num_rows, rows = batch * heads * q_len, 16
    delta_kernel[(ceil_div(num_rows, rows),)](
        grad, out, query if grad_lse is None else grad_lse.contiguous(), largest, total, delta, shift, factor,
        *inputs[:3], *of_out, num_rows, q_len, H=heads, UNIT=unit, DV=value_size,
        DV_POW2=next_power_of_2(value_size), HAS_GRAD_LSE=grad_lse is not None, EXACT=exact, ROWS=rows,
    )  # fmt: skip
    has_cap = bool(softcap)
    shared = {
        "H": heads, "GROUP": group, "UNIT": unit, "SOFTCAP": has_cap, "EXACT": exact, "TOGETHER": HEADS_TOGETHER,
        "PRECISION": _precision(dtype), **sizes(size, value_size, dtype),
        **registers(exact or size > 256 or pieces(size, dtype)[1] > 16),
    }  # fmt: skip
    softcap = softcap if softcap else 1.0

    for gradients in kernels_of_keys(arch, dtype, size, value_size):
        block_m, block_n, warps, stages = blocks(gradients, arch, dtype, size, value_size, softcap=has_cap)
        num_tiles = ceil_div(kv_len, block_n)
        num_ranges = num_tiles + ceil_div(q_len, block_m)
        ranges = lo.new_empty(lo.shape[0], num_ranges, 2, dtype=torch.int32)
        ranges_kernel[(num_ranges, lo.shape[0])](
            lo, hi, ranges, num_tiles, 2 * num_ranges, q_len, kv_len, M=block_m, N=block_n, BLOCK=RANGE_BLOCK
        )
        programs = num_tiles * batch * kv_heads
        parts = _parts_of_heads(group, q_len, programs)
        targets, target_strides = [dk, dv], [0, *of_keys[:3], 0, *of_keys[3:]]
        if parts > 1:
            targets = [_in_parts(x, parts) for x in targets]
            target_strides = [stride // unit for x in targets for stride in x.stride()[:4]]
        dkv_kernel[(programs * parts,)](
            grad, query, key, value, lo, hi, ranges, shift, factor, delta, *targets, *inputs, *target_strides,
            mask_stride, 2 * num_ranges if mask_stride else 0, num_tiles, q_len, kv_len, scale, softcap,
            **shared, PARTS=parts, AS_COLUMN=loads_as_columns(arch, stages),
            WANTS_DK="k" in gradients, WANTS_DV="v" in gradients,
            M=block_m, N=block_n, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        if parts > 1:
            for name, whole, of_parts in zip("kv", (dk, dv), targets, strict=True):
                if name in gradients:
                    whole.copy_(of_parts.sum(0))

    block_m, block_n, warps, stages = blocks("dq", arch, dtype, size, value_size)
    num_tiles = ceil_div(q_len, block_m)
    dq_kernel[(num_tiles * batch * heads,)](
        grad, query, key, value, lo, hi, shift, factor, delta, dq, *inputs, *of_dq,
        mask_stride, num_tiles, q_len, kv_len, scale, softcap,
        **shared, M=block_m, N=block_n, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return dq, dk, dv, delta
