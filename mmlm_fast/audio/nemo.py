"""NeMo's log-mel features, as in Parakeet and Canary, and the normalisation of features over a clip."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mmlm_fast import _C
from mmlm_fast.audio.arguments import whole
from mmlm_fast.audio.filters import mel_filters, window_of
from mmlm_fast.audio.plain import address_of, has_memory, plain_torch
from mmlm_fast.audio.resample import num_resampled
from mmlm_fast.audio.spectral import dtype_name, family, features_of, plain_float
from mmlm_fast.audio.waveforms import Waveform, clips_of
from mmlm_fast.ops.paths import using_reference

SAMPLING_RATE = 16000
HOP_LENGTH = 160
ZERO_GUARD = 2.0**-24
EPSILON = 1e-5


@family("nemo")
def nemo_key(num_mel_bins: int, preemphasis: float, dtype: str) -> dict:
    return dict(
        sampling_rate=SAMPLING_RATE,
        window=window_of("hann", 400, periodic=False),
        hop_length=HOP_LENGTH,
        n_fft=512,
        filters=mel_filters(num_mel_bins, n_fft=512, sampling_rate=SAMPLING_RATE),
        offset=(512 - 400) // 2 - 256,
        pad_total=512,
        span=512,
        min_samples=1,
        bins_first=False,
        dtype=getattr(torch, dtype),
        options=dict(edge="zero", signal_preemphasis=preemphasis, log="natural", add=ZERO_GUARD),
    )


def nemo_log_mel(
    waveform: Waveform,
    *,
    num_mel_bins: int = 80,
    preemphasis: float = 0.97,
    normalize: bool = True,
    orig_freq: int | None = None,
    channel_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor | list[Tensor]:
    """Compute NeMo's log-mel features, ``ln(mel + 2⁻²⁴)``, each bin standardised over the clip.

    Pre-emphasis of the signal, symmetric Hann window of 400 samples every 160, centred in transforms of 512 (zeros
    beyond the ends), power, Slaney filters from 0 to 8000 Hz.

    Args:
        waveform: Audio at 16 kHz: ``[*batch, N]``, or a sequence of 1-D tensors; arrays likewise. Float samples in
            [-1, 1], or int16 or int32 ones, which are scaled to [-1, 1).
        num_mel_bins: 80 (Parakeet), 128 (Canary).
        preemphasis: Of ``x[t] - c x[t-1]``; 0 for none.
        normalize: Subtract each bin's mean and divide by its deviation (n - 1) plus 1e-5, over the ``N // 160`` frames
            that the clip fills; the last frame, which it does not, becomes 0.
        orig_freq: Rate of the waveform where it is not 16 kHz: resampled in the same pass.
        channel_dim: Dimension that holds channels, which are averaged.
        dtype: Of the result: float32, float16, bfloat16 (computed in float32), or float64, computed in float64.

    Returns:
        ``[*batch, 1 + N // 160, num_mel_bins]``; a list of them where a sequence of clips came. Differentiable.

    Raises:
        ValueError: for a clip of less than two frames (320 samples) with `normalize`, where NeMo gives NaN, and for
            NaN or infinite samples (CPU).

    Source: NVIDIA NeMo ``FilterbankFeatures``; transformers ``ParakeetFeatureExtractor``.
    """
    num_mel_bins = whole("num_mel_bins", num_mel_bins, 1, 512, "from 1 to 512")
    key = nemo_key(num_mel_bins=num_mel_bins, preemphasis=plain_float(preemphasis), dtype=dtype_name(dtype))
    clips = clips_of(waveform, channel_dim=channel_dim, orig_freq=orig_freq)
    lengths = [num_resampled(w.shape[-1], clips.orig_freq, SAMPLING_RATE) for w in clips.waveforms]
    if normalize:
        for i, n in enumerate(lengths):
            if n // HOP_LENGTH < 2:
                raise ValueError(
                    f"clip {i} must have at least {2 * HOP_LENGTH} samples, two frames to normalise over, got {n}"
                )
    out = features_of(key, clips)
    if not normalize or not lengths:
        return out
    if isinstance(out, Tensor):
        return standardize(out, lengths[0] // HOP_LENGTH, ddof=1, eps_outside=EPSILON)
    return [standardize(x, n // HOP_LENGTH, ddof=1, eps_outside=EPSILON) for x, n in zip(out, lengths, strict=True)]


def standardize(
    features: Tensor,
    num_valid: int | Sequence[int] | None = None,
    *,
    per: str = "bin",
    ddof: int = 0,
    eps_inside: float = 0.0,
    eps_outside: float = 0.0,
    means: bool = True,
    variances: bool = True,
    padding: float = 0.0,
) -> Tensor:
    """Normalise features over the frames of a clip: ``(x − mean) / (√(var + eps_inside) + eps_outside)``.

    Args:
        features: ``[*batch, frames, bins]``.
        num_valid: Frames that count, one number or one a clip; later frames become `padding`. Default: all.
        per: "bin" for statistics of each bin over time (NeMo's, Kaldi's and Seamless' CMVN), "clip" for one mean and
            deviation of all valid features of a clip (Whisper's `do_normalize`, on waveforms as ``[*batch, N, 1]``).
        ddof: Degrees of freedom taken off the count of the variance: 0 or 1.
        eps_inside: Added to the variance.
        eps_outside: Added to the deviation.
        means: Subtract the mean.
        variances: Divide by the deviation.
        padding: Value of frames that do not count.

    Returns:
        A new tensor like `features`; statistics are accumulated in float64 on a CPU. Differentiable.

    Raises:
        ValueError: for other shapes, a count that is not between 0 and the frames, or integer features.
    """
    if not features.is_floating_point() or features.dim() < 2:
        raise ValueError(
            f"features must be floating point, [*batch, frames, bins], got {features.dtype} {tuple(features.shape)}"
        )
    if per not in ("bin", "clip"):
        raise ValueError(f'per must be "bin" or "clip", got {per!r}')
    frames, bins = features.shape[-2:]
    flat = features.reshape(math.prod(features.shape[:-2]), frames, bins)
    ddof = whole("ddof", ddof, 0, 1)
    if num_valid is None:
        counts = [frames] * len(flat)
    elif isinstance(num_valid, (Sequence, np.ndarray)) or (isinstance(num_valid, Tensor) and num_valid.dim()):
        what = f"one count a clip, from 0 to {frames}"
        counts = [whole("num_valid", n, 0, frames, what) for n in num_valid]
    else:
        counts = [whole("num_valid", num_valid, 0, frames)] * len(flat)
    if len(counts) != len(flat):
        raise ValueError(f"num_valid must be one count a clip, from 0 to {frames}, got {counts} for {len(flat)} clips")
    by_reference = torch.compiler.is_compiling() or using_reference() or features.requires_grad or per == "clip"
    if not by_reference:  # Dynamo cannot trace the look at memory
        by_reference = features.device.type != "cpu" or features.dtype not in (torch.float32, torch.float64)
        by_reference = by_reference or not has_memory(features)
    if by_reference:
        out = _standardize_ref(flat, counts, per, ddof, eps_inside, eps_outside, means, variances, padding)
    else:
        with plain_torch():
            out = flat.clone(memory_format=torch.contiguous_format)
        standardize_in_place(out, counts, ddof, eps_inside, eps_outside, means, variances, padding)
    return out.reshape(features.shape)


def standardize_in_place(
    features: Tensor | np.ndarray,
    num_valid: Sequence[int],
    ddof: int = 0,
    eps_inside: float = 0.0,
    eps_outside: float = 0.0,
    means: bool = True,
    variances: bool = True,
    padding: float = 0.0,
) -> None:
    """Standardise dense features ``[clips, frames, bins]`` of float32 or float64 in the core; see `standardize`."""
    is_double = features.dtype in (torch.float64, np.float64)
    dtype = torch.float64 if is_double else torch.float32
    clips, frames, bins = features.shape
    start, step = address_of(features, dtype, clips * frames * bins), frames * bins * dtype.itemsize
    starts = [start + i * step for i in range(clips)]
    options = (ddof, eps_inside, eps_outside, means, variances, padding)
    _C.standardize(starts, [frames] * clips, list(num_valid), bins, is_double, *options)


def _standardize_ref(
    flat: Tensor,
    counts: list[int],
    per: str,
    ddof: int,
    eps_inside: float,
    eps_outside: float,
    means: bool,
    variances: bool,
    padding: float,
) -> Tensor:
    rows = []
    for clip, count in zip(flat, counts, strict=True):
        valid = clip[:count]
        over = (0,) if per == "bin" else (0, 1)
        number = count if per == "bin" else count * clip.shape[1]
        mean = valid.sum(over, keepdim=True) / number
        variance = (valid - mean).square().sum(over, keepdim=True) / (number - ddof)
        deviation = (variance + eps_inside).sqrt() + eps_outside
        centred = valid - mean if means else valid
        rows.append(torch.cat([centred / deviation if variances else centred, torch.full_like(clip[count:], padding)]))
    return torch.stack(rows) if rows else flat.clone()
