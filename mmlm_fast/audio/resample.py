"""Polyphase resampling with a windowed sinc: torchaudio's definition, in the native core."""

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from mmlm_fast import _C
from mmlm_fast.audio.plain import address_of, without_autocast
from mmlm_fast.audio.tables import kept_tables
from mmlm_fast.audio.waveforms import Clips, as_float, clips_of, native_format
from mmlm_fast.ops._registry import register_op, using_reference

_METHODS = ("sinc_interp_hann", "sinc_interp_kaiser")
_KAISER_BETA = 14.769656459379492


@lru_cache(maxsize=32)
def sinc_kernel(
    old_rate: int, new_rate: int, width: int = 6, rolloff: float = 0.99, method: str = _METHODS[0], beta: float = 0.0
) -> tuple[np.ndarray, int]:
    """Filters ``[new_rate, 2 * before + old_rate]`` in float64 for coprime rates, and `before`.

    Output ``new_rate * j + p`` is the sum of ``filters[p, k] * x[old_rate * j + k - before]``.

    Source: torchaudio ``functional._get_sinc_resample_kernel``; Smith, Digital Audio Resampling (2002).
    """
    base = min(old_rate, new_rate) * rolloff
    before = math.ceil(width * old_rate / base)
    k = np.arange(-before, before + old_rate) / old_rate
    t = np.clip((k - np.arange(new_rate)[:, None] / new_rate) * base, -width, width)
    if method == "sinc_interp_hann":
        window = np.cos(t * np.pi / width / 2) ** 2
    else:
        window = np.i0(beta * np.sqrt(1 - (t / width) ** 2)) / np.i0(beta)
    filters = np.sinc(t) * window * (base / old_rate)
    filters[np.abs(t) >= width] = 0.0  # the sinc's zero, but for rounding
    filters.setflags(write=False)
    return filters, before


def _coprime(orig_freq: int, new_freq: int) -> tuple[int, int]:
    common = math.gcd(orig_freq, new_freq)
    return orig_freq // common, new_freq // common


def num_resampled(num_samples: int, orig_freq: int, new_freq: int) -> int:
    """Samples after resampling; an `orig_freq` of 0 means the rate is `new_freq` already."""
    if not orig_freq or orig_freq == new_freq:
        return num_samples
    old, new = _coprime(orig_freq, new_freq)
    return -(-num_samples * new // old)


@lru_cache(maxsize=32)
def native_resampler(
    orig_freq: int, new_freq: int, width: int = 6, rolloff: float = 0.99, method: str = _METHODS[0], beta: float = 0.0
) -> "_C.Resampler | None":
    if not orig_freq or orig_freq == new_freq:
        return None
    old, new = _coprime(orig_freq, new_freq)
    filters, before = sinc_kernel(old, new, width, rolloff, method, beta)
    return _C.Resampler(old, new, filters, before)


def resample_ref(
    waveform: Tensor,
    orig_freq: int,
    new_freq: int,
    width: int = 6,
    rolloff: float = 0.99,
    method: str = _METHODS[0],
    beta: float = 0.0,
) -> Tensor:
    """The definition, in plain PyTorch and in the waveform's dtype: ``[*batch, N]`` to ``[*batch, M]``."""
    if orig_freq == new_freq:
        return waveform
    old, new = _coprime(orig_freq, new_freq)
    filters, before = sinc_kernel(old, new, width, rolloff, method, beta)
    key = "resample", old, new, width, rolloff, method, beta
    kernel = kept_tables(key, lambda: [filters], waveform.dtype, waveform)[0][:, None]
    num_samples = waveform.shape[-1]
    wanted = num_resampled(num_samples, orig_freq, new_freq)
    rows = waveform.reshape(math.prod(waveform.shape[:-1]), 1, num_samples)
    padded = torch.nn.functional.pad(rows, (before, before + old))
    with without_autocast(padded):
        phases = torch.nn.functional.conv1d(padded, kernel, stride=old)  # [B, new, j]
    return phases.transpose(1, 2).flatten(1)[:, :wanted].reshape(*waveform.shape[:-1], wanted)


def _cpu(
    waveforms: list[Tensor], orig_freq: int, new_freq: int, width: int, rolloff: float, method: str, beta: float
) -> Tensor:
    lengths = [num_resampled(w.shape[-1], orig_freq, new_freq) for w in waveforms]
    dtype = torch.float64 if waveforms[0].dtype == torch.float64 else torch.float32
    out = torch.empty(sum(lengths), dtype=dtype, device="cpu")
    starts, size = [address_of(out, dtype, sum(lengths))], out.element_size()
    for n in lengths[:-1]:
        starts.append(starts[-1] + n * size)
    format = native_format(waveforms, native_resampler(orig_freq, new_freq, width, rolloff, method, beta))
    _C.read_samples(
        format,
        [address_of(w) for w in waveforms],
        [w.shape[-1] for w in waveforms],
        starts,
        dtype == torch.float64,
        torch.get_num_threads(),
    )
    return out


def _cuda(
    waveforms: list[Tensor], orig_freq: int, new_freq: int, width: int, rolloff: float, method: str, beta: float
) -> Tensor:
    dtype = torch.float64 if waveforms[0].dtype == torch.float64 else torch.float32
    options = (width, rolloff, method, beta)
    return torch.cat([resample_ref(as_float(w, dtype), orig_freq, new_freq, *options) for w in waveforms])


_fwd = register_op(
    "resample(Tensor[] waveforms, int orig_freq, int new_freq, int width, float rolloff, str method, float beta)"
    " -> Tensor",
    portable=_cpu,
    kernel="mmlm_fast.audio.resample:_cuda",
    fake=lambda waveforms, orig_freq, new_freq, width, rolloff, method, beta: waveforms[0].new_empty(
        (sum(num_resampled(w.shape[-1], orig_freq, new_freq) for w in waveforms),),
        dtype=torch.float64 if waveforms[0].dtype == torch.float64 else torch.float32,
    ),
)


def resample(
    waveform: Tensor | list[Tensor],
    orig_freq: int,
    new_freq: int,
    lowpass_filter_width: int = 6,
    rolloff: float = 0.99,
    resampling_method: str = "sinc_interp_hann",
    beta: float | None = None,
    *,
    channel_dim: int | None = None,
) -> Tensor | list[Tensor]:
    """Resample by a windowed sinc, with conversion to float and mixing down in the same pass.

    Args:
        waveform: ``[*batch, N]``, or a sequence of 1-D tensors. float16, bfloat16, float32 and float64 samples, or
            int16 and int32 ones, which are scaled to [-1, 1).
        orig_freq: Rate of the samples in whole hertz.
        new_freq: Rate wanted, in whole hertz.
        lowpass_filter_width: Zero crossings of the sinc on each side; more is sharper and dearer.
        rolloff: Cut-off as a fraction of the lower Nyquist frequency, in (0, 1].
        resampling_method: "sinc_interp_hann" or "sinc_interp_kaiser".
        beta: Shape of the Kaiser window; default 14.77.
        channel_dim: Dimension that holds channels, which are averaged; by default there is none.

    Returns:
        ``[*batch, ceil(N * new_freq / orig_freq)]`` in float32 (float64 for float64 samples), sums accumulated in that
        dtype; a list where a sequence came. With equal rates only conversion and mixing are done. Differentiable.

    Raises:
        ValueError: for rates that are not positive whole numbers, or options out of range.

    Source: torchaudio ``functional.resample``, whose filters these are, made in float64.
    """
    for name, rate in (("orig_freq", orig_freq), ("new_freq", new_freq)):
        if int(rate) != rate or rate < 1:
            raise ValueError(f"{name} must be a positive whole number of hertz, got {rate!r}")
    if resampling_method not in _METHODS:
        raise ValueError(f"resampling_method must be among {', '.join(_METHODS)}, got {resampling_method!r}")
    if lowpass_filter_width < 1 or not 0 < rolloff <= 1:
        raise ValueError(
            f"lowpass_filter_width must be at least 1 and rolloff in (0, 1], got {lowpass_filter_width} and {rolloff}"
        )
    beta = 0.0 if resampling_method == _METHODS[0] else _KAISER_BETA if beta is None else float(beta)
    options = (int(lowpass_filter_width), float(rolloff), resampling_method, beta)
    clips = clips_of(waveform, channel_dim=channel_dim, orig_freq=int(orig_freq))
    return _resampled(clips, int(orig_freq), int(new_freq), options)


def _resampled(clips: Clips, orig_freq: int, new_freq: int, options: tuple) -> Tensor | list[Tensor]:
    if not clips.waveforms:
        if clips.batch is None:
            return []
        shape = (*clips.batch, num_resampled(clips.num_samples, orig_freq, new_freq))
        return torch.empty(shape, dtype=torch.float32, device=clips.device)
    if using_reference() or any(w.requires_grad for w in clips.waveforms):
        dtype = torch.float64 if clips.waveforms[0].dtype == torch.float64 else torch.float32
        parts = [resample_ref(as_float(w, dtype), orig_freq, new_freq, *options) for w in clips.waveforms]
        return parts if clips.batch is None else torch.stack(parts).reshape(*clips.batch, parts[0].shape[-1])
    flat = _fwd(clips.waveforms, orig_freq, new_freq, *options)
    if clips.batch is not None:
        wanted = num_resampled(clips.waveforms[0].shape[-1], orig_freq, new_freq)
        return flat.reshape(*clips.batch, wanted)
    return list(flat.split([num_resampled(w.shape[-1], orig_freq, new_freq) for w in clips.waveforms]))
