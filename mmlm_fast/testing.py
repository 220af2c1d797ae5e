"""How an op is checked, in the tests, before every benchmark and in the report."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

# Triton's interpreter rounds float32 to bfloat16 by truncation, which doubles the rounding error.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Fewer numbers than this make an error norm a matter of luck; more draws than this make a test slow.
NUMBERS_IN_A_NORM = 64
MAX_DRAWS = 16

# What attention in float32 may err on a GPU, as a multiple of what the accuracy rule allows. A product there is three
# of tf32 on tensor cores, which add towards zero: each of D/8 steps loses up to 2⁻²³ of the sum, always the same way,
# where the reference's sums round to nearest, by 2⁻²⁴ either way. torch's own kernel for float32 does the same.
GPU_FLOAT32_ATTENTION_FACTOR = 2.0


@dataclass(frozen=True)
class Difference:
    """Error of a result against float64, and what the accuracy rule allows; both are norms."""

    error: float
    allowed: float
    scale: float  # norm of the exact result

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed

    @property
    def relative(self) -> float:
        return self.error / self.scale if self.scale else self.error


def _double(tree: Any) -> Any:
    return pytree.tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, tree)


def difference(actual: Tensor, twin: Tensor, exact: Tensor) -> Difference:
    """The accuracy rule: error against float64 at most twice that of the reference in the inputs' own dtype.

    The tolerance is measured, not chosen: it follows dtype, shape and reduction length. Its floor is two units in
    the last place of the output's norm.

    Args:
        actual: Result under test.
        twin: The reference's result, computed in the inputs' own dtype.
        exact: The reference's result, computed in float64.
    """
    assert actual.dtype == twin.dtype, f"dtype {actual.dtype}, expected {twin.dtype}"
    assert actual.shape == twin.shape, f"shape {tuple(actual.shape)}, expected {tuple(twin.shape)}"
    assert actual.isfinite().equal(twin.isfinite()), "NaN or infinity not where the reference has it"
    if not actual.is_floating_point():
        return Difference(float((actual != twin).sum()), 0.0, float(twin.numel()))
    factor = 4.0 if _INTERPRETED and actual.dtype == torch.bfloat16 else 2.0
    keep = twin.isfinite()
    exact = torch.where(keep, exact, 0)
    error, reference_error = ((torch.where(keep, t.double(), 0) - exact).norm().item() for t in (actual, twin))
    scale = exact.norm().item()
    return Difference(error, max(factor * reference_error, 2 * torch.finfo(actual.dtype).eps * scale), scale)


def differences_to_reference(actual: Any, reference: Callable, *inputs: Any) -> list[Difference]:
    """One `Difference` per tensor of `actual`; `reference` and its inputs may be nested sequences."""
    exact = pytree.tree_leaves(reference(*_double(inputs)))
    twin = pytree.tree_leaves(reference(*inputs))
    return [difference(a, t, e) for a, t, e in zip(pytree.tree_leaves(actual), twin, exact, strict=True)]


def assert_close_to_reference(actual: Any, reference: Callable, *inputs: Any) -> None:
    """Assert the accuracy rule (see `difference`) for every tensor of `actual`."""
    _assert_allowed(differences_to_reference(actual, reference, *inputs))


def gradients(function: Callable, inputs: Sequence[Any], grad: Any) -> tuple[Tensor, ...]:
    """Gradients of `function(*inputs)` for every floating-point tensor in `inputs`, which are not modified.

    `grad`: the incoming gradient, one for each tensor where the function returns several.
    """
    copies = pytree.tree_map(
        lambda x: x.detach().clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x,
        list(inputs),
    )
    leaves = [x for x in pytree.tree_leaves(copies) if isinstance(x, Tensor) and x.requires_grad]
    outs = pytree.tree_leaves(function(*copies))
    grads = [g.to(out.dtype) for g, out in zip(pytree.tree_leaves(grad), outs, strict=True)]
    return torch.autograd.grad(outs, leaves, grads, allow_unused=True, materialize_grads=True)


def gradient_differences_to_reference(function: Callable, reference: Callable, *inputs: Any) -> list[Difference]:
    """One `Difference` for the gradient of every floating-point input, for random incoming gradients.

    The accuracy rule compares error norms, which are luck for a gradient of two numbers: several draws of the incoming
    gradient are taken together where an input is small.
    """
    with torch.no_grad():
        outs = pytree.tree_leaves(reference(*inputs))
    sizes = [x.numel() for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor) and x.is_floating_point()]
    draws = max(1, min(MAX_DRAWS, math.ceil(NUMBERS_IN_A_NORM / max(1, min(sizes, default=1)))))
    draws = draws if any(out.numel() for out in outs) else 1
    grads = [[torch.randn(out.shape, dtype=out.dtype, device=out.device) for out in outs] for _ in range(draws)]

    def all_draws(f: Callable, *args: Any) -> list[Tensor]:
        grads, inputs = args[0], args[1:]
        return [torch.stack(draws) for draws in zip(*(gradients(f, inputs, g) for g in grads), strict=True)]

    actual = all_draws(function, grads, *inputs)
    return differences_to_reference(actual, lambda *args: all_draws(reference, *args), grads, *inputs)


def assert_gradients_close_to_reference(function: Callable, reference: Callable, *inputs: Any) -> None:
    """Assert the accuracy rule for every gradient (see `gradient_differences_to_reference`)."""
    _assert_allowed(gradient_differences_to_reference(function, reference, *inputs))


def _assert_allowed(differences: Sequence[Difference]) -> None:
    for i, d in enumerate(differences):
        assert d.ok, f"output {i}: error {d.error:.3e}, allowed {d.allowed:.3e}"
