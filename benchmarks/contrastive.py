"""What the cases of contrastive losses share: features, large batches, memory over the batch."""

import gc
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmlm_benchmarks import harness
from mmlm_fast.testing import Difference

CURVE = (1024, 4096, 16384, 65536)  # batches
CURVE_SIZE = 64  # features: memory beyond theirs does not depend on them, time does
MOST_CHECKED = 4096  # batch of the formula in float64: ten matrices of pairs are alive at once
MOST_PAIRS = 16384**2  # of the eager formula: 4 to 5 GiB


def draw_features(num: int, size: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Normalised, pairs that are alike."""
    x = torch.randn(num, size, device=device)
    y = x + 2 * torch.randn(num, size, device=device)
    return F.normalize(x, dim=1).to(dtype), F.normalize(y, dim=1).to(dtype)


def step(function: Callable) -> Callable:
    def call(*leaves: Tensor) -> None:
        torch.autograd.grad(function(*leaves), leaves)

    return call


def ceiling_case(
    op: str, num: int, size: int, device: str, eager: Callable, fast: Callable, scalars: list[float]
) -> harness.Case:
    """A training step at a batch at which the eager formula is at its end; losses compared in float32.

    The float64 formula that the smaller cases are checked against would need 10 GiB here.
    """

    def inputs() -> list[tuple]:
        torch.manual_seed(0)
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        leaves = (*draw_features(num, size, device, dtype), *(torch.tensor(s, device=device) for s in scalars))
        return [tuple(t.requires_grad_() for t in leaves)]

    def check(providers: dict[str, Callable], args: tuple) -> dict[str, list[Difference]]:
        with torch.no_grad():
            ours, theirs = (float(f(*args)) for f in (fast, eager))
        allowed = 2 * torch.finfo(args[0].dtype).eps * abs(theirs)
        return {"mmlm_fast": [Difference(abs(ours - theirs), allowed, abs(theirs))]}

    return harness.Case(
        group=op,
        name=f"{op}, batch of {num}, forward + backward",
        shape_from=f"{size} features",
        inputs=inputs,
        providers={"eager": step(eager), "mmlm_fast": step(fast)},
        check=check,
        bytes_moved=6 * num * size * 4,
        flops=6 * num * num * size,
    )


def memory_curve(op: str, device: str, eager: Callable, fast: Callable, num_scalars: int) -> list[dict[str, Any]]:
    """Peak memory of a training step beyond inputs and gradients, over the batch."""
    points = []
    for num in CURVE:
        leaves = (*draw_features(num, CURVE_SIZE, device, torch.float32), *torch.ones(num_scalars, device=device))
        leaves = tuple(t.detach().requires_grad_() for t in leaves)
        gradients = 2 * num * CURVE_SIZE * 4 / 2**20
        for provider, function in (("eager", eager), ("mmlm_fast", fast)):
            if provider == "eager" and num * num > MOST_PAIRS:
                continue
            gc.collect()
            peak = harness.peak_memory_mib(step(function), leaves)
            if peak is not None:
                point = {"op": op, "provider": provider, "batch": num, "mib": round(max(0.0, peak - gradients), 1)}
                points.append(point)
    return points
