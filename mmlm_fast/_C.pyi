"""The native core; see csrc/bindings.cpp."""

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

class SpectralPlan:
    num_out: int
    largest_sample: float
    num_bytes: int
    bins_first: bool
    double_precision: bool
    double_output: bool
    def __init__(
        self,
        options: dict[str, Any],
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
def active_isa() -> str: ...
def best_isa() -> str: ...
def set_isa(name: str) -> str: ...
def isas() -> list[str]: ...
def build_info_json() -> str: ...
def cuda_status() -> dict[str, Any]: ...

Heads = tuple[int, ...]

def attention_forward(
    type: int,
    sizes: tuple[int, ...],
    scale: float,
    softcap: float,
    tensors: tuple[Heads, ...],
    lo: int,
    hi: int,
    mask_stride: int,
    sinks: int,
    largest: int,
    total: int,
    num_threads: int,
) -> None: ...
def attention_backward(
    type: int,
    sizes: tuple[int, ...],
    scale: float,
    softcap: float,
    tensors: tuple[Heads, ...],
    lo: int,
    hi: int,
    mask_stride: int,
    largest: int,
    total: int,
    gradients: tuple[Heads, ...],
    grad_lse: int,
    delta: int,
    num_threads: int,
) -> None: ...

# Address and stride of rows; (0, 0): not given.
Rows = tuple[int, int]

def add_norm_forward(
    type: int,
    rows: int,
    size: int,
    is_layer: bool,
    weight: int,
    bias: int,
    eps: float,
    x: Rows,
    residual: Rows,
    sum: Rows,
    out: Rows,
    num_threads: int,
) -> None: ...
def add_norm_backward(
    type: int,
    rows: int,
    size: int,
    is_layer: bool,
    weight: int,
    eps: float,
    sum: Rows,
    grad: Rows,
    grad_sum: Rows,
    dx: Rows,
    dweight: int,
    dbias: int,
    num_threads: int,
) -> None: ...
def glu_forward(
    type: int, activation: int, rows: int, size: int, gate: Rows, up: Rows, bias: int, out: Rows, num_threads: int
) -> None: ...
def glu_backward(
    type: int,
    activation: int,
    rows: int,
    size: int,
    gate: Rows,
    up: Rows,
    bias: int,
    grad: Rows,
    dgate: Rows,
    dup: Rows,
    dbias: int,
    num_threads: int,
) -> None: ...
def gated_add_forward(
    type: int, rows: int, size: int, x: Rows, residual: Rows, gate: int, keep: int, out: Rows, num_threads: int
) -> None: ...
def gated_add_backward(
    type: int, rows: int, size: int, x: Rows, gate: int, keep: int, grad: Rows, dx: Rows, sums: int, num_threads: int
) -> None: ...
def rope_forward(
    type: int,
    sizes: tuple[int, ...],
    interleaved: bool,
    inverse: bool,
    cos: int,
    sin: int,
    table_stride: int,
    weight: int,
    eps: float,
    x: Heads,
    out: Heads,
    num_threads: int,
) -> None: ...
def rope_backward(
    type: int,
    sizes: tuple[int, ...],
    interleaved: bool,
    cos: int,
    sin: int,
    table_stride: int,
    weight: int,
    eps: float,
    x: Heads,
    dx: Heads,
    grad: Heads,
    dweight: int,
    num_threads: int,
) -> None: ...
def merge_forward(
    type: int,
    rows: int,
    size: int,
    source: int,
    base: Rows,
    base_is_rows: bool,
    add: bool,
    scale: float,
    features: list[tuple[int, int, int]],
    out: Rows,
    num_threads: int,
) -> None: ...
def merge_backward(
    type: int, rows: int, size: int, source: int, features: list[tuple[int, int, int]], grad: Rows, num_threads: int
) -> None: ...
def fuse_forward(
    type: int,
    rows: int,
    size: int,
    tokens: int,
    features: list[Rows],
    broadcast: list[bool],
    query: int,
    present: int,
    weights: int,
    out: Rows,
    num_threads: int,
) -> None: ...
def fuse_backward(
    type: int,
    rows: int,
    size: int,
    tokens: int,
    features: list[Rows],
    broadcast: list[bool],
    query: int,
    present: int,
    weights: int,
    grad: Rows,
    dfeatures: list[Rows],
    dscores: int,
    dquery: int,
    num_threads: int,
) -> None: ...
def mix_forward(
    type: int,
    rows: int,
    size: int,
    first: Rows,
    second: Rows,
    logits: Rows,
    present: int,
    out: Rows,
    gate: Rows,
    num_threads: int,
) -> None: ...
def mix_backward(
    type: int,
    rows: int,
    size: int,
    first: Rows,
    second: Rows,
    logits: Rows,
    present: int,
    grad: Rows,
    dfirst: Rows,
    dsecond: Rows,
    dlogits: Rows,
    num_threads: int,
) -> None: ...
def gather_forward(
    type: int,
    rows: int,
    size: int,
    parts: int,
    index: int,
    channels_first: bool,
    norm_at: int,
    is_layer: bool,
    weight: int,
    bias: int,
    eps: float,
    x: Rows,
    out: Rows,
    num_threads: int,
) -> None: ...
def gather_backward(
    type: int,
    rows: int,
    size: int,
    parts: int,
    index: int,
    channels_first: bool,
    norm_at: int,
    is_layer: bool,
    weight: int,
    eps: float,
    x: Rows,
    grad: Rows,
    dx: Rows,
    dweight: int,
    dbias: int,
    num_threads: int,
) -> None: ...
def patchify(
    type: int,
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
    patch: int,
    merge: int,
    repeats: int,
    pixels: int,
    scale: int,
    shift: int,
    out: int,
    num_threads: int,
) -> None: ...

Positives = tuple[int, int, int, int, int, int]

def token_loss(
    rows: int,
    vocab: int,
    logits: Rows,
    target: int,
    options: tuple[float, float, float, float],
    factor: int,
    loss: int,
    num_threads: int,
) -> None: ...
def clip_statistics(
    rows: int,
    columns: int,
    dots: Rows,
    scale: float,
    bias: float,
    positives: Positives,
    row: tuple[int, ...],
    column: tuple[int, ...],
    num_threads: int,
) -> None: ...
def clip_gradients(
    rows: int,
    columns: int,
    dots: Rows,
    scale: float,
    bias: float,
    positives: Positives,
    row: tuple[int, ...],
    column: tuple[int, ...],
    sums: int,
    num_threads: int,
) -> None: ...
def siglip_pairs(
    rows: int,
    columns: int,
    dots: Rows,
    scale: float,
    bias: float,
    positives: Positives,
    gradients: bool,
    sums: int,
    num_threads: int,
) -> None: ...
