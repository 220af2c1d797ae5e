"""One module of cases per op, of the op's stem. `op_case` makes forward and forward + backward from one op."""

from collections.abc import Callable, Mapping
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mmlm_benchmarks.harness import Case, Example
from mmlm_fast.testing import difference, gradients

OPS = tuple(sorted(module.name for module in iter_modules(__path__)))


def examples(op: str, device: str = "cpu", sizes: str | None = "tiny") -> list[Example]:
    """Calls of an op, one for each of its cases' shapes."""
    cases = import_module(f"{__name__}.{op}").cases(device, sizes)
    return list({case.example.name: case.example for case in cases if case.example is not None}.values())


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
    """Cases for the forward pass and for a training step: eager, torch.compile, ours; both checked in float64.

    Args:
        group, name, shape_from: Of the rows.
        device: Of the tensors.
        draw: Inputs in a dtype.
        reference: What eager is: the formula as transformers or the seeds write it.
        fast: Ours. All return a tensor or a tuple of them.
        values_moved, flops, backward_flops: For the floor.
        exact: What is run in float64, where the eager formula cannot be.
        draw_check: Inputs of a size at which float64 fits, where those of `draw` have none; they are checked in place
            of these.
        peers: Other implementations.
        dtype: bfloat16 on CUDA and float32 on CPU by default.
        train: Whether there is a training step.
    """
    dtype = dtype or (torch.bfloat16 if device == "cuda" else torch.float32)
    exact = exact or reference
    compiled = torch.compile(reference, fullgraph=True, dynamic=False)

    def is_leaf(t: Any) -> bool:
        return isinstance(t, Tensor) and t.is_floating_point()

    def forward_only(f: Callable) -> Callable:
        def call(*args: Any) -> Any:
            with torch.no_grad():
                return f(*args)

        return call

    def inputs() -> list[tuple]:
        torch.manual_seed(0)
        return [draw(dtype) for _ in range(4)]

    def step_inputs() -> list[tuple]:
        return [pytree.tree_map(lambda t: t.requires_grad_() if is_leaf(t) else t, args) for args in inputs()]

    def double(args: tuple) -> tuple:
        return pytree.tree_map(lambda t: t.detach().double() if is_leaf(t) else t, args)

    def checked(args: tuple) -> tuple:
        if draw_check is None:
            return args
        torch.manual_seed(0)
        takes_grad = any(is_leaf(t) and t.requires_grad for t in pytree.tree_leaves(args))
        return pytree.tree_map(lambda t: t.requires_grad_(takes_grad) if is_leaf(t) else t, draw_check(dtype))

    def check(providers: dict[str, Callable], args: tuple) -> dict[str, list]:
        args = checked(args)
        truth, twin = (pytree.tree_leaves(t) for t in (exact(*double(args)), reference(*args)))
        return {
            p: [difference(*three) for three in zip(pytree.tree_leaves(call(*args)), twin, truth, strict=True)]
            for p, call in providers.items()
        }

    def check_step(providers: dict[str, Callable], args: tuple) -> dict[str, list]:
        args = checked(args)
        grad = [torch.ones_like(out) for out in pytree.tree_leaves(reference(*args))]
        truth = gradients(exact, double(args), grad)
        twin = gradients(reference, args, grad)
        found = {}
        for provider, function in functions.items():
            actual = gradients(function, args, grad)
            found[provider] = [difference(a, t, e) for a, t, e in zip(actual, twin, truth, strict=True)]
        return found

    def step(f: Callable) -> Callable:
        def call(*args: Any) -> None:
            leaves = [t for t in pytree.tree_leaves(args) if isinstance(t, Tensor) and t.requires_grad]
            outs = pytree.tree_leaves(f(*args))
            torch.autograd.grad(outs, leaves, [torch.ones_like(out) for out in outs])

        return call

    functions = {"eager": reference, "torch.compile": compiled, **(peers or {}), "mmlm_fast": fast}
    shared = {
        "group": group,
        "shape_from": f"{shape_from}, {str(dtype).removeprefix('torch.')}",
        "example": Example(name, draw, fast, reference),
    }
    made = [
        Case(
            name=f"{name}, forward",
            inputs=inputs,
            providers={p: forward_only(f) for p, f in functions.items()},
            check=check,
            bytes_moved=values_moved * dtype.itemsize,
            flops=flops,
            **shared,
        ),
        Case(
            name=f"{name}, forward + backward",
            inputs=step_inputs,
            providers={p: step(f) for p, f in functions.items()},
            check=check_step,
            bytes_moved=3 * values_moved * dtype.itemsize,
            flops=flops + backward_flops,
            **shared,
        ),
    ]
    return made if train else made[:1]
