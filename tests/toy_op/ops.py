"""Part of the way from x to y: (1 − t)·x + t·y."""

import torch
from torch import Tensor

from mmlm_fast.ops._derivatives import differentiable, recorded
from mmlm_fast.ops._native import as_rows, core, num_rows, number_type, rows
from mmlm_fast.ops._op import Op
from mmlm_fast.ops._registry import check_floating, check_like, plain_float, register_op
from mmlm_fast.ops.paths import REFERENCE

OP = Op("blend", smallest=2**18)


def blend_ref(x: Tensor, y: Tensor, t: float) -> Tensor:
    return ((1 - t) * x + t * y).to(x.dtype)


def blend(x: Tensor, y: Tensor, t: float) -> Tensor:
    """Compute (1 − t)·x + t·y.

    Args:
        x, y: ``[..., H]`` in one dtype.
        t: Where between them.

    Returns:
        Like `x`, computed in float32 and rounded once.

    Raises:
        ValueError: for shapes, dtypes or devices that do not go together.
    """
    check_floating("x", x)
    check_like("y", y, x, tuple(x.shape))
    if OP.path(x, fits=x.dim() > 0 and x.shape[-1] > 0) == REFERENCE:
        return blend_ref(x, y, t)
    return recorded(_Blend, x, y, plain_float(t))


def _native_fwd(x: Tensor, y: Tensor, t: float) -> Tensor:
    flat, other, out = as_rows(x), as_rows(y), x.new_empty(x.shape)
    core().blend_fwd(
        number_type(x), num_rows(x), x.shape[-1], rows(flat), rows(other), t, rows(out), torch.get_num_threads()
    )
    return out


def _native_bwd(grad: Tensor, t: float) -> tuple[Tensor, Tensor]:
    return (1 - t) * grad, t * grad


_fwd = register_op("blend_fwd", native=_native_fwd, fake=lambda x, y, t: x.new_empty(x.shape))
_bwd = register_op(
    "blend_bwd", portable=_native_bwd, fake=lambda grad, t: (grad.new_empty(grad.shape), grad.new_empty(grad.shape))
)


def _again(ctx, grads):
    x, y = (torch.zeros_like(grads[0]).requires_grad_() for _ in range(2))
    return (blend_ref(x, y, ctx.t),), (x, y)


class _Blend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, t):
        ctx.t = t
        return _fwd(x, y, t)

    @staticmethod
    @differentiable(_again)
    def backward(ctx, grad):
        return *_bwd(grad, ctx.t), None
