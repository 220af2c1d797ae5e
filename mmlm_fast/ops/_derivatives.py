"""Backward passes of kernels that autograd can differentiate again."""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from mmlm_fast.ops.paths import is_transformed


def differentiable(
    again: Callable[..., tuple[Sequence[Tensor | None], Sequence[Any]]],
) -> Callable[[Callable], Callable]:
    """Decorate a backward pass made of kernels, into which autograd cannot see.

    Where nobody needs to see into it, the kernels run. Where the gradients' own graph is wanted (``create_graph=True``)
    or a transform of torch.func or forward mode is at work, the gradients are those of the op's reference, run again
    from what was saved: they are right to any order, and cost what the reference costs.

    Where no output has a gradient no input gets one, as with torch's own operators; the forward pass must say
    ``ctx.set_materialize_grads(False)``. DDP with unused parameters runs the backward pass of what the loss does not
    depend on: zeros there would make an optimizer decay weights that it leaves alone without us.

    Args:
        again: ``again(ctx, grads, *saved)`` runs the reference on the saved tensors. Returns outputs in the order of
            `grads`, None for those without gradient, and inputs in the order of forward's arguments, None (or nothing
            at the end) for those without gradient.
    """

    def decorate(backward: Callable) -> Callable:
        @wraps(backward)
        def call(ctx: Any, *grads: Tensor | None) -> Any:
            if all(g is None for g in grads):
                return (None,) * len(ctx.needs_input_grad)
            if not is_seen_through(grads):
                return backward(ctx, *grads)
            twice, device = torch.is_grad_enabled(), next(g.device.type for g in grads if g is not None)
            wanted = [i for i, needs in enumerate(ctx.needs_input_grad) if needs]
            # As in the forward pass, whose casts were made before it. New names for the inputs: one may have been
            # computed from another, and gradients must not go further.
            with torch.enable_grad(), torch.autocast(device, enabled=False):
                saved = [None if t is None else t.view_as(t) for t in ctx.saved_tensors]
                outputs, inputs = again(ctx, grads, *saved)
                pairs = [
                    (out, grad)
                    for out, grad in zip(outputs, grads, strict=True)
                    if grad is not None and out is not None and out.requires_grad
                ]
                outs, incoming = zip(*pairs, strict=True)
                gradients = torch.autograd.grad(
                    outs, [inputs[i] for i in wanted], incoming, create_graph=twice, allow_unused=True
                )
            found = dict(zip(wanted, gradients, strict=True))
            return tuple(found.get(i) for i in range(len(ctx.needs_input_grad)))

        return call

    return decorate


def recorded(function: type[torch.autograd.Function], *args: Any) -> Any:
    """Call ``function.apply``; where nothing is differentiated its forward pass alone, which costs 20 µs less."""
    if torch.compiler.is_compiling():
        return function.apply(*_distinct(args))
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
        return function.apply(*args)
    return function.forward(_NotRecorded(), *args)


class _NotRecorded:
    """The context of a forward pass that has no backward pass: no tensor outlives the call."""

    def save_for_backward(self, *tensors: Any) -> None:
        pass

    def mark_non_differentiable(self, *tensors: Any) -> None:
        pass

    def set_materialize_grads(self, value: bool) -> None:
        pass


def _distinct(args: Sequence[Any]) -> list[Any]:
    """The same, tensors under another name where one comes twice: Dynamo takes no tensor twice into a function."""
    found: list[Any] = []
    for x in args:
        twice = isinstance(x, Tensor) and any(x is other for other in found)
        found.append(x.view_as(x) if twice else x)
    return found


def is_seen_through(grads: Sequence[Tensor | None]) -> bool:
    """Whether a backward pass of these gradients is itself differentiated or vectorised.

    In a compiled one neither happens: AOTAutograd refuses it.
    """
    if torch.compiler.is_compiling():
        return False
    if torch.is_grad_enabled() or is_transformed():
        return True
    # torch.autograd.grad(..., is_grads_batched=True) has a vmap of its own.
    return any(g is not None and torch._C._functorch.is_legacy_batchedtensor(g) for g in grads)


def unseen(shape: Sequence[int], like: Tensor) -> Tensor:
    """Stand for an input that was not kept, since no gradient depends on it: without memory of that size."""
    return torch.zeros((), dtype=like.dtype, device=like.device).expand(shape).requires_grad_()


def refuse_twice(out: Tensor, of: str) -> Tensor:
    """What a kernel of torch computed, whose second derivatives torch has not: who asks is told the remedy."""
    node = None if torch.compiler.is_compiling() else out.grad_fn
    if node is not None and "Attention" in node.name():  # its math path has them

        def hook(gradients: tuple[Tensor | None, ...], _: Any) -> tuple[Tensor | None, ...] | None:
            return refused(of, gradients) if torch.is_grad_enabled() else None

        node.register_hook(hook)
    return out


def refused(of: str, gradients: Sequence[Tensor | None], anchor: Tensor | None = None) -> tuple[Tensor | None, ...]:
    """These gradients, which raise where they are differentiated; see `_Refusal`."""
    message = f"second derivatives of {of}: call it in mmlm_fast.reference()"
    found = iter(_Refusal.apply(message, anchor, *(g for g in gradients if g is not None)))
    return tuple(None if g is None else next(found) for g in gradients)


class _Refusal(torch.autograd.Function):
    """``apply(message, anchor, *gradients)``: these gradients, which raise `message` where they are differentiated.

    `anchor` ties them to what they depend on: autograd takes what it finds no way to for constant, and is silent.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(message: str, anchor: Tensor | None, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(g.view_as(g) for g in gradients)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        ctx.message = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        raise RuntimeError(ctx.message)
