"""Triton kernels for `blend`: (1 − t)·x + t·y. Contract: mmlm_fast/ops/blend.py.

Floor: two tensors read and one written, and the other way round.
"""

import torch
import triton.language as tl
from torch import Tensor

from mmlm_kernels.launch import ceil_div, kernel

BLOCK = 1024


@kernel(do_not_specialize=["t"])
def _fwd_kernel(x_ptr, y_ptr, out_ptr, N, t, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < N, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + i, mask=i < N, other=0.0).to(tl.float32)
    tl.store(out_ptr + i, ((1 - t) * x + t * y).to(out_ptr.dtype.element_ty), mask=i < N)


@kernel(do_not_specialize=["t"])
def _bwd_kernel(grad_ptr, dx_ptr, dy_ptr, N, t, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    grad = tl.load(grad_ptr + i, mask=i < N, other=0.0).to(tl.float32)
    tl.store(dx_ptr + i, ((1 - t) * grad).to(dx_ptr.dtype.element_ty), mask=i < N)
    tl.store(dy_ptr + i, (t * grad).to(dy_ptr.dtype.element_ty), mask=i < N)


def blend_fwd(x: Tensor, y: Tensor, t: float) -> Tensor:
    x, y = x.contiguous(), y.contiguous()
    out = torch.empty_like(x)
    if x.numel():
        _fwd_kernel[(ceil_div(x.numel(), BLOCK),)](x, y, out, x.numel(), t, BLOCK=BLOCK)
    return out


def blend_bwd(grad: Tensor, t: float) -> tuple[Tensor, Tensor]:
    grad = grad.contiguous()
    dx, dy = torch.empty_like(grad), torch.empty_like(grad)
    if grad.numel():
        _bwd_kernel[(ceil_div(grad.numel(), BLOCK),)](grad, dx, dy, grad.numel(), t, BLOCK=BLOCK)
    return dx, dy
