"""Triton kernels of `interval_attention`: the forward pass, and the sum of its parts where the keys are split.

Letters are those of interval_attention_parts.py.
"""

import triton
import triton.language as tl

from mmlm_kernels.interval_attention_parts import (
    INTEGERS,
    LOG2E,
    accumulate,
    bounds,
    dot_transposed,
    load_pieces,
    place,
    scores,
    select_rows,
    store_pieces,
    tile_range,
    zeros,
)
from mmlm_kernels.launch import kernel

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _statistics(m, denominator):
    """Largest score, and Σ exp(score − largest), from the same in units of log 2.

    The product with ln 2 is rounded; the sum is taken from what `_weights` makes of it again.
    """
    largest = m * LN2
    return largest, denominator * tl.exp2(m - largest * LOG2E)


@triton.jit
def _attend(acc1, acc2, acc3, m, denominator, q1, q2, q3, k_ptr, v_ptr, start, stop, k_stride, v_stride, lo, hi,
            Skv, scale, softcap, MASKED: tl.constexpr, SOFTCAP: tl.constexpr,
            D: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, P3: tl.constexpr,
            DV: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr, V3: tl.constexpr,
            PRECISION: tl.constexpr, N: tl.constexpr):  # fmt: skip
    for begin in range(start, stop, N):
        keys = begin + tl.arange(0, N)
        there = keys < Skv
        rows = keys.to(tl.int64)
        k1, k2, k3 = load_pieces(k_ptr, rows, k_stride, there, P1, P2, P3, D)
        s = scores(dot_transposed(q1, q2, q3, k1, k2, k3, P2, P3, PRECISION), scale, softcap, SOFTCAP)
        if MASKED:
            s = tl.where((keys[None, :] >= lo[:, None]) & (keys[None, :] < hi[:, None]), s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, axis=1))
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s - shift[:, None])
        alpha = tl.exp2(m - shift)
        denominator = denominator * alpha + tl.sum(p, axis=1)
        m = m_new
        v1, v2, v3 = load_pieces(v_ptr, rows, v_stride, there, V1, V2, V3, DV)
        acc1 = acc1 * alpha[:, None]
        if V2 > 0:
            acc2 = acc2 * alpha[:, None]
        if V3 > 0:
            acc3 = acc3 * alpha[:, None]
        acc1, acc2, acc3 = accumulate(acc1, acc2, acc3, p.to(v1.dtype), v1, v2, v3, V2, V3, PRECISION)
    return acc1, acc2, acc3, m, denominator


@kernel(do_not_specialize=INTEGERS)
def fwd_kernel(q_ptr, k_ptr, v_ptr, lo_ptr, hi_ptr, sinks_ptr, out_ptr, largest_ptr, total_ptr,
               q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_s,
               v_stride_b, v_stride_h, v_stride_s, out_stride_split, out_stride_b, out_stride_h, out_stride_s,
               mask_stride, num_tiles, B, Sq, Skv, scale, softcap,
               H: tl.constexpr, GROUP: tl.constexpr, PACK: tl.constexpr, SPLITS: tl.constexpr, UNIT: tl.constexpr,
               HAS_SINKS: tl.constexpr, SOFTCAP: tl.constexpr, TOGETHER: tl.constexpr,
               D: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, P3: tl.constexpr,
               DV: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr, V3: tl.constexpr,
               PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr):  # fmt: skip
    """Rows of a program: M queries of one head, or with PACK > 1 the queries of PACK heads that share their keys."""
    pid = tl.program_id(0)
    split = pid % SPLITS
    pid = pid // SPLITS
    tile, pair = place(pid, num_tiles, B * (H // PACK), TOGETHER)
    tile = num_tiles - 1 - tile  # the last queries see most keys under a causal mask: they start first
    b = (pair // (H // PACK)).to(tl.int64)
    head = pair % (H // PACK) * PACK
    kv_head = (head // GROUP).to(tl.int64)

    rows = tile * M + tl.arange(0, M)
    there = rows < Sq * PACK
    query = rows % Sq if PACK > 1 else rows
    heads = (head + rows // Sq).to(tl.int64) if PACK > 1 else (head + tl.zeros_like(rows)).to(tl.int64)
    lo, hi = bounds(lo_ptr + b * mask_stride, hi_ptr + b * mask_stride, query, there, Skv)
    first, inner, outer, last = tile_range(lo, hi, Skv, N)
    if SPLITS > 1:  # an equal share of the keys in use, whatever the room in the cache
        share = ((last - first + SPLITS - 1) // SPLITS + N - 1) // N * N
        first = first + split * share
        last = tl.minimum(last, first + share)
        inner = tl.minimum(tl.maximum(inner, first), tl.maximum(last, first))
        outer = tl.maximum(inner, inner + (tl.minimum(outer, last) - inner) // N * N)

    row_offset = query.to(tl.int64) * q_stride_s * UNIT + heads * q_stride_h * UNIT
    q1, q2, q3 = load_pieces(q_ptr + b * q_stride_b * UNIT, row_offset, 1, there, P1, P2, P3, D)
    k_ptr += b * k_stride_b * UNIT + kv_head * k_stride_h * UNIT
    v_ptr += b * v_stride_b * UNIT + kv_head * v_stride_h * UNIT

    acc1, acc2, acc3 = zeros(M, V1, V2, V3)
    m = tl.full((M,), float("-inf"), tl.float32)
    denominator = tl.zeros((M,), tl.float32)
    sink = m
    if HAS_SINKS and SPLITS == 1:
        sink = tl.load(sinks_ptr + heads, mask=there, other=0.0).to(tl.float32)
        m = sink * LOG2E
        denominator += 1.0
    for part in tl.static_range(3):
        start = first if part == 0 else (inner if part == 1 else outer)
        stop = inner if part == 0 else (outer if part == 1 else last)
        acc1, acc2, acc3, m, denominator = _attend(
            acc1, acc2, acc3, m, denominator, q1, q2, q3, k_ptr, v_ptr, start, stop,
            k_stride_s * UNIT, v_stride_s * UNIT, lo, hi, Skv, scale, softcap,
            part != 1, SOFTCAP, D, P1, P2, P3, DV, V1, V2, V3, PRECISION, N,
        )  # fmt: skip

    alive = hi > lo
    if SPLITS == 1:
        factor = (1.0 / denominator)[:, None]
        acc1 = acc1 * factor
        if V2 > 0:
            acc2 = acc2 * factor
        if V3 > 0:
            acc3 = acc3 * factor
        largest, total = _statistics(m, denominator)
        largest = tl.where(alive, largest, sink)
        total = tl.where(alive, total, 1.0 if HAS_SINKS else 0.0)
    else:  # of this part, in units of log 2
        largest = tl.where(alive, m, float("-inf"))
        total = tl.where(alive, denominator, 0.0)
    out_ptr += split.to(tl.int64) * out_stride_split * UNIT + b * out_stride_b * UNIT
    out_offset = query.to(tl.int64) * out_stride_s * UNIT + heads * out_stride_h * UNIT
    acc1, acc2, acc3 = select_rows(alive, acc1, acc2, acc3, V2, V3)
    store_pieces(out_ptr, out_offset, 1, there, acc1, acc2, acc3, V1, V2, V3, DV)
    row = ((split.to(tl.int64) * B + b) * H + heads) * Sq + query
    tl.store(largest_ptr + row, largest, mask=there)
    tl.store(total_ptr + row, total, mask=there)


@kernel(do_not_specialize=INTEGERS)
def combine_kernel(partial_ptr, partial_largest_ptr, partial_total_ptr, sinks_ptr, out_ptr, largest_ptr, total_ptr,
                   out_stride_b, out_stride_h, out_stride_s, num_rows, Sq,
                   H: tl.constexpr, UNIT: tl.constexpr, HAS_SINKS: tl.constexpr, SPLITS: tl.constexpr,
                   SPLITS_POW2: tl.constexpr, DV: tl.constexpr, DV_POW2: tl.constexpr):  # fmt: skip
    """One row: the parts' sums, each shifted from its own largest score to that of all. partial [SPLITS, rows, DV]."""
    row = tl.program_id(0).to(tl.int64)
    head = row // Sq % H
    splits = tl.arange(0, SPLITS_POW2)
    columns = tl.arange(0, DV_POW2)
    part = splits * num_rows.to(tl.int64) + row
    parts = tl.load(partial_largest_ptr + part, mask=splits < SPLITS, other=float("-inf"))
    m = tl.max(parts, axis=0)
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * LOG2E
        m = tl.maximum(m, sink)
    alive = m > float("-inf")
    shift = tl.where(alive, m, 0.0)
    weights = tl.exp2(parts - shift)
    denominator = tl.sum(weights * tl.load(partial_total_ptr + part, mask=splits < SPLITS, other=0.0), axis=0)
    if HAS_SINKS:
        denominator += tl.exp2(sink - shift)
    acc = tl.zeros((DV_POW2,), tl.float32)
    for split in range(SPLITS):
        weight = tl.sum(tl.where(splits == split, weights, 0.0), axis=0)
        offset = (split * num_rows.to(tl.int64) + row) * DV
        acc += weight * tl.load(partial_ptr + offset + columns, mask=columns < DV, other=0.0)
    acc = tl.where(alive, acc / tl.where(alive, denominator, 1.0), 0.0)
    out_ptr += (row // (Sq * H) * out_stride_b + head * out_stride_h + row % Sq * out_stride_s) * UNIT
    tl.store(out_ptr + columns, acc.to(out_ptr.dtype.element_ty), mask=columns < DV)
    largest, total = _statistics(shift, denominator)
    tl.store(largest_ptr + row, tl.where(alive, largest, float("-inf")))
    tl.store(total_ptr + row, tl.where(alive, total, 0.0))
