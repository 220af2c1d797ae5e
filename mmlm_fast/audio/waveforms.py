"""What a waveform may be: int16, int32, float16, bfloat16, float32 or float64 samples, one clip or many, channels."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmlm_fast import _C
from mmlm_fast.audio.arguments import whole

Waveform = Tensor | np.ndarray | Sequence[Tensor | np.ndarray]
# The native core's codes. Keyed by dtype, in the machine's byte order: looking up its name took longer than a frame.
SAMPLE_TYPES = {np.dtype(t): code for code, t in enumerate((np.int16, np.int32, np.float32, np.float64))}
FULL_SCALE = {torch.int16: 2.0**-15, torch.int32: 2.0**-31}
MAX_CHANNELS = 16
_ACCEPTED = (torch.int16, torch.int32, torch.float16, torch.bfloat16, torch.float32, torch.float64)
_NATIVE = {torch.int16: 0, torch.int32: 1, torch.float32: 2, torch.float64: 3}


@dataclass(frozen=True)
class Clips:
    waveforms: list[Tensor]  # [num_samples], or [channels, num_samples] with any strides
    batch: torch.Size | None  # shape of the batch; None: a list of clips of their own lengths
    orig_freq: int  # rate of the samples, 0: the feature's own
    num_samples: int = 0  # of an empty batch
    device: torch.device | None = None
    dtype: torch.dtype = torch.float32  # of samples as floats


def clips_of(waveform: Waveform, *, channel_dim: int | None = None, orig_freq: int | None = None) -> Clips:
    """The clips of a tensor or array ``[*batch, num_samples]`` or a sequence of 1-D ones, checked.

    With `channel_dim` that dimension of the tensor, or of each clip, holds channels, to be averaged.
    """
    rate = 0 if orig_freq is None else whole("orig_freq", orig_freq, 1, 2**31 - 1, "a rate in whole hertz")
    if channel_dim is not None:
        channel_dim = whole("channel_dim", channel_dim, -64, 63)
    if isinstance(waveform, np.ndarray):
        waveform = tensor_of(waveform, "waveform")
    if isinstance(waveform, Tensor):
        _check_tensor(waveform, "waveform")
        if channel_dim is not None:
            waveform = _channels_last_but_one(waveform, channel_dim)
            batch, inner = waveform.shape[:-2], waveform.shape[-2:]
        else:
            check_mono(waveform.shape, "waveform")
            batch, inner = waveform.shape[:-1], waveform.shape[-1:]
        waveform = _readable(waveform)
        if not batch:
            return Clips([waveform], batch, rate)
        rows = list(waveform.reshape(math.prod(batch), *inner).unbind(0))
        dtype = torch.float64 if waveform.dtype == torch.float64 else torch.float32
        return Clips(rows, batch, rate, inner[-1], waveform.device, dtype)
    if isinstance(waveform, (str, bytes)) or not isinstance(waveform, Sequence):
        raise ValueError(
            f"waveform must be a tensor or array of samples, or a sequence of them, got {type(waveform).__name__}"
        )
    clips: list[Tensor] = []
    for i, given in enumerate(waveform):
        if not isinstance(given, (Tensor, np.ndarray)):
            raise ValueError(
                f"clip {i} must be a 1-D tensor or array of samples, got {type(given).__name__}: a list is one of clips"
            )
        clip = tensor_of(given, f"clip {i}")
        _check_tensor(clip, f"clip {i}")
        if channel_dim is not None and clip.dim() == 2:
            clip = _channels_last_but_one(clip, channel_dim)
        elif clip.dim() != 1:
            raise ValueError(f"clip {i} must be a 1-D tensor of samples, got shape {tuple(clip.shape)}")
        if clips and clip.device != clips[0].device:
            raise ValueError(f"clips must be on one device, got {clips[0].device} and {clip.device} (clip {i})")
        clips.append(_readable(clip))
    return Clips(_of_one_format(clips), None, rate)


def tensor_of(samples: Any, name: str) -> Tensor:
    """A tensor for an array, which it shares memory with where torch can: not with read-only or reversed ones.

    Raises:
        ValueError: for masked samples, and for numbers that torch has no type for.
    """
    if isinstance(samples, Tensor):
        return samples
    if torch.compiler.is_compiling():
        return torch.as_tensor(samples)
    if isinstance(samples, np.ma.MaskedArray):
        if np.ma.is_masked(samples):
            raise ValueError(f"{name} must hold samples, got a masked array with masked ones: fill or remove them")
        samples = samples.data
    array = np.asarray(samples)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if not array.flags.writeable or any(stride < 0 for stride in array.strides):
        array = array.copy()
    try:
        return torch.from_numpy(array)
    except TypeError:
        raise ValueError(
            f"{name} must hold float samples in [-1, 1], or int16 or int32 ones, got {array.dtype} of shape "
            f"{array.shape}"
        ) from None


def _of_one_format(clips: list[Tensor]) -> list[Tensor]:
    """The same clips with dtype, channels and strides that one native call can read."""
    if len({(c.dtype, c.shape[:-1]) for c in clips}) > 1:
        return [as_float(c, torch.float32).contiguous() for c in clips]
    if len({c.stride() for c in clips}) > 1:
        return [c.contiguous() if c.dim() == 1 else c.t().contiguous().t() for c in clips]
    return clips


def _check_tensor(tensor: Tensor, name: str) -> None:
    if tensor.dtype not in _ACCEPTED:
        raise ValueError(
            f"{name} must hold float samples in [-1, 1], or int16 or int32 ones, got {tensor.dtype} of shape "
            f"{tuple(tensor.shape)}"
        )


def check_mono(shape: Sequence[int], name: str) -> None:
    """Refuse ``[num_samples, channels]``, which as a batch would be thousands of clips of two samples each."""
    if len(shape) == 0:
        raise ValueError(f"{name} must be [*batch, num_samples], got a scalar")
    if len(shape) >= 2 and 0 < shape[-1] <= MAX_CHANNELS < shape[-2]:
        raise ValueError(
            f"{name} must be [*batch, num_samples], got shape {tuple(shape)}, which looks like "
            f"[num_samples, channels]: mix down to mono first, {name}.mean(-1), or pass channel_dim=-1"
        )


def _channels_last_but_one(tensor: Tensor, channel_dim: int) -> Tensor:
    if tensor.dim() < 2 or not -tensor.dim() <= channel_dim < tensor.dim():
        raise ValueError(f"channel_dim={channel_dim} is not a dimension of shape {tuple(tensor.shape)}")
    moved = tensor.movedim(channel_dim, -2)
    if moved.shape[-2] == 0:
        raise ValueError(f"a clip needs at least one channel, got shape {tuple(tensor.shape)}")
    return moved


def _readable(tensor: Tensor) -> Tensor:
    """In a dtype that the native core reads."""
    return tensor if tensor.dtype in _NATIVE else tensor.float()


def as_float(waveform: Tensor, dtype: torch.dtype) -> Tensor:
    """Samples in [-1, 1] as `dtype`, channels ``[channels, num_samples]`` averaged; differentiable."""
    scale = FULL_SCALE.get(waveform.dtype)
    x = waveform.to(dtype) if scale is None else waveform.to(dtype) * scale
    return x.mean(0) if x.dim() == 2 else x


@lru_cache(maxsize=64)
def _format(kind: int, channels: int, channel_stride: int, stride: int) -> "_C.Format":
    return _C.Format(kind, channels, channel_stride, stride, None)


def native_format(waveforms: list[Tensor], resampler: "_C.Resampler | None") -> "_C.Format":
    """How the native core reads these tensors, which share dtype, channels and strides."""
    first = waveforms[0]
    layout = (1, 0, first.stride(0) if first.shape[0] > 1 else 1)
    if first.dim() == 2:
        layout = (first.shape[0], first.stride(0), first.stride(1))
    if resampler is None:
        return _format(_NATIVE[first.dtype], *layout)
    return _C.Format(_NATIVE[first.dtype], *layout, resampler)  # not kept: it would keep the resampler
