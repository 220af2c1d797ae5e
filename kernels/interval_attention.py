"""Triton kernels for `interval_attention`. Contract: mmlm_fast/ops/interval_attention.py.

Compute-bound. Floor forward: 4·D flops for each visible pair of query and key, and head; backward 10·D (ours does
14·D: scores and dP are computed once for dK, dV and once for dQ, so that no output is accumulated atomically). With few
queries the keys and values are read once: then memory is the floor, and the keys are split among programs.

A tile of queries needs the keys from its least `lo` to its largest `hi`; between its largest `lo` and least `hi`
nothing is masked. For a tile of keys a small kernel finds the queries that see it.

A head size that is no power of two is cut into up to three pieces that are (72 = 64 + 16, 104 = 64 + 32 + 16), each a
tile of its own: P1, P2, P3 are their widths, 0 where there is none.

Legend: B batch, H query heads, S queries or keys, D head size of queries and keys, DV of values, M block of queries,
N block of keys, R rows of a program: queries, or queries of several heads that share their keys.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmlm_kernels.tiles import architecture

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
OLD_TRITON = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)
RANGE_BLOCK = 1024
DECODE_ROWS = 64  # at most so many rows (queries × heads that share keys) are split over the keys
MIN_SPLIT_KEYS = 256
MAX_SPLITS = 64
PROGRAMS_WANTED = 2 * 132  # two for each multiprocessor of a large GPU
SPLIT_ABOVE = 128  # head size
HEADS_TOGETHER = 8  # whose tiles run side by side (`_place`)
# No integer is specialised: lengths and strides change with every batch and every token, and UNIT says what they are
# multiples of (tests/test_kernel_variants.py).
INTEGERS = [f"{name}_stride_{axis}" for name in ("q", "k", "v", "grad", "out", "dq", "dk", "dv") for axis in "bhs"]
INTEGERS += ["out_stride_split", "mask_stride", "range_stride", "num_tiles", "num_rows", "B", "Sq", "Skv"]


@triton.jit
def _tanh(x):
    """Cephes' tanhf: 1 − 2/(e²ˣ + 1) loses all digits of a small x, an odd polynomial keeps them."""
    z = x * x
    small = -5.70498872745e-3 * z + 2.06390887954e-2
    small = small * z - 5.37397155531e-2
    small = small * z + 1.33314422036e-1
    small = small * z - 3.33332819422e-1
    small = small * z * x + x
    large = 1.0 - 2.0 / (tl.exp2(x * LOG2E * 2.0) + 1.0)
    return tl.where(tl.abs(x) < 0.625, small, large)


@triton.jit
def _load(ptr, rows, stride, mask, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """``[rows, WIDTH]``, columns from FIRST; `rows` are int64, `stride` is between them."""
    columns = FIRST + tl.arange(0, WIDTH)
    pointers = ptr + rows[:, None] * stride + columns[None, :]
    if FIRST + WIDTH <= D:
        return tl.load(pointers, mask=mask[:, None], other=0.0)
    else:
        return tl.load(pointers, mask=mask[:, None] & (columns < D)[None, :], other=0.0)


@triton.jit
def _load_pieces(ptr, rows, stride, mask, P1: tl.constexpr, P2: tl.constexpr, P3: tl.constexpr, D: tl.constexpr):
    x1 = _load(ptr, rows, stride, mask, 0, P1, D)
    x2 = x1
    x3 = x1
    if P2 > 0:
        x2 = _load(ptr, rows, stride, mask, P1, P2, D)
    if P3 > 0:
        x3 = _load(ptr, rows, stride, mask, P1 + P2, P3, D)
    return x1, x2, x3


@triton.jit
def _store(ptr, rows, stride, mask, x, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    columns = FIRST + tl.arange(0, WIDTH)
    pointers = ptr + rows[:, None] * stride + columns[None, :]
    tl.store(pointers, x.to(ptr.dtype.element_ty), mask=mask[:, None] & (columns < D)[None, :])


@triton.jit
def _store_pieces(ptr, rows, stride, mask, x1, x2, x3,
                  P1: tl.constexpr, P2: tl.constexpr, P3: tl.constexpr, D: tl.constexpr):  # fmt: skip
    _store(ptr, rows, stride, mask, x1, 0, P1, D)
    if P2 > 0:
        _store(ptr, rows, stride, mask, x2, P1, P2, D)
    if P3 > 0:
        _store(ptr, rows, stride, mask, x3, P1 + P2, P3, D)


@triton.jit
def _select_rows(alive, x1, x2, x3, P2: tl.constexpr, P3: tl.constexpr):
    """Zeros in rows that see no key: what a loop left there, which did not mask them, may be infinite or NaN."""
    x1 = tl.where(alive[:, None], x1, 0.0)
    if P2 > 0:
        x2 = tl.where(alive[:, None], x2, 0.0)
    if P3 > 0:
        x3 = tl.where(alive[:, None], x3, 0.0)
    return x1, x2, x3


@triton.jit
def _zeros(ROWS: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, P3: tl.constexpr):
    """Accumulators; a piece that is not there is a vector that nothing touches."""
    a1 = tl.zeros((ROWS, P1), tl.float32)
    a2 = tl.zeros((ROWS,), tl.float32)
    a3 = tl.zeros((ROWS,), tl.float32)
    if P2 > 0:
        a2 = tl.zeros((ROWS, P2), tl.float32)
    if P3 > 0:
        a3 = tl.zeros((ROWS, P3), tl.float32)
    return a1, a2, a3


@triton.jit
def _dot_transposed(a1, a2, a3, b1, b2, b3, P2: tl.constexpr, P3: tl.constexpr, PRECISION: tl.constexpr):
    """a·bᵀ over the pieces."""
    out = tl.dot(a1, tl.trans(b1), input_precision=PRECISION)
    if P2 > 0:
        out = tl.dot(a2, tl.trans(b2), out, input_precision=PRECISION)
    if P3 > 0:
        out = tl.dot(a3, tl.trans(b3), out, input_precision=PRECISION)
    return out


@triton.jit
def _accumulate(acc1, acc2, acc3, a, b1, b2, b3, P2: tl.constexpr, P3: tl.constexpr, PRECISION: tl.constexpr):
    """acc += a·b for each piece of b."""
    acc1 = tl.dot(a, b1, acc1, input_precision=PRECISION)
    if P2 > 0:
        acc2 = tl.dot(a, b2, acc2, input_precision=PRECISION)
    if P3 > 0:
        acc3 = tl.dot(a, b3, acc3, input_precision=PRECISION)
    return acc1, acc2, acc3


@triton.jit
def _scores(product, scale, softcap, SOFTCAP: tl.constexpr):
    """Scores in units of log 2."""
    if SOFTCAP:
        return _tanh(product * (scale / softcap)) * (softcap * LOG2E)
    else:
        return product * (scale * LOG2E)


@triton.jit
def _softcap_grad(s, softcap):
    """d score / d (scale · product), from the score in units of log 2."""
    t = s / (softcap * LOG2E)
    return 1.0 - t * t


@triton.jit
def _place(pid, num_tiles, num_heads, TOGETHER: tl.constexpr):
    """Tile and head of a program: the first tiles of TOGETHER heads, their second ones, …

    Tiles come with the most work first: those of one head after the other would let the last head's first tile start
    where others end. Of few heads at once, so that programs side by side read the same.
    """
    if TOGETHER == 1:
        return pid % num_tiles, pid // num_tiles
    first = pid // (num_tiles * TOGETHER) * TOGETHER
    heads = tl.minimum(num_heads - first, TOGETHER)
    rest = pid % (num_tiles * TOGETHER)
    return rest // heads, first + rest % heads


@triton.jit
def _bounds(lo_ptr, hi_ptr, index, mask, Skv):
    """The rows' intervals, cut to the keys there are; rows that do not exist see none."""
    lo = tl.maximum(tl.load(lo_ptr + index, mask=mask, other=0), 0)
    hi = tl.minimum(tl.load(hi_ptr + index, mask=mask, other=0), Skv)
    return lo, hi


@triton.jit
def _statistics(m, denominator):
    """Largest score, and Σ exp(score − largest), from the same in units of log 2.

    The product with ln 2 is rounded; the sum is taken from what `_weights` makes of it again.
    """
    largest = m * LN2
    return largest, denominator * tl.exp2(m - largest * LOG2E)


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
    """What `_delta_kernel` left of these rows; where masked out, what makes weights of 0."""
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


@triton.jit
def _tile_range(lo, hi, Skv, BLOCK: tl.constexpr):
    """Keys a tile of rows needs: masked [first, inner), unmasked [inner, outer), masked [outer, last)."""
    alive = hi > lo
    first = tl.min(tl.where(alive, lo, Skv), axis=0)
    last = tl.max(tl.where(alive, hi, 0), axis=0)
    last = tl.maximum(first, last)
    inner = first + (tl.max(tl.where(alive, lo, 0), axis=0) - first + BLOCK - 1) // BLOCK * BLOCK
    inner = tl.minimum(tl.maximum(inner, first), last)
    outer = inner + tl.maximum(tl.min(tl.where(alive, hi, Skv), axis=0) - inner, 0) // BLOCK * BLOCK
    return first, inner, outer, last


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
        k1, k2, k3 = _load_pieces(k_ptr, rows, k_stride, there, P1, P2, P3, D)
        s = _scores(_dot_transposed(q1, q2, q3, k1, k2, k3, P2, P3, PRECISION), scale, softcap, SOFTCAP)
        if MASKED:
            s = tl.where((keys[None, :] >= lo[:, None]) & (keys[None, :] < hi[:, None]), s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, axis=1))
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s - shift[:, None])
        alpha = tl.exp2(m - shift)
        denominator = denominator * alpha + tl.sum(p, axis=1)
        m = m_new
        v1, v2, v3 = _load_pieces(v_ptr, rows, v_stride, there, V1, V2, V3, DV)
        acc1 = acc1 * alpha[:, None]
        if V2 > 0:
            acc2 = acc2 * alpha[:, None]
        if V3 > 0:
            acc3 = acc3 * alpha[:, None]
        acc1, acc2, acc3 = _accumulate(acc1, acc2, acc3, p.to(v1.dtype), v1, v2, v3, V2, V3, PRECISION)
    return acc1, acc2, acc3, m, denominator


@triton.jit(do_not_specialize=INTEGERS)
def _fwd_kernel(q_ptr, k_ptr, v_ptr, lo_ptr, hi_ptr, sinks_ptr, out_ptr, largest_ptr, total_ptr,
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
    tile, pair = _place(pid, num_tiles, B * (H // PACK), TOGETHER)
    tile = num_tiles - 1 - tile  # the last queries see most keys under a causal mask: they start first
    b = (pair // (H // PACK)).to(tl.int64)
    head = pair % (H // PACK) * PACK
    kv_head = (head // GROUP).to(tl.int64)

    rows = tile * M + tl.arange(0, M)
    there = rows < Sq * PACK
    query = rows % Sq if PACK > 1 else rows
    heads = (head + rows // Sq).to(tl.int64) if PACK > 1 else (head + tl.zeros_like(rows)).to(tl.int64)
    lo, hi = _bounds(lo_ptr + b * mask_stride, hi_ptr + b * mask_stride, query, there, Skv)
    first, inner, outer, last = _tile_range(lo, hi, Skv, N)
    if SPLITS > 1:  # an equal share of the keys in use, whatever the room in the cache
        share = ((last - first + SPLITS - 1) // SPLITS + N - 1) // N * N
        first = first + split * share
        last = tl.minimum(last, first + share)
        inner = tl.minimum(tl.maximum(inner, first), tl.maximum(last, first))
        outer = tl.maximum(inner, inner + (tl.minimum(outer, last) - inner) // N * N)

    row_offset = query.to(tl.int64) * q_stride_s * UNIT + heads * q_stride_h * UNIT
    q1, q2, q3 = _load_pieces(q_ptr + b * q_stride_b * UNIT, row_offset, 1, there, P1, P2, P3, D)
    k_ptr += b * k_stride_b * UNIT + kv_head * k_stride_h * UNIT
    v_ptr += b * v_stride_b * UNIT + kv_head * v_stride_h * UNIT

    acc1, acc2, acc3 = _zeros(M, V1, V2, V3)
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
    acc1, acc2, acc3 = _select_rows(alive, acc1, acc2, acc3, V2, V3)
    _store_pieces(out_ptr, out_offset, 1, there, acc1, acc2, acc3, V1, V2, V3, DV)
    row = ((split.to(tl.int64) * B + b) * H + heads) * Sq + query
    tl.store(largest_ptr + row, largest, mask=there)
    tl.store(total_ptr + row, total, mask=there)


@triton.jit(do_not_specialize=INTEGERS)
def _combine_kernel(partial_ptr, partial_largest_ptr, partial_total_ptr, sinks_ptr, out_ptr, largest_ptr, total_ptr,
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


@triton.jit(do_not_specialize=INTEGERS)
def _delta_kernel(grad_ptr, out_ptr, grad_lse_ptr, largest_ptr, total_ptr, delta_ptr, shift_ptr, factor_ptr,
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


@triton.jit(do_not_specialize=INTEGERS)
def _ranges_kernel(lo_ptr, hi_ptr, ranges_ptr, num_tiles, range_stride, Sq, Skv,
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
        q1, q2, q3 = _load_pieces(q_ptr, rows, q_stride, there, P1, P2, P3, D)
        shift, factor = _load_normaliser(shift_ptr, factor_ptr, query, there, EXACT, AS_COLUMN)
        s = _scores(_dot_transposed(k1, k2, k3, q1, q2, q3, P2, P3, PRECISION), scale, softcap, SOFTCAP)  # [N, M]
        p = _weights(s, shift[None, :], factor[None, :], EXACT)
        if (seen_from > first_key) | (seen_to < end_key):
            lo = tl.load(lo_ptr + query, mask=there, other=0)
            hi = tl.load(hi_ptr + query, mask=there, other=0)
            p = tl.where((keys[:, None] >= lo[None, :]) & (keys[:, None] < hi[None, :]), p, 0.0)
        g1, g2, g3 = _load_pieces(grad_ptr, rows, grad_stride, there, V1, V2, V3, DV)
        if WANTS_DV:
            dv1, dv2, dv3 = _accumulate(dv1, dv2, dv3, p.to(g1.dtype), g1, g2, g3, V2, V3, PRECISION)
        if WANTS_DK:
            dp = _dot_transposed(v1, v2, v3, g1, g2, g3, V2, V3, PRECISION)
            delta = _load_rows(delta_ptr, query, there, 0.0, AS_COLUMN)
            ds = p * (dp - delta[None, :])
            if SOFTCAP:
                ds = ds * _softcap_grad(s, softcap)
            dk1, dk2, dk3 = _accumulate(dk1, dk2, dk3, ds.to(q1.dtype), q1, q2, q3, P2, P3, PRECISION)
    return dk1, dk2, dk3, dv1, dv2, dv3


@triton.jit(do_not_specialize=INTEGERS)
def _dkv_kernel(grad_ptr, q_ptr, k_ptr, v_ptr, lo_ptr, hi_ptr, ranges_ptr, shift_ptr, factor_ptr, delta_ptr,
                dk_ptr, dv_ptr,
                grad_stride_b, grad_stride_h, grad_stride_s, q_stride_b, q_stride_h, q_stride_s,
                k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
                dk_stride_b, dk_stride_h, dk_stride_s, dv_stride_b, dv_stride_h, dv_stride_s,
                mask_stride, range_stride, num_tiles, Sq, Skv, scale, softcap,
                H: tl.constexpr, GROUP: tl.constexpr, UNIT: tl.constexpr, SOFTCAP: tl.constexpr, EXACT: tl.constexpr,
                AS_COLUMN: tl.constexpr, TOGETHER: tl.constexpr, WANTS_DK: tl.constexpr, WANTS_DV: tl.constexpr,
                D: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, P3: tl.constexpr,
                DV: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr, V3: tl.constexpr,
                PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr):  # fmt: skip
    """dK, dV or both of a tile of keys, summed over the heads that share it."""
    kv_heads: tl.constexpr = H // GROUP
    # under a causal mask the first keys are seen by most queries: they start first
    tile, pair = _place(tl.program_id(0), num_tiles, tl.num_programs(0) // num_tiles, TOGETHER)
    b = (pair // kv_heads).to(tl.int64)
    kv_head = (pair % kv_heads).to(tl.int64)
    keys = tile * N + tl.arange(0, N)
    there = keys < Skv
    rows = keys.to(tl.int64)
    ranges_ptr += b * range_stride
    first, last = tl.load(ranges_ptr + tile * 2), tl.load(ranges_ptr + tile * 2 + 1)

    k_ptr += b * k_stride_b * UNIT + kv_head * k_stride_h * UNIT
    v_ptr += b * v_stride_b * UNIT + kv_head * v_stride_h * UNIT
    k1, k2, k3 = _load_pieces(k_ptr, rows, k_stride_s * UNIT, there, P1, P2, P3, D)
    v1, v2, v3 = k1, k2, k3
    if WANTS_DK:
        v1, v2, v3 = _load_pieces(v_ptr, rows, v_stride_s * UNIT, there, V1, V2, V3, DV)
    dk1, dk2, dk3 = _zeros(N if WANTS_DK else 1, P1 if WANTS_DK else 1, P2 if WANTS_DK else 0, P3 if WANTS_DK else 0)
    dv1, dv2, dv3 = _zeros(N if WANTS_DV else 1, V1 if WANTS_DV else 1, V2 if WANTS_DV else 0, V3 if WANTS_DV else 0)
    for g in range(GROUP):
        head = kv_head * GROUP + g
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
        dk_ptr += b * dk_stride_b * UNIT + kv_head * dk_stride_h * UNIT
        _store_pieces(dk_ptr, rows, dk_stride_s * UNIT, there, dk1, dk2, dk3, P1, P2, P3, D)
    if WANTS_DV:
        dv_ptr += b * dv_stride_b * UNIT + kv_head * dv_stride_h * UNIT
        _store_pieces(dv_ptr, rows, dv_stride_s * UNIT, there, dv1, dv2, dv3, V1, V2, V3, DV)


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
        k1, k2, k3 = _load_pieces(k_ptr, rows, k_stride, there, P1, P2, P3, D)
        s = _scores(_dot_transposed(q1, q2, q3, k1, k2, k3, P2, P3, PRECISION), scale, softcap, SOFTCAP)
        p = _weights(s, shift[:, None], factor[:, None], EXACT)
        if MASKED:
            p = tl.where((keys[None, :] >= lo[:, None]) & (keys[None, :] < hi[:, None]), p, 0.0)
        v1, v2, v3 = _load_pieces(v_ptr, rows, v_stride, there, V1, V2, V3, DV)
        dp = _dot_transposed(g1, g2, g3, v1, v2, v3, V2, V3, PRECISION)
        ds = p * (dp - delta[:, None])
        if SOFTCAP:
            ds = ds * _softcap_grad(s, softcap)
        dq1, dq2, dq3 = _accumulate(dq1, dq2, dq3, ds.to(k1.dtype), k1, k2, k3, P2, P3, PRECISION)
    return dq1, dq2, dq3


@triton.jit(do_not_specialize=INTEGERS)
def _dq_kernel(grad_ptr, q_ptr, k_ptr, v_ptr, lo_ptr, hi_ptr, shift_ptr, factor_ptr, delta_ptr, dq_ptr,
               grad_stride_b, grad_stride_h, grad_stride_s, q_stride_b, q_stride_h, q_stride_s,
               k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
               dq_stride_b, dq_stride_h, dq_stride_s, mask_stride, num_tiles, Sq, Skv, scale, softcap,
               H: tl.constexpr, GROUP: tl.constexpr, UNIT: tl.constexpr, SOFTCAP: tl.constexpr, EXACT: tl.constexpr,
               TOGETHER: tl.constexpr, D: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, P3: tl.constexpr,
               DV: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr, V3: tl.constexpr,
               PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr):  # fmt: skip
    tile, pair = _place(tl.program_id(0), num_tiles, tl.num_programs(0) // num_tiles, TOGETHER)
    tile = num_tiles - 1 - tile
    b = (pair // H).to(tl.int64)
    head = (pair % H).to(tl.int64)
    kv_head = head // GROUP
    query = tile * M + tl.arange(0, M)
    there = query < Sq
    rows = query.to(tl.int64)
    lo, hi = _bounds(lo_ptr + b * mask_stride, hi_ptr + b * mask_stride, query, there, Skv)
    first, inner, outer, last = _tile_range(lo, hi, Skv, N)
    q_ptr += b * q_stride_b * UNIT + head * q_stride_h * UNIT
    grad_ptr += b * grad_stride_b * UNIT + head * grad_stride_h * UNIT
    k_ptr += b * k_stride_b * UNIT + kv_head * k_stride_h * UNIT
    v_ptr += b * v_stride_b * UNIT + kv_head * v_stride_h * UNIT
    q1, q2, q3 = _load_pieces(q_ptr, rows, q_stride_s * UNIT, there, P1, P2, P3, D)
    g1, g2, g3 = _load_pieces(grad_ptr, rows, grad_stride_s * UNIT, there, V1, V2, V3, DV)
    row = (b * H + head) * Sq
    alive = there & (hi > lo)
    shift, factor = _load_normaliser(shift_ptr + row, factor_ptr + row, query, alive, EXACT, False)
    delta = tl.load(delta_ptr + row + query, mask=there, other=0.0)
    dq1, dq2, dq3 = _zeros(M, P1, P2, P3)
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
    dq1, dq2, dq3 = _select_rows(alive, dq1, dq2, dq3, P2, P3)
    dq_ptr += b * dq_stride_b * UNIT + head * dq_stride_h * UNIT
    _store_pieces(dq_ptr, rows, dq_stride_s * UNIT, there, dq1, dq2, dq3, P1, P2, P3, D)


# ---- launchers -----------------------------------------------------------------------------------------------------

# Padded head size up to which a row holds; M, N, warps, stages. By bytes of a number, and architecture where another
# row than the first architecture's is better: 80 stands for all without wgmma and tcgen05. Chosen so that no main loop
# spills under Triton 3.6 and 3.9, and shared memory stays below 99 KB on 80 (which is sm_120's, too). A warpgroup's
# wgmma takes 64 rows of the row operand: with 8 warps and 64 rows both compute the same. Those of 90 for heads of 64,
# 80, 128 and 256 are the fastest of a handful on an H100 under Triton 3.6 (CONTRIBUTING); others are guesses.
TILES = {
    ("fwd", 2, 80): [(64, 128, 64, 4, 3), (128, 128, 64, 8, 2), (192, 32, 32, 4, 2), (256, 64, 32, 8, 2),
                     (512, 32, 16, 8, 2)],
    ("fwd", 2, 90): [(64, 128, 64, 4, 3), (80, 64, 64, 4, 3), (128, 128, 64, 8, 3), (256, 128, 64, 8, 2),
                     (512, 32, 16, 8, 2)],
    ("fwd", 2, 100): [(64, 128, 64, 4, 3), (128, 128, 64, 8, 2), (256, 64, 32, 8, 2), (512, 32, 16, 8, 2)],
    ("fwd", 4, 80): [(64, 32, 32, 4, 2), (128, 16, 32, 4, 2)],
    ("dkv", 2, 80): [(64, 32, 64, 4, 2), (112, 16, 64, 4, 2), (128, 32, 64, 8, 2), (256, 32, 32, 8, 1),
                     (320, 16, 32, 8, 1), (512, 16, 16, 8, 1)],
    ("dkv", 2, 90): [(64, 64, 64, 4, 3), (80, 64, 64, 4, 2), (96, 64, 128, 8, 2), (112, 32, 128, 8, 2),
                     (128, 64, 128, 8, 2), (320, 16, 32, 8, 1), (512, 16, 16, 8, 1)],
    ("dkv, cap", 2, 90): [(64, 64, 64, 4, 3), (80, 64, 64, 4, 2), (96, 64, 128, 8, 2), (112, 32, 128, 8, 2),
                          (128, 32, 128, 8, 3), (320, 16, 32, 8, 1), (512, 16, 16, 8, 1)],
    ("dk", 2, 90): [(192, 64, 128, 8, 2), (256, 32, 128, 8, 3)],
    ("dv", 2, 90): [(192, 64, 128, 8, 3), (256, 64, 128, 8, 2)],
    ("dkv", 2, 100): [(64, 64, 64, 8, 2), (96, 32, 64, 8, 2), (112, 16, 64, 8, 1), (128, 32, 64, 4, 1),
                      (256, 32, 32, 8, 1), (320, 16, 32, 8, 1), (512, 16, 16, 8, 1)],
    ("dkv", 4, 80): [(64, 32, 32, 8, 1), (128, 16, 16, 8, 1)],
    ("dq", 2, 80): [(64, 64, 64, 4, 2), (112, 64, 32, 8, 2), (128, 64, 32, 4, 2), (256, 32, 32, 8, 1),
                    (512, 16, 16, 8, 1)],
    ("dq", 2, 90): [(112, 64, 64, 4, 2), (128, 128, 64, 8, 3), (256, 128, 32, 8, 3), (512, 16, 16, 8, 1)],
    ("dq", 4, 80): [(64, 32, 32, 4, 1), (128, 16, 32, 8, 1)],
    ("dq", 4, 100): [(64, 32, 32, 8, 1), (128, 16, 32, 8, 1)],
}  # fmt: skip
if not OLD_TRITON:
    TILES["fwd", 2, 90] = [(256, 128, 32, 8, 2) if row[0] == 256 else row for row in TILES["fwd", 2, 90]]
    TILES["dk", 2, 90] = [(256, 32, 128, 8, 2) if row[0] == 256 else row for row in TILES["dk", 2, 90]]
    TILES["dkv", 2, 90] = [(112, 32, 64, 4, 2) if row[0] == 112 else row for row in TILES["dkv", 2, 90]]
    TILES["dkv", 2, 100] = [(112, 32, 64, 8, 2) if row[0] == 112 else row for row in TILES["dkv", 2, 100]]
if OLD_TRITON:  # it needs more registers for mma.sync
    TILES["dkv", 2, 80] = [(64, 16, 64, 4, 2), *TILES["dkv", 2, 80][1:]]
    TILES["dq", 2, 100] = TILES["dq", 2, 80]
    TILES["fwd", 2, 80] = [(64, 128, 64, 4, 2), *TILES["fwd", 2, 80][1:]]


def _pieces(size: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Up to three powers of two, each at least 16, whose sum is the head size or little more.

    In float32 one: there pieces spill registers, and a power of two does not.
    """
    if dtype == torch.float32:
        return max(16, triton.next_power_of_2(size)), 0, 0
    rest, widths = -(-max(size, 16) // 16) * 16, []
    while rest and len(widths) < 3:
        power = 1 << (rest.bit_length() - 1)
        if len(widths) == 2 and power < rest:
            power *= 2
        widths.append(power)
        rest -= min(power, rest)
    if len(widths) > 1 and widths[-1] == widths[-2]:  # 64 + 32 + 32 is 64 + 64; and that is 128
        widths = [*widths[:-2], 2 * widths[-1]]
    if len(widths) > 1 and widths[-1] == widths[-2]:
        widths = [*widths[:-2], 2 * widths[-1]]
    return tuple(widths + [0] * (3 - len(widths)))  # type: ignore[return-value]


def _blocks(kernel: str, x: Tensor, *head_sizes: int, softcap: bool = False) -> tuple[int, int, int, int]:
    padded, arch, width = max(sum(_pieces(size, x.dtype)) for size in head_sizes), architecture(), x.element_size()
    # a cap's polynomial takes registers, which some tiles do not have
    keys = [(f"{kernel}, cap", width, arch)] * softcap + [(kernel, width, arch), (kernel, width, 80)]
    rows = next(TILES[key] for key in keys if key in TILES)
    return next((row[1:] for row in rows if padded <= row[0]), rows[-1][1:])


def _kernels_of_keys(x: Tensor, *head_sizes: int) -> tuple[str, ...]:
    """The kernels that make the gradients of keys and values: two where both sums have no room in registers."""
    padded = max(sum(_pieces(size, x.dtype)) for size in head_sizes)
    rows = TILES.get(("dk", x.element_size(), architecture()), [])
    return ("dk", "dv") if any(SPLIT_ABOVE < padded <= row[0] for row in rows) else ("dkv",)


def _loads_as_columns(stages: int) -> bool:
    """See `_load_rows`."""
    return stages > 1 if architecture() == 90 else OLD_TRITON


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


def _registers(is_large: bool) -> dict[str, int]:
    """For some tiles ptxas rather spills than has fewer programs on a multiprocessor, unless it is told a limit."""
    return {"maxnreg": 255} if is_large else {}


def _sizes(head_size: int, value_size: int, dtype: torch.dtype) -> dict[str, int]:
    names = ("P1", "P2", "P3", "V1", "V2", "V3")
    values = (*_pieces(head_size, dtype), *_pieces(value_size, dtype))
    return {"D": head_size, "DV": value_size, **dict(zip(names, values, strict=True))}


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
    block_m, block_n, warps, stages = _blocks("fwd", query, size, value_size)
    if softcap:  # the polynomial needs registers too
        warps, block_n = 8, min(block_n, 32 if max(size, value_size) > 128 else 64)
    pack, splits, together, (_, second_piece, third_piece) = 1, 1, HEADS_TOGETHER, _pieces(size, query.dtype)
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
    _fwd_kernel[(splits * num_tiles * batch * (heads // pack),)](
        query, key, value, lo, hi, sinks.contiguous() if has_sinks else query, target, *statistics,
        *_strides(query, unit), *_strides(key, unit), *_strides(value, unit),
        *((s // unit for s in target.stride()[:4]) if splits > 1 else (0, *_strides(target, unit))),
        mask_stride, num_tiles, batch, q_len, kv_len, scale, softcap if softcap else 1.0,
        H=heads, GROUP=group, PACK=pack, SPLITS=splits, UNIT=unit, HAS_SINKS=has_sinks,
        SOFTCAP=bool(softcap), TOGETHER=together, **_sizes(size, value_size, query.dtype),
        PRECISION=_precision(query.dtype), M=block_m, N=block_n, num_warps=warps, num_stages=stages,
        **_registers(query.dtype == torch.float32 or max(size, value_size) > 128 or third_piece > 0),
    )  # fmt: skip
    if splits > 1:
        _combine_kernel[(batch * heads * q_len,)](
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
    _delta_kernel[(triton.cdiv(num_rows, rows),)](
        grad, out, query if grad_lse is None else grad_lse.contiguous(), largest, total, delta, shift, factor,
        *_strides(grad, unit), *_strides(out, unit), num_rows, q_len, H=heads, UNIT=unit, DV=value_size,
        DV_POW2=triton.next_power_of_2(value_size), HAS_GRAD_LSE=grad_lse is not None, EXACT=exact, ROWS=rows,
    )  # fmt: skip
    shared = {"H": heads, "GROUP": group, "UNIT": unit, "SOFTCAP": bool(softcap), "EXACT": exact}
    shared |= {"TOGETHER": HEADS_TOGETHER}
    shared |= {"PRECISION": _precision(query.dtype), **_sizes(size, value_size, query.dtype)}
    shared |= _registers(exact or size > 256 or _pieces(size, query.dtype)[1] > 16)
    inputs = (*_strides(grad, unit), *_strides(query, unit), *_strides(key, unit), *_strides(value, unit))
    softcap = softcap if softcap else 1.0

    for kernel in _kernels_of_keys(query, size, value_size):
        block_m, block_n, warps, stages = _blocks(kernel, query, size, value_size, softcap=shared["SOFTCAP"])
        num_tiles = triton.cdiv(kv_len, block_n)
        ranges = lo.new_empty(lo.shape[0], num_tiles + triton.cdiv(q_len, block_m), 2, dtype=torch.int32)
        range_stride = ranges.stride(0)
        _ranges_kernel[(ranges.shape[1], lo.shape[0])](
            lo, hi, ranges, num_tiles, range_stride, q_len, kv_len, M=block_m, N=block_n, BLOCK=RANGE_BLOCK
        )
        _dkv_kernel[(num_tiles * batch * kv_heads,)](
            grad, query, key, value, lo, hi, ranges, shift, factor, delta, dk, dv, *inputs, *_strides(dk, unit),
            *_strides(dv, unit),
            mask_stride, range_stride if mask_stride else 0, num_tiles, q_len, kv_len, scale, softcap,
            **shared, AS_COLUMN=_loads_as_columns(stages), WANTS_DK="k" in kernel, WANTS_DV="v" in kernel,
            M=block_m, N=block_n, num_warps=warps, num_stages=stages,
        )  # fmt: skip

    block_m, block_n, warps, stages = _blocks("dq", query, size, value_size)
    num_tiles = triton.cdiv(q_len, block_m)
    _dq_kernel[(num_tiles * batch * heads,)](
        grad, query, key, value, lo, hi, shift, factor, delta, dq, *inputs, *_strides(dq, unit),
        mask_stride, num_tiles, q_len, kv_len, scale, softcap,
        **shared, M=block_m, N=block_n, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return dq, dk, dv, delta
