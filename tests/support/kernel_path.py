"""The paths of ops that tests go through (see the fixture `take`), and what calls keep."""

import pytest
import torch

PATHS = ["native", "kernel"]
# float16 differs from bfloat16 by a rounding alone, and has no native path.
PATHS_AND_DTYPES = [
    pytest.param(path, dtype, marks=pytest.mark.slow if dtype == torch.float16 else (), id=f"{path} {dtype}")
    for path in PATHS
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    if path == "kernel" or dtype != torch.float16
]


def saved_numbers(function) -> int:
    """Numbers kept for the backward pass by a call of `function`, each tensor's storage once."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = function()
    del out
    return sum(kept.values())
