"""Between two tensors."""

from functools import partial

import torch

from mmlm_benchmarks.harness import Case
from mmlm_benchmarks.ops import op_case
from mmlm_fast.ops import blend
from mmlm_fast.ops.blend import blend_ref

SIZES = {"cpu": (512, 4096), "tiny": (3, 40), "cuda": (8192, 4096)}  # rows, hidden size


def cases(device: str, sizes: str | None = None) -> list[Case]:
    rows, size = SIZES[sizes or device]
    return op_case(
        "blend",
        "blend",
        "none",
        device,
        lambda dtype: tuple(torch.randn(rows, size, device=device, dtype=dtype) for _ in range(2)),
        reference=partial(blend_ref, t=0.3),
        fast=partial(blend, t=0.3),
        values_moved=3 * rows * size,
        flops=0,
        backward_flops=0,
    )
