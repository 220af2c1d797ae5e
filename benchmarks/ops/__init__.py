"""Give the cases of each op, in a module of its stem; `op_case` makes a forward pass and a training step of one."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mmlm_benchmarks.harness import Call, Case, Example
from mmlm_fast.testing import Difference, difference, gradients

OPS = tuple(sorted(module.name for module in iter_modules(__path__)))


def examples(op: str, device: str = "cpu", sizes: str | None = "tiny") -> list[Example]:
    """Return calls of an op, one for each of its cases' shapes."""
    cases = import_module(f"{__name__}.{op}").cases(device, sizes)
    return list({case.example.name: case.example for case in cases if case.example is not None}.values())


@dataclass(frozen=True)
class TrainingStep:
    """Run a function forward and backward, for gradients of all that requires them, and let go of these."""

    function: Callable

    def __call__(self, *args: Any) -> None:
        leaves = [t for t in pytree.tree_leaves(args) if isinstance(t, Tensor) and t.requires_grad]
        outs = pytree.tree_leaves(self.function(*args))
        torch.autograd.grad(outs, leaves, [torch.ones_like(out) for out in outs])


@dataclass(frozen=True)
class _Checks:
    """Compare what providers compute with the formula in float64.

    Attributes:
        reference: The formula, as it is run in the dtype of the inputs.
        exact: What is run in float64.
        draw: Inputs that are checked in place of those given; None: these.
    """

    reference: Callable
    exact: Callable
    draw: Callable[[], tuple] | None

    def forward(self, providers: dict[str, Call], args: tuple) -> dict[str, list[Difference]]:
        """Compare outputs."""
        args = self._inputs(args)
        truth, twin = (pytree.tree_leaves(t) for t in (self.exact(*_double(args)), self.reference(*args)))
        return {p: _differences(pytree.tree_leaves(call(*args)), twin, truth) for p, call in providers.items()}

    def step(self, providers: dict[str, Any], args: tuple) -> dict[str, list[Difference]]:
        """Compare the gradients that each `TrainingStep` takes, of incoming gradients of one."""
        args = self._inputs(args)
        grad = [torch.ones_like(out) for out in pytree.tree_leaves(self.reference(*args))]
        truth, twin = gradients(self.exact, _double(args), grad), gradients(self.reference, args, grad)
        return {p: _differences(gradients(s.function, args, grad), twin, truth) for p, s in providers.items()}

    def _inputs(self, args: tuple) -> tuple:
        if self.draw is None:
            return args
        torch.manual_seed(0)
        takes_grad = any(_is_float(t) and t.requires_grad for t in pytree.tree_leaves(args))
        return _map_floats(lambda t: t.requires_grad_(takes_grad), self.draw())


def _differences(actual: Iterable[Tensor], twin: Iterable[Tensor], exact: Iterable[Tensor]) -> list[Difference]:
    return [difference(*tensors) for tensors in zip(actual, twin, exact, strict=True)]


def _is_float(t: Any) -> bool:
    return isinstance(t, Tensor) and t.is_floating_point()


def _map_floats(function: Callable[[Tensor], Tensor], args: tuple) -> tuple:
    return pytree.tree_map(lambda t: function(t) if _is_float(t) else t, args)


def _double(args: tuple) -> tuple:
    return _map_floats(lambda t: t.detach().double(), args)


def _without_gradients(function: Callable) -> Callable:
    def call(*args: Any) -> Any:
        with torch.no_grad():
            return function(*args)

    return call


def op_case(
    group: str,
    name: str,
    shape_from: str,
    device: str,
    draw: Callable[[torch.dtype], tuple],
    *,
    reference: Callable,
    fast: Callable,
    values_moved: int,
    flops: int,
    backward_flops: int,
    exact: Callable | None = None,
    draw_check: Callable[[torch.dtype], tuple] | None = None,
    peers: Mapping[str, Callable] | None = None,
    dtype: torch.dtype | None = None,
    train: bool = True,
) -> list[Case]:
    """Make the cases of the forward pass and of a training step: eager, torch.compile, ours; both checked in float64.

    Args:
        group, name, shape_from: What the rows say of the case.
        device: Where the tensors are.
        draw: Inputs in a dtype.
        reference: What eager is: the formula as transformers or the seeds write it.
        fast: Ours. All return a tensor or a tuple of them.
        values_moved, flops, backward_flops: What the least possible time follows from.
        exact: What is run in float64, where the eager formula cannot be.
        draw_check: Inputs of a size at which float64 fits, where those of `draw` have none; they are checked in place
            of these.
        peers: Other implementations.
        dtype: bfloat16 on CUDA and float32 on CPU by default.
        train: Whether there is a training step.
    """
    dtype = dtype or (torch.bfloat16 if device == "cuda" else torch.float32)
    compiled = torch.compile(reference, fullgraph=True, dynamic=False)
    functions = {"eager": reference, "torch.compile": compiled, **(peers or {}), "mmlm_fast": fast}
    checks = _Checks(reference, exact or reference, None if draw_check is None else partial(draw_check, dtype))

    def inputs() -> list[tuple]:
        torch.manual_seed(0)
        return [draw(dtype) for _ in range(4)]

    def step_inputs() -> list[tuple]:
        return [_map_floats(Tensor.requires_grad_, args) for args in inputs()]

    shared: dict[str, Any] = {
        "group": group,
        "shape_from": f"{shape_from}, {str(dtype).removeprefix('torch.')}",
        "example": Example(name, draw, fast, reference),
    }
    forward = Case(
        name=f"{name}, forward",
        inputs=inputs,
        providers={p: _without_gradients(f) for p, f in functions.items()},
        check=checks.forward,
        bytes_moved=values_moved * dtype.itemsize,
        flops=flops,
        **shared,
    )
    step = Case(
        name=f"{name}, forward + backward",
        inputs=step_inputs,
        providers={p: TrainingStep(f) for p, f in functions.items()},
        check=checks.step,
        bytes_moved=3 * values_moved * dtype.itemsize,
        flops=flops + backward_flops,
        **shared,
    )
    return [forward, step] if train else [forward]
