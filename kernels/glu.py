"""Triton kernels for `glu` and `bias_act`: act(gate + bias)·up. Contract: mmlm_fast/ops/glu.py.

Memory-bound. Floor: gate and up read, the product written; backward reads the gradient too and writes two. The
activation is computed again in the backward pass. Rows have strides, so packed halves are read as they lie.

Legend: R rows, H hidden size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmlm_kernels.launch import ceil_div, kernel

ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "quick_gelu": 3, "relu": 4}
BLOCK = 1024
MAX_SPLITS = 128  # of the rows in the gradient of the bias


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    """The activation and its slope."""
    if ACTIVATION == 4:
        y = tl.where(x > 0, x, tl.where(x == x, 0.0, x))  # NaN stays
        slope = tl.where(x > 0, 1.0, 0.0)
    elif ACTIVATION == 1:
        phi = 0.5 * (1 + tl.math.erf(x * 0.7071067811865476))
        y = x * phi
        slope = phi + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:  # x·σ(u)
        u = x
        du = x * 0.0 + 1.0
        if ACTIVATION == 2:  # (1 + tanh z)/2 = σ(2z)
            square = tl.minimum(x * x, 1e6)  # u is beyond ±88 by then, and finite numbers stay finite
            u = 1.5957691216057308 * x * (1 + 0.044715 * square)
            du = 1.5957691216057308 * (1 + 0.134145 * square)
        elif ACTIVATION == 3:
            u = 1.702 * x
            du = x * 0.0 + 1.702
        s = tl.sigmoid(u)
        y = x * s
        slope = s + y * tl.sigmoid(-u) * du  # 1 − s would have the rounding error of 1
    return y, slope


@kernel()
def _fwd_kernel(gate_ptr, up_ptr, bias_ptr, out_ptr, H, stride_gate, stride_up, ACTIVATION: tl.constexpr,
                HAS_UP: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < H
    x = tl.load(gate_ptr + row * stride_gate + columns, mask=mask, other=0.0).to(tl.float32)
    if HAS_UP:  # loads first: both are under way at once
        up = tl.load(up_ptr + row * stride_up + columns, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    y, _ = _activate(x, ACTIVATION)
    if HAS_UP:
        y *= up
    tl.store(out_ptr + row * H + columns, y.to(out_ptr.dtype.element_ty), mask=mask)


@kernel(do_not_specialize=["R", "rows_per_program"])
def _bwd_kernel(grad_ptr, gate_ptr, up_ptr, bias_ptr, dgate_ptr, dup_ptr, dbias_ptr, R, H, stride_gate, stride_up,
                stride_dgate, stride_dup, rows_per_program, ACTIVATION: tl.constexpr, HAS_UP: tl.constexpr,
                HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < H
    dbias = tl.zeros((BLOCK,), tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    for row in range(program * rows_per_program, tl.minimum((program + 1) * rows_per_program, R)):
        x = tl.load(gate_ptr + row * stride_gate + columns, mask=mask, other=0.0).to(tl.float32)
        d = tl.load(grad_ptr + row * H + columns, mask=mask, other=0.0).to(tl.float32)
        if HAS_UP:
            up = tl.load(up_ptr + row * stride_up + columns, mask=mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            x += bias
        y, slope = _activate(x, ACTIVATION)
        if HAS_UP:
            tl.store(dup_ptr + row * stride_dup + columns, (d * y).to(dup_ptr.dtype.element_ty), mask=mask)
            d *= up
        d *= slope
        tl.store(dgate_ptr + row * stride_dgate + columns, d.to(dgate_ptr.dtype.element_ty), mask=mask)
        dbias += d
    if HAS_BIAS:
        tl.store(dbias_ptr + program * H + columns, dbias, mask=mask)


def _rows(x: Tensor) -> Tensor:
    x = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def glu_fwd(gate: Tensor, up: Tensor | None, bias: Tensor | None, activation: str) -> Tensor:
    out, g, u = gate.new_empty(gate.shape), _rows(gate), None if up is None else _rows(up)
    bias = None if bias is None else bias.contiguous()
    rows, size = g.shape
    if rows:
        _fwd_kernel[(rows, ceil_div(size, BLOCK))](
            g, g if u is None else u, g if bias is None else bias, out, size, g.stride(0),
            0 if u is None else u.stride(0), ACTIVATION=ACTIVATIONS[activation], HAS_UP=u is not None,
            HAS_BIAS=bias is not None, BLOCK=BLOCK,
        )  # fmt: skip
    return out


def glu_bwd(
    grad: Tensor, gate: Tensor, up: Tensor | None, bias: Tensor | None, activation: str, packed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    g, u, d = _rows(gate), None if up is None else _rows(up), grad.contiguous()
    bias = None if bias is None else bias.contiguous()
    rows, size = g.shape
    dgate = gate.new_empty((*gate.shape[:-1], 2 * size if packed else size))
    dup = gate.new_empty(0) if up is None or packed else torch.empty_like(dgate)
    flat = dgate.view(rows, dgate.shape[-1])
    into_gate = flat[:, :size]
    into_up = flat[:, size:] if packed else dup.view(rows, size) if up is not None else flat
    rows_per_program = 1 if bias is None else max(1, ceil_div(rows, MAX_SPLITS))
    programs = ceil_div(rows, rows_per_program)
    partial = None if bias is None else gate.new_empty(programs, size, dtype=torch.float32)
    if rows:
        _bwd_kernel[(programs, ceil_div(size, BLOCK))](
            d, g, g if u is None else u, g if bias is None else bias, into_gate, into_up,
            d if partial is None else partial, rows, size, g.stride(0), 0 if u is None else u.stride(0),
            into_gate.stride(0), into_up.stride(0), rows_per_program, ACTIVATION=ACTIVATIONS[activation],
            HAS_UP=u is not None, HAS_BIAS=bias is not None, BLOCK=BLOCK,
        )  # fmt: skip
    return dgate, dup, gate.new_empty(0) if partial is None else partial.sum(0).to(bias.dtype)
