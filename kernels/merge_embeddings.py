"""Triton kernels for `merge_embeddings`: rows of a table or of features. Contract: mmlm_fast/ops/merge_embeddings.py.

Memory-bound. Floor: each output row written once, from one row read (two where features are added).

Legend: T tokens, H hidden size, K modalities.
"""

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
MODES = {"embed": 0, "replace": 1, "add": 2}


@triton.jit
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


@triton.jit
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


def _firsts(sizes: list[int]) -> tuple[int, ...]:
    """Where each modality's rows begin, and the last end: f as 2·f + 1, shifted by one row so that none is 1.

    Triton compiles anew for an integer in a tuple that becomes 1 or a multiple of 16, whatever the decorator says; odd
    numbers above 1 are neither. The shift is taken back with the row of `source`.
    """
    firsts = [1]
    for size in sizes:
        firsts.append(firsts[-1] + size)
    return tuple(2 * first + 1 for first in firsts)


def merge_embeddings_fwd(source: Tensor, base: Tensor, features: list[Tensor], mode: str, scale: float) -> Tensor:
    base = base if base.stride(-1) == 1 else base.contiguous()
    flat = [f.reshape(-1, base.shape[1]).contiguous() if f.numel() else base for f in features]
    sizes = [f.numel() // base.shape[1] for f in features]
    out = base.new_empty(source.shape[0], base.shape[1])
    if out.numel():
        _fwd_kernel[(out.shape[0], triton.cdiv(out.shape[1], BLOCK))](
            source, base, tuple(flat), _firsts(sizes), out, out.shape[1], base.stride(0), scale, MODE=MODES[mode],
            K=len(flat), BLOCK=BLOCK,
        )  # fmt: skip
    return out


def merge_embeddings_bwd(grad: Tensor, source: Tensor, sizes: list[int]) -> list[Tensor]:
    grad = grad.contiguous()
    gradients = [grad.new_empty(size, grad.shape[1]) for size in sizes]
    if grad.numel() and sizes:
        _bwd_kernel[(grad.shape[0], triton.cdiv(grad.shape[1], BLOCK))](
            grad, source, tuple(g if g.numel() else grad for g in gradients), _firsts(sizes), grad.shape[1],
            K=len(sizes), BLOCK=BLOCK,
        )  # fmt: skip
    return gradients
