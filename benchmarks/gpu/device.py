"""What the suite needs of a device: a CUDA device, or the CPU where a rehearsal stands in for one."""

from dataclasses import dataclass

import torch

from mmlm_benchmarks.harness import LEAD_CLOCK_HZ

NEEDS_CUDA = ("side stream", "CUDA graph", "no sync")


@dataclass(frozen=True)
class Device:
    """`type` is cuda or cpu; `is_stand_in` where results say nothing about a GPU."""

    type: str
    is_stand_in: bool = False

    @property
    def compile_backend(self) -> str:
        return "aot_eager" if self.is_stand_in else "inductor"

    def has(self, mode: str) -> bool:
        return self.type == "cuda" or mode not in NEEDS_CUDA

    def synchronize(self) -> None:
        if self.type == "cuda":
            torch.cuda.synchronize()

    def keep_busy(self, seconds: float) -> None:
        """Occupy the device, so that what is queued behind has to wait."""
        if self.type == "cuda":
            torch.cuda._sleep(int(seconds * LEAD_CLOCK_HZ))
