"""What differs between the defaults of torchaudio.transforms and librosa, and their keywords made a spec."""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mmlm_fast.audio.arguments import float_name, plain_float, whole
from mmlm_fast.audio.spec import (
    Cosines,
    Framing,
    MelFilters,
    Precision,
    Spec,
    Window,
    constant_in_graphs,
    is_tracing,
    kept_spec,
)
from mmlm_fast.audio.tables import Table, kept_within

_EDGES = {"reflect": "reflect", "constant": "zero", "symmetric": "mirror"}
_LOGARITHMS = ("none", "log", "log10", "dB")


@dataclass(frozen=True)
class Convention:
    """A library's defaults.

    torchaudio makes its tables in float32, librosa in float64.
    """

    sample_rate: int
    n_fft: int
    hops_in_window: int
    pad_mode: str
    norm: str | None
    mel_scale: str
    n_mels: int
    n_mfcc: int
    computed_in: Precision


CONVENTIONS = {
    "torchaudio": Convention(
        sample_rate=16000,
        n_fft=400,
        hops_in_window=2,
        pad_mode="reflect",
        norm=None,
        mel_scale="htk",
        n_mels=128,
        n_mfcc=40,
        computed_in="float32",
    ),
    "librosa": Convention(
        sample_rate=22050,
        n_fft=2048,
        hops_in_window=4,
        pad_mode="constant",
        norm="slaney",
        mel_scale="slaney",
        n_mels=128,
        n_mfcc=20,
        computed_in="float64",
    ),
}


def convention_of(name: str) -> Convention:
    """Return a convention by name, or raise ValueError."""
    if name not in CONVENTIONS:
        raise ValueError(f"convention must be among {', '.join(CONVENTIONS)}, got {name!r}")
    return CONVENTIONS[name]


def _plain(
    *,
    convention: str,
    sample_rate: int | None,
    n_fft: int | None,
    win_length: int | None,
    hop_length: int | None,
    window_fn: Any,
    wkwargs: dict | None,
    power: float,
    normalized: bool | str,
    center: bool,
    pad_mode: str | None,
    log: str,
    amin: float,
    ref: float,
    top_db: float | None,
    dtype: Any,
    has_filters: bool,
    n_mels: int | None = None,
    f_min: float = 0.0,
    f_max: float | None = None,
    norm: str | None = "default",
    mel_scale: str | None = None,
    num_ceps: int = 0,
    dct_norm: str | None = None,
    lifter: float = 0.0,
) -> dict[str, Any]:
    defaults = convention_of(convention)
    n_fft = whole("n_fft", defaults.n_fft if n_fft is None else n_fft)
    win_length = n_fft if win_length is None else whole("win_length", win_length)
    # torchaudio: half of the window; librosa: a quarter of the window.
    shift = max(win_length // defaults.hops_in_window, 1)
    if win_length > n_fft:
        raise ValueError(f"win_length must be at most n_fft={n_fft}, got {win_length}")
    pad_mode = defaults.pad_mode if pad_mode is None else pad_mode
    if pad_mode not in _EDGES:
        raise ValueError(f"pad_mode must be among {', '.join(_EDGES)}, got {pad_mode!r}")
    if power is None or power <= 0:
        raise ValueError(f"power must be positive, got {power}: a complex spectrogram is torch.stft's")
    if log not in _LOGARITHMS:
        raise ValueError(f"log must be among {', '.join(_LOGARITHMS)}, got {log!r}")
    if amin <= 0 and log in ("dB", "log10"):
        raise ValueError(f"amin must be positive, got {amin}")
    norm_of_spectrum = {False: "none", True: "window"}.get(normalized, normalized)  # type: ignore[arg-type]
    if norm_of_spectrum not in ("none", "window", "frame_length"):
        raise ValueError(f'normalized must be False, True, "window" or "frame_length", got {normalized!r}')
    filters = None
    if has_filters:
        filters = (
            whole("n_mels", defaults.n_mels if n_mels is None else n_mels),
            plain_float(f_min),
            None if f_max is None else plain_float(f_max),
            defaults.norm if norm == "default" else norm,
            defaults.mel_scale if mel_scale is None else mel_scale,
        )
    return dict(
        sample_rate=whole("sample_rate", defaults.sample_rate if sample_rate is None else sample_rate),
        n_fft=n_fft,
        window=_window_argument(window_fn, wkwargs, win_length),
        win_length=win_length,
        hop_length=shift if hop_length is None else whole("hop_length", hop_length),
        power=plain_float(power),
        normalized=norm_of_spectrum,
        edge=_EDGES[pad_mode] if center else "none",
        filters=filters,
        log=log,
        amin=plain_float(amin),
        ref=plain_float(ref),
        top_db=None if top_db is None else plain_float(top_db),
        cosines=(num_ceps, dct_norm, plain_float(lifter)) if num_ceps else None,
        computed_in=defaults.computed_in,
        dtype=float_name(dtype),
    )


@kept_spec(_plain)
def spectrogram_spec(
    *,
    sample_rate: int,
    n_fft: int,
    window: str | Table | tuple,
    win_length: int,
    hop_length: int,
    power: float,
    normalized: str,
    edge: str,
    filters: tuple | None,
    log: str,
    amin: float,
    ref: float,
    top_db: float | None,
    cosines: tuple | None,
    computed_in: Precision,
    dtype: str,
) -> Spec:
    """Return the spec of `mel_spectrogram`'s keywords."""
    if isinstance(window, tuple):
        window = Table(np.array(window))
    shape = Window(window, computed_in=computed_in) if isinstance(window, str) else window
    centered = Framing.centered(n_fft, win_length, edge)
    framing = Framing.inside(n_fft, win_length) if edge == "none" else centered
    mel = None
    if filters is not None:
        highest_hz = sample_rate // 2 if computed_in == "float32" else None
        mel = replace(MelFilters(*filters), computed_in=computed_in, highest_hz=highest_hz)
    scale = 1.0
    if normalized == "window":
        weights = shape.array if isinstance(shape, Table) else shape.table(win_length)
        scale = 1 / float(np.sqrt(np.square(weights).sum()))
    elif normalized == "frame_length":
        scale = 1 / math.sqrt(n_fft)
    add = floor = shift = dynamic_range = 0.0
    multiply = 1.0
    if log == "dB":
        # Decibels of an amplitude are those of its square: amin and ref are amplitudes then, as there.
        multiply, floor = 10.0 if power == 2 else 20.0, amin
        shift = -multiply * float(np.log10(max(amin, ref)))
        dynamic_range = top_db or 0.0
    elif log == "log" and amin == 0:
        add = 1e-6
    elif log != "none":
        floor = amin
    return Spec(
        n_fft=n_fft,
        frame_length=win_length,
        hop_length=hop_length,
        window=shape,
        framing=framing,
        sampling_rate=sample_rate,
        filters=mel,
        dct=None if cosines is None else replace(Cosines(*cosines), computed_in=computed_in),
        scale=scale,
        exponent=power,
        add=add,
        floor=floor,
        log="none" if log == "none" else "natural" if log == "log" else "decimal",
        multiply=multiply,
        shift=shift,
        dynamic_range=dynamic_range,
        dtype=dtype,
    )


# ---- windows that are given ---------------------------------------------------------------------------------------


def _window_argument(window: Any, wkwargs: dict | None, length: int) -> Any:
    """Return a window's name, or its numbers: a table, in a graph a tuple."""
    if isinstance(window, str):
        return window
    if callable(window):
        arguments = tuple(sorted((wkwargs or {}).items()))
        return _called_as_constant(window, length, arguments) if is_tracing() else _called(window, length, arguments)
    table = _numbers(window)
    if len(table.array) != length:
        raise ValueError(f"window must have win_length={length} values, got {len(table.array)}")
    return table


@kept_within(4 * 2**20, lambda table: table.array.nbytes + 1024)
def _called(window_fn: Callable, length: int, wkwargs: tuple) -> Table:
    kwargs = dict(wkwargs)
    torch = sys.modules.get("torch")
    if torch is None:
        return _numbers(window_fn(length, **kwargs))
    from mmlm_fast.audio.plain import plain_torch

    if getattr(torch, getattr(window_fn, "__name__", ""), None) is window_fn:
        kwargs.setdefault("dtype", torch.float32)  # whatever the default is now: the window is kept
    with plain_torch():
        return _numbers(window_fn(length, **kwargs))


@constant_in_graphs
def _called_as_constant(window_fn: Callable, length: int, wkwargs: tuple) -> tuple:
    return tuple(_called(window_fn, length, wkwargs).array.tolist())


def _numbers(window: Any) -> Table:
    """Return a window's values; those of a list as float32, as torch takes them."""
    return Table.of((window if hasattr(window, "dtype") else np.asarray(window, np.float32)).flatten())
