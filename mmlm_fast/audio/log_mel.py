"""Whisper's log-mel spectrogram: reference, native CPU core, CUDA kernel behind one op."""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from mmlm_fast import _C
from mmlm_fast.ops._registry import register_op, using_reference

N_FFT = 400
HOP_LENGTH = 160
SAMPLING_RATE = 16000
MIN_SAMPLES = N_FFT // 2 + 1  # reflect padding needs more samples than it adds


@lru_cache
def mel_filters(num_mel_bins: int) -> np.ndarray:
    """Slaney's mel filters, ``[num_mel_bins, 201]`` in float64, 0 to 8000 Hz, each of unit area.

    Source: Slaney, Auditory Toolbox (1998); librosa.filters.mel(htk=False, norm="slaney").
    """

    def hz_to_mel(hz: np.ndarray) -> np.ndarray:
        linear = 3 * hz / 200
        return np.where(hz < 1000, linear, 15 + np.log(np.maximum(hz, 1e-10) / 1000) * 27 / np.log(6.4))

    def mel_to_hz(mel: np.ndarray) -> np.ndarray:
        return np.where(mel < 15, 200 * mel / 3, 1000 * np.exp((mel - 15) * np.log(6.4) / 27))

    top = SAMPLING_RATE / 2
    edges = mel_to_hz(np.linspace(0, float(hz_to_mel(np.array(top))), num_mel_bins + 2))
    hz = np.linspace(0, top, N_FFT // 2 + 1)
    rising = (hz - edges[:-2, None]) / np.diff(edges)[:-1, None]
    falling = (edges[2:, None] - hz) / np.diff(edges)[1:, None]
    filters = np.maximum(0, np.minimum(rising, falling)) * (2 / (edges[2:] - edges[:-2]))[:, None]
    filters.setflags(write=False)
    return filters


@lru_cache
def _plan(num_mel_bins: int) -> "_C.LogMelPlan":
    return _C.LogMelPlan(mel_filters(num_mel_bins))


def log_mel_ref(waveform: Tensor, num_mel_bins: int = 80) -> Tensor:
    """The definition, in plain PyTorch and in the waveform's dtype: ``[*batch, N]`` to ``[*batch, M, N // 160]``."""
    flat = waveform.reshape(-1, waveform.shape[-1])
    window = torch.hann_window(N_FFT, dtype=torch.float64, device=flat.device).to(flat.dtype)
    stft = torch.stft(flat, N_FFT, HOP_LENGTH, window=window, return_complex=True)
    power = stft[..., :-1].abs().square()
    filters = torch.tensor(mel_filters(num_mel_bins), dtype=flat.dtype, device=flat.device)
    log_spec = (filters @ power).clamp(min=1e-10).log10()
    log_spec = torch.maximum(log_spec, log_spec.amax((-2, -1), keepdim=True) - 8)
    return ((log_spec + 4) / 4).reshape(*waveform.shape[:-1], num_mel_bins, -1)


def log_mel(
    waveform: Tensor | Sequence[Tensor],
    *,
    num_mel_bins: int = 80,
    sampling_rate: int = SAMPLING_RATE,
    num_samples: int | None = None,
) -> Tensor:
    """Compute Whisper's log-mel spectrogram, ``(max(log₁₀ mel, max − 8) + 4) / 4``.

    Frames of 400 samples every 160, centred (reflect padding), periodic Hann window, power, Slaney mel filters from
    0 to 8000 Hz, floor 1e-10, clipped to 8 below the clip's maximum.

    Args:
        waveform: Mono audio in [-1, 1] at 16 kHz: a float tensor ``[*batch, N]``, or a sequence of 1-D tensors of
            different lengths. float16, bfloat16 and float64 are computed in float32.
        num_mel_bins: 80 (Whisper up to large-v2) or 128 (large-v3), any number from 1 to 512.
        sampling_rate: In hertz. Only 16000 is accepted: resample first.
        num_samples: Every clip is padded with zeros to this length before anything else, as Whisper pads to 30 s
            (480000). Default: the longest clip. A longer clip is an error, never cut.

    Returns:
        float32 ``[*batch, num_mel_bins, num_samples // 160]`` on the device of the waveform. On a CPU the native core
        computes each clip's own samples only, on `torch.get_num_threads()` threads above 20 s of audio. Where the
        waveform needs a gradient, the differentiable reference runs instead.

    Raises:
        ValueError: for another sampling rate, integer or complex samples, a clip that is too long or shorter than 201
            samples after padding, NaN or infinite samples (CPU only: on CUDA they become NaN features, since looking
            would synchronise), or a stereo array in place of clips.

    Source: openai/whisper ``audio.py``; transformers ``WhisperFeatureExtractor``.
    """
    if sampling_rate != SAMPLING_RATE:
        raise ValueError(f"sampling_rate must be {SAMPLING_RATE}, got {sampling_rate}: resample the waveform first")
    if not isinstance(num_mel_bins, int) or not 1 <= num_mel_bins <= 512:
        raise ValueError(f"num_mel_bins must be from 1 to 512, got {num_mel_bins}")
    clips, batch = _clips_of(waveform)
    longest = waveform.shape[-1] if isinstance(waveform, Tensor) else max([c.shape[0] for c in clips] or [0])
    num_samples = longest if num_samples is None else num_samples
    if longest > num_samples:
        raise ValueError(f"clips must have at most num_samples={num_samples} samples, got {longest}: cut them first")
    if num_samples < MIN_SAMPLES:
        raise ValueError(
            f"a clip needs at least {MIN_SAMPLES} samples after padding, got {num_samples}: pass num_samples"
        )
    if not clips:
        device = waveform.device if isinstance(waveform, Tensor) else None
        return torch.empty(*batch, num_mel_bins, num_samples // HOP_LENGTH, device=device)
    if using_reference() or any(c.requires_grad for c in clips):
        padded = [torch.nn.functional.pad(c.float(), (0, num_samples - c.shape[0])) for c in clips]
        out = log_mel_ref(torch.stack(padded), num_mel_bins)
    else:
        out = _fwd([c.float().contiguous() for c in clips], num_mel_bins, num_samples)
    return out.reshape(*batch, *out.shape[1:])


def _clips_of(waveform: Tensor | Sequence[Tensor]) -> tuple[list[Tensor], torch.Size]:
    """The clips, checked, and the batch shape of the result."""
    if isinstance(waveform, Tensor):
        check_mono(waveform.shape, "waveform")
        batch = waveform.shape[:-1]
        clips = (
            [waveform]
            if waveform.dim() == 1
            else list(waveform.reshape(math.prod(batch), waveform.shape[-1]).unbind(0))
        )
    else:
        clips = list(waveform)
        batch = torch.Size([len(clips)])
    for i, clip in enumerate(clips):
        if not isinstance(clip, Tensor) or clip.dim() != 1 or not clip.is_floating_point():
            raise ValueError(
                f"clip {i} must be a 1-D float tensor in [-1, 1], got {_describe(clip)}; divide int16 by 32768"
            )
        if clip.device != clips[0].device:
            raise ValueError(f"clips must be on one device, got {clips[0].device} and {clip.device} (clip {i})")
    return clips, batch


def _describe(clip: object) -> str:
    return f"{clip.dtype} of shape {tuple(clip.shape)}" if isinstance(clip, Tensor) else type(clip).__name__


MAX_CHANNELS = 16


def check_mono(shape: Sequence[int], name: str) -> None:
    """Refuse ``[num_samples, channels]``, which as a batch would be thousands of clips of two samples each."""
    if len(shape) == 0:
        raise ValueError(f"{name} must be [*batch, num_samples], got a scalar")
    if len(shape) >= 2 and 0 < shape[-1] <= MAX_CHANNELS < shape[-2]:
        raise ValueError(
            f"{name} must be [*batch, num_samples], got shape {tuple(shape)}, which looks like "
            f"[num_samples, channels]: mix down to mono first, {name}.mean(-1)"
        )


def run_plan(
    plan: "_C.LogMelPlan", addresses: list[int], lengths: list[int], num_samples: int, out_address: int
) -> None:
    """Run the native core on float32 clips in memory; see csrc/bindings.cpp. ValueError where not finite."""
    bad = plan.run(addresses, lengths, num_samples, out_address, torch.get_num_threads())
    if bad:
        raise ValueError(
            f"waveform must be finite and below about 1e16 in magnitude, got NaN, infinity or an overflow in clip"
            f"{'s' if len(bad) > 1 else ''} {', '.join(map(str, bad[:10]))}{' …' if len(bad) > 10 else ''}"
        )


def _cpu(waveforms: list[Tensor], num_mel_bins: int, num_samples: int) -> Tensor:
    out = torch.empty(len(waveforms), num_mel_bins, num_samples // HOP_LENGTH)
    addresses, lengths = [x.data_ptr() for x in waveforms], [x.shape[0] for x in waveforms]
    run_plan(_plan(num_mel_bins), addresses, lengths, num_samples, out.data_ptr())
    return out


@lru_cache
def _device_tables(num_mel_bins: int, device: torch.device) -> list[Tensor]:
    return [torch.from_numpy(table).to(device) for table in _plan(num_mel_bins).sparse_filters()]


@lru_cache
def _has_cuda_code() -> bool:
    return bool(_C.cuda_status()["compiled"])


@lru_cache
def _device_window(device: torch.device) -> Tensor:
    return torch.hann_window(N_FFT, dtype=torch.float64).float().to(device)


def _cuda(waveforms: list[Tensor], num_mel_bins: int, num_samples: int) -> Tensor:
    padded = torch.stack([torch.nn.functional.pad(x, (0, num_samples - x.shape[0])) for x in waveforms])
    if not _has_cuda_code():  # this build has no CUDA code: still on the device, in plain torch
        return log_mel_ref(padded, num_mel_bins)
    spectrum = torch.stft(padded, N_FFT, HOP_LENGTH, window=_device_window(padded.device), return_complex=True)
    num_frames = num_samples // HOP_LENGTH  # the last frame is dropped
    out = torch.empty(len(waveforms), num_mel_bins, num_frames, device=padded.device)
    clip_max = torch.empty(len(waveforms), dtype=torch.int32, device=padded.device)
    _C.log_mel_cuda(
        spectrum.data_ptr(),
        list(spectrum.stride()),
        [t.data_ptr() for t in _device_tables(num_mel_bins, padded.device)],
        out.data_ptr(),
        clip_max.data_ptr(),
        len(waveforms),
        num_frames,
        num_mel_bins,
        torch.cuda.current_stream(padded.device).cuda_stream,
        padded.device.index,
    )
    return out


_fwd = register_op(
    "log_mel(Tensor[] waveforms, int num_mel_bins, int num_samples) -> Tensor",
    portable=_cpu,
    kernel="mmlm_fast.audio.log_mel:_cuda",
    fake=lambda waveforms, num_mel_bins, num_samples: waveforms[0].new_empty(
        (len(waveforms), num_mel_bins, num_samples // HOP_LENGTH)
    ),
)
