"""The native core; see csrc/python/."""

from collections.abc import Callable
from typing import Any, overload

import numpy as np

class Resampler:
    num_bytes: int
    @overload
    def __init__(self, old_rate: int, new_rate: int, taps: np.ndarray, first: np.ndarray) -> None: ...
    @overload
    def __init__(self, old_rate: int, new_rate: int, width: int, rolloff: float, beta: float) -> None: ...
    def num_output(self, num_input: int) -> int: ...

class Format:
    def __init__(
        self,
        type: int,
        num_channels: int,
        channel_stride: int,
        sample_stride: int,
        resampler: Any,
    ) -> None: ...

class Edge:
    none: Edge
    zero: Edge
    reflect: Edge
    mirror: Edge

class Log:
    none: Log
    natural: Log
    decimal: Log

class Energy:
    none: Energy
    first: Energy
    last: Energy
    replace_first: Energy
    replace_last: Energy

class SpectralOptions:
    """Options of a plan; csrc/audio/spectral.h says what they do."""

    frame_length: int
    hop_length: int
    n_fft: int
    offset: int
    edge: Edge
    scale: float
    signal_preemphasis: float
    frame_preemphasis: float
    remove_dc_offset: bool
    exponent: float
    power_add: float
    power_floor: float
    round_spectrum: bool
    add: float
    floor: float
    log: Log
    multiply: float
    shift: float
    dynamic_range: float
    energy: Energy
    raw_energy: bool
    energy_floor: float
    bins_first: bool
    double_precision: bool
    double_output: bool
    prime_factor_400: bool
    def __init__(self) -> None: ...

class SpectralPlan:
    num_out: int
    largest_sample: float
    num_bytes: int
    bins_first: bool
    double_precision: bool
    double_output: bool
    def __init__(
        self,
        options: SpectralOptions,
        window: np.ndarray,
        filters: np.ndarray | None = None,
        dct: np.ndarray | None = None,
    ) -> None: ...
    def run(
        self,
        format: Format,
        samples: list[int],
        num_input: list[int],
        num_samples: list[int],
        num_frames: list[int],
        out: list[int],
        out_stride: int,
        num_threads: int,
    ) -> list[int]: ...
    def run_rows(
        self,
        samples: list[np.ndarray],
        num_samples: list[int],
        num_frames: list[int],
        out: np.ndarray,
        num_threads: int,
    ) -> list[int]: ...
    def device_tables(self) -> tuple[np.ndarray, ...]: ...
    def device_bytes(self) -> int: ...
    def run_device(
        self,
        tables: list[int],
        samples: list[int],
        num_valid: list[int],
        num_samples: list[int],
        num_frames: list[int],
        out: list[int],
        sample_stride: int,
        is_int16: bool,
        out_type: int,
        out_stride: int,
        clip_max: int,
        stream: int,
        device: int,
        on_host: bool,
    ) -> None: ...

class SpectralStream:
    def __init__(self, plan: SpectralPlan) -> None: ...
    def push(self, samples: int, type: int, count: int) -> int: ...
    def finish(self, total_frames: int) -> int: ...
    def pull(self, out: int, out_stride: int, count: int) -> bool: ...
    @property
    def num_received(self) -> int: ...
    @property
    def next_frame(self) -> int: ...
    def state(self) -> tuple[int, int, int, np.ndarray]: ...
    def set_state(self, received: int, next_frame: int, first_kept: int, kept: np.ndarray) -> None: ...

def read_samples(
    format: Format, samples: list[int], num_input: list[int], out: list[int], is_double: bool, num_threads: int
) -> None: ...
def read_range(
    format: Format,
    samples: int,
    first_input: int,
    num_input: int,
    first: int,
    count: int,
    out: int,
    is_double: bool,
    num_threads: int,
) -> None: ...
def standardize(
    features: list[int],
    num_frames: list[int],
    num_valid: list[int],
    num_bins: int,
    is_double: bool,
    ddof: int,
    eps_inside: float,
    eps_outside: float,
    means: bool,
    variances: bool,
    padding: float,
) -> None: ...
def digest(table: np.ndarray) -> tuple[int, int]: ...
def address_of(array: np.ndarray) -> int: ...
def turns() -> dict[str, int]: ...
def active_isa() -> str: ...
def best_isa() -> str: ...
def set_isa(name: str) -> str: ...
def isas() -> list[str]: ...
def build_info_json() -> str: ...
def cuda_status() -> dict[str, Any]: ...

# What computes the ops takes addresses and strides: see csrc/python/.
def __getattr__(name: str) -> Callable[..., None]: ...
