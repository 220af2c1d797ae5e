"""What each job of benchmarks/gpu_suite.sh runs first in a rehearsal: kernels run in Triton's interpreter on the CPU.

MMLM_REHEARSAL_CRASH and MMLM_REHEARSAL_HANG name a job that does so in its first backward pass.
"""

import ctypes
import os
import sys
import time
from importlib import import_module
from pathlib import Path

import torch

kept = []  # registrations end with their library


def stand_in(stage: str, job: str) -> None:
    """Make this process, which runs a job of a stage, do without a GPU."""
    if stage in ("check", "candidates"):
        torch.set_num_threads(1)
        launch_kernels_on_the_cpu()
        fail_in_the_first_backward_pass(job)


def launch_kernels_on_the_cpu() -> None:
    """Give every op of ours its Triton launcher where the dispatcher has its portable path."""
    os.environ["TRITON_INTERPRET"] = "1"
    sys.path.append(str(Path(__file__).parent))
    import interpreter

    interpreter.install()
    import mmlm_fast.ops  # noqa: F401
    from mmlm_fast.ops import _contrastive, _registry

    library = torch.library.Library("mmlm_fast", "IMPL")
    for name, (_, kernel) in _registry.REGISTERED.items():
        module, _, function = kernel.partition(":")
        if module.startswith("mmlm_kernels"):
            library.impl(name, getattr(import_module(module), function), "CPU", allow_override=True)
    _registry.SMALL_NUMBERS.update(dict.fromkeys(_registry.SMALL_NUMBERS, 0))
    for name, module in list(sys.modules.items()):
        if name.startswith("mmlm_fast.ops.") and hasattr(module, "takes_kernel"):
            module.takes_kernel = lambda x, *_: x.dtype != torch.float64
    _contrastive.tile_dtype = lambda x: x.dtype
    kept.append(library)


def fail_in_the_first_backward_pass(job: str) -> None:
    grad = torch.autograd.grad

    def crash(*args, **kwargs):
        if os.environ.get("MMLM_REHEARSAL_CRASH") == job:
            ctypes.string_at(0)
        if os.environ.get("MMLM_REHEARSAL_HANG") == job:
            time.sleep(1e6)
        return grad(*args, **kwargs)

    torch.autograd.grad = crash
