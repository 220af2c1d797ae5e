"""What the kernels of `interval_attention` share: pieces of a head, scores, places of programs, tiles' ranges.

A head size that is no power of two is cut into up to three pieces that are (72 = 64 + 16, 104 = 64 + 32 + 16), each a
tile of its own: P1, P2, P3 are their widths, 0 where there is none.

Legend: B batch, H query heads, S queries or keys, D head size of queries and keys, DV of values, M block of queries,
N block of keys, R rows of a program: queries, or queries of several heads that share their keys.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# No integer is specialised: lengths and strides change with every batch and every token, and UNIT says what they are
# multiples of (tests/test_kernel_variants.py).
INTEGERS = [f"{name}_stride_{axis}" for name in ("q", "k", "v", "grad", "out", "dq", "dk", "dv") for axis in "bhs"]
INTEGERS += ["out_stride_split", "dk_stride_part", "dv_stride_part", "mask_stride", "range_stride"]
INTEGERS += ["num_tiles", "num_rows", "B", "Sq", "Skv"]


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
def load_pieces(ptr, rows, stride, mask, P1: tl.constexpr, P2: tl.constexpr, P3: tl.constexpr, D: tl.constexpr):
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
def store_pieces(ptr, rows, stride, mask, x1, x2, x3,
                 P1: tl.constexpr, P2: tl.constexpr, P3: tl.constexpr, D: tl.constexpr):  # fmt: skip
    _store(ptr, rows, stride, mask, x1, 0, P1, D)
    if P2 > 0:
        _store(ptr, rows, stride, mask, x2, P1, P2, D)
    if P3 > 0:
        _store(ptr, rows, stride, mask, x3, P1 + P2, P3, D)


@triton.jit
def select_rows(alive, x1, x2, x3, P2: tl.constexpr, P3: tl.constexpr):
    """Zeros in rows that see no key: what a loop left there, which did not mask them, may be infinite or NaN."""
    x1 = tl.where(alive[:, None], x1, 0.0)
    if P2 > 0:
        x2 = tl.where(alive[:, None], x2, 0.0)
    if P3 > 0:
        x3 = tl.where(alive[:, None], x3, 0.0)
    return x1, x2, x3


@triton.jit
def zeros(ROWS: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, P3: tl.constexpr):
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
def dot_transposed(a1, a2, a3, b1, b2, b3, P2: tl.constexpr, P3: tl.constexpr, PRECISION: tl.constexpr):
    """a·bᵀ over the pieces."""
    out = tl.dot(a1, tl.trans(b1), input_precision=PRECISION)
    if P2 > 0:
        out = tl.dot(a2, tl.trans(b2), out, input_precision=PRECISION)
    if P3 > 0:
        out = tl.dot(a3, tl.trans(b3), out, input_precision=PRECISION)
    return out


@triton.jit
def accumulate(acc1, acc2, acc3, a, b1, b2, b3, P2: tl.constexpr, P3: tl.constexpr, PRECISION: tl.constexpr):
    """acc += a·b for each piece of b."""
    acc1 = tl.dot(a, b1, acc1, input_precision=PRECISION)
    if P2 > 0:
        acc2 = tl.dot(a, b2, acc2, input_precision=PRECISION)
    if P3 > 0:
        acc3 = tl.dot(a, b3, acc3, input_precision=PRECISION)
    return acc1, acc2, acc3


@triton.jit
def scores(product, scale, softcap, SOFTCAP: tl.constexpr):
    """Scores in units of log 2."""
    if SOFTCAP:
        return _tanh(product * (scale / softcap)) * (softcap * LOG2E)
    else:
        return product * (scale * LOG2E)


@triton.jit
def place(pid, num_tiles, num_heads, TOGETHER: tl.constexpr):
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
def bounds(lo_ptr, hi_ptr, index, mask, Skv):
    """The rows' intervals, cut to the keys there are; rows that do not exist see none."""
    lo = tl.maximum(tl.load(lo_ptr + index, mask=mask, other=0), 0)
    hi = tl.minimum(tl.load(hi_ptr + index, mask=mask, other=0), Skv)
    return lo, hi


@triton.jit
def tile_range(lo, hi, Skv, BLOCK: tl.constexpr):
    """Keys a tile of rows needs: masked [first, inner), unmasked [inner, outer), masked [outer, last)."""
    alive = hi > lo
    first = tl.min(tl.where(alive, lo, Skv), axis=0)
    last = tl.max(tl.where(alive, hi, 0), axis=0)
    last = tl.maximum(first, last)
    inner = first + (tl.max(tl.where(alive, lo, 0), axis=0) - first + BLOCK - 1) // BLOCK * BLOCK
    inner = tl.minimum(tl.maximum(inner, first), last)
    outer = inner + tl.maximum(tl.min(tl.where(alive, hi, Skv), axis=0) - inner, 0) // BLOCK * BLOCK
    return first, inner, outer, last
