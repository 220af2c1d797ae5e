"""Triton kernels for `gated_add`: residual + tanh(gate)·x. Contract: mmlm_fast/ops/gated_add.py.

Memory-bound. Floor: two tensors read, one written, forward and backward. The gradient of the gate in two stages.

Legend: R rows, H hidden size.
"""

import torch
import triton.language as tl
from torch import Tensor

from mmlm_kernels.launch import ceil_div, kernel

BLOCK = 1024
MAX_SPLITS = 128  # of the rows in the gradient of the gate


@kernel()
def _fwd_kernel(x_ptr, residual_ptr, t_ptr, keep_ptr, out_ptr, H, HAS_KEEP: tl.constexpr,
                BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < H
    kept = mask
    if HAS_KEEP:
        kept = columns < tl.where(tl.load(keep_ptr + row) != 0, H, 0)
    t = tl.load(t_ptr + columns, mask=mask, other=0.0)
    x = tl.load(x_ptr + row * H + columns, mask=kept, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + row * H + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * H + columns, (residual + t * x).to(out_ptr.dtype.element_ty), mask=mask)


@kernel(do_not_specialize=["R", "rows_per_program"])
def _bwd_kernel(grad_ptr, x_ptr, t_ptr, keep_ptr, dx_ptr, sums_ptr, R, H, rows_per_program,
                HAS_KEEP: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < H
    t = tl.load(t_ptr + columns, mask=mask, other=0.0)
    sums = tl.zeros((BLOCK,), tl.float32)
    for row in range(program * rows_per_program, tl.minimum((program + 1) * rows_per_program, R)):
        kept = mask
        if HAS_KEEP:
            kept = columns < tl.where(tl.load(keep_ptr + row) != 0, H, 0)
        grad = tl.load(grad_ptr + row * H + columns, mask=kept, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row * H + columns, mask=kept, other=0.0).to(tl.float32)
        sums += grad * x
        tl.store(dx_ptr + row * H + columns, (grad * t).to(dx_ptr.dtype.element_ty), mask=mask)
    tl.store(sums_ptr + program * H + columns, sums, mask=mask)


def _arguments(x: Tensor, gate: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    t = gate.float().tanh().expand(x.shape[-1]).contiguous()
    return t, t if keep is None else keep.contiguous().view(torch.uint8)


def gated_add_fwd(x: Tensor, residual: Tensor, gate: Tensor, keep: Tensor | None) -> Tensor:
    x, residual = x.contiguous(), residual.contiguous()
    out, size = torch.empty_like(x), x.shape[-1]
    t, there = _arguments(x, gate, keep)
    if x.numel():
        _fwd_kernel[(x.numel() // size, ceil_div(size, BLOCK))](
            x, residual, t, there, out, size, HAS_KEEP=keep is not None, BLOCK=BLOCK
        )
    return out


def gated_add_bwd(grad: Tensor, x: Tensor, gate: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    grad, x = grad.contiguous(), x.contiguous()
    dx, size = torch.empty_like(x), x.shape[-1]
    t, there = _arguments(x, gate, keep)
    rows = x.numel() // size
    rows_per_program = max(1, ceil_div(rows, MAX_SPLITS))
    programs = ceil_div(rows, rows_per_program)
    sums = x.new_empty(programs, size, dtype=torch.float32)
    if rows:
        _bwd_kernel[(programs, ceil_div(size, BLOCK))](
            grad, x, t, there, dx, sums, rows, size, rows_per_program, HAS_KEEP=keep is not None, BLOCK=BLOCK
        )
    total = sums.sum(0)
    slope = 1 - gate.float().tanh().square()
    dgate = (total.sum() if gate.numel() == 1 else total) * slope
    return dx, dgate.reshape(gate.shape).to(gate.dtype)
