"""Windowed-sinc filters between two rates, and a signal resampled as it arrives: what `resample` is made of."""

import math
from typing import Any, NamedTuple

import numpy as np

from mmlm_fast import _C
from mmlm_fast.audio.arguments import plain_float, whole
from mmlm_fast.audio.spec import num_threads
from mmlm_fast.audio.tables import kept_within
from mmlm_fast.audio.waveforms import ARRAYS, SAMPLE_TYPES, native_format

METHODS = ("sinc_interp_hann", "sinc_interp_kaiser")
_KAISER_BETA = 14.769656459379492
MAX_RATE = 2**31 - 1
# Beyond these a table of all phases is larger than what most clips need of it: the taps are made with every output,
# which costs five times as much. All rates that audio comes in are below.
_MAX_TAPS, _MAX_OLD_RATE = 2**18, 2048


class Filter(NamedTuple):
    """A windowed sinc between coprime rates: its value at ``t = base * (k / old - p / new)``, for ``|t| < width``."""

    old: int
    new: int
    width: int = 6
    rolloff: float = 0.99
    method: str = METHODS[0]
    beta: float = 0.0

    @classmethod
    def between(cls, orig_freq: int, new_freq: int, *options: Any) -> "Filter":
        """Return the filter of two rates, whatever they have in common."""
        common = math.gcd(orig_freq, new_freq)
        return cls(orig_freq // common, new_freq // common, *options)

    @property
    def base(self) -> float:
        return min(self.old, self.new) * self.rolloff

    @property
    def before(self) -> int:
        """Samples that an output needs on each side of it."""
        return math.ceil(self.width * self.old / self.base)

    @property
    def has_table(self) -> bool:
        return self.old <= _MAX_OLD_RATE and self.new * (2 * self.before + 3) <= _MAX_TAPS


def taps_of(f: Filter) -> tuple[np.ndarray, np.ndarray]:
    """Make the taps ``[new, num_taps]`` in float64 and the first sample of each phase ``[new]``.

    Output ``new * j + p`` is the sum of ``taps[p, k] * x[old * j + first[p] + k]``.

    Source: torchaudio ``functional._get_sinc_resample_kernel``; Smith, Digital Audio Resampling (2002).
    """
    count = 2 * f.before + 3
    first = np.arange(f.new) * f.old // f.new - f.before - 1
    taps = np.empty((f.new, count))
    step = max(1, 2**14 // count)
    for p in range(0, f.new, step):  # in blocks: temporaries of a few hundred KiB
        k = first[p : p + step, None] + np.arange(count)
        t = np.clip((k / f.old - np.arange(p, min(p + step, f.new))[:, None] / f.new) * f.base, -f.width, f.width)
        if f.method == METHODS[0]:
            window = np.cos(t * np.pi / f.width / 2) ** 2
        else:
            window = np.i0(f.beta * np.sqrt(1 - (t / f.width) ** 2)) / np.i0(f.beta)
        block = np.sinc(t) * window * (f.base / f.old)
        block[np.abs(t) >= f.width] = 0.0  # the sinc's zero, but for rounding
        taps[p : p + step] = block
    return taps, first


def num_resampled(num_samples: int, orig_freq: int, new_freq: int) -> int:
    """Return the number of samples after resampling; an `orig_freq` of 0 means the rate is `new_freq` already."""
    if not orig_freq or orig_freq == new_freq:
        return num_samples
    common = math.gcd(orig_freq, new_freq)
    return -(-num_samples * (new_freq // common) // (orig_freq // common))


def native_resampler(
    orig_freq: int, new_freq: int, width: int = 6, rolloff: float = 0.99, method: str = METHODS[0], beta: float = 0.0
) -> "_C.Resampler | None":
    """Return the core's resampler, or None where the rates are the same."""
    if not orig_freq or orig_freq == new_freq:
        return None
    return _native(Filter.between(orig_freq, new_freq, width, rolloff, method, beta))


# Taps in float32 and float64, with what phases have beside them.
@kept_within(16 * 2**20, lambda resampler: resampler.num_bytes)
def _native(f: Filter) -> "_C.Resampler":
    if f.has_table:
        return _C.Resampler(f.old, f.new, *taps_of(f))
    return _C.Resampler(f.old, f.new, f.width, f.rolloff, -1.0 if f.method == METHODS[0] else f.beta)


def checked_rates(orig_freq: Any, new_freq: Any) -> tuple[int, int]:
    """Return two rates in whole hertz, or raise ValueError."""
    what = "a positive whole number of hertz"
    return whole("orig_freq", orig_freq, 1, MAX_RATE, what), whole("new_freq", new_freq, 1, MAX_RATE, what)


def checked_options(
    width: Any = 6, rolloff: float = 0.99, method: str = METHODS[0], beta: float | None = None
) -> tuple[int, float, str, float]:
    """Return the options of a filter, or raise ValueError."""
    if method not in METHODS:
        raise ValueError(f"resampling_method must be among {', '.join(METHODS)}, got {method!r}")
    width, rolloff = whole("lowpass_filter_width", width, 1, 2**16), plain_float(rolloff)
    if not 0 < rolloff <= 1:
        raise ValueError(f"rolloff must be in (0, 1], got {rolloff}")
    if method == METHODS[0]:
        return width, rolloff, method, 0.0
    beta = _KAISER_BETA if beta is None else plain_float(beta)
    if not 0 <= beta <= 700:
        raise ValueError(f"beta must be from 0 to 700, got {beta}")
    return width, rolloff, method, beta


class ResampledSignal:
    """Resample one signal that arrives in pieces, bit by bit as `resample`; keeps two filters' lengths of samples.

    Args:
        arguments: Rates and options, checked.
        is_double: In float64.
        largest: Largest sample that is taken.
    """

    def __init__(self, arguments: tuple, is_double: bool, largest: float = math.inf) -> None:
        self._arguments, self._largest = arguments, largest
        self._filter = Filter.between(*arguments)
        self._resampler = native_resampler(*arguments)
        self._is_double = is_double
        kind = np.dtype(np.float64 if is_double else np.float32)
        self._format = _C.Format(SAMPLE_TYPES[kind], 1, 0, 1, self._resampler)
        self.num_received = self.num_given = self._first = 0
        self._kept = np.empty(0, kind)

    def push(self, samples: np.ndarray) -> np.ndarray:
        """Return the outputs that are complete with these samples, ``[N]`` or ``[channels, N]``.

        Raises:
            ValueError: for samples that are not finite or too large; then none is taken.
        """
        chunk = mono_of(samples, self._is_double)
        raise_if_bad(chunk, self._largest)
        self._kept = np.concatenate([self._kept, chunk])
        self.num_received += len(chunk)
        f, complete = self._filter, self.num_received
        if self._resampler is not None:  # output i needs the samples up to floor(i * old / new) + before + 1
            complete = max(0, -(-(complete - f.before - 1) * f.new // f.old))
        return self._pull(complete)

    def finish(self) -> np.ndarray:
        """Return the outputs that are left, with zeros behind the end."""
        return self._pull(self.num_total)

    @property
    def num_total(self) -> int:
        """Outputs of the signal if it ends here."""
        return num_resampled(self.num_received, *self._arguments[:2])

    def _pull(self, complete: int) -> np.ndarray:
        count, f = max(0, complete - self.num_given), self._filter
        out = np.empty(count, self._kept.dtype)
        if count:
            place = self._first, len(self._kept), self.num_given, count
            kept, to = ARRAYS.address(self._kept), ARRAYS.address(out)
            _C.read_range(self._format, kept, *place, to, self._is_double, num_threads())
        self.num_given += count
        before = 0 if self._resampler is None else f.before
        first = min(max(0, self.num_given * f.old // f.new - before), self.num_received)
        self._kept, self._first = self._kept[first - self._first :].copy(), first
        return out

    def state(self) -> tuple[int, int, int, np.ndarray]:
        """Return all that `set_state` needs to go on."""
        return self.num_received, self.num_given, self._first, self._kept.copy()

    def set_state(self, received: int, given: int, first: int, kept: np.ndarray) -> None:
        """Go on where another signal of the same arguments was."""
        if not 0 <= first <= received or first + len(kept) != received:
            raise ValueError("not the state of a stream")
        self.num_received, self.num_given, self._first, self._kept = received, given, first, kept.copy()


def mono_of(samples: np.ndarray, is_double: bool) -> np.ndarray:
    """Return samples ``[N]`` or ``[channels, N]`` as dense floats, integers scaled to [-1, 1), channels averaged."""
    out = np.empty(samples.shape[-1], np.float64 if is_double else np.float32)
    format = native_format(ARRAYS, [samples], None)
    _C.read_samples(format, [ARRAYS.address(samples)], [samples.shape[-1]], [ARRAYS.address(out)], is_double, 1)
    return out


def read(
    library: Any,
    waveforms: list[Any],
    orig_freq: int,
    new_freq: int,
    options: tuple,
    lengths: list[int],
    out: int,
    is_double: bool,
) -> None:
    """Resample clips in the core to one row of numbers at address `out`, clip behind clip."""
    starts, size = [out], 8 if is_double else 4
    for n in lengths[:-1]:
        starts.append(starts[-1] + n * size)
    format = native_format(library, waveforms, native_resampler(orig_freq, new_freq, *options))
    addresses, num_input = [library.address(w) for w in waveforms], [w.shape[-1] for w in waveforms]
    _C.read_samples(format, addresses, num_input, starts, is_double, num_threads())


def raise_if_bad(samples: np.ndarray, largest: float) -> None:
    """Refuse samples that are not finite, or beyond `largest`."""
    with np.errstate(over="ignore", invalid="ignore"):
        most = float(np.abs(samples).max(initial=0.0))
    if not math.isfinite(most):
        raise ValueError("samples must be finite, got NaN or infinity")
    if most > largest:
        raise ValueError("samples must not be too large for their squares, got an overflow")
