"""Spectrogram, mel spectrogram and MFCC with the parameters of torchaudio.transforms and of librosa."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmlm_fast.audio.arguments import whole
from mmlm_fast.audio.filters import cosine_matrix, lifter, mel_filters, window_of
from mmlm_fast.audio.plain import in_plain_torch, without_autocast
from mmlm_fast.audio.resample import resample
from mmlm_fast.audio.spectral import constant_in_graphs, dtype_name, family, features_of, plain_float
from mmlm_fast.audio.tables import kept_tables, kept_within
from mmlm_fast.audio.waveforms import Waveform, as_float, clips_of

_EDGES = {"reflect": "reflect", "constant": "zero", "symmetric": "mirror"}
# What differs between the two libraries' defaults. torchaudio makes its tables in float32, librosa in float64; librosa
# transforms in float64 but keeps a complex64 spectrum of float32 samples.
_CONVENTIONS: dict[str, dict[str, Any]] = {
    "torchaudio": dict(
        sample_rate=16000,
        n_fft=400,
        hop=2,
        pad_mode="reflect",
        norm=None,
        mel_scale="htk",
        n_mels=128,
        n_mfcc=40,
        table_dtype="float32",
    ),
    "librosa": dict(
        sample_rate=22050,
        n_fft=2048,
        hop=4,
        pad_mode="constant",
        norm="slaney",
        mel_scale="slaney",
        n_mels=128,
        n_mfcc=20,
        table_dtype="float64",
    ),
}


@family("mel_spectrogram")
def spectrogram_key(
    sample_rate: int,
    n_fft: int,
    window: tuple[float, ...] | str,
    win_length: int,
    hop_length: int,
    power: float,
    normalized: str,
    center: bool,
    pad_mode: str,
    mel: tuple | None,
    log: str,
    amin: float,
    ref: float,
    top_db: float | None,
    dct: tuple[int, int, str | None, float] | None,
    table_dtype: str,
    round_spectrum: bool,
    dtype: str,
) -> dict:
    tables = getattr(torch, table_dtype)
    if isinstance(window, tuple):
        weights = np.array(window, np.float64)
    else:
        weights = window_of(window, win_length, dtype=tables)
    options: dict[str, Any] = {"exponent": float(power)}
    if round_spectrum:
        options["round_spectrum"] = True
    if center:
        options["edge"] = _EDGES[pad_mode]
    if normalized != "none":
        norm = np.sqrt(np.square(weights).sum()) if normalized == "window" else np.sqrt(n_fft)
        options["scale"] = 1 / float(norm)
    if log == "dB":
        # Decibels of an amplitude are those of its square: amin and ref are amplitudes then, as there.
        factor = 10.0 if power == 2 else 20.0
        options |= dict(log="decimal", floor=amin, multiply=factor, shift=-factor * float(np.log10(max(amin, ref))))
        if top_db is not None:
            options["dynamic_range"] = float(top_db)
    elif log != "none":
        options |= dict(log="natural" if log == "log" else "decimal")
        options |= {"add": 1e-6} if log == "log" and amin == 0 else {"floor": amin}
    middle = n_fft // 2 if center else 0
    min_samples = 1
    if center and pad_mode == "reflect":
        min_samples = middle + 1
    elif not center:
        min_samples = n_fft
    return dict(
        sampling_rate=sample_rate,
        window=weights,
        hop_length=hop_length,
        n_fft=n_fft,
        filters=None
        if mel is None
        else mel_filters(
            mel[0],
            n_fft=n_fft,
            sampling_rate=sample_rate,
            f_min=mel[1],
            f_max=mel[2],
            norm=mel[3],
            mel_scale=mel[4],
            dtype=tables,
            highest_hz=sample_rate // 2 if table_dtype == "float32" else None,
        ),
        dct=None if dct is None else _scaled_dct(*dct, tables),
        # torch.stft and librosa put a short window in the middle of the transform.
        offset=(n_fft - win_length) // 2 - middle,
        pad_total=2 * middle,
        span=n_fft,
        min_samples=min_samples,
        dtype=getattr(torch, dtype),
        options=options,
    )


def _scaled_dct(
    num_ceps: int, num_mel_bins: int, norm: str | None, lifter_coefficient: float, dtype: torch.dtype
) -> np.ndarray:
    """librosa's lifter: 1 + Q / 2 sin(pi (i + 1) / Q)."""
    scale = lifter(num_ceps + 1, lifter_coefficient)[1:] if lifter_coefficient else np.ones(num_ceps)
    return cosine_matrix(num_ceps, num_mel_bins, norm, dtype) * scale[:, None]


@constant_in_graphs
def _dct_rows(*arguments: Any) -> tuple[tuple[float, ...], ...]:
    return tuple(map(tuple, _scaled_dct(*arguments).tolist()))


@kept_within(4 * 2**20, lambda window: 32 * len(window) + 1024)
@in_plain_torch
def _called_window(window_fn: Callable, length: int, wkwargs: tuple) -> tuple[float, ...]:
    kwargs = dict(wkwargs)
    if getattr(torch, getattr(window_fn, "__name__", ""), None) is window_fn:
        kwargs.setdefault("dtype", torch.float32)  # whatever the default is now: the window is kept
    return _numbers(window_fn(length, **kwargs))


@in_plain_torch
def _numbers(window: Any) -> tuple[float, ...]:
    dtype = None if hasattr(window, "dtype") else torch.float32
    return tuple(torch.as_tensor(window, dtype=dtype, device="cpu").double().flatten().tolist())


def _window_argument(window: Any, wkwargs: dict | None, length: int) -> tuple[float, ...] | str:
    if isinstance(window, str):
        return window
    if callable(window):
        return _called_window(window, length, tuple(sorted((wkwargs or {}).items())))
    values = _numbers(window)
    if len(values) != length:
        raise ValueError(f"window must have win_length={length} values, got {len(values)}")
    return values


def _key(convention: str, mel: bool, given: dict[str, Any]) -> str:
    """From the public functions' arguments, None where not given, to a spec's key."""
    if convention not in _CONVENTIONS:
        raise ValueError(f"convention must be among {', '.join(_CONVENTIONS)}, got {convention!r}")
    defaults = _CONVENTIONS[convention]

    def value(name: str) -> Any:
        return defaults[name] if given.get(name) is None else given[name]

    rate, n_fft = (whole(name, value(name)) for name in ("sample_rate", "n_fft"))
    win_length = n_fft if given["win_length"] is None else whole("win_length", given["win_length"])
    # torchaudio: half of the window; librosa: a quarter of the window.
    hop_length = given["hop_length"]
    hop_length = max(win_length // defaults["hop"], 1) if hop_length is None else whole("hop_length", hop_length)
    if win_length > n_fft:
        raise ValueError(f"win_length must be at most n_fft={n_fft}, got {win_length}")
    if value("pad_mode") not in _EDGES:
        raise ValueError(f"pad_mode must be among {', '.join(_EDGES)}, got {value('pad_mode')!r}")
    if given["power"] is None or given["power"] <= 0:
        raise ValueError(f"power must be positive, got {given['power']}: a complex spectrogram is torch.stft's")
    if given["log"] not in ("none", "log", "log10", "dB"):
        raise ValueError(f"log must be among none, log, log10, dB, got {given['log']!r}")
    if given["amin"] <= 0 and given["log"] in ("dB", "log10"):
        raise ValueError(f"amin must be positive, got {given['amin']}")
    normalized = {False: "none", True: "window"}.get(given["normalized"], given["normalized"])
    if normalized not in ("none", "window", "frame_length"):
        raise ValueError(f'normalized must be False, True, "window" or "frame_length", got {normalized!r}')
    bands = None
    if mel:
        norm = defaults["norm"] if given["norm"] == "default" else given["norm"]
        top = None if given["f_max"] is None else plain_float(given["f_max"])
        bands = (whole("n_mels", value("n_mels")), plain_float(given["f_min"]), top, norm, value("mel_scale"))
    return spectrogram_key(
        sample_rate=rate,
        n_fft=n_fft,
        window=_window_argument(given["window_fn"], given["wkwargs"], win_length),
        win_length=win_length,
        hop_length=hop_length,
        power=plain_float(given["power"]),
        normalized=normalized,
        center=bool(given["center"]),
        pad_mode=value("pad_mode"),
        mel=bands,
        log=given["log"],
        amin=plain_float(given["amin"]),
        ref=plain_float(given["ref"]),
        top_db=None if given["top_db"] is None else plain_float(given["top_db"]),
        dct=given.get("dct"),
        table_dtype=defaults["table_dtype"],
        round_spectrum=False,
        dtype=dtype_name(given["dtype"]),
    )


def _run(key: str, waveform: Any, orig_freq: int | None, channel_dim: int | None, pad: int, rate: int) -> Any:
    clips = clips_of(waveform, channel_dim=channel_dim, orig_freq=orig_freq)
    if pad := whole("pad", pad, 0):  # zeros before everything else, so also before what centring makes up
        rate = whole("sample_rate", rate)
        waveforms: list[Any] = [
            as_float(w, torch.float64 if w.dtype == torch.float64 else torch.float32) for w in clips.waveforms
        ]
        if clips.orig_freq and rate != clips.orig_freq:
            waveforms = [resample(w, clips.orig_freq, rate) for w in waveforms]
        waveforms = [torch.nn.functional.pad(w, (pad, pad)) for w in waveforms]
        clips = replace(clips, waveforms=waveforms, orig_freq=0, num_samples=clips.num_samples + 2 * pad)
    return features_of(key, clips)


def spectrogram(
    waveform: Waveform,
    *,
    sample_rate: int | None = None,
    n_fft: int | None = None,
    win_length: int | None = None,
    hop_length: int | None = None,
    pad: int = 0,
    window_fn: Any = "hann",
    wkwargs: dict | None = None,
    power: float = 2.0,
    normalized: bool | str = False,
    center: bool = True,
    pad_mode: str | None = None,
    log: str = "none",
    amin: float = 1e-10,
    ref: float = 1.0,
    top_db: float | None = None,
    convention: str = "torchaudio",
    orig_freq: int | None = None,
    channel_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor | list[Tensor]:
    """Compute ``|STFT| ** power``, ``[*batch, n_fft // 2 + 1, frames]``; arguments as in `mel_spectrogram`."""
    given: dict[str, Any] = dict(
        sample_rate=sample_rate,
        n_fft=n_fft,
        win_length=win_length,
        hop_length=hop_length,
        window_fn=window_fn,
        wkwargs=wkwargs,
        power=power,
        normalized=normalized,
        center=center,
        pad_mode=pad_mode,
        log=log,
        amin=amin,
        ref=ref,
        top_db=top_db,
        dtype=dtype,
    )
    key = _key(convention, False, given)
    return _run(key, waveform, orig_freq, channel_dim, pad, sample_rate or _CONVENTIONS[convention]["sample_rate"])


def mel_spectrogram(
    waveform: Waveform,
    *,
    sample_rate: int | None = None,
    n_fft: int | None = None,
    win_length: int | None = None,
    hop_length: int | None = None,
    f_min: float = 0.0,
    f_max: float | None = None,
    pad: int = 0,
    n_mels: int | None = None,
    window_fn: Any = "hann",
    wkwargs: dict | None = None,
    power: float = 2.0,
    normalized: bool | str = False,
    center: bool = True,
    pad_mode: str | None = None,
    norm: str | None = "default",
    mel_scale: str | None = None,
    log: str = "none",
    amin: float = 1e-10,
    ref: float = 1.0,
    top_db: float | None = None,
    convention: str = "torchaudio",
    orig_freq: int | None = None,
    channel_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor | list[Tensor]:
    """Compute a mel spectrogram, ``filters · |STFT| ** power``, with the logarithm where wanted.

    The keywords are torchaudio's; `convention` chooses whose defaults the rest has:

    ==============  ============  ==========  ========================
    keyword         "torchaudio"  "librosa"   librosa's name
    ==============  ============  ==========  ========================
    `sample_rate`   16000         22050       ``sr``
    `n_fft`         400           2048
    `hop_length`    half window   a quarter
    `pad_mode`      "reflect"     "constant"
    `norm`          None          "slaney"
    `mel_scale`     "htk"         "slaney"    ``htk``
    `f_min, f_max`  0, Nyquist    the same    ``fmin, fmax``
    ==============  ============  ==========  ========================

    Args:
        waveform: ``[*batch, N]``, or a sequence of 1-D tensors; arrays likewise. Float samples in [-1, 1], or int16
            or int32 ones, which are scaled to [-1, 1).
        sample_rate: Rate that the filters are for, in hertz.
        n_fft: Length of the transform, any number.
        win_length: Length of the window, at most `n_fft`, which is the default; shorter ones sit in the middle.
        hop_length: Samples between frames.
        f_min: Lowest frequency, in hertz.
        f_max: Highest frequency, in hertz.
        pad: Zeros added at both ends first.
        n_mels: Number of filters.
        window_fn: "hann", "hamming", "blackman", "povey", "rectangular" (periodic), values ``[win_length]``, or a
            function of the length such as `torch.hann_window`, which gets `wkwargs`.
        power: Exponent of the magnitude: 2 for power, 1 for magnitude.
        normalized: Divide the spectrum by the window's norm (True, "window") or √n_fft ("frame_length").
        center: Frame t is centred at sample ``t * hop_length``, else starts there.
        pad_mode: How the ends are made up where frames are centred: "reflect", "constant" (zeros), "symmetric".
        norm: "slaney" for filters of unit area, or None.
        mel_scale: "htk" or "slaney".
        log: "none"; "dB" (torchaudio's AmplitudeToDB, librosa's power_to_db and amplitude_to_db); "log10"; or "log".
        amin: Least value before the logarithm. With ``log="log"`` and ``amin=0``, 1e-6 is added instead, as
            torchaudio's MFCC does with `log_mels`.
        ref: Value that is 0 dB.
        top_db: Clip to this many dB below each clip's maximum.
        convention: "torchaudio" or "librosa".
        orig_freq: Rate of the waveform where it is not `sample_rate`: resampled in the same pass (see `resample`).
        channel_dim: Dimension that holds channels, which are averaged.
        dtype: Of the result: float32, float16, bfloat16 (computed in float32), or float64, computed in float64.

    Returns:
        ``[*batch, n_mels, frames]`` of `dtype`, ``frames = 1 + N // hop_length`` where centred; a list where a
        sequence of clips came. Differentiable with respect to the waveform.

    Raises:
        ValueError: for options out of range, clips too short for one frame or for the reflection, or samples that are
            NaN or infinite (CPU).

    Source: torchaudio ``transforms.MelSpectrogram``; librosa ``feature.melspectrogram``.
    """
    given: dict[str, Any] = dict(
        sample_rate=sample_rate,
        n_fft=n_fft,
        win_length=win_length,
        hop_length=hop_length,
        f_min=f_min,
        f_max=f_max,
        n_mels=n_mels,
        window_fn=window_fn,
        wkwargs=wkwargs,
        power=power,
        normalized=normalized,
        center=center,
        pad_mode=pad_mode,
        norm=norm,
        mel_scale=mel_scale,
        log=log,
        amin=amin,
        ref=ref,
        top_db=top_db,
        dtype=dtype,
    )
    key = _key(convention, True, given)
    return _run(key, waveform, orig_freq, channel_dim, pad, sample_rate or _CONVENTIONS[convention]["sample_rate"])


def mel_mfcc(
    waveform: Waveform,
    *,
    n_mfcc: int | None = None,
    dct_norm: str | None = "ortho",
    log_mels: bool = False,
    lifter: float = 0.0,
    convention: str = "torchaudio",
    sample_rate: int | None = None,
    orig_freq: int | None = None,
    channel_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    **melkwargs: Any,
) -> Tensor | list[Tensor]:
    """Compute MFCC the way of torchaudio.transforms and librosa: DCT-II of the mel spectrogram in dB.

    (`mfcc` is Kaldi's.) `melkwargs` are `mel_spectrogram`'s keywords.

    Args:
        waveform: As in `mel_spectrogram`.
        n_mfcc: Number of coefficients; default 40 for torchaudio, 20 for librosa.
        dct_norm: "ortho" or None; librosa's ``norm``.
        log_mels: ``ln(mel + 1e-6)`` in place of dB clipped to 80 below the clip's maximum.
        lifter: librosa's lifter, ``1 + Q / 2 sin(π (i + 1) / Q)``; 0 for none.

    Returns:
        ``[*batch, n_mfcc, frames]``. Differentiable through the reference.

    Source: torchaudio ``transforms.MFCC``; librosa ``feature.mfcc``.
    """
    defaults = _CONVENTIONS.get(convention, _CONVENTIONS["torchaudio"])
    n_mfcc = whole("n_mfcc", defaults["n_mfcc"] if n_mfcc is None else n_mfcc)
    n_mels = whole("n_mels", defaults["n_mels"] if melkwargs.get("n_mels") is None else melkwargs["n_mels"])
    if n_mfcc > n_mels:
        raise ValueError(f"n_mfcc must be at most n_mels={n_mels}, got {n_mfcc}")
    if not log_mels and melkwargs.get("top_db", 80.0) is not None:
        # The clipping needs the clip's maximum before the cosine transform, which the plan applies last: two steps.
        mel = mel_spectrogram(
            waveform,
            convention=convention,
            sample_rate=sample_rate,
            orig_freq=orig_freq,
            channel_dim=channel_dim,
            dtype=dtype,
            log="dB",
            top_db=melkwargs.pop("top_db", 80.0),
            **melkwargs,
        )
        table_dtype = getattr(torch, defaults["table_dtype"])
        arguments = (n_mfcc, n_mels, dct_norm, plain_float(lifter), table_dtype)

        def coefficients(mel: Tensor) -> Tensor:
            rows = kept_tables(("dct", *arguments), lambda: [np.array(_dct_rows(*arguments))], dtype, mel)
            with without_autocast(mel):
                return rows[0] @ mel

        return coefficients(mel) if isinstance(mel, Tensor) else [coefficients(m) for m in mel]
    known: dict[str, Any] = mel_spectrogram.__kwdefaults__ or {}
    unknown = sorted(set(melkwargs) - set(known))
    if unknown:
        raise ValueError(f"melkwargs must be mel_spectrogram's keywords, got {', '.join(unknown)}")
    given = known | melkwargs | dict(sample_rate=sample_rate, dtype=dtype, top_db=None)
    given |= dict(log="log", amin=0.0) if log_mels else dict(log="dB")
    given["dct"] = (n_mfcc, n_mels, dct_norm, plain_float(lifter))
    rate = sample_rate or defaults["sample_rate"]
    return _run(_key(convention, True, given), waveform, orig_freq, channel_dim, given["pad"], rate)
