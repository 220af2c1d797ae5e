"""Add a branch to the residual stream through a tanh gate: the epilogue of gated cross-attention."""

import torch
from torch import Tensor

from mmlm_fast.ops._derivatives import differentiable, recorded, unseen
from mmlm_fast.ops._native import address, as_rows, core, num_rows, number_type, rows
from mmlm_fast.ops._op import REFERENCE, Op
from mmlm_fast.ops._registry import check_floating, register_op

OP = Op("gated_add", smallest=2**20)


def gated_add_ref(x: Tensor, residual: Tensor, gate: Tensor, keep: Tensor | None = None) -> Tensor:
    if keep is not None:
        x = torch.where(keep[..., None], x, 0)
    return residual + gate.tanh().to(x.dtype) * x


def gated_add(x: Tensor, residual: Tensor, gate: Tensor, *, keep: Tensor | None = None) -> Tensor:
    """Compute residual + tanh(gate)·x, where `keep`.

    Args:
        x: ``[..., H]``, the output of cross-attention or of the MLP behind it.
        residual: Like `x`; where dtypes differ (autocast) both are promoted.
        gate: ``[1]`` or ``[H]`` (or a scalar), in the dtype of the sum or float32.
        keep: Bool, shaped like `x` without its last dimension: False where a token sees no picture and passes
            unchanged, whatever `x` holds there.

    Returns:
        Like `x`, in the dtype of the sum, computed in float32 and rounded once. Kept for the backward pass: `x`, `gate`
        and `keep`.

    Raises:
        ValueError: for shapes, dtypes or devices that do not go together.

    Source: Flamingo (Alayrac et al. 2022), equation 2; transformers' MllamaCrossAttentionDecoderLayer.
    """
    for name, tensor in (("x", x), ("residual", residual), ("gate", gate)):
        check_floating(name, tensor)
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on {x.device}, got {tensor.device}")
    if x.dim() < 1 or residual.shape != x.shape:
        raise ValueError(f"residual must be {tuple(x.shape)}, got {tuple(residual.shape)}")
    if residual.dtype != x.dtype:
        dtype = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(dtype), residual.to(dtype)
    if gate.numel() not in (1, x.shape[-1]) or gate.dim() > 1 or gate.dtype not in (x.dtype, torch.float32):
        raise ValueError(
            f"gate must be [1] or [{x.shape[-1]}] in {x.dtype} or float32, got {tuple(gate.shape)} in {gate.dtype}"
        )
    if keep is not None and (keep.dtype != torch.bool or keep.shape != x.shape[:-1] or keep.device != x.device):
        raise ValueError(
            f"keep must be bool {tuple(x.shape[:-1])} on {x.device}, got {keep.dtype} {tuple(keep.shape)} on "
            f"{keep.device}"
        )
    if OP.path(x) == REFERENCE:
        return gated_add_ref(x, residual, gate, keep)
    return recorded(_GatedAdd, x, residual, gate, keep)


def wide_gate(gate: Tensor, size: int) -> Tensor:
    """tanh of the gate for each column, in float32."""
    return gate.float().tanh().expand(size).contiguous()


def gate_gradient(sums: Tensor, gate: Tensor) -> Tensor:
    """Of the gate from Σ grad·x of each column ``[H]``."""
    slope = 1 - gate.float().tanh().square()
    return ((sums.sum() if gate.numel() == 1 else sums) * slope).reshape(gate.shape).to(gate.dtype)


def _native_fwd(x: Tensor, residual: Tensor, gate: Tensor, keep: Tensor | None) -> Tensor:
    flat, other, out = as_rows(x), as_rows(residual), x.new_empty(x.shape)
    t, keep = wide_gate(gate, x.shape[-1]), None if keep is None else keep.contiguous()
    core().gated_add_fwd(
        number_type(x), num_rows(x), x.shape[-1], rows(flat), rows(other), t.data_ptr(), address(keep), rows(out),
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def _native_bwd(grad: Tensor, x: Tensor, gate: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    flat, g, dx = as_rows(x), as_rows(grad), x.new_empty(x.shape)
    t, keep = wide_gate(gate, x.shape[-1]), None if keep is None else keep.contiguous()
    sums = flat.new_zeros(x.shape[-1], dtype=torch.float32)
    core().gated_add_bwd(
        number_type(x), num_rows(x), x.shape[-1], rows(flat), t.data_ptr(), address(keep), rows(g), rows(dx),
        sums.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return dx, gate_gradient(sums, gate)


_fwd = register_op("gated_add_fwd", native=_native_fwd, fake=lambda x, residual, gate, keep: x.new_empty(x.shape))
_bwd = register_op(
    "gated_add_bwd",
    native=_native_bwd,
    fake=lambda grad, x, gate, keep: (x.new_empty(x.shape), gate.new_empty(gate.shape)),
)


def _again(ctx, grads, x, gate, keep):
    residual = unseen(x.shape, x)
    return (gated_add_ref(x, residual, gate, keep),), (x, residual, gate)


class _GatedAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, gate, keep):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, gate, keep)
        return _fwd(x, residual, gate, keep)

    @staticmethod
    @differentiable(_again)
    def backward(ctx, grad):
        x, gate, keep = ctx.saved_tensors
        dx, dgate = _bwd(grad, x, gate, keep)
        return dx, grad, dgate, None
