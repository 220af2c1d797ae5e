"""The native core; see csrc/bindings.cpp."""

from typing import Any

import numpy as np

class LogMelPlan:
    num_mel_bins: int
    def __init__(self, filters: np.ndarray) -> None: ...
    def run(
        self, samples: list[int], num_valid: list[int], num_samples: int, out: int, num_threads: int
    ) -> list[int]: ...
    def sparse_filters(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]: ...

def active_isa() -> str: ...
def best_isa() -> str: ...
def set_isa(name: str) -> str: ...
def build_info_json() -> str: ...
def cuda_status() -> dict[str, Any]: ...
def log_mel_cuda(
    spectrum: int,
    strides: list[int],
    tables: list[int],
    out: int,
    clip_max: int,
    num_clips: int,
    num_frames: int,
    num_mel_bins: int,
    stream: int,
    device: int,
) -> None: ...
