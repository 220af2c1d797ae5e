"""What the native core says of itself: how it was built, and what it finds on this machine."""

import json
from typing import Any

from mmlm_fast import _C


def active_isa() -> str:
    """Name of the instruction set that the core's CPU kernels run with."""
    return _C.active_isa()


def best_isa() -> str:
    """Name of the widest instruction set that this CPU has and the core has kernels for."""
    return _C.best_isa()


def build_info() -> dict[str, Any]:
    """How the core was built: compiler, nvcc and its architectures, and why CUDA code is lacking where it is."""
    return json.loads(_C.build_info_json())


def cuda_status() -> dict[str, Any]:
    """Whether the core holds CUDA code, how many devices its CUDA runtime finds, and what that runtime says."""
    return _C.cuda_status()
