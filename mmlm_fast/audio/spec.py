"""What features are: one typed, frozen value from which tables, the native core's plan and an op's argument follow.

A family (`log_mel.WHISPER`, `nemo.NEMO`, `kaldi.KaldiSettings(…).spec()`) is a `Spec`; another extractor of the family
is ``dataclasses.replace(WHISPER, …)``. `prepared` makes the plan of a spec and keeps it, by value.
"""

import functools
import json
import math
import operator
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from threading import Lock
from typing import Any, Literal, NamedTuple
from weakref import WeakValueDictionary

import numpy as np

from mmlm_fast import _C
from mmlm_fast.audio.elementary import DEPENDENT, functions
from mmlm_fast.audio.filters import cosine_matrix, kaldi_mel_filters, lifter, mel_filters, window_of
from mmlm_fast.audio.tables import ByteCache, Table

FLT_EPSILON = 1.1920928955078125e-07
MAX_N_FFT = 1 << 24  # of the core
Precision = Literal["float32", "float64"]


class SpecError(ValueError):
    """A spec that the core has no plan for."""


def _integer(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise SpecError(f"{name} must be a whole number, got {value!r}") from None


# ---- parts of a spec ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Window:
    """A window by name; see `filters.window_of`."""

    name: str
    periodic: bool = True
    blackman_coeff: float = 0.42
    computed_in: Precision = "float64"

    def table(self, frame_length: int) -> np.ndarray:
        return window_of(self.name, frame_length, self.periodic, self.blackman_coeff, self.computed_in)


@dataclass(frozen=True)
class MelFilters:
    """Triangles over hertz; see `filters.mel_filters`."""

    num_mel_bins: int
    f_min: float = 0.0
    f_max: float | None = None
    norm: str | None = "slaney"
    mel_scale: str = "slaney"
    computed_in: Precision = "float64"
    highest_hz: float | None = None

    def table(self, n_fft: int, sampling_rate: float) -> np.ndarray:
        return mel_filters(
            self.num_mel_bins,
            n_fft=n_fft,
            sampling_rate=sampling_rate,
            f_min=self.f_min,
            f_max=self.f_max,
            norm=self.norm,
            mel_scale=self.mel_scale,
            dtype=self.computed_in,
            highest_hz=self.highest_hz,
        )


@dataclass(frozen=True)
class KaldiFilters:
    """Triangles over mel; see `filters.kaldi_mel_filters`."""

    num_mel_bins: int
    low_freq: float = 20.0
    high_freq: float = 0.0
    vtln_low: float = 100.0
    vtln_high: float = -500.0
    vtln_warp: float = 1.0

    def table(self, n_fft: int, sampling_rate: float) -> np.ndarray:
        vtln = (self.vtln_low, self.vtln_high, self.vtln_warp)
        return kaldi_mel_filters(self.num_mel_bins, n_fft, sampling_rate, self.low_freq, self.high_freq, *vtln)


@dataclass(frozen=True)
class Cosines:
    """A cosine transform, liftered the way of librosa: ``1 + Q / 2 sin(pi (i + 1) / Q)``."""

    num_ceps: int
    norm: str | None = "ortho"
    lifter: float = 0.0
    computed_in: Precision = "float64"

    def table(self, num_mel_bins: int) -> np.ndarray:
        scale = lifter(self.num_ceps + 1, self.lifter)[1:] if self.lifter else np.ones(self.num_ceps)
        return cosine_matrix(self.num_ceps, num_mel_bins, self.norm, self.computed_in) * scale[:, None]


@dataclass(frozen=True)
class KaldiCosines:
    """Kaldi's cosine transform with its lifter, in float32 as torchaudio makes them.

    With `htk_compat` C0 comes last, and unless the energy replaces it without the factor sqrt(1/2) that the orthonormal
    transform gives it.
    """

    num_ceps: int
    lifter: float = 22.0
    htk_compat: bool = False
    use_energy: bool = False

    def table(self, num_mel_bins: int) -> np.ndarray:
        matrix = cosine_matrix(self.num_ceps, num_mel_bins, dtype="float32")
        matrix = matrix * lifter(self.num_ceps, self.lifter, "float32")[:, None]
        if self.htk_compat:
            matrix = np.concatenate([matrix[1:], matrix[:1] * (1 if self.use_energy else math.sqrt(2))])
        return matrix


@dataclass(frozen=True)
class Framing:
    """Where frames lie: frame t begins at sample ``offset + t * hop_length``.

    Of N samples there are ``1 + (N + pad_total - span) // hop_length - num_dropped`` frames.

    Attributes:
        edge: How samples outside the clip are made up: "none" (no frame reaches there), "zero", "reflect" (mirrored
            about the first and last sample) or "mirror" (mirrored including them).
        min_samples: Samples that a clip needs.
    """

    offset: int
    pad_total: int
    span: int
    edge: Literal["none", "zero", "reflect", "mirror"] = "none"
    num_dropped: int = 0
    min_samples: int = 1

    @classmethod
    def centered(cls, n_fft: int, frame_length: int, edge: Any, num_dropped: int = 0) -> "Framing":
        """Centre frame t at sample ``t * hop_length``, a window shorter than the transform in its middle."""
        middle = n_fft // 2
        least = middle + 1 if edge == "reflect" else 1  # reflection needs more samples than it adds
        return cls((n_fft - frame_length) // 2 - middle, 2 * middle, n_fft, edge, num_dropped, least)

    @classmethod
    def inside(cls, n_fft: int, frame_length: int, num_dropped: int = 0) -> "Framing":
        """Take the frames of `n_fft` samples that fit, a shorter window in their middle."""
        return cls((n_fft - frame_length) // 2, 0, n_fft, "none", num_dropped, n_fft)

    @classmethod
    def snipped(cls, frame_length: int) -> "Framing":
        """Take the windows that fit, as Kaldi does."""
        return cls(0, 0, frame_length, "none", 0, frame_length)


class Layout(NamedTuple):
    """What a call needs to know of a spec; plain numbers, so that Dynamo can work with them."""

    num_out: int
    hop_length: int
    pad_total: int
    span: int
    num_dropped: int
    min_samples: int
    bins_first: bool
    sampling_rate: int

    def num_frames(self, num_samples: int) -> int:
        return max(0, 1 + (num_samples + self.pad_total - self.span) // self.hop_length - self.num_dropped)

    def check_length(self, num_samples: int) -> None:
        if num_samples < self.min_samples:
            raise ValueError(
                f"a clip needs at least {self.min_samples} samples after padding, got {num_samples}: pad it, or pass "
                f"num_samples where there is such an argument"
            )

    def shape(self, num_frames: int) -> tuple[int, int]:
        return (self.num_out, num_frames) if self.bins_first else (num_frames, self.num_out)


# ---- the spec -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spec:
    """Short-time spectral features: frames, window, DFT, power, filters, logarithm, cosine transform.

    Attributes:
        n_fft: Length of the transform, at least `frame_length`.
        frame_length: Length of the window.
        hop_length: Samples between frames.
        window: By name, or its values ``[frame_length]``.
        framing: Where frames lie, and what is beyond the ends.
        sampling_rate: In hertz.
        filters: By what they are, or their weights ``[num_filters, n_fft // 2 + 1]``; None for the spectrum itself.
        dct: Cosine transform behind the logarithm, if any.
        scale: Factor on the samples.
        signal_preemphasis: ``y[t] = x[t] - c x[t-1]`` on the whole signal, with ``x[-1] = 0``.
        frame_preemphasis: The same inside each frame, with ``x[-1] = x[0]``.
        remove_dc_offset: Subtract each frame's mean first.
        exponent: Of the magnitude: 2 for power.
        power_add: Added to the power.
        power_floor: Least power, before `exponent` is applied.
        round_spectrum: Round the spectrum to complex64 first, as peers do that transform in float64.
        add: Added to sums of filters.
        floor: Least sum of a filter, or of the power without filters.
        log: "none", "natural" or "decimal".
        multiply: Factor on the logarithm.
        shift: Added behind the factor.
        dynamic_range: Raise values to the clip's largest less this; 0 for not. In units of the result.
        energy: Where a frame's log energy goes: "none", "first", "last", "replace_first", "replace_last".
        raw_energy: Energy before pre-emphasis and window, else after.
        energy_floor: Least energy; never below FLT_EPSILON.
        bins_first: ``[bins, frames]``, else ``[frames, bins]``.
        dtype: Name of the result's dtype: float32, float64, float16 or bfloat16.
        computed_in: Dtype of the arithmetic; None for float64 where the result is, and where the transform's length has
            prime factors above 5: there the core's float32 transforms err more than torch's.
    """

    n_fft: int
    frame_length: int
    hop_length: int
    window: Window | Table
    framing: Framing
    sampling_rate: Any = 16000
    filters: MelFilters | KaldiFilters | Table | None = None
    dct: Cosines | KaldiCosines | None = None
    scale: float = 1.0
    signal_preemphasis: float = 0.0
    frame_preemphasis: float = 0.0
    remove_dc_offset: bool = False
    exponent: float = 2.0
    power_add: float = 0.0
    power_floor: float = 0.0
    round_spectrum: bool = False
    add: float = 0.0
    floor: float = 0.0
    log: Literal["none", "natural", "decimal"] = "none"
    multiply: float = 1.0
    shift: float = 0.0
    dynamic_range: float = 0.0
    energy: Literal["none", "first", "last", "replace_first", "replace_last"] = "none"
    raw_energy: bool = True
    energy_floor: float = 0.0
    bins_first: bool = True
    dtype: str = "float32"
    computed_in: Precision | None = None

    def __post_init__(self) -> None:
        for name in ("n_fft", "frame_length", "hop_length"):
            value = getattr(self, name)
            if type(value) is not int:  # 161.0 would be equal to 161, and share its plan
                object.__setattr__(self, name, _integer(name, value))
        object.__setattr__(self, "_hash", hash(tuple(getattr(self, f.name) for f in fields(self))))

    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined, no-any-return]

    def __reduce__(self) -> tuple:
        return Spec, tuple(getattr(self, f.name) for f in fields(self))  # hashes differ between processes

    @functools.cached_property
    def why_not(self) -> str:
        """Why the core has no plan for it, where an extractor's attributes say so; empty where it has."""
        if not 1 <= self.frame_length <= self.n_fft <= MAX_N_FFT or self.hop_length < 1:
            return f"frames of {self.frame_length} samples every {self.hop_length} in a transform of {self.n_fft}"
        numbers = (self.scale, self.signal_preemphasis, self.frame_preemphasis, self.power_add, self.power_floor,
                   self.add, self.floor, self.multiply, self.shift, self.dynamic_range)  # fmt: skip
        if not all(map(math.isfinite, numbers)) or self.dynamic_range < 0:
            return "an option that is not finite, or a negative range"
        if self.log != "none" and isinstance(self.filters, Table) and not self.filters.least >= 0:
            return "logarithms of negative sums"
        return ""

    @property
    def table_bytes(self) -> int:
        """Bytes of the tables that it holds."""
        return 1024 + sum(part.array.nbytes for part in (self.window, self.filters) if isinstance(part, Table))

    @property
    def compute_dtype(self) -> str:
        """Name of the dtype of references, and of what the core writes."""
        return "float64" if self.dtype == "float64" else "float32"

    @property
    def is_exact(self) -> bool:
        """Whether the core computes in float64."""
        if self.computed_in is not None:
            return self.computed_in == "float64"
        return self.dtype == "float64" or not _is_smooth(self.n_fft)

    @functools.cached_property
    def key(self) -> str:
        """The spec as text, from which `spec_of` makes it again: an op's argument, which an exported graph holds."""
        key = json.dumps(_plain(self))
        _BY_KEY[key] = self
        return key


_BY_KEY: WeakValueDictionary[str, Spec] = WeakValueDictionary()
_PARTS = {part.__name__: part for part in (Spec, Window, MelFilters, KaldiFilters, Cosines, KaldiCosines, Framing)}
_OPTIONS = [
    *("frame_length", "hop_length", "n_fft", "scale", "signal_preemphasis", "frame_preemphasis", "remove_dc_offset"),
    *("exponent", "power_add", "power_floor", "round_spectrum", "add", "floor", "multiply", "shift", "dynamic_range"),
    *("raw_energy", "energy_floor", "bins_first"),
]


def _is_smooth(n: int) -> bool:
    """Return whether a number is even and has no prime factor above 5."""
    if n % 2:
        return False
    for prime in (2, 3, 5):
        while n % prime == 0:
            n //= prime
    return n == 1


def _plain(value: Any) -> Any:
    """Turn a spec or a part of one into what JSON holds: its class and the fields that are not their defaults."""
    if isinstance(value, Table):
        return ["Table", value.text()]
    if type(value).__name__ not in _PARTS:
        return value
    given = {f.name: getattr(value, f.name) for f in fields(value)}
    defaults = {f.name: f.default for f in fields(value)}
    return [type(value).__name__, {n: _plain(v) for n, v in given.items() if v != defaults[n]}]


def _part(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    name, held = value
    return Table.from_text(held) if name == "Table" else _PARTS[name](**{n: _part(v) for n, v in held.items()})


def spec_of(key: str) -> Spec:
    """Return the spec of a key, in whatever process it was made."""
    spec = _BY_KEY.get(key)
    return _read(key) if spec is None else spec


@functools.lru_cache(maxsize=64)
def _read(key: str) -> Spec:
    return _part(json.loads(key))


# ---- what a call needs of it --------------------------------------------------------------------------------------


class Prepared:
    """Tables of a spec in float64, its options for the core, and the plan that the first call makes of them."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.window = _array(spec.window, spec.frame_length)
        self.filters = None if spec.filters is None else _array(spec.filters, spec.n_fft, spec.sampling_rate)
        rows = spec.n_fft // 2 + 1 if self.filters is None else len(self.filters)
        self.dct = None if spec.dct is None else spec.dct.table(rows)
        self.num_out = (rows if self.dct is None else len(self.dct)) + (spec.energy in ("first", "last"))
        framing = spec.framing
        self.layout = Layout(
            num_out=self.num_out,
            hop_length=spec.hop_length,
            pad_total=framing.pad_total,
            span=framing.span,
            num_dropped=framing.num_dropped,
            min_samples=framing.min_samples,
            bins_first=spec.bins_first,
            sampling_rate=spec.sampling_rate,
        )
        self._plans: dict[bool, _C.SpectralPlan] = {}
        self._lock = Lock()

    @property
    def plan(self) -> "_C.SpectralPlan":
        """The plan of the CPU."""
        return self._plans.get(False) or self._made(False)

    @property
    def device_plan(self) -> "_C.SpectralPlan":
        """The plan of CUDA, which computes in float32."""
        return self._plans.get(True) or self._made(True)

    def _made(self, for_device: bool) -> "_C.SpectralPlan":
        with self._lock:
            if for_device not in self._plans:
                options = self._options(for_device)
                self._plans[for_device] = _C.SpectralPlan(options, self.window, self.filters, self.dct)
            return self._plans[for_device]

    def _options(self, for_device: bool) -> "_C.SpectralOptions":
        spec, options = self.spec, _C.SpectralOptions()
        for name in _OPTIONS:
            setattr(options, name, getattr(spec, name))
        options.offset = spec.framing.offset
        options.edge = getattr(_C.Edge, spec.framing.edge)
        options.log = getattr(_C.Log, spec.log)
        options.energy = getattr(_C.Energy, spec.energy)
        options.double_precision = spec.is_exact and not for_device
        options.double_output = spec.dtype == "float64" and not for_device
        options.prime_factor_400 = not for_device
        return options

    @property
    def num_bytes(self) -> int:
        """Of tables, and about as much of the plans."""
        arrays = (self.window, self.filters, self.dct)
        return 4096 + sum(2 * a.nbytes for a in arrays if a is not None) + 128 * self.spec.n_fft


def _array(part: Any, *arguments: Any) -> np.ndarray:
    return part.array if isinstance(part, Table) else part.table(*arguments)


_PREPARED: ByteCache[Prepared] = ByteCache(64 * 2**20, lambda prepared: prepared.num_bytes)
DEPENDENT.append(_PREPARED)


def prepared(spec: Spec) -> Prepared:
    """Return tables and plans of a spec: kept by its value, up to a number of bytes, shared by threads."""
    functions()  # what is kept is forgotten where they change
    return _PREPARED.get(spec, lambda: Prepared(spec))


# ---- keywords to specs --------------------------------------------------------------------------------------------


def torch_is_loaded() -> bool:
    """Return whether there can be tensors."""
    return hasattr(sys.modules.get("torch"), "Tensor")


def is_tracing() -> bool:
    """Return whether torch.compile or torch.export is tracing this call."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.compiler.is_compiling()


def constant_in_graphs(function: Callable) -> Callable:
    """Mark a function that Dynamo calls while tracing, to take its result as a constant: no table comes into a graph.

    What `torch.compiler.assume_constant_result` does, which would import Dynamo, two seconds, with this package.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


# Of keywords by which a spec may be kept; torch adds its dtypes.
PLAIN_TYPES: set[type] = {int, float, bool, str, type(None)}
_SPECS: ByteCache[Spec] = ByteCache(16 * 2**20, lambda spec: spec.table_bytes)


def spec_with_tables(make: Callable[..., Spec]) -> Callable[..., Spec]:
    """Decorate a function from plain values and tables to a spec: kept up to a number of bytes of tables.

    80.0 is not taken for 80.
    """

    @functools.wraps(make)
    def kept(*args: Any, **kwargs: Any) -> Spec:
        key = (make, args, *map(type, args), *kwargs.items(), *map(type, kwargs.values()))
        return _SPECS.get(key, lambda: make(*args, **kwargs))

    return kept


def kept_spec(plain: Callable[..., dict[str, Any]]) -> Callable[[Callable[..., Spec]], Callable[..., Any]]:
    """Decorate a function from keywords to a spec: each spec is made once, and proved to have tables.

    In a graph that is being traced the result is the spec's key.

    Args:
        plain: Checks the keywords and returns them as plain numbers and names, one value for all that are equal, and
            constants to Dynamo.
    """

    def decorate(make: Callable[..., Spec]) -> Callable[..., Any]:
        @spec_with_tables
        def made(**arguments: Any) -> Spec:
            spec = make(**arguments)
            prepared(spec)  # bad arguments are the caller's error, not the op's
            return spec

        @functools.lru_cache(maxsize=256, typed=True)  # 80.0 filters are an error, 80 are not
        def kept(**given: Any) -> Spec:
            return made(**plain(**given))

        @constant_in_graphs
        def key_of(**arguments: Any) -> str:
            return made(**arguments).key

        @functools.wraps(make)
        def spec(**given: Any) -> Any:
            if is_tracing():
                return key_of(**plain(**given))
            if PLAIN_TYPES.issuperset(map(type, given.values())):
                return kept(**given)
            return made(**plain(**given))

        return spec

    return decorate


# ---- a call of the core -------------------------------------------------------------------------------------------


def num_threads() -> int:
    """Return how many threads a call may use: torch's number, without torch that of OMP_NUM_THREADS or of the CPUs."""
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "get_num_threads"):
        return torch.get_num_threads()
    wanted = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return max(int(wanted), 1) if wanted.isdecimal() else _num_cpus()


@functools.cache
def _num_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(
    plan: "_C.SpectralPlan",
    format: "_C.Format",
    samples: list[int],
    num_input: list[int],
    num_samples: list[int],
    num_frames: list[int],
    out: list[int],
    out_stride: int,
) -> None:
    """Compute the features of clips: addresses in, addresses out, each clip with zeros up to its `num_samples`.

    Args:
        format: What the samples are; see `waveforms.native_format`.
        samples: Address of each clip.
        num_input: Samples that each has, a channel.
        num_samples: Samples that each counts as, behind resampling.
        num_frames: Frames wanted of each.
        out: Where each clip's features go.
        out_stride: Numbers between rows there.

    Raises:
        ValueError: for clips whose features would not be finite, all named.
    """
    bad = plan.run(format, samples, num_input, num_samples, num_frames, out, out_stride, num_threads())
    if bad:
        raise_not_finite(bad)


def raise_not_finite(bad: Sequence[int]) -> None:
    """Name the clips whose samples are not finite, or too large."""
    raise ValueError(
        f"waveform must be finite and not too large for its squares, got NaN, infinity or an overflow in clip"
        f"{'s' if len(bad) > 1 else ''} {', '.join(map(str, bad[:10]))}{' …' if len(bad) > 10 else ''}"
    )


def offsets_of(sizes: Sequence[int]) -> list[int]:
    """Return where each of several parts begins, and where the last ends."""
    offsets = [0]
    for size in sizes:
        offsets.append(offsets[-1] + size)
    return offsets
