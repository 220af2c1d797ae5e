"""Whisper's log-mel spectrogram."""

import torch
from torch import Tensor

from mmlm_fast.audio.arguments import whole
from mmlm_fast.audio.filters import mel_filters, window_of
from mmlm_fast.audio.resample import num_resampled
from mmlm_fast.audio.spectral import dtype_name, family, features_of, plain_float, spec_of, spectral_ref
from mmlm_fast.audio.waveforms import Waveform, clips_of

N_FFT = 400
HOP_LENGTH = 160
SAMPLING_RATE = 16000
MIN_SAMPLES = N_FFT // 2 + 1  # reflect padding needs more samples than it adds
DYNAMIC_RANGE = 8.0


def whisper_options(floor: float = 1e-10) -> dict:
    """(log10(max(mel, floor)) + 4) / 4, the range still unlimited."""
    return dict(edge="reflect", floor=floor, log="decimal", multiply=0.25, shift=1.0)


@family("log_mel")
def log_mel_key(num_mel_bins: int, log_mel_max: float | None, dtype: str) -> dict:
    if log_mel_max is None:
        options = whisper_options() | dict(dynamic_range=DYNAMIC_RANGE / 4)
    else:
        options = whisper_options(max(1e-10, 10.0 ** (log_mel_max - DYNAMIC_RANGE)))
    return dict(
        sampling_rate=SAMPLING_RATE,
        window=window_of("hann", N_FFT),
        hop_length=HOP_LENGTH,
        n_fft=N_FFT,
        filters=mel_filters(num_mel_bins),
        offset=-(N_FFT // 2),
        pad_total=N_FFT,
        span=N_FFT,
        drop=1,  # the last frame
        min_samples=MIN_SAMPLES,
        dtype=getattr(torch, dtype),
        options=options,
    )


def checked_key(num_mel_bins: int, log_mel_max: float | None, dtype: torch.dtype) -> str:
    return log_mel_key(
        num_mel_bins=whole("num_mel_bins", num_mel_bins, 1, 512, "from 1 to 512"),
        log_mel_max=None if log_mel_max is None else plain_float(log_mel_max),
        dtype=dtype_name(dtype),
    )


def log_mel_ref(waveform: Tensor, num_mel_bins: int = 80) -> Tensor:
    """The definition, in plain PyTorch and in the waveform's dtype: ``[*batch, N]`` to ``[*batch, M, N // 160]``."""
    spec = spec_of(checked_key(num_mel_bins, None, torch.float32))
    return spectral_ref(spec, waveform, spec.layout.num_frames(waveform.shape[-1]))


def log_mel(
    waveform: Waveform,
    *,
    num_mel_bins: int = 80,
    sampling_rate: int = SAMPLING_RATE,
    num_samples: int | None = None,
    orig_freq: int | None = None,
    channel_dim: int | None = None,
    log_mel_max: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Compute Whisper's log-mel spectrogram, ``(max(log₁₀ mel, max − 8) + 4) / 4``.

    Frames of 400 samples every 160, centred (reflect padding), periodic Hann window, power, Slaney mel filters from
    0 to 8000 Hz, floor 1e-10, clipped to 8 below the clip's maximum.

    Args:
        waveform: Audio at 16 kHz: a tensor ``[*batch, N]``, or a sequence of 1-D tensors of different lengths;
            arrays likewise. Float
            samples in [-1, 1], or int16 or int32 ones, which are scaled to [-1, 1).
        num_mel_bins: 80 (Whisper up to large-v2) or 128 (large-v3), any number from 1 to 512.
        sampling_rate: In hertz, for callers that carry it along. Only 16000 is accepted; see `orig_freq`.
        num_samples: Every clip is padded with zeros to this length before anything else, as Whisper pads to 30 s
            (480000). Default: the longest clip. A longer clip is an error, never cut.
        orig_freq: Rate of the waveform where it is another: it is resampled to 16 kHz in the same pass (see
            `resample`). `num_samples` counts resampled ones.
        channel_dim: Dimension that holds channels, which are averaged; by default there is none.
        log_mel_max: Clip to 8 below this value of log₁₀ mel, not below each clip's own maximum: 1.5 is Voxtral
            Realtime's. Then frames do not depend on what comes later, and `StreamingLogMel` has the same bits.
        dtype: Of the result: float32, float16, bfloat16 (computed in float32, rounded once), or float64, computed in
            float64, for what a peer in float64 computes.

    Returns:
        ``[*batch, num_mel_bins, num_samples // 160]`` of `dtype` on the device of the waveform. On a CPU the native
        core computes each clip's own samples only, on `torch.get_num_threads()` threads above 20 s of audio. Where the
        waveform needs a gradient, the differentiable reference runs instead.

    Raises:
        ValueError: for another sampling rate, complex samples, a clip that is too long or shorter than 201 samples
            after padding, NaN or infinite samples (CPU only: on CUDA they become NaN features, since looking would
            synchronise), or a stereo array in place of clips.

    Source: openai/whisper ``audio.py``; transformers ``WhisperFeatureExtractor``.
    """
    if whole("sampling_rate", sampling_rate) != SAMPLING_RATE:
        raise ValueError(
            f"sampling_rate must be {SAMPLING_RATE}, got {sampling_rate}: pass orig_freq={sampling_rate} to have the "
            f"waveform resampled"
        )
    key = checked_key(num_mel_bins, log_mel_max, dtype)
    clips = clips_of(waveform, channel_dim=channel_dim, orig_freq=orig_freq)
    if num_samples is not None:
        num_samples = whole("num_samples", num_samples, 0)
    elif clips.batch is None:
        lengths = [num_resampled(w.shape[-1], clips.orig_freq, SAMPLING_RATE) for w in clips.waveforms]
        num_samples = max(lengths, default=0)
    out = features_of(key, clips, num_samples)
    if isinstance(out, Tensor):
        return out
    if out:
        return torch.stack(out)
    return torch.empty(
        0, whole("num_mel_bins", num_mel_bins), (num_samples or 0) // HOP_LENGTH, dtype=dtype, device="cpu"
    )
