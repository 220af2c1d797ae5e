"""One module of cases per op, of the op's stem. `op_case` makes forward and forward + backward from one op."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mmlm_benchmarks.harness import Case
from mmlm_fast.testing import difference, gradients

OPS = ("concat_linear", "fuse_modalities", "interval_attention")


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
) -> list[Case]:
    """Cases for the forward pass and for a training step: eager, torch.compile, ours; both checked in float64."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    compiled = torch.compile(reference, fullgraph=True, dynamic=False)

    def forward_only(f: Callable) -> Callable:
        def call(*args: Any) -> Any:
            with torch.no_grad():
                return f(*args)

        return call

    def inputs() -> list[tuple]:
        torch.manual_seed(0)
        return [draw(dtype) for _ in range(4)]

    def step_inputs() -> list[tuple]:
        return [
            pytree.tree_map(lambda t: t.requires_grad_() if isinstance(t, Tensor) else t, args) for args in inputs()
        ]

    def double(args: tuple) -> tuple:
        return pytree.tree_map(lambda t: t.detach().double() if isinstance(t, Tensor) else t, args)

    def check(providers: dict[str, Callable], args: tuple) -> dict[str, list]:
        exact, twin = reference(*double(args)), reference(*args)
        return {p: [difference(call(*args), twin, exact)] for p, call in providers.items()}

    def check_step(providers: dict[str, Callable], args: tuple) -> dict[str, list]:
        grad = torch.ones_like(reference(*args))
        exact = gradients(reference, double(args), grad)
        twin = gradients(reference, args, grad)
        found = {}
        for provider, function in (("eager", reference), ("torch.compile", compiled), ("mmlm_fast", fast)):
            actual = gradients(function, args, grad)
            found[provider] = [difference(a, t, e) for a, t, e in zip(actual, twin, exact, strict=True)]
        return found

    def step(f: Callable) -> Callable:
        def call(*args: Any) -> None:
            leaves = [t for t in pytree.tree_leaves(args) if isinstance(t, Tensor)]
            out = f(*args)
            torch.autograd.grad(out, leaves, torch.ones_like(out))

        return call

    functions = {"eager": reference, "torch.compile": compiled, "mmlm_fast": fast}
    shared = {"group": group, "shape_from": f"{shape_from}, {str(dtype).removeprefix('torch.')}"}
    return [
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
