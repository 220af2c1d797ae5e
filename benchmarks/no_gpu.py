"""A GPU that is not there: Triton compiles for it, and what is launched goes nowhere."""

import zlib
from collections.abc import Callable
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase


def _nothing(*_: Any) -> None:
    pass


class _Utils:
    """What a compiled kernel asks of the driver before its first launch."""

    def load_binary(self, name: str, binary: bytes, *_: Any) -> tuple[int, int, int, int, int]:
        module, function, registers, spills, threads = 0, zlib.crc32(binary), 32, 0, 1024
        return module, function, registers, spills, threads

    def unload_module(self, *_: Any) -> None:
        pass

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": 232_448}


class NoGpu(DriverBase):
    """A driver for `triton.runtime.driver.set_active`; the interpreter must be off.

    Args:
        arch: Compute capability, 90 for an H100.
        launched: Called in place of a launch, with all that Triton's launcher takes.
    """

    def __init__(self, arch: int, launched: Callable[..., None] = _nothing) -> None:
        self.target = GPUTarget("cuda", arch, 32)
        self.utils = _Utils()
        self.launcher_cls = lambda src, metadata: launched

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_benchmarker(self) -> Any:
        raise RuntimeError("nothing can be timed without a GPU")

    def get_device_interface(self) -> Any:
        return torch.cpu

    def get_empty_cache_for_benchmark(self) -> Any:
        raise RuntimeError("nothing can be timed without a GPU")

    def clear_cache(self, cache: Any) -> None:
        pass
