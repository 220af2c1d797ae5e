"""Losses whose gradients are formed in the forward pass: the backward pass multiplies them by the incoming gradient."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_graph_is_kept: Callable[[], bool] = getattr(
    torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True
)  # private: without it gradients are scaled out of place


def wide(x: Tensor) -> torch.dtype:
    """What losses of `x` are computed and returned in: float32, or float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def formed_dtype(x: Tensor) -> torch.dtype:
    """Of gradients that wait for the incoming one: float16 would lose them before a loss scaler enlarges them."""
    return torch.float32 if x.dtype == torch.float16 else x.dtype


class FormedGradients(torch.autograd.Function):
    """``apply(forward, *inputs)``: `forward` returns the loss and one gradient an input, empty where not wanted."""

    @staticmethod
    def forward(ctx: Any, forward: Callable, *inputs: Any) -> Tensor:
        loss, formed = forward(inputs, ctx.needs_input_grad[1:])
        ctx.dtypes = [x.dtype if isinstance(x, Tensor) else None for x in inputs]
        ctx.save_for_backward(*formed)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        scaled = _scaled(ctx.saved_tensors, grad)
        return None, *(
            g.to(dtype) if needs else None for g, dtype, needs in zip(scaled, ctx.dtypes, needed, strict=True)
        )


def _scaled(formed: Sequence[Tensor], grad: Tensor) -> Sequence[Tensor]:
    if torch.compiler.is_compiling():
        return [g * grad for g in formed]
    if grad.device.type == "cpu" and float(grad) == 1:
        return formed
    if _graph_is_kept():
        return [g * grad for g in formed]
    return [g.mul_(grad) for g in formed]  # the largest is as large as the weight: no second one beside it
