"""Spectrogram, mel spectrogram and MFCC with the parameters of torchaudio.transforms and of librosa."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mmlm_fast.audio.arguments import plain_float, whole
from mmlm_fast.audio.conventions import CONVENTIONS, convention_of, spectrogram_spec
from mmlm_fast.audio.features import as_torch_does, features_of, resample_clips
from mmlm_fast.audio.sinc import checked_options, mono_of
from mmlm_fast.audio.spec import Cosines, torch_is_loaded
from mmlm_fast.audio.waveforms import Clips, Samples, clips_of

if TYPE_CHECKING:
    from torch import Tensor


def _run(
    spec: Any,
    waveform: Any,
    orig_freq: int | None,
    channel_dim: int | None,
    pad: int,
    sample_rate: Any,
    convention: str,
) -> Any:
    clips = clips_of(waveform, channel_dim=channel_dim, orig_freq=orig_freq)
    if pad := whole("pad", pad, 0):
        rate = convention_of(convention).sample_rate if sample_rate is None else sample_rate
        clips = _padded(clips, whole("sample_rate", rate), pad)
    return features_of(spec, clips)


def _padded(clips: Clips, rate: int, pad: int) -> Clips:
    """Put zeros around clips before everything else, so also before what centring makes up."""
    waveforms = [_as_floats(w) for w in clips.waveforms]
    if waveforms and clips.orig_freq and rate != clips.orig_freq:
        are_arrays = isinstance(waveforms[0], np.ndarray)  # in a graph they are tensors by now
        alone = clips._replace(waveforms=waveforms, batch=None, are_arrays=are_arrays)
        waveforms = resample_clips(alone, clips.orig_freq, rate, checked_options())
    waveforms = [np.pad(w, pad) if isinstance(w, np.ndarray) else _pad(w, (pad, pad)) for w in waveforms]
    return clips._replace(waveforms=waveforms, orig_freq=0, num_samples=clips.num_samples + 2 * pad)


def _as_floats(waveform: Any) -> Any:
    if not torch_is_loaded():
        return mono_of(waveform, waveform.dtype == np.float64)
    from mmlm_fast.audio.tensors import as_float, double_or_float

    return as_torch_does(lambda tensor: as_float(tensor, double_or_float(tensor)), waveform)


def _pad(waveform: "Tensor", sides: tuple[int, int]) -> "Tensor":
    from torch.nn.functional import pad

    return pad(waveform, sides)


def spectrogram(
    waveform: "Samples | Sequence[Samples]",
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
    dtype: Any = "float32",
) -> "Samples | list[Samples]":
    """Compute ``|STFT| ** power``, ``[*batch, n_fft // 2 + 1, frames]``; arguments as in `mel_spectrogram`."""
    spec = spectrogram_spec(
        convention=convention,
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
        has_filters=False,
    )
    return _run(spec, waveform, orig_freq, channel_dim, pad, sample_rate, convention)


def mel_spectrogram(
    waveform: "Samples | Sequence[Samples]",
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
    dtype: Any = "float32",
) -> "Samples | list[Samples]":
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
        waveform: ``[*batch, N]``, or a sequence of 1-D ones: tensors or arrays. Float samples in [-1, 1], or int16
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
        dtype: Of the result, of torch or numpy or by name: float32, float16, bfloat16 (computed in float32), or
            float64, computed in float64.

    Returns:
        ``[*batch, n_mels, frames]`` of `dtype`, an array for arrays, ``frames = 1 + N // hop_length`` where
        centred; a list where a sequence of clips came. Differentiable with respect to the waveform.

    Raises:
        ValueError: for options out of range, clips too short for one frame or for the reflection, or samples that are
            NaN or infinite (CPU).

    Source: torchaudio ``transforms.MelSpectrogram``; librosa ``feature.melspectrogram``.
    """
    spec = spectrogram_spec(
        convention=convention,
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
        has_filters=True,
        n_mels=n_mels,
        f_min=f_min,
        f_max=f_max,
        norm=norm,
        mel_scale=mel_scale,
    )
    return _run(spec, waveform, orig_freq, channel_dim, pad, sample_rate, convention)


def mel_mfcc(
    waveform: "Samples | Sequence[Samples]",
    *,
    n_mfcc: int | None = None,
    dct_norm: str | None = "ortho",
    log_mels: bool = False,
    lifter: float = 0.0,
    convention: str = "torchaudio",
    sample_rate: int | None = None,
    orig_freq: int | None = None,
    channel_dim: int | None = None,
    dtype: Any = "float32",
    **melkwargs: Any,
) -> "Samples | list[Samples]":
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
    defaults = CONVENTIONS.get(convention, CONVENTIONS["torchaudio"])
    n_mfcc = whole("n_mfcc", defaults.n_mfcc if n_mfcc is None else n_mfcc)
    n_mels = whole("n_mels", defaults.n_mels if melkwargs.get("n_mels") is None else melkwargs["n_mels"])
    if n_mfcc > n_mels:
        raise ValueError(f"n_mfcc must be at most n_mels={n_mels}, got {n_mfcc}")
    if not log_mels and melkwargs.get("top_db", 80.0) is not None:
        # The clipping needs the clip's maximum before the cosine transform, which the plan applies last: two steps.
        mel: Any = mel_spectrogram(
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
        cosines = Cosines(n_mfcc, dct_norm, plain_float(lifter), defaults.computed_in)
        return [_coefficients(cosines, m) for m in mel] if isinstance(mel, list) else _coefficients(cosines, mel)
    defaults_of_mel: dict[str, Any] = mel_spectrogram.__kwdefaults__ or {}
    unknown = sorted(set(melkwargs) - set(defaults_of_mel))
    if unknown:
        raise ValueError(f"melkwargs must be mel_spectrogram's keywords, got {', '.join(unknown)}")
    given = defaults_of_mel | melkwargs | dict(sample_rate=sample_rate, dtype=dtype, top_db=None, convention=convention)
    given |= dict(log="log", amin=0.0) if log_mels else dict(log="dB")
    own = {name: value for name, value in given.items() if name not in ("pad", "orig_freq", "channel_dim")}
    spec = spectrogram_spec(**own, has_filters=True, num_ceps=n_mfcc, dct_norm=dct_norm, lifter=plain_float(lifter))
    return _run(spec, waveform, orig_freq, channel_dim, given["pad"], sample_rate, convention)


def _coefficients(cosines: Cosines, mel: Any) -> Any:
    """Transform ``[*batch, n_mels, frames]`` along its bins, in its own dtype."""
    if not torch_is_loaded():
        return cosines.table(mel.shape[-2]).astype(mel.dtype) @ mel
    from mmlm_fast.audio.reference import transformed

    return as_torch_does(lambda tensor: transformed(cosines, tensor), mel)
