"""Losses whose gradients are formed in the forward pass: the backward pass multiplies them by the incoming gradient."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mmlm_fast.ops._derivatives import is_seen_through, recorded, refused
from mmlm_fast.ops._registry import register_op

# Private in torch: without it gradients are scaled out of place.
_keeps_graph: Callable[[], bool] = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
SMALL = 1 << 20  # numbers of a gradient for which a launch of our own is not worth it


def graph_is_kept() -> bool:
    """Whether the backward pass at work may be followed by another through the same graph (``retain_graph=True``)."""
    return _keeps_graph()


def wide(x: Tensor) -> torch.dtype:
    """What losses of `x` are computed and returned in: float32, or float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def formed_dtype(x: Tensor) -> torch.dtype:
    """Of gradients that wait for the incoming one: float16 would lose them before a loss scaler enlarges them."""
    return torch.float32 if x.dtype == torch.float16 else x.dtype


def with_formed_gradients(name: str, forward: Callable, *inputs: Tensor | None) -> Tensor:
    """The loss of ``forward(inputs, needed)``, which returns it and one gradient an input, empty where not wanted.

    Inputs are not kept, so that the gradients cannot be differentiated again: who tries is told the remedy.
    """
    # Not asked of the context: that says what requires a gradient, also where none is wanted.
    needed = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs]
    return recorded(_FormedGradients, name, forward, needed, *inputs)[0]


class _FormedGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        name, forward, needed, *inputs = args
        loss, formed = forward(inputs, needed)
        ctx.name, ctx.dtypes = name, [None if x is None else x.dtype for x in inputs]
        anchor = loss.new_empty(0)  # an output of no size: what is made of it depends on the inputs
        ctx.save_for_backward(*formed, anchor)
        return loss, anchor

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[3:]
        if grad is None:
            return None, None, None, *(None for _ in needed)
        *formed, anchor = ctx.saved_tensors
        scaled = [g.to(d) if n else None for g, d, n in zip(_scaled(formed, grad), ctx.dtypes, needed, strict=True)]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            scaled = [*refused(f"{ctx.name}, whose gradients are formed in the forward pass", scaled, anchor)]
        return None, None, None, *scaled


def _scaled(formed: Sequence[Tensor], grad: Tensor) -> Sequence[Tensor]:
    if torch.compiler.is_compiling() or is_seen_through((grad,)) or graph_is_kept():
        return [g * grad for g in formed]
    if grad.device.type == "cpu" and float(grad) == 1:
        return formed
    for g in formed:  # in place: the largest is as large as the weight, and no second one beside it
        if g.is_cuda and g.numel() > SMALL and g.is_contiguous():
            _scale_(g, grad)
        else:
            g.mul_(grad)
    return formed


def _multiply(gradient: Tensor, factor: Tensor) -> None:
    gradient.mul_(factor)


_scale_ = register_op("scale_gradient_", portable=_multiply, mutates=("gradient",), fake=lambda gradient, factor: None)
