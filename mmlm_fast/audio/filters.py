"""Tables: windows, mel filters, cosine transforms, as float64 arrays whose values were computed in `dtype`.

Peers differ here. torchaudio computes its tables in float32, even for float64 waveforms, librosa rounds its filters to
float32, transformers keeps float64: to have a peer's numbers, take its dtype.
"""

import math
from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np

from mmlm_fast.audio.elementary import DEPENDENT, functions
from mmlm_fast.audio.tables import ByteCache

Array = np.ndarray
_CACHE: ByteCache[Array] = ByteCache(16 * 2**20, lambda array: array.nbytes + 1024)
DEPENDENT.append(_CACHE)


def _kept(make: Callable[..., Array]) -> Callable[..., Array]:
    """Keep a table, in float64 and read-only; infinite and undefined values on the way are nobody's warning."""

    @wraps(make)
    def table(*args: Any, **kwargs: Any) -> Array:
        functions()  # what is kept is forgotten where they change
        return _CACHE.get((make.__name__, args, tuple(sorted(kwargs.items()))), lambda: made(*args, **kwargs))

    def made(*args: Any, **kwargs: Any) -> Array:
        with np.errstate(all="ignore"):
            array = np.array(make(*args, **kwargs), np.float64)
        array.setflags(write=False)
        return array

    return table


@_kept
def window_of(
    name: str,
    length: int,
    periodic: bool = True,
    blackman_coeff: float = 0.42,
    dtype: str = "float64",
) -> Array:
    """Make the window ``[length]``: hann, hamming, povey (hann ** 0.85), blackman, rectangular.

    Source: transformers ``audio_utils.window_function``; torchaudio ``compliance.kaldi._feature_window_function``.
    """
    f = functions()
    phase = 2 * math.pi / max(length if periodic else length - 1, 1) * np.arange(length, dtype=dtype)
    shapes: dict[str, Callable[[], Array]] = {
        "hann": lambda: f.cosine_window(length, periodic, 0.5, dtype),
        "hamming": lambda: f.cosine_window(length, periodic, 0.54, dtype),
        "povey": lambda: f.power(f.cosine_window(length, periodic, 0.5, dtype), 0.85),
        "blackman": lambda: blackman_coeff - 0.5 * f.cos(phase) + (0.5 - blackman_coeff) * f.cos(2 * phase),
        "rectangular": lambda: np.ones(length, dtype),
    }
    alias = {"hanning": "hann", "hann_window": "hann", "hamming_window": "hamming", "boxcar": "rectangular"}
    name = alias.get(name, name)
    if name not in shapes:
        raise ValueError(f"window must be among {', '.join(shapes)}, got {name!r}")
    return shapes[name]()


_LOG_STEP = math.log(6.4) / 27


def hz_to_mel(hz: float, mel_scale: str) -> float:
    """Convert hertz to mel.

    slaney: linear below 1 kHz, logarithmic above; htk: 2595 log10(1 + f / 700); kaldi: 1127 ln(1 + f / 700).
    """
    if mel_scale == "htk":
        return 2595 * math.log10(1 + hz / 700)
    if mel_scale == "kaldi":
        return 1127 * math.log(1 + hz / 700)
    if mel_scale != "slaney":
        raise ValueError(f"mel_scale must be slaney, htk or kaldi, got {mel_scale!r}")
    return 3 * hz / 200 if hz < 1000 else 15 + math.log(hz / 1000) / _LOG_STEP


def _mel_to_hz(mel: Array, mel_scale: str) -> Array:
    f = functions()
    if mel_scale == "htk":
        return 700 * (f.power(10, mel / 2595) - 1)
    if mel_scale == "kaldi":
        return 700 * (f.exp(mel / 1127) - 1)
    return np.where(mel < 15, 200 / 3 * mel, 1000 * f.exp(_LOG_STEP * (mel - 15)))


def _triangles(points: Array, edges: Array) -> Array:
    """Evaluate triangles ``[len(edges) - 2, len(points)]`` over `edges` at `points`."""
    steps = np.diff(edges)[:, None]
    rising, falling = (points - edges[:-2, None]) / steps[:-1], (edges[2:, None] - points) / steps[1:]
    return np.maximum(np.minimum(rising, falling), 0)


@_kept
def mel_filters(
    num_mel_bins: int,
    *,
    n_fft: int = 400,
    sampling_rate: float = 16000,
    f_min: float = 0.0,
    f_max: float | None = None,
    norm: str | None = "slaney",
    mel_scale: str = "slaney",
    dtype: str = "float64",
    highest_hz: float | None = None,
) -> Array:
    """Make mel filters, ``[num_mel_bins, n_fft // 2 + 1]``: triangles over hertz; with norm "slaney" of unit area each.

    `highest_hz` is the frequency of the last bin, by default its own; torchaudio takes ``sampling_rate // 2``, which
    is another one where `n_fft` or the rate is odd.

    Source: Slaney, Auditory Toolbox (1998); librosa.filters.mel; torchaudio.functional.melscale_fbanks.
    """
    if norm not in (None, "slaney"):
        raise ValueError(f'norm must be None or "slaney", got {norm!r}')
    top = sampling_rate / 2 if f_max is None else f_max
    if not 0 <= f_min < top:
        raise ValueError(f"f_min must be from 0 to below f_max, got f_min={f_min}, f_max={top}")
    linspace = functions().linspace
    edges = _mel_to_hz(
        linspace(hz_to_mel(f_min, mel_scale), hz_to_mel(top, mel_scale), num_mel_bins + 2, dtype), mel_scale
    )
    highest_hz = sampling_rate / n_fft * (n_fft // 2) if highest_hz is None else highest_hz
    filters = _triangles(linspace(0, highest_hz, n_fft // 2 + 1, dtype), edges)
    if norm == "slaney":
        filters = filters * (2 / (edges[2:] - edges[:-2]))[:, None]
    return filters


def _vtln_warp(hz: Array, warp: float, low_freq: float, high_freq: float, vtln_low: float, vtln_high: float) -> Array:
    """Warp frequencies for the vocal tract: piecewise linear, the identity outside [low_freq, high_freq].

    Source: Kaldi ``mel-computations.cc``, MelBanks::VtlnWarpFreq.
    """
    low, high, scale = vtln_low * max(1.0, warp), vtln_high * min(1.0, warp), 1.0 / warp
    left = (scale * low - low_freq) / (low - low_freq)
    right = (high_freq - scale * high) / (high_freq - high)
    above = np.where(hz < high, scale * hz, high_freq + right * (hz - high_freq))
    warped = np.where(hz < low, low_freq + left * (hz - low_freq), above)
    return np.where((hz < low_freq) | (hz > high_freq), hz, warped)


@_kept
def kaldi_mel_filters(
    num_mel_bins: int,
    n_fft: int,
    sampling_rate: float,
    low_freq: float = 20.0,
    high_freq: float = 0.0,
    vtln_low: float = 100.0,
    vtln_high: float = -500.0,
    vtln_warp: float = 1.0,
    dtype: str = "float32",
) -> Array:
    """Make Kaldi's mel filters, ``[num_mel_bins, n_fft // 2 + 1]``: triangles over mel, zero at the Nyquist frequency.

    A `high_freq` or `vtln_high` at or below 0 counts from the Nyquist frequency.

    Source: Kaldi ``mel-computations.cc``; torchaudio ``compliance.kaldi.get_mel_banks``.
    """
    nyquist = sampling_rate / 2
    high = high_freq + nyquist if high_freq <= 0 else high_freq
    if not (0 <= low_freq < nyquist and 0 < high <= nyquist and low_freq < high):
        raise ValueError(f"low_freq and high_freq must rise within 0 to {nyquist:g} Hz, got {low_freq:g} and {high:g}")
    log = functions().log
    lowest = hz_to_mel(low_freq, "kaldi")
    step = (hz_to_mel(high, "kaldi") - lowest) / (num_mel_bins + 1)
    edges = lowest + np.arange(num_mel_bins + 2, dtype=dtype) * step
    hz = sampling_rate / n_fft * np.arange(n_fft // 2, dtype=dtype)
    points = 1127 * log(1 + hz / 700)
    if vtln_warp != 1.0:
        vtln_top = vtln_high + nyquist if vtln_high < 0 else vtln_high
        if not (low_freq < vtln_low < high and 0 < vtln_top < high and vtln_low < vtln_top):
            raise ValueError(
                f"vtln_low and vtln_high must rise within low_freq and high_freq, got {vtln_low:g} and {vtln_top:g}"
            )
        warped = _vtln_warp(_mel_to_hz(edges, "kaldi"), vtln_warp, low_freq, high, vtln_low, vtln_top)
        edges = 1127 * log(1 + warped / 700)
    return np.pad(_triangles(points, edges), ((0, 0), (0, n_fft // 2 + 1 - len(points))))


@_kept
def cosine_matrix(num_ceps: int, num_mel_bins: int, norm: str | None = "ortho", dtype: str = "float64") -> Array:
    """Make the DCT-II, ``[num_ceps, num_mel_bins]``; orthonormal, or twice the sum of cosines with norm None.

    Source: scipy.fft.dct; torchaudio.functional.create_dct.
    """
    if norm not in (None, "ortho"):
        raise ValueError(f'norm must be None or "ortho", got {norm!r}')
    k, n = np.arange(num_ceps, dtype=dtype)[:, None], np.arange(num_mel_bins, dtype=dtype)
    matrix = functions().cos(math.pi / num_mel_bins * (n + 0.5) * k)
    if norm is None:
        return matrix * 2
    matrix[0] *= 1 / math.sqrt(2)
    return matrix * math.sqrt(2 / num_mel_bins)


@_kept
def lifter(num_ceps: int, coefficient: float, dtype: str = "float64") -> Array:
    """Make Kaldi's cepstral lifter, ``1 + Q / 2 sin(pi i / Q)``; ones for Q = 0."""
    if not coefficient:
        return np.ones(num_ceps)
    i = np.arange(num_ceps, dtype=dtype)
    return 1 + 0.5 * coefficient * functions().sin(math.pi * i / coefficient)
