"""Triton kernels of `interval_attention`: the backward pass.

`delta_kernel` leaves what both others need of each row, `ranges_kernel` finds the queries that see a tile of keys;
`dkv_kernel` and `dq_kernel` compute the gradients. Letters are those of interval_attention_parts.py.
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


@triton.jit
def _softcap_grad(s, softcap):
    """d score / d (scale · product), from the score in units of log 2."""
    t = s / (softcap * LOG2E)
    return 1.0 - t * t


@triton.jit
def _load_rows(ptr, index, mask, other, AS_COLUMN: tl.constexpr):
    """One number a row. With AS_COLUMN by the sum over a column of one, which costs a barrier.

    Triton loads a vector in the layout of the scores it meets, from 3.9 on in wgmma's alone: up to 130 registers of
    pointers a thread, which spills, and in a pipeline as many copies of four bytes. It does not look through a sum
    along another axis. On an H100 that made the gradients of keys and values 18 to 30 % faster.
    """
    if AS_COLUMN:
        return tl.sum(tl.load((ptr + index)[:, None], mask=mask[:, None], other=other), axis=1)
    else:
        return tl.load(ptr + index, mask=mask, other=other)


@triton.jit
def _load_normaliser(shift_ptr, factor_ptr, index, mask, EXACT: tl.constexpr, AS_COLUMN: tl.constexpr):
    """What `delta_kernel` left of these rows; where masked out, what makes weights of 0."""
    shift = _load_rows(shift_ptr, index, mask, float("inf"), AS_COLUMN)
    factor = shift
    if EXACT:
        factor = _load_rows(factor_ptr, index, mask, 0.0, AS_COLUMN)
    return shift, factor


@triton.jit
def _weights(s, shift, factor, EXACT: tl.constexpr):
    """Softmax from scores in units of log 2; shift and factor can be broadcast to them."""
    p = tl.exp2(s - shift)
    return p * factor if EXACT else p


@kernel(do_not_specialize=INTEGERS)
def delta_kernel(grad_ptr, out_ptr, grad_lse_ptr, largest_ptr, total_ptr, delta_ptr, shift_ptr, factor_ptr,
                 grad_stride_b, grad_stride_h, grad_stride_s, out_stride_b, out_stride_h, out_stride_s, num_rows, Sq,
                 H: tl.constexpr, UNIT: tl.constexpr, DV: tl.constexpr, DV_POW2: tl.constexpr,
                 HAS_GRAD_LSE: tl.constexpr, EXACT: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """delta = Σ_d dO·O − dLSE, what dP is measured from; and what the weights are made from again.

    A row's weights are exp2(score − shift), with EXACT times a factor: in float32 the rounding of a log-sum-exp, which
    is one number, would be more than the reference's error. A row without keys has the shift that makes them 0.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = rows < num_rows
    columns = tl.arange(0, DV_POW2)
    mask = there[:, None] & (columns < DV)[None, :]
    b, head, query = rows // (Sq * H), rows // Sq % H, rows % Sq
    grad_offset = (b * grad_stride_b + head * grad_stride_h + query * grad_stride_s) * UNIT
    out_offset = (b * out_stride_b + head * out_stride_h + query * out_stride_s) * UNIT
    grad = tl.load(grad_ptr + grad_offset[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    out = tl.load(out_ptr + out_offset[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    delta = tl.sum(grad * out, axis=1)
    if HAS_GRAD_LSE:
        delta -= tl.load(grad_lse_ptr + rows, mask=there, other=0.0)
    tl.store(delta_ptr + rows, delta, mask=there)
    total = tl.load(total_ptr + rows, mask=there, other=1.0)
    alive = total != 0.0
    total = tl.where(alive, total, 1.0)
    shift = tl.load(largest_ptr + rows, mask=there, other=0.0) * LOG2E
    if EXACT:
        tl.store(factor_ptr + rows, 1.0 / total, mask=there)
    else:
        shift += tl.log2(total)
    tl.store(shift_ptr + rows, tl.where(alive, shift, float("inf")), mask=there)


@kernel(do_not_specialize=INTEGERS)
def ranges_kernel(lo_ptr, hi_ptr, ranges_ptr, num_tiles, range_stride, Sq, Skv,
                  M: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """For each tile of N keys [first, last), in which all queries are that see some of it; behind them, for each tile
    of M queries, [lo, hi), the keys that all of them see."""
    tile = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    lo_ptr += b * Sq
    hi_ptr += b * Sq
    if tile < num_tiles:
        begin = tile * N
        end = tl.minimum(begin + N, Skv)
        first = Sq
        last = 0
        for start in range(0, Sq, BLOCK):
            rows = start + tl.arange(0, BLOCK)
            there = rows < Sq
            lo = tl.load(lo_ptr + rows, mask=there, other=0)
            hi = tl.load(hi_ptr + rows, mask=there, other=0)
            some = there & (hi > lo) & (lo < end) & (hi > begin)
            first = tl.minimum(first, tl.min(tl.where(some, rows, Sq), axis=0))
            last = tl.maximum(last, tl.max(tl.where(some, rows + 1, 0), axis=0))
        last = tl.maximum(first, last)
    else:
        rows = (tile - num_tiles) * M + tl.arange(0, M)
        there = rows < Sq
        first = tl.max(tl.load(lo_ptr + rows, mask=there, other=0), axis=0)
        last = tl.min(tl.load(hi_ptr + rows, mask=there, other=2147483647), axis=0)
    ranges_ptr += b * range_stride + tile * 2
    tl.store(ranges_ptr, first)
    tl.store(ranges_ptr + 1, last)


@triton.jit
def _dkv_loop(dk1, dk2, dk3, dv1, dv2, dv3, k1, k2, k3, v1, v2, v3, q_ptr, grad_ptr, lo_ptr, hi_ptr,
              shift_ptr, factor_ptr, delta_ptr, shared_ptr, start, stop, q_stride, grad_stride, keys, first_key,
              end_key, scale, softcap,
              SOFTCAP: tl.constexpr, EXACT: tl.constexpr, AS_COLUMN: tl.constexpr,
              WANTS_DK: tl.constexpr, WANTS_DV: tl.constexpr,
              D: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, P3: tl.constexpr,
              DV: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr, V3: tl.constexpr,
              PRECISION: tl.constexpr, M: tl.constexpr):  # fmt: skip
    """A tile is masked where not all of its queries see all keys; their bounds are loaded there alone, and not cut to
    the keys there are: what is beyond them is not stored.

    Masked everywhere it took 7 more instructions for each query and key: Triton carries the comparisons from the layout
    of the bounds to that of the scores as bytes, through shared memory.
    """
    for begin in range(start // M * M, stop, M):
        query = begin + tl.arange(0, M)
        there = (query >= start) & (query < stop)
        seen_from = tl.load(shared_ptr + begin // M * 2)
        seen_to = tl.load(shared_ptr + begin // M * 2 + 1)
        rows = query.to(tl.int64)
        q1, q2, q3 = load_pieces(q_ptr, rows, q_stride, there, P1, P2, P3, D)
        shift, factor = _load_normaliser(shift_ptr, factor_ptr, query, there, EXACT, AS_COLUMN)
        s = scores(dot_transposed(k1, k2, k3, q1, q2, q3, P2, P3, PRECISION), scale, softcap, SOFTCAP)  # [N, M]
        p = _weights(s, shift[None, :], factor[None, :], EXACT)
        if (seen_from > first_key) | (seen_to < end_key):
            lo = tl.load(lo_ptr + query, mask=there, other=0)
            hi = tl.load(hi_ptr + query, mask=there, other=0)
            p = tl.where((keys[:, None] >= lo[None, :]) & (keys[:, None] < hi[None, :]), p, 0.0)
        g1, g2, g3 = load_pieces(grad_ptr, rows, grad_stride, there, V1, V2, V3, DV)
        if WANTS_DV:
            dv1, dv2, dv3 = accumulate(dv1, dv2, dv3, p.to(g1.dtype), g1, g2, g3, V2, V3, PRECISION)
        if WANTS_DK:
            dp = dot_transposed(v1, v2, v3, g1, g2, g3, V2, V3, PRECISION)
            delta = _load_rows(delta_ptr, query, there, 0.0, AS_COLUMN)
            ds = p * (dp - delta[None, :])
            if SOFTCAP:
                ds = ds * _softcap_grad(s, softcap)
            dk1, dk2, dk3 = accumulate(dk1, dk2, dk3, ds.to(q1.dtype), q1, q2, q3, P2, P3, PRECISION)
    return dk1, dk2, dk3, dv1, dv2, dv3


@kernel(do_not_specialize=INTEGERS)
def dkv_kernel(grad_ptr, q_ptr, k_ptr, v_ptr, lo_ptr, hi_ptr, ranges_ptr, shift_ptr, factor_ptr, delta_ptr,
               dk_ptr, dv_ptr,
               grad_stride_b, grad_stride_h, grad_stride_s, q_stride_b, q_stride_h, q_stride_s,
               k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
               dk_stride_part, dk_stride_b, dk_stride_h, dk_stride_s,
               dv_stride_part, dv_stride_b, dv_stride_h, dv_stride_s,
               mask_stride, range_stride, num_tiles, Sq, Skv, scale, softcap,
               H: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr, UNIT: tl.constexpr, SOFTCAP: tl.constexpr,
               EXACT: tl.constexpr,
               AS_COLUMN: tl.constexpr, TOGETHER: tl.constexpr, WANTS_DK: tl.constexpr, WANTS_DV: tl.constexpr,
               D: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, P3: tl.constexpr,
               DV: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr, V3: tl.constexpr,
               PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr):  # fmt: skip
    """dK, dV or both of a tile of keys, summed over the heads that share it, or over one of PARTS of them."""
    kv_heads: tl.constexpr = H // GROUP
    heads_of_part: tl.constexpr = GROUP // PARTS
    part = tl.program_id(0).to(tl.int64) % PARTS
    # under a causal mask the first keys are seen by most queries: they start first
    num_pairs = tl.num_programs(0) // (num_tiles * PARTS)
    tile, pair = place(tl.program_id(0) // PARTS, num_tiles, num_pairs, TOGETHER)
    b = (pair // kv_heads).to(tl.int64)
    kv_head = (pair % kv_heads).to(tl.int64)
    keys = tile * N + tl.arange(0, N)
    there = keys < Skv
    rows = keys.to(tl.int64)
    ranges_ptr += b * range_stride
    first, last = tl.load(ranges_ptr + tile * 2), tl.load(ranges_ptr + tile * 2 + 1)

    k_ptr += b * k_stride_b * UNIT + kv_head * k_stride_h * UNIT
    v_ptr += b * v_stride_b * UNIT + kv_head * v_stride_h * UNIT
    k1, k2, k3 = load_pieces(k_ptr, rows, k_stride_s * UNIT, there, P1, P2, P3, D)
    v1, v2, v3 = k1, k2, k3
    if WANTS_DK:
        v1, v2, v3 = load_pieces(v_ptr, rows, v_stride_s * UNIT, there, V1, V2, V3, DV)
    dk1, dk2, dk3 = zeros(N if WANTS_DK else 1, P1 if WANTS_DK else 1, P2 if WANTS_DK else 0, P3 if WANTS_DK else 0)
    dv1, dv2, dv3 = zeros(N if WANTS_DV else 1, V1 if WANTS_DV else 1, V2 if WANTS_DV else 0, V3 if WANTS_DV else 0)
    for g in range(heads_of_part):
        head = kv_head * GROUP + part * heads_of_part + g
        row = (b * H + head) * Sq
        dk1, dk2, dk3, dv1, dv2, dv3 = _dkv_loop(
            dk1, dk2, dk3, dv1, dv2, dv3, k1, k2, k3, v1, v2, v3,
            q_ptr + b * q_stride_b * UNIT + head * q_stride_h * UNIT,
            grad_ptr + b * grad_stride_b * UNIT + head * grad_stride_h * UNIT,
            lo_ptr + b * mask_stride, hi_ptr + b * mask_stride, shift_ptr + row, factor_ptr + row, delta_ptr + row,
            ranges_ptr + num_tiles * 2, first, last, q_stride_s * UNIT, grad_stride_s * UNIT, keys,
            tile * N, tl.minimum(tile * N + N, Skv), scale, softcap,
            SOFTCAP, EXACT, AS_COLUMN, WANTS_DK, WANTS_DV, D, P1, P2, P3, DV, V1, V2, V3, PRECISION, M,
        )  # fmt: skip
    if WANTS_DK:
        dk1 = dk1 * scale
        if P2 > 0:
            dk2 = dk2 * scale
        if P3 > 0:
            dk3 = dk3 * scale
        dk_ptr += part * dk_stride_part * UNIT + b * dk_stride_b * UNIT + kv_head * dk_stride_h * UNIT
        store_pieces(dk_ptr, rows, dk_stride_s * UNIT, there, dk1, dk2, dk3, P1, P2, P3, D)
    if WANTS_DV:
        dv_ptr += part * dv_stride_part * UNIT + b * dv_stride_b * UNIT + kv_head * dv_stride_h * UNIT
        store_pieces(dv_ptr, rows, dv_stride_s * UNIT, there, dv1, dv2, dv3, V1, V2, V3, DV)


@triton.jit
def _dq_loop(dq1, dq2, dq3, q1, q2, q3, g1, g2, g3, k_ptr, v_ptr, shift, factor, delta, lo, hi, start, stop,
             k_stride, v_stride, Skv, scale, softcap, MASKED: tl.constexpr, SOFTCAP: tl.constexpr, EXACT: tl.constexpr,
             D: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, P3: tl.constexpr,
             DV: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr, V3: tl.constexpr,
             PRECISION: tl.constexpr, N: tl.constexpr):  # fmt: skip
    for begin in range(start, stop, N):
        keys = begin + tl.arange(0, N)
        there = keys < Skv
        rows = keys.to(tl.int64)
        k1, k2, k3 = load_pieces(k_ptr, rows, k_stride, there, P1, P2, P3, D)
        s = scores(dot_transposed(q1, q2, q3, k1, k2, k3, P2, P3, PRECISION), scale, softcap, SOFTCAP)
        p = _weights(s, shift[:, None], factor[:, None], EXACT)
        if MASKED:
            p = tl.where((keys[None, :] >= lo[:, None]) & (keys[None, :] < hi[:, None]), p, 0.0)
        v1, v2, v3 = load_pieces(v_ptr, rows, v_stride, there, V1, V2, V3, DV)
        dp = dot_transposed(g1, g2, g3, v1, v2, v3, V2, V3, PRECISION)
        ds = p * (dp - delta[:, None])
        if SOFTCAP:
            ds = ds * _softcap_grad(s, softcap)
        dq1, dq2, dq3 = accumulate(dq1, dq2, dq3, ds.to(k1.dtype), k1, k2, k3, P2, P3, PRECISION)
    return dq1, dq2, dq3


@kernel(do_not_specialize=INTEGERS)
def dq_kernel(grad_ptr, q_ptr, k_ptr, v_ptr, lo_ptr, hi_ptr, shift_ptr, factor_ptr, delta_ptr, dq_ptr,
              grad_stride_b, grad_stride_h, grad_stride_s, q_stride_b, q_stride_h, q_stride_s,
              k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
              dq_stride_b, dq_stride_h, dq_stride_s, mask_stride, num_tiles, Sq, Skv, scale, softcap,
              H: tl.constexpr, GROUP: tl.constexpr, UNIT: tl.constexpr, SOFTCAP: tl.constexpr, EXACT: tl.constexpr,
              TOGETHER: tl.constexpr, D: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, P3: tl.constexpr,
              DV: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr, V3: tl.constexpr,
              PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr):  # fmt: skip
    tile, pair = place(tl.program_id(0), num_tiles, tl.num_programs(0) // num_tiles, TOGETHER)
    tile = num_tiles - 1 - tile
    b = (pair // H).to(tl.int64)
    head = (pair % H).to(tl.int64)
    kv_head = head // GROUP
    query = tile * M + tl.arange(0, M)
    there = query < Sq
    rows = query.to(tl.int64)
    lo, hi = bounds(lo_ptr + b * mask_stride, hi_ptr + b * mask_stride, query, there, Skv)
    first, inner, outer, last = tile_range(lo, hi, Skv, N)
    q_ptr += b * q_stride_b * UNIT + head * q_stride_h * UNIT
    grad_ptr += b * grad_stride_b * UNIT + head * grad_stride_h * UNIT
    k_ptr += b * k_stride_b * UNIT + kv_head * k_stride_h * UNIT
    v_ptr += b * v_stride_b * UNIT + kv_head * v_stride_h * UNIT
    q1, q2, q3 = load_pieces(q_ptr, rows, q_stride_s * UNIT, there, P1, P2, P3, D)
    g1, g2, g3 = load_pieces(grad_ptr, rows, grad_stride_s * UNIT, there, V1, V2, V3, DV)
    row = (b * H + head) * Sq
    alive = there & (hi > lo)
    shift, factor = _load_normaliser(shift_ptr + row, factor_ptr + row, query, alive, EXACT, False)
    delta = tl.load(delta_ptr + row + query, mask=there, other=0.0)
    dq1, dq2, dq3 = zeros(M, P1, P2, P3)
    for part in tl.static_range(3):
        start = first if part == 0 else (inner if part == 1 else outer)
        stop = inner if part == 0 else (outer if part == 1 else last)
        dq1, dq2, dq3 = _dq_loop(
            dq1, dq2, dq3, q1, q2, q3, g1, g2, g3, k_ptr, v_ptr, shift, factor, delta, lo, hi, start, stop,
            k_stride_s * UNIT, v_stride_s * UNIT, Skv, scale, softcap, part != 1, SOFTCAP, EXACT,
            D, P1, P2, P3, DV, V1, V2, V3, PRECISION, N,
        )  # fmt: skip
    dq1 = dq1 * scale
    if P2 > 0:
        dq2 = dq2 * scale
    if P3 > 0:
        dq3 = dq3 * scale
    dq1, dq2, dq3 = select_rows(alive, dq1, dq2, dq3, P2, P3)
    dq_ptr += b * dq_stride_b * UNIT + head * dq_stride_h * UNIT
    store_pieces(dq_ptr, rows, dq_stride_s * UNIT, there, dq1, dq2, dq3, P1, P2, P3, D)
