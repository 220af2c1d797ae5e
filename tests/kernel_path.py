"""Run a public op through its Triton launchers on whatever device there is, so that one test covers both paths."""

import sys
from importlib import import_module

import pytest
import torch

from mmlm_fast.ops import _contrastive, _registry

PATHS = ["native", "kernel"]
# float16 differs from bfloat16 by a rounding alone, and has no native path.
PATHS_AND_DTYPES = [
    pytest.param(path, dtype, marks=pytest.mark.slow if dtype == torch.float16 else (), id=f"{path} {dtype}")
    for path in PATHS
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    if path == "kernel" or dtype != torch.float16
]


def take(path: str, op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`native`: the CPU core however small the input. `kernel`: the launchers."""
    monkeypatch.setattr(_registry, "SMALL_NUMBERS", dict.fromkeys(_registry.SMALL_NUMBERS, 0))
    module = sys.modules[f"mmlm_fast.ops.{op}"]
    if op in ("clip_loss", "siglip_loss"):
        monkeypatch.setattr(sys.modules["mmlm_fast.ops.clip_loss"], "SMALL_NUMBERS", _registry.SMALL_NUMBERS)
    if hasattr(module, "SMALL_NUMBERS"):
        monkeypatch.setattr(module, "SMALL_NUMBERS", _registry.SMALL_NUMBERS)
    if path == "native":
        return
    kernels = import_module(f"mmlm_kernels.{op}")
    if hasattr(module, "takes_kernel"):
        monkeypatch.setattr(module, "takes_kernel", lambda *_: True)
    for name in ("_fwd", "_bwd", "_patchify", "_statistics", "_gradients", "_pairs"):
        launcher = "patchify" if name == "_patchify" else op + name
        if hasattr(module, name) and hasattr(kernels, launcher):
            monkeypatch.setattr(module, name, getattr(kernels, launcher))
    if hasattr(module, "_fwd_over_all"):  # made of ops: not through the dispatcher, which would pick the CPU's
        monkeypatch.setattr(module, "_fwd", module._fwd_over_all)
        monkeypatch.setattr(_contrastive, "tile_dtype", lambda x: x.dtype)


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
