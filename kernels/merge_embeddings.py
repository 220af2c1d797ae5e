"""Triton kernels for `merge_embeddings`: rows of a table or of features. Contract: mmlm_fast/ops/merge_embeddings.py.

Memory-bound. Floor: each output row written once, from one row read (two where features are added).

Legend: T tokens, H hidden size, K modalities.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmlm_kernels.launch import ceil_div, kernel

BLOCK = 1024
TOKENS = 1024  # of a program that looks for placeholders
MODES = {"embed": 0, "replace": 1, "add": 2}


@kernel()
def _fwd_kernel(source_ptr, base_ptr, features, firsts, out_ptr, H, stride_base, scale, MODE: tl.constexpr,
                K: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < H
    source = tl.load(source_ptr + token)
    is_text = source >= 0
    base_row = tl.where(is_text, source, 0) if MODE == 0 else token
    base_mask = mask
    if MODE != 2:
        base_mask = columns < tl.where(is_text, H, 0)
    x = tl.load(base_ptr + base_row * stride_base + columns, mask=base_mask, other=0.0).to(tl.float32) * scale
    for m in tl.static_range(K):
        row = -source - (firsts[m] >> 1)
        inside = (row >= 0) & (-source < (firsts[m + 1] >> 1))
        inside = columns < tl.where(inside, H, 0)
        x += tl.load(features[m] + row * H + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * H + columns, x.to(out_ptr.dtype.element_ty), mask=mask)


@kernel()
def _bwd_kernel(grad_ptr, source_ptr, gradients, firsts, H, K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(source_ptr + token)
    mask = columns < tl.where(source < 0, H, 0)
    g = tl.load(grad_ptr + token * H + columns, mask=mask, other=0.0)
    for m in tl.static_range(K):
        row = -source - (firsts[m] >> 1)
        inside = (row >= 0) & (-source < (firsts[m + 1] >> 1))
        tl.store(gradients[m] + row * H + columns, g, mask=columns < tl.where(inside, H, 0))


@triton.jit
def _bad(ids, is_text, there, num_ids):
    """Text that is no row of the table."""
    return there & is_text & ((ids < 0) | (ids >= num_ids)) & (num_ids >= 0)


@kernel(do_not_specialize=["num_ids", "N", "num_blocks"])
def _count_kernel(ids_ptr, tokens, counts_ptr, num_ids, N, num_blocks, K: tl.constexpr, BLOCK: tl.constexpr):
    """Placeholders of each modality in a block of tokens, and in row K ids that are no row of the table."""
    block = tl.program_id(0)
    places = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = places < N
    ids = tl.load(ids_ptr + places, mask=there, other=0).to(tl.int64)
    is_text = there
    for m in tl.static_range(K):
        here = there & (ids == (tokens[m] >> 1))
        is_text = is_text & (ids != (tokens[m] >> 1))
        tl.store(counts_ptr + m * num_blocks + block, tl.sum(here.to(tl.int32), 0))
    tl.store(counts_ptr + K * num_blocks + block, tl.sum(_bad(ids, is_text, there, num_ids).to(tl.int32), 0))


@triton.jit
def _before(counts_ptr, block, BLOCK: tl.constexpr):
    """Sum of the counts of earlier blocks."""
    total = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, block, BLOCK):
        places = start + tl.arange(0, BLOCK)
        total += tl.load(counts_ptr + places, mask=places < block, other=0)
    return tl.sum(total, 0)


@kernel(do_not_specialize=["num_ids", "N", "num_blocks"])
def _sources_kernel(ids_ptr, tokens, firsts, counts_ptr, source_ptr, wrong_ptr, num_ids, N, num_blocks,
                    K: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    block = tl.program_id(0)
    places = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = places < N
    ids = tl.load(ids_ptr + places, mask=there, other=0).to(tl.int64)
    is_text = there
    source = tl.zeros((BLOCK,), tl.int64)
    last = block == num_blocks - 1
    for m in tl.static_range(K):
        here = there & (ids == (tokens[m] >> 1))
        is_text = is_text & (ids != (tokens[m] >> 1))
        rank = _before(counts_ptr + m * num_blocks, block, BLOCK) + tl.cumsum(here.to(tl.int32), 0)
        first, count = firsts[m] >> 1, (firsts[m + 1] >> 1) - (firsts[m] >> 1)
        # Never out of range, also where the counts differ and the assertion has not come yet.
        row = tl.minimum(tl.maximum(rank, 1), tl.maximum(count, 1))
        source = tl.where(here, 1 - first - row.to(tl.int64), source)
        total = tl.max(rank, 0)
        tl.store(wrong_ptr + m, (total - count).to(tl.int64), mask=last)
    bad = _bad(ids, is_text, there, num_ids)
    source = tl.where(is_text & (num_ids >= 0) & (bad == 0), ids, source)
    tl.store(source_ptr + places, source, mask=there)
    total_bad = _before(counts_ptr + K * num_blocks, block, BLOCK) + tl.sum(bad.to(tl.int32), 0)
    tl.store(wrong_ptr + K, total_bad.to(tl.int64), mask=last)


def _odd(tokens: list[int]) -> tuple[int, ...]:
    """As in `_firsts`: t as 2·t + 1."""
    return tuple(2 * token + 1 for token in tokens)


def _firsts(sizes: list[int]) -> tuple[int, ...]:
    """Where each modality's rows begin, and the last end: f as 2·f + 1, shifted by one row so that none is 1.

    Triton compiles anew for an integer in a tuple that becomes 1 or a multiple of 16, whatever the decorator says; odd
    numbers above 1 are neither. The shift is taken back with the row of `source`.
    """
    firsts = [1]
    for size in sizes:
        firsts.append(firsts[-1] + size)
    return tuple(2 * first + 1 for first in firsts)


def merge_embeddings_sources(ids: Tensor, tokens: list[int], counts: list[int], num_ids: int) -> tuple[Tensor, Tensor]:
    ids, size = ids.contiguous(), ids.numel()
    source, wrong = ids.new_empty(size, dtype=torch.int64), ids.new_empty(len(tokens) + 1, dtype=torch.int64)
    if not size:
        return source, wrong.copy_(torch.tensor([*(-count for count in counts), 0]))
    num_blocks = ceil_div(size, TOKENS)
    found = ids.new_empty(len(tokens) + 1, num_blocks, dtype=torch.int32)
    shared = dict(K=len(tokens), BLOCK=TOKENS)
    _count_kernel[(num_blocks,)](ids, _odd(tokens), found, num_ids, size, num_blocks, **shared)
    _sources_kernel[(num_blocks,)](
        ids, _odd(tokens), _firsts(counts), found, source, wrong, num_ids, size, num_blocks, **shared
    )
    return source, wrong


def merge_embeddings_fwd(source: Tensor, base: Tensor, features: list[Tensor], mode: str, scale: float) -> Tensor:
    base = base if base.stride(-1) == 1 else base.contiguous()
    flat = [f.reshape(-1, base.shape[1]).contiguous() if f.numel() else base for f in features]
    sizes = [f.numel() // base.shape[1] for f in features]
    out = base.new_empty(source.shape[0], base.shape[1])
    if out.numel():
        _fwd_kernel[(out.shape[0], ceil_div(out.shape[1], BLOCK))](
            source, base, tuple(flat), _firsts(sizes), out, out.shape[1], base.stride(0), scale, MODE=MODES[mode],
            K=len(flat), BLOCK=BLOCK,
        )  # fmt: skip
    return out


def merge_embeddings_bwd(grad: Tensor, source: Tensor, sizes: list[int]) -> list[Tensor]:
    grad = grad.contiguous()
    gradients = [grad.new_empty(size, grad.shape[1]) for size in sizes]
    if grad.numel() and sizes:
        _bwd_kernel[(grad.shape[0], ceil_div(grad.shape[1], BLOCK))](
            grad, source, tuple(g if g.numel() else grad for g in gradients), _firsts(sizes), grad.shape[1],
            K=len(sizes), BLOCK=BLOCK,
        )  # fmt: skip
    return gradients
