"""Kaldi's log-mel filter bank and MFCC, with the keywords of torchaudio.compliance.kaldi."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmlm_fast.audio.arguments import whole
from mmlm_fast.audio.filters import cosine_matrix, kaldi_mel_filters, lifter, window_of
from mmlm_fast.audio.resample import num_resampled, resample
from mmlm_fast.audio.spectral import (
    SpectralSpec,
    dtype_name,
    family,
    features_of,
    frames_ref,
    plain_float,
    spec_of,
    spectrum_ref,
)
from mmlm_fast.audio.waveforms import Clips, Waveform, as_float, clips_of, tensor_of

EPSILON = 1.1920928955078125e-07  # FLT_EPSILON: the floor of energies
# Far above what is in use; a frame of more is an argument in another unit, and its tables would not fit in memory.
MAX_RATE = 10**8
MAX_FRAME = 1 << 22
MAX_TABLE = 1 << 28  # of the filters, bins times samples
_WINDOWS = ("povey", "hanning", "hamming", "blackman", "rectangular")


@family("kaldi")
def kaldi_key(
    num_ceps: int,
    cepstral_lifter: float,
    blackman_coeff: float,
    energy_floor: float,
    frame_length: int,
    frame_shift: int,
    n_fft: int,
    high_freq: float,
    htk_compat: bool,
    low_freq: float,
    num_mel_bins: int,
    preemphasis_coefficient: float,
    raw_energy: bool,
    remove_dc_offset: bool,
    sample_frequency: int,
    snip_edges: bool,
    use_energy: bool,
    use_log_fbank: bool,
    use_power: bool,
    vtln: tuple[float, float, float],
    window_type: str,
    scale: float,
    dtype: str,
) -> dict:
    options: dict[str, Any] = dict(
        scale=scale,
        frame_preemphasis=preemphasis_coefficient,
        remove_dc_offset=remove_dc_offset,
        exponent=2.0 if use_power else 1.0,
        raw_energy=raw_energy,
        energy_floor=energy_floor,
        edge="none" if snip_edges else "mirror",
    )
    if use_log_fbank:
        options |= dict(log="natural", floor=EPSILON)
    if use_energy:
        place = "last" if htk_compat else "first"
        options["energy"] = f"replace_{place}" if num_ceps else place
    matrix = None
    if num_ceps:
        # In float32, as torchaudio makes them.
        matrix = cosine_matrix(num_ceps, num_mel_bins, dtype=torch.float32)
        matrix = matrix * lifter(num_ceps, cepstral_lifter, torch.float32)[:, None]
        if htk_compat:
            # C0 last, and without the factor sqrt(1/2) that the orthonormal transform gives it.
            matrix = np.concatenate([matrix[1:], matrix[:1] * (1 if use_energy else math.sqrt(2))])
    # Frame t of the unsnipped kind is centred at (t + 1/2) * frame_shift.
    offset = 0 if snip_edges else frame_shift // 2 - frame_length // 2
    return dict(
        sampling_rate=sample_frequency,
        window=window_of(window_type, frame_length, False, blackman_coeff),
        hop_length=frame_shift,
        n_fft=n_fft,
        filters=kaldi_mel_filters(num_mel_bins, n_fft, sample_frequency, low_freq, high_freq, *vtln),
        dct=matrix,
        offset=offset,
        pad_total=0 if snip_edges else frame_shift // 2,
        span=frame_length if snip_edges else frame_shift,
        min_samples=frame_length,
        bins_first=False,
        dtype=getattr(torch, dtype),
        options=options,
    )


def checked_key(
    *,
    blackman_coeff: float = 0.42,
    energy_floor: float = 1.0,
    frame_length: float = 25.0,
    frame_shift: float = 10.0,
    high_freq: float = 0.0,
    htk_compat: bool = False,
    low_freq: float = 20.0,
    num_mel_bins: int = 23,
    preemphasis_coefficient: float = 0.97,
    raw_energy: bool = True,
    remove_dc_offset: bool = True,
    round_to_power_of_two: bool = True,
    sample_frequency: float = 16000.0,
    snip_edges: bool = True,
    use_energy: bool = False,
    use_log_fbank: bool = True,
    use_power: bool = True,
    vtln_high: float = -500.0,
    vtln_low: float = 100.0,
    vtln_warp: float = 1.0,
    window_type: str = "povey",
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    num_ceps: int = 0,
    cepstral_lifter: float = 0.0,
) -> str:
    """From torchaudio's keywords to a spec's key, or ValueError."""
    sample_frequency, frame_shift, frame_length = map(plain_float, (sample_frequency, frame_shift, frame_length))
    vtln = (plain_float(vtln_low), plain_float(vtln_high), plain_float(vtln_warp))
    if not 0 < sample_frequency <= MAX_RATE:
        raise ValueError(f"sample_frequency must be positive and at most {MAX_RATE} Hz, got {sample_frequency}")
    for name, ms in (("frame_length", frame_length), ("frame_shift", frame_shift)):
        if not -math.inf < sample_frequency * ms * 0.001 <= MAX_FRAME:
            raise ValueError(f"{name} must be at most {MAX_FRAME} samples, got {ms} ms at {sample_frequency} Hz")
    shift, length = (int(sample_frequency * ms * 0.001) for ms in (frame_shift, frame_length))
    if length < 2 or shift < 1:
        raise ValueError(
            f"frame_length must be at least 2 samples and frame_shift 1, got {frame_length} and {frame_shift} ms, "
            f"{length} and {shift} samples"
        )
    n_fft = 1 << (length - 1).bit_length() if round_to_power_of_two else length
    if n_fft % 2:
        raise ValueError(
            f"the frame must have an even number of samples, got {n_fft}: use round_to_power_of_two or another "
            f"frame_length"
        )
    if not 0 <= preemphasis_coefficient <= 1:
        raise ValueError(f"preemphasis_coefficient must be in [0, 1], got {preemphasis_coefficient}")
    if window_type not in _WINDOWS:
        raise ValueError(f"window_type must be among {', '.join(_WINDOWS)}, got {window_type!r}")
    num_mel_bins = whole("num_mel_bins", num_mel_bins, 4, None, "above 3")
    if num_mel_bins * n_fft > MAX_TABLE:
        raise ValueError(f"num_mel_bins must be at most {MAX_TABLE // n_fft} for {n_fft} samples, got {num_mel_bins}")
    num_ceps = whole("num_ceps", num_ceps, 0)
    if num_ceps > num_mel_bins:
        raise ValueError(f"num_ceps must be at most num_mel_bins={num_mel_bins}, got {num_ceps}")
    return kaldi_key(
        num_ceps=num_ceps,
        cepstral_lifter=plain_float(cepstral_lifter),
        blackman_coeff=plain_float(blackman_coeff),
        energy_floor=plain_float(energy_floor),
        frame_length=length,
        frame_shift=shift,
        n_fft=n_fft,
        high_freq=plain_float(high_freq),
        htk_compat=bool(htk_compat),
        low_freq=plain_float(low_freq),
        num_mel_bins=num_mel_bins,
        preemphasis_coefficient=plain_float(preemphasis_coefficient),
        raw_energy=bool(raw_energy),
        remove_dc_offset=bool(remove_dc_offset),
        sample_frequency=int(sample_frequency) if sample_frequency.is_integer() else sample_frequency,
        snip_edges=bool(snip_edges),
        use_energy=bool(use_energy),
        use_log_fbank=bool(use_log_fbank),
        use_power=bool(use_power),
        vtln=vtln,
        window_type=window_type,
        scale=plain_float(scale),
        dtype=dtype_name(dtype),
    )


def _clips(waveform: Any, channel: int, channel_dim: int | None, orig_freq: int | None) -> tuple[Clips, bool]:
    """The clips, and whether one came alone. A 2-D tensor is ``[channels, num_samples]``, as in torchaudio."""
    channel = whole("channel", channel, -1)
    if isinstance(waveform, np.ndarray):
        waveform = tensor_of(waveform, "waveform")
    if isinstance(waveform, Tensor):
        if waveform.dim() not in (1, 2):
            raise ValueError(
                f"waveform must be [num_samples], [channels, num_samples] or a sequence of 1-D tensors, got shape "
                f"{tuple(waveform.shape)}"
            )
        if waveform.dim() == 2 and channel_dim is None:
            channels = waveform.shape[0]
            if channel < 0 and channels > 1:
                raise ValueError(
                    f"waveform has {channels} channels, shape {tuple(waveform.shape)}: pass channel=0 to use one, "
                    f"channel_dim=0 to average them, or list(waveform) for a batch of clips"
                )
            if max(channel, 0) >= channels:
                raise ValueError(f"channel must be below {channels}, got {channel}")
            waveform = waveform[max(channel, 0)]
        elif waveform.dim() == 1:
            _check_only_channel(channel)
        return clips_of(waveform, channel_dim=channel_dim, orig_freq=orig_freq), True
    if channel_dim is None:
        _check_only_channel(channel)
    return clips_of(waveform, channel_dim=channel_dim, orig_freq=orig_freq), False


def _check_only_channel(channel: int) -> None:
    if channel > 0:
        raise ValueError(f"channel must be 0 or -1 for waveforms of one channel, got {channel}")


def _run(
    key: str,
    waveform: Any,
    channel: int,
    channel_dim: int | None,
    orig_freq: int | None,
    min_duration: float,
    dither: float,
    subtract_mean: bool,
) -> Tensor | list[Tensor]:
    clips, alone = _clips(waveform, channel, channel_dim, orig_freq)
    if alone and min_duration:
        spec = spec_of(key)
        seconds = num_resampled(clips.waveforms[0].shape[-1], clips.orig_freq, spec.sampling_rate) / spec.sampling_rate
        if seconds < min_duration:
            return torch.empty(0, dtype=spec.dtype, device=clips.waveforms[0].device)  # as torchaudio
    if dither:
        spec = spec_of(key)
        out: Any = [_dithered(spec, w, clips.orig_freq, dither) for w in clips.waveforms]
        out = out[0] if alone else out
    else:
        out = features_of(key, clips)
    if subtract_mean:
        out = out - out.mean(0, keepdim=True) if alone else [x - x.mean(0, keepdim=True) for x in out]
    return out


def _dithered(spec: SpectralSpec, waveform: Tensor, orig_freq: int, dither: float) -> Tensor:
    """Noise is drawn per frame, as torchaudio draws it: the frames are taken apart first."""
    x: Any = as_float(waveform, spec.compute_dtype)
    if orig_freq:
        x = resample(x, orig_freq, spec.sampling_rate)
    spec.layout.check_length(x.shape[-1])
    frames = frames_ref(spec, x, spec.layout.num_frames(x.shape[-1]))
    return spectrum_ref(spec, frames + torch.randn_like(frames) * dither).to(spec.dtype)


def kaldi_fbank(
    waveform: Waveform,
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
    dtype: torch.dtype = torch.float32,
) -> Tensor | list[Tensor]:
    """Compute Kaldi's log-mel filter bank; the keywords are torchaudio.compliance.kaldi.fbank's.

    Per frame: dither, mean removed, log energy, pre-emphasis, window, zeros to a power of two, power spectrum,
    triangular filters over mel, ``ln(max(mel, FLT_EPSILON))``.

    Args:
        waveform: ``[N]``, ``[channels, N]``, or a sequence of 1-D tensors; arrays likewise. Kaldi expects samples at
            the scale of 16-bit integers; here they are taken as they are, in [-1, 1] for int16 and int32 ones: pass
            ``scale=32768``.
        blackman_coeff: Of the Blackman window.
        channel: Which channel of ``[channels, N]``; needed where there are several.
        dither: Standard deviation of the noise added to every frame (from torch's generator), at the scale of
            ``scale * waveform``.
        energy_floor: Least energy, before its logarithm.
        frame_length: In milliseconds.
        frame_shift: In milliseconds.
        high_freq: Highest frequency in hertz; 0 or below counts from the Nyquist frequency.
        htk_compat: Energy last, not first.
        low_freq: Lowest frequency in hertz.
        min_duration: A shorter clip, in seconds, gives an empty tensor, as there.
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
        dtype: Of the result: float32, float16, bfloat16 (computed in float32), or float64, computed in float64.

    Returns:
        ``[frames, num_mel_bins (+ 1)]``; a list of them where a sequence of clips came. Differentiable.

    Raises:
        ValueError: where torchaudio asserts, and for several channels without a choice (torchaudio takes the first),
            clips shorter than a frame, NaN or infinite samples (CPU).

    Source: torchaudio ``compliance.kaldi.fbank``; Kaldi ``feature-fbank.cc``.
    """
    key = checked_key(
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
    return _run(key, waveform, channel, channel_dim, orig_freq, min_duration, dither, subtract_mean)


def mfcc(
    waveform: Waveform,
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
    dtype: torch.dtype = torch.float32,
) -> Tensor | list[Tensor]:
    """Compute Kaldi's MFCC: orthonormal DCT-II of `kaldi_fbank`, liftered; keywords of torchaudio's.

    Args:
        cepstral_lifter: Q of ``1 + Q / 2 sin(π i / Q)``; 0 for none.
        num_ceps: Number of coefficients, at most `num_mel_bins`.
        use_energy: The log energy in place of C0.
        htk_compat: C0 or the energy last, C0 times √2.

    The other arguments, and the errors, are `kaldi_fbank`'s. (`mel_mfcc` is torchaudio.transforms' and librosa's.)

    Returns:
        ``[frames, num_ceps]``; a list of them where a sequence of clips came. Differentiable.

    Source: torchaudio ``compliance.kaldi.mfcc``; Kaldi ``feature-mfcc.cc``.
    """
    key = checked_key(
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
    return _run(key, waveform, channel, channel_dim, orig_freq, min_duration, dither, subtract_mean)
