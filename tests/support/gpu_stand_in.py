"""What each job of benchmarks/gpu_suite.sh runs first in a rehearsal: kernels run in Triton's interpreter on the CPU.

MMLM_REHEARSAL_CRASH and MMLM_REHEARSAL_HANG name a job that does so in its first backward pass.
"""

import ctypes
import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import torch

kept = ExitStack()  # for as long as the process


def stand_in(stage: str, job: str) -> None:
    """Make this process, which runs a job of a stage, do without a GPU."""
    if stage in ("check", "candidates"):
        torch.set_num_threads(1)
        launch_kernels_on_the_cpu()
        fail_in_the_first_backward_pass(job)


def launch_kernels_on_the_cpu() -> None:
    """Let every op of ours take its Triton launcher where the dispatcher has its portable path."""
    os.environ["TRITON_INTERPRET"] = "1"
    sys.path.append(str(Path(__file__).parents[1]))
    from support import interpreter

    interpreter.install()
    from mmlm_fast.ops import paths

    kept.enter_context(paths.forced(paths.Path.KERNEL))


def fail_in_the_first_backward_pass(job: str) -> None:
    grad = torch.autograd.grad

    def crash(*args, **kwargs):
        if os.environ.get("MMLM_REHEARSAL_CRASH") == job:
            ctypes.string_at(0)
        if os.environ.get("MMLM_REHEARSAL_HANG") == job:
            time.sleep(1e6)
        return grad(*args, **kwargs)

    torch.autograd.grad = crash
