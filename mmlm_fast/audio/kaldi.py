"""Kaldi's log-mel filter bank and MFCC, with the keywords of torchaudio.compliance.kaldi."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from mmlm_fast.audio.arguments import float_name, plain_float, whole
from mmlm_fast.audio.features import as_torch_does, by_tensors, features_of
from mmlm_fast.audio.sinc import num_resampled
from mmlm_fast.audio.spec import (
    FLT_EPSILON,
    Framing,
    KaldiCosines,
    KaldiFilters,
    Spec,
    Window,
    kept_spec,
    spec_of,
    torch_is_loaded,
)
from mmlm_fast.audio.waveforms import Clips, Samples, clips_of, library_of

if TYPE_CHECKING:
    pass

# Far above what is in use; a frame of more is an argument in another unit, and its tables would not fit in memory.
MAX_RATE = 10**8
MAX_FRAME = 1 << 22
MAX_TABLE = 1 << 28  # of the filters, bins times samples
_WINDOWS = ("povey", "hanning", "hamming", "blackman", "rectangular")


@dataclass(frozen=True)
class KaldiSettings:
    """Settings of Kaldi's features, with torchaudio's names and defaults; see `kaldi_fbank`."""

    blackman_coeff: float = 0.42
    energy_floor: float = 1.0
    frame_length: float = 25.0
    frame_shift: float = 10.0
    high_freq: float = 0.0
    htk_compat: bool = False
    low_freq: float = 20.0
    num_mel_bins: int = 23
    preemphasis_coefficient: float = 0.97
    raw_energy: bool = True
    remove_dc_offset: bool = True
    round_to_power_of_two: bool = True
    sample_frequency: float = 16000.0
    snip_edges: bool = True
    use_energy: bool = False
    use_log_fbank: bool = True
    use_power: bool = True
    vtln_high: float = -500.0
    vtln_low: float = 100.0
    vtln_warp: float = 1.0
    window_type: str = "povey"
    scale: float = 1.0
    dtype: str = "float32"
    num_ceps: int = 0  # 0: the filter bank
    cepstral_lifter: float = 0.0

    def __post_init__(self) -> None:
        rate = self.sample_frequency
        if not 0 < rate <= MAX_RATE:
            raise ValueError(f"sample_frequency must be positive and at most {MAX_RATE} Hz, got {rate}")
        for name, ms in (("frame_length", self.frame_length), ("frame_shift", self.frame_shift)):
            if not -math.inf < rate * ms * 0.001 <= MAX_FRAME:
                raise ValueError(f"{name} must be at most {MAX_FRAME} samples, got {ms} ms at {rate} Hz")
        length, shift = self.num_samples
        if length < 2 or shift < 1:
            raise ValueError(
                f"frame_length must be at least 2 samples and frame_shift 1, got {self.frame_length} and "
                f"{self.frame_shift} ms, {length} and {shift} samples"
            )
        if self.n_fft % 2:
            raise ValueError(
                f"the frame must have an even number of samples, got {self.n_fft}: use round_to_power_of_two or "
                f"another frame_length"
            )
        if not 0 <= self.preemphasis_coefficient <= 1:
            raise ValueError(f"preemphasis_coefficient must be in [0, 1], got {self.preemphasis_coefficient}")
        if self.window_type not in _WINDOWS:
            raise ValueError(f"window_type must be among {', '.join(_WINDOWS)}, got {self.window_type!r}")
        most = MAX_TABLE // self.n_fft
        if self.num_mel_bins > most:
            raise ValueError(f"num_mel_bins must be at most {most} for {self.n_fft} samples, got {self.num_mel_bins}")
        if self.num_ceps > self.num_mel_bins:
            raise ValueError(f"num_ceps must be at most num_mel_bins={self.num_mel_bins}, got {self.num_ceps}")

    @property
    def num_samples(self) -> tuple[int, int]:
        """Samples of a frame, and between frames."""
        rate = self.sample_frequency
        return int(rate * self.frame_length * 0.001), int(rate * self.frame_shift * 0.001)

    @property
    def n_fft(self) -> int:
        length = self.num_samples[0]
        return 1 << (length - 1).bit_length() if self.round_to_power_of_two else length

    def spec(self) -> Spec:
        """Return what is to be computed."""
        length, shift = self.num_samples
        energy, place = "none", "last" if self.htk_compat else "first"
        if self.use_energy:
            energy = f"replace_{place}" if self.num_ceps else place
        return Spec(
            n_fft=self.n_fft,
            frame_length=length,
            hop_length=shift,
            window=Window(self.window_type, False, self.blackman_coeff),
            framing=Framing.snipped(length) if self.snip_edges else _halved(length, shift),
            sampling_rate=int(self.sample_frequency) if self.sample_frequency.is_integer() else self.sample_frequency,
            filters=KaldiFilters(
                self.num_mel_bins, self.low_freq, self.high_freq, self.vtln_low, self.vtln_high, self.vtln_warp
            ),
            dct=KaldiCosines(self.num_ceps, self.cepstral_lifter, self.htk_compat, self.use_energy)
            if self.num_ceps
            else None,
            scale=self.scale,
            frame_preemphasis=self.preemphasis_coefficient,
            remove_dc_offset=self.remove_dc_offset,
            exponent=2.0 if self.use_power else 1.0,
            floor=FLT_EPSILON if self.use_log_fbank else 0.0,
            log="natural" if self.use_log_fbank else "none",
            energy=energy,  # type: ignore[arg-type]
            raw_energy=self.raw_energy,
            energy_floor=self.energy_floor,
            bins_first=False,
            dtype=self.dtype,
        )


def _window_type(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"window_type must be among {', '.join(_WINDOWS)}, got {value!r}")
    return value


def _number(name: str) -> Callable[[Any], float]:
    return lambda value: plain_float(value, name)


# How each setting is made plain.
_PLAIN: dict[str, Callable[[Any], Any]] = {
    field.name: bool if field.type is bool else _number(field.name) for field in fields(KaldiSettings)
} | dict(
    num_mel_bins=lambda value: whole("num_mel_bins", value, 4, None, "above 3"),
    num_ceps=lambda value: whole("num_ceps", value, 0),
    dtype=float_name,
    window_type=_window_type,
)
SETTINGS = frozenset(_PLAIN)


def _plain(**given: Any) -> dict[str, Any]:
    return {name: _PLAIN[name](value) for name, value in given.items()}


def _halved(length: int, shift: int) -> Framing:
    """Centre frame t at ``(t + 1/2) * shift``, the ends mirrored."""
    return Framing(shift // 2 - length // 2, shift // 2, shift, "mirror", 0, length)


@kept_spec(_plain)
def kaldi_spec(**settings: Any) -> Spec:
    """Return the spec of `KaldiSettings`' fields.

    Raises:
        ValueError: where torchaudio asserts, and for frames and tables beyond memory.
    """
    return KaldiSettings(**settings).spec()


def _clips(waveform: Any, channel: int, channel_dim: int | None, orig_freq: int | None) -> tuple[Clips, bool]:
    """Return the clips, and whether one came alone. A 2-D tensor is ``[channels, num_samples]``, as in torchaudio."""
    channel = whole("channel", channel, -1)
    library = library_of(waveform)
    if isinstance(waveform, (np.ndarray, library.kind)):
        if waveform.ndim not in (1, 2):
            raise ValueError(
                f"waveform must be [num_samples], [channels, num_samples] or a sequence of 1-D tensors, got shape "
                f"{tuple(waveform.shape)}"
            )
        if waveform.ndim == 2 and channel_dim is None:
            channels = waveform.shape[0]
            if channel < 0 and channels > 1:
                raise ValueError(
                    f"waveform has {channels} channels, shape {tuple(waveform.shape)}: pass channel=0 to use one, "
                    f"channel_dim=0 to average them, or list(waveform) for a batch of clips"
                )
            if max(channel, 0) >= channels:
                raise ValueError(f"channel must be below {channels}, got {channel}")
            waveform = waveform[max(channel, 0)]
        elif waveform.ndim == 1:
            _check_only_channel(channel)
        return clips_of(waveform, channel_dim=channel_dim, orig_freq=orig_freq), True
    if channel_dim is None:
        _check_only_channel(channel)
    return clips_of(waveform, channel_dim=channel_dim, orig_freq=orig_freq), False


def _check_only_channel(channel: int) -> None:
    if channel > 0:
        raise ValueError(f"channel must be 0 or -1 for waveforms of one channel, got {channel}")


def _run(
    spec: Any,
    waveform: Any,
    channel: int,
    channel_dim: int | None,
    orig_freq: int | None,
    min_duration: float,
    dither: float,
    subtract_mean: bool,
) -> Any:
    clips, alone = _clips(waveform, channel, channel_dim, orig_freq)
    if alone and min_duration:
        rate = _as_spec(spec).sampling_rate
        if num_resampled(clips.waveforms[0].shape[-1], clips.orig_freq, rate) / rate < min_duration:
            return _nothing(_as_spec(spec), clips)  # as torchaudio
    if dither:
        if not torch_is_loaded():
            raise ValueError(f"dither draws from torch's generator: import torch first, or pass dither=0, got {dither}")
        out: Any = by_tensors(lambda tensors: _dithered(_as_spec(spec), tensors, dither), clips)
        out = out[0] if alone else out
    else:
        out = features_of(spec, clips)
    if subtract_mean:
        out = as_torch_does(_without_mean, out) if alone else [as_torch_does(_without_mean, x) for x in out]
    return out


def _without_mean(features: Any) -> Any:
    return features - features.mean(0, keepdims=True)


def _as_spec(spec: Any) -> Spec:
    return spec_of(spec) if isinstance(spec, str) else spec


def _nothing(spec: Spec, clips: Clips) -> Any:
    return clips.library.empty((0,), spec.dtype, clips.library.device(clips.waveforms[0]))


def _dithered(spec: Spec, clips: Clips, dither: float) -> Any:
    """Compute features with noise; `clips` are tensors."""
    from mmlm_fast.audio.reference import dithered

    return [dithered(spec, w, clips.orig_freq, dither) for w in clips.waveforms]


def kaldi_fbank(
    waveform: "Samples | Sequence[Samples]",
    blackman_coeff: float = 0.42,
    channel: int = -1,
    dither: float = 0.0,
    energy_floor: float = 1.0,
    frame_length: float = 25.0,
    frame_shift: float = 10.0,
    high_freq: float = 0.0,
    htk_compat: bool = False,
    low_freq: float = 20.0,
    min_duration: float = 0.0,
    num_mel_bins: int = 23,
    preemphasis_coefficient: float = 0.97,
    raw_energy: bool = True,
    remove_dc_offset: bool = True,
    round_to_power_of_two: bool = True,
    sample_frequency: float = 16000.0,
    snip_edges: bool = True,
    subtract_mean: bool = False,
    use_energy: bool = False,
    use_log_fbank: bool = True,
    use_power: bool = True,
    vtln_high: float = -500.0,
    vtln_low: float = 100.0,
    vtln_warp: float = 1.0,
    window_type: str = "povey",
    *,
    scale: float = 1.0,
    channel_dim: int | None = None,
    orig_freq: int | None = None,
    dtype: Any = "float32",
) -> "Samples | list[Samples]":
    """Compute Kaldi's log-mel filter bank; the keywords are torchaudio.compliance.kaldi.fbank's.

    Per frame: dither, mean removed, log energy, pre-emphasis, window, zeros to a power of two, power spectrum,
    triangular filters over mel, ``ln(max(mel, FLT_EPSILON))``.

    Args:
        waveform: ``[N]``, ``[channels, N]``, or a sequence of 1-D ones: tensors or arrays. Kaldi expects samples at
            the scale of 16-bit integers; here they are taken as they are, in [-1, 1] for int16 and int32 ones: pass
            ``scale=32768``.
        blackman_coeff: Of the Blackman window.
        channel: Which channel of ``[channels, N]``; needed where there are several.
        dither: Standard deviation of the noise added to every frame, at the scale of ``scale * waveform``. From torch's
            generator: it needs torch for arrays too.
        energy_floor: Least energy, before its logarithm.
        frame_length: In milliseconds.
        frame_shift: In milliseconds.
        high_freq: Highest frequency in hertz; 0 or below counts from the Nyquist frequency.
        htk_compat: Energy last, not first.
        low_freq: Lowest frequency in hertz.
        min_duration: Minimum length in seconds; a shorter clip returns an empty tensor, as in torchaudio.
        num_mel_bins: Number of filters, above 3.
        preemphasis_coefficient: Of ``x[t] - c x[t-1]`` within each frame.
        raw_energy: Energy before pre-emphasis and window.
        remove_dc_offset: Subtract each frame's mean.
        round_to_power_of_two: Pad frames with zeros to a power of two.
        sample_frequency: In hertz.
        snip_edges: Only frames that fit; else ``(N + shift // 2) // shift`` frames, the ends mirrored.
        subtract_mean: Subtract each feature's mean over the clip.
        use_energy: Add a column with the log energy.
        use_log_fbank: Logarithm of the filter sums.
        use_power: Power spectrum, else magnitude.
        vtln_high: Upper cut-off of the vocal-tract warping in hertz; below 0 counts from the Nyquist frequency.
        vtln_low: Lower cut-off.
        vtln_warp: Warping factor, 1 for none.
        window_type: povey, hanning, hamming, blackman or rectangular.
        scale: Factor on the samples.
        channel_dim: Dimension that holds channels, which are averaged.
        orig_freq: Rate of the waveform where it is not `sample_frequency`: resampled in the same pass.
        dtype: Of the result, of torch or numpy or by name: float32, float16, bfloat16 (computed in float32), or
            float64, computed in float64.

    Returns:
        ``[frames, num_mel_bins (+ 1)]``; a list of them where a sequence of clips came; arrays for arrays.
        Differentiable.

    Raises:
        ValueError: where torchaudio asserts, and for several channels without a choice (torchaudio takes the first),
            clips shorter than a frame, NaN or infinite samples (CPU).

    Source: torchaudio ``compliance.kaldi.fbank``; Kaldi ``feature-fbank.cc``.
    """
    spec = kaldi_spec(
        blackman_coeff=blackman_coeff,
        energy_floor=energy_floor,
        frame_length=frame_length,
        frame_shift=frame_shift,
        high_freq=high_freq,
        htk_compat=htk_compat,
        low_freq=low_freq,
        num_mel_bins=num_mel_bins,
        preemphasis_coefficient=preemphasis_coefficient,
        raw_energy=raw_energy,
        remove_dc_offset=remove_dc_offset,
        round_to_power_of_two=round_to_power_of_two,
        sample_frequency=sample_frequency,
        snip_edges=snip_edges,
        use_energy=use_energy,
        use_log_fbank=use_log_fbank,
        use_power=use_power,
        vtln_high=vtln_high,
        vtln_low=vtln_low,
        vtln_warp=vtln_warp,
        window_type=window_type,
        scale=scale,
        dtype=dtype,
    )
    return _run(spec, waveform, channel, channel_dim, orig_freq, min_duration, dither, subtract_mean)


def mfcc(
    waveform: "Samples | Sequence[Samples]",
    blackman_coeff: float = 0.42,
    cepstral_lifter: float = 22.0,
    channel: int = -1,
    dither: float = 0.0,
    energy_floor: float = 1.0,
    frame_length: float = 25.0,
    frame_shift: float = 10.0,
    high_freq: float = 0.0,
    htk_compat: bool = False,
    low_freq: float = 20.0,
    num_ceps: int = 13,
    min_duration: float = 0.0,
    num_mel_bins: int = 23,
    preemphasis_coefficient: float = 0.97,
    raw_energy: bool = True,
    remove_dc_offset: bool = True,
    round_to_power_of_two: bool = True,
    sample_frequency: float = 16000.0,
    snip_edges: bool = True,
    subtract_mean: bool = False,
    use_energy: bool = False,
    vtln_high: float = -500.0,
    vtln_low: float = 100.0,
    vtln_warp: float = 1.0,
    window_type: str = "povey",
    *,
    scale: float = 1.0,
    channel_dim: int | None = None,
    orig_freq: int | None = None,
    dtype: Any = "float32",
) -> "Samples | list[Samples]":
    """Compute Kaldi's MFCC: orthonormal DCT-II of `kaldi_fbank`, liftered; keywords of torchaudio's.

    Args:
        cepstral_lifter: Q of ``1 + Q / 2 sin(π i / Q)``; 0 for none.
        num_ceps: Number of coefficients, at most `num_mel_bins`.
        use_energy: The log energy in place of C0.
        htk_compat: C0 or the energy last, C0 times √2.

    The other arguments, and the errors, are `kaldi_fbank`'s. (`kaldi_mfcc` is another name for it;
    `mel_mfcc` is torchaudio.transforms' and librosa's.)

    Returns:
        ``[frames, num_ceps]``; a list of them where a sequence of clips came; arrays for arrays. Differentiable.

    Source: torchaudio ``compliance.kaldi.mfcc``; Kaldi ``feature-mfcc.cc``.
    """
    spec = kaldi_spec(
        num_ceps=whole("num_ceps", num_ceps),
        cepstral_lifter=cepstral_lifter,
        blackman_coeff=blackman_coeff,
        energy_floor=energy_floor,
        frame_length=frame_length,
        frame_shift=frame_shift,
        high_freq=high_freq,
        htk_compat=htk_compat,
        low_freq=low_freq,
        num_mel_bins=num_mel_bins,
        preemphasis_coefficient=preemphasis_coefficient,
        raw_energy=raw_energy,
        remove_dc_offset=remove_dc_offset,
        round_to_power_of_two=round_to_power_of_two,
        sample_frequency=sample_frequency,
        snip_edges=snip_edges,
        use_energy=use_energy,
        vtln_high=vtln_high,
        vtln_low=vtln_low,
        vtln_warp=vtln_warp,
        window_type=window_type,
        scale=scale,
        dtype=dtype,
    )
    return _run(spec, waveform, channel, channel_dim, orig_freq, min_duration, dither, subtract_mean)


kaldi_mfcc = mfcc
