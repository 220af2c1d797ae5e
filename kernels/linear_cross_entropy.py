"""Triton kernels for `linear_cross_entropy`. Contract: mmlm_fast/ops/linear_cross_entropy.py.

Rows that count are moved to the front on the device. Their number is known there alone, so products are launched for
all rows, and tiles behind the last row that counts return at once: work follows the number of rows without the host
waiting for it. Where no row can be ignored the products are cuBLAS's.
Floor: 2·N·H·V flops, and twice that for the gradients, over the rows that count; a chunk of logits read twice and
written twice.

Legend: N rows, of which `count` count, H hidden size, V vocabulary; C = A B with sizes M, N, K.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmlm_kernels.launch import ceil_div, kernel, next_power_of_2
from mmlm_kernels.tiles import MAX_REGISTERS, TILES_FLOAT32, precision, product_tiles

BLOCK_V = 4096  # logits of one step along a row
GROUP_M = 8  # row tiles that share their tiles of B in L2
MIN_CHUNK_BYTES = 512 * 2**20  # of logits: smaller products would not fill a GPU
ROWS, DEPTH = 1, 2  # what of a product the count bounds


@kernel(do_not_specialize=["first", "M", "K"])
def _matmul_kernel(a_ptr, b_ptr, bias_ptr, c_ptr, count_ptr, first, M, N, K, stride_am, stride_ak, stride_bk, stride_bn,
                   stride_cm, UNIT_M: tl.constexpr, UNIT_K: tl.constexpr, BOUNDED: tl.constexpr,
                   HAS_BIAS: tl.constexpr, ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr, GROUP: tl.constexpr,
                   IN_STEPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                   BLOCK_K: tl.constexpr):  # fmt: skip
    """C = A B + bias, or C += A B. Of this chunk count - first rows count. BOUNDED 1: rows of A; 2: of B, K of them.

    IN_STEPS: each step's BLOCK_K terms are summed by themselves, which rounds the long sum K / BLOCK_K times, not K.
    M and K are in units that are 16 where a mask along the dense dimension of A needs to be known for wide loads.
    """
    M, K = M * UNIT_M, K * UNIT_K
    limit = tl.load(count_ptr) - first
    num_m, num_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    per_group = GROUP * num_n
    first_m = pid // per_group * GROUP
    size = tl.minimum(num_m - first_m, GROUP)
    tile_m, tile_n = first_m + pid % per_group % size, pid % per_group // size
    if BOUNDED == 1:
        M = tl.minimum(M, limit)
        if tile_m * BLOCK_M >= M:
            return
    else:
        K = tl.minimum(K, limit)
        if ACCUMULATE and K <= 0:
            return
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, column_mask = rows < M, columns < N
    ks = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + rows[:, None].to(tl.int64) * stride_am + ks[None, :].to(tl.int64) * stride_ak
    b_ptrs = b_ptr + ks[:, None].to(tl.int64) * stride_bk + columns[None, :].to(tl.int64) * stride_bn
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    ones = tl.full((BLOCK_M, BLOCK_N), 1.0, tl.float32)
    for k in range(0, K, BLOCK_K):
        inside = k + ks < K
        a = tl.load(a_ptrs, mask=row_mask[:, None] & inside[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=inside[:, None] & column_mask[None, :], other=0.0)
        if IN_STEPS:
            acc = tl.fma(tl.dot(a, b, input_precision=PRECISION), ones, acc)  # a + would be drawn into the product
        else:
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
        a_ptrs += BLOCK_K * stride_ak
        b_ptrs += BLOCK_K * stride_bk
    if HAS_BIAS:
        acc += tl.load(bias_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    c_ptrs = c_ptr + rows[:, None].to(tl.int64) * stride_cm + columns[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    if ACCUMULATE:
        acc += tl.load(c_ptrs, mask=mask, other=0.0)
    tl.store(c_ptrs, acc.to(c_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _logit(z, scale, softcap, SOFTCAP: tl.constexpr):
    if SOFTCAP:
        u = 2 * scale * z / softcap
        e = tl.exp(-tl.abs(u))  # tanh(u / 2) = ±(1 - e) / (1 + e)
        z = softcap * tl.where(u < 0, -1.0, 1.0) * (1 - e) / (1 + e)
    else:
        z = scale * z
    return z


@kernel(do_not_specialize=["first"])
def _loss_kernel(logits_ptr, target_ptr, row_factor_ptr, factor_ptr, loss_ptr, count_ptr, first, V, stride, scale,
                 softcap, smoothing, z_loss, HAS_ROW_FACTOR: tl.constexpr, HAS_FACTOR: tl.constexpr,
                 GRADIENTS: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Loss of each row of a chunk, and its logits' gradients in their place; zeros behind the rows that count.

    Gradients are multiplied by a factor of each row, and by one of all, where there are such.
    """
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * stride
    if row >= tl.load(count_ptr) - first:
        tl.store(loss_ptr + row, 0.0)
        if GRADIENTS:
            for begin in range(0, V, BLOCK):
                columns = begin + tl.arange(0, BLOCK)
                zeros = tl.zeros((BLOCK,), logits_ptr.dtype.element_ty)
                tl.store(logits_ptr + columns, zeros, mask=columns < V)
        return
    target = tl.load(target_ptr + row)
    hit = _logit(tl.load(logits_ptr + target).to(tl.float32), scale, softcap, SOFTCAP)
    top = tl.full((BLOCK,), -float("inf"), tl.float32)
    total, plain = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, V, BLOCK):
        columns = begin + tl.arange(0, BLOCK)
        mask = columns < V
        z = _logit(tl.load(logits_ptr + columns, mask=mask, other=0.0).to(tl.float32), scale, softcap, SOFTCAP)
        plain += tl.where(mask, z, 0.0)
        z = tl.where(mask, z, -float("inf"))
        new = tl.maximum(top, z)
        shift = tl.where(new == -float("inf"), 0.0, new)
        total = total * tl.exp(top - shift) + tl.exp(z - shift)
        top = new
    largest = tl.max(top, axis=0)
    shift = tl.where(largest == -float("inf"), 0.0, largest)
    sum_exp = tl.sum(total * tl.exp(top - shift), axis=0)
    log_sum = tl.log(sum_exp)
    lse = shift + log_sum
    loss = (1 - smoothing) * ((shift - hit) + log_sum) + z_loss * lse * lse
    loss += tl.where(smoothing > 0, smoothing * (lse - tl.sum(plain, axis=0) / V), 0.0)  # of -inf there is no mean
    tl.store(loss_ptr + row, loss)
    if GRADIENTS:
        factor = scale
        if HAS_ROW_FACTOR:
            factor *= tl.load(row_factor_ptr + row)
        if HAS_FACTOR:
            factor *= tl.load(factor_ptr)
        softmax = factor * (1 + 2 * z_loss * lse) / sum_exp
        uniform = factor * smoothing / V
        for begin in range(0, V, BLOCK):
            columns = begin + tl.arange(0, BLOCK)
            mask = columns < V
            z = _logit(tl.load(logits_ptr + columns, mask=mask, other=0.0).to(tl.float32), scale, softcap, SOFTCAP)
            g = softmax * tl.exp(z - shift) - uniform
            g -= tl.where(columns == target, factor * (1 - smoothing), 0.0)
            if SOFTCAP:
                g *= 1 - (z / softcap) * (z / softcap)
            tl.store(logits_ptr + columns, g.to(logits_ptr.dtype.element_ty), mask=mask)


def _product(
    a: Tensor, b: Tensor, out: Tensor, bounds: tuple, bounded: int, bias: Tensor | None = None, accumulate: bool = False
) -> None:
    """out = a·b (+ bias), or out += a·b; bounds: device count of what is `bounded`, and its first, or None: all."""
    count, first = bounds
    if count is None:
        if accumulate and a.dtype != out.dtype and out.is_cuda:  # no half-precision product is written and read again
            torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, out=out)
        elif accumulate:
            out.addmm_(a, b) if a.dtype == out.dtype else out.add_(a @ b)
        elif a.dtype != out.dtype:
            out.copy_(a @ b)
        elif bias is None:
            torch.mm(a, b, out=out)
        else:
            torch.addmm(bias, a, b, out=out)
        return
    (rows, depth), columns = a.shape, b.shape[1]
    tiles = product_tiles(a.dtype, is_plain=not accumulate)
    unit_m, unit_k = (16 if a.stride(i) == 1 and a.shape[i] % 16 == 0 else 1 for i in range(2))
    grid = (ceil_div(rows, tiles["BLOCK_M"]) * ceil_div(columns, tiles["BLOCK_N"]),)
    _matmul_kernel[grid](
        a, b, out if bias is None else bias, out, count, first, rows // unit_m, columns, depth // unit_k, *a.stride(),
        *b.stride(), out.stride(0), UNIT_M=unit_m, UNIT_K=unit_k, BOUNDED=bounded, HAS_BIAS=bias is not None,
        ACCUMULATE=accumulate, PRECISION=precision(), GROUP=GROUP_M, IN_STEPS=tiles is TILES_FLOAT32, **tiles,
    )  # fmt: skip


def _rows_of_chunk(x: Tensor, vocab: int, is_summed: bool, budget: int) -> int:
    """Rows of a chunk within `budget` bytes of logits; 0: whatever makes the whole call take the least memory.

    Several chunks need a sum of the weight's gradients in float32, beside the gradient that is given back in bfloat16.
    Where the logits of all rows are no more than that, they are one chunk, whose gradient needs no sum. Else a chunk is
    at least half of the sum, which each chunk reads and writes.
    """
    num_rows, size = x.shape
    if not budget:
        summed = 4 * vocab * size if is_summed else 0
        beside = summed if x.dtype == torch.bfloat16 else 0
        if num_rows * vocab * x.element_size() <= beside + MIN_CHUNK_BYTES:
            return max(num_rows, 1)
        budget = max(MIN_CHUNK_BYTES, summed // 2)
    most = max(16, budget // (x.element_size() * vocab) // 128 * 128)
    chunks = ceil_div(num_rows, most)
    return max(1, min(most, ceil_div(ceil_div(num_rows, chunks), 16) * 16))


def linear_cross_entropy_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignored: Tensor | None, row_factor: Tensor | None,
    factor: Tensor, numbers: list[float], needed: list[bool], budget: int,
) -> list[Tensor]:  # fmt: skip
    """Losses [N] in the order of x, and gradients of x, weight and bias, empty where not needed."""
    num_rows, vocab = x.shape[0], weight.shape[0]
    device, formed = x.device, torch.float32 if x.dtype == torch.float16 else x.dtype
    order, count = _order(ignored)
    step = _rows_of_chunk(x, vocab, needed[1], budget)
    is_sum = step < num_rows
    losses = torch.zeros(num_rows, dtype=torch.float32, device=device)
    dx = torch.zeros(x.shape if needed[0] else (0,), dtype=formed, device=device)
    make = torch.zeros if is_sum else torch.empty
    dweight = make(weight.shape if needed[1] else (0,), dtype=torch.float32 if is_sum else formed, device=device)
    dbias = torch.zeros(vocab if needed[2] else 0, dtype=torch.float32, device=device)
    buffer = torch.empty(min(step, num_rows), vocab, dtype=x.dtype, device=device)
    all_rows = torch.full((), num_rows, dtype=torch.int64, device=device) if count is None else count
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    scale, softcap, smoothing, z_loss = numbers
    # float16 would lose gradients divided by thousands of rows; its are multiplied by the factor in float32, afterwards
    after = formed != x.dtype
    for first in range(0, num_rows, step):
        where = None if order is None else order[first : first + step]
        part = slice(first, first + step)
        rows = x[part].contiguous() if where is None else x.index_select(0, where)
        y = target[part] if where is None else target.index_select(0, where)
        logits = buffer[: rows.shape[0]]
        bounds = (count, first)
        _product(rows, weight.T, logits, bounds, ROWS, bias)
        loss = torch.empty(rows.shape[0], dtype=torch.float32, device=device)
        row_factors = None
        if row_factor is not None:
            row_factors = row_factor[part] if where is None else row_factor.index_select(0, where)
        _loss_kernel[(rows.shape[0],)](
            logits, y, loss if row_factors is None else row_factors, factor, loss, all_rows, first, vocab,
            logits.stride(0), scale, softcap, smoothing, z_loss, HAS_ROW_FACTOR=row_factors is not None,
            HAS_FACTOR=not after, GRADIENTS=any(needed), SOFTCAP=softcap != 0,
            BLOCK=min(BLOCK_V, next_power_of_2(vocab)), num_warps=8, maxnreg=MAX_REGISTERS,
        )  # fmt: skip
        _put(losses, where, part, loss)
        if needed[0]:
            dx_rows = torch.zeros(rows.shape, dtype=x.dtype, device=device)
            _product(logits, weight, dx_rows, bounds, ROWS)
            _put(dx, where, part, (dx_rows * factor).to(formed) if after else dx_rows)
        if needed[1]:
            _product(logits.T, rows, dweight, bounds, DEPTH, accumulate=is_sum)
        if needed[2]:
            dbias += logits.sum(0, dtype=torch.float32)
    dweight, dbias = (g.mul_(factor) if after else g for g in (dweight, dbias))
    return [losses, dx, dweight.to(formed), dbias.to(formed)]


def _order(ignored: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Rows that count, in order, then the others, and the number of the first: without the host knowing it."""
    if ignored is None:
        return None, None
    kept = ~ignored
    count = kept.sum()
    place = torch.where(kept, kept.cumsum(0) - 1, count + ignored.cumsum(0) - 1)
    order = torch.empty_like(place).scatter_(0, place, torch.arange(len(place), device=place.device))
    return order, count


def _put(out: Tensor, where: Tensor | None, part: slice, values: Tensor) -> None:
    if where is None:
        out[part] = values
    else:
        out.index_copy_(0, where, values)
