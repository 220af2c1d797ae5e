"""The proof of a replacement: on the user's own weights, forward and backward, against the original and float64."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mmlm_fast.ops.paths import Path, forced
from mmlm_fast.testing import difference

ROWS = 16
SAME_FORMULA = 1e-4  # of a norm: what a float32 computation may differ from its formula in float64


class RefusedError(Exception):
    """Why a replacement is not made, in words."""


def random(*shape: int, like: Tensor, scale: float = 1.0, seed: int = 0) -> Tensor:
    """Normal numbers in dtype and on the device of `like`, the same whatever torch's own generator is at."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu") * scale
    return numbers.to(device=like.device, dtype=like.dtype)


def prove(
    original: Callable[..., Any],
    ours: Callable[..., Any],
    exact: Callable[..., Any],
    tensors: Sequence[Tensor],
    *,
    fixed: int = 0,
) -> float:
    """The largest error of `ours` and its gradients, relative to the exact ones.

    Args:
        original: What is to be replaced, as a function of `tensors` in any floating dtype.
        ours: What replaces it.
        exact: The formula that both compute, in the dtype of its arguments.
        tensors: In the dtype that the module works in.
        fixed: How many of them, the first ones, get no gradient.

    Raises:
        RefusedError: where the original is not the formula, or ours errs by more than twice what the original does.
    """
    dtype = tensors[0].dtype
    single = [t.float() for t in tensors]
    truth = _run(exact, [t.double() for t in tensors], fixed)
    theirs = _run(original, single, fixed)
    for i, (a, b) in enumerate(zip(theirs, truth, strict=True)):
        if a.shape != b.shape:
            raise RefusedError(f"the original gives {tuple(a.shape)} where its formula gives {tuple(b.shape)}")
        error, scale = (a.double() - b).norm().item(), b.norm().item()
        if not error <= SAME_FORMULA * max(scale, 1e-6):
            what = _name(i, len(theirs) - len(tensors) + fixed)
            raise RefusedError(f"the original is not the formula it is known by: {what} differs by {error / scale:.1e}")
    twins = theirs if dtype == torch.float32 else _run(original, tensors, fixed)
    path = Path.KERNEL if tensors[0].is_cuda else Path.NATIVE
    with forced(path):
        found = _run(ours, tensors, fixed)
    largest = 0.0
    for i, (a, twin, b) in enumerate(zip(found, twins, truth, strict=True)):
        what = _name(i, len(found) - len(tensors) + fixed)
        if a.dtype != twin.dtype or a.shape != twin.shape:
            raise RefusedError(
                f"{what} is {a.dtype} {tuple(a.shape)} where the original has {twin.dtype} {tuple(twin.shape)}"
            )
        d = difference(a, twin, b)
        if not d.ok:
            raise RefusedError(f"{what} errs by {d.error:.1e}, where {d.allowed:.1e} is allowed")
        largest = max(largest, d.relative)
    return largest


def _name(place: int, num_outputs: int) -> str:
    return f"output {place}" if place < num_outputs else f"gradient {place - num_outputs}"


def _run(function: Callable[..., Any], tensors: Sequence[Tensor], fixed: int) -> list[Tensor]:
    """Outputs, then the gradient of each tensor but the first `fixed`."""
    device = tensors[0].device.type
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(device, enabled=False))
        leaves = [t.detach().clone().requires_grad_(i >= fixed) for i, t in enumerate(tensors)]
        outs = [out for out in pytree.tree_leaves(function(*leaves)) if isinstance(out, Tensor)]
        incoming = [random(*out.shape, like=out, seed=i + 1) for i, out in enumerate(outs)]
        wanted = leaves[fixed:]
        gradients = torch.autograd.grad(outs, wanted, incoming, allow_unused=True, materialize_grads=True)
    return [*(out.detach() for out in outs), *gradients]
