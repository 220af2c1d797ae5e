"""Waveforms as torch tensors; see `waveforms`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mmlm_fast.audio.plain import has_memory, is_plain
from mmlm_fast.audio.waveforms import ARRAYS, add_library

CPU = torch.device("cpu")
FULL_SCALE = {torch.int16: 2.0**-15, torch.int32: 2.0**-31}


class TensorLibrary:
    """Waveforms as tensors; `ArrayLibrary` says what its methods do."""

    kind = Tensor
    codes = {torch.int16: 0, torch.int32: 1, torch.float32: 2, torch.float64: 3}
    others = (torch.float16, torch.bfloat16)
    double = torch.float64

    @staticmethod
    def admit(samples: Any, name: str) -> Tensor:
        """Return a tensor for an array: one that shares its memory where torch can.

        Raises:
            ValueError: for masked samples, and for numbers that torch has no type for.
        """
        if isinstance(samples, Tensor):
            return samples
        if torch.compiler.is_compiling():
            return torch.as_tensor(samples)
        array = ARRAYS.admit(samples, name)
        try:
            return torch.from_numpy(array if array.flags.writeable else array.copy())
        except TypeError:
            raise ValueError(
                f"{name} must hold float samples in [-1, 1], or int16 or int32 ones, got {array.dtype} of shape "
                f"{array.shape}"
            ) from None

    @staticmethod
    def moved(x: Tensor, axis: int, to: int) -> Tensor:
        return x.movedim(axis, to)

    @staticmethod
    def as_float32(x: Tensor) -> Tensor:
        return x.float()

    @staticmethod
    def mixed(x: Tensor) -> Tensor:
        return as_float(x, torch.float32).contiguous()

    @staticmethod
    def dense(x: Tensor) -> Tensor:
        return x.contiguous() if x.dim() == 1 else x.t().contiguous().t()

    @staticmethod
    def strides(x: Tensor) -> tuple[int, ...]:
        return x.stride()

    @staticmethod
    def device(x: Tensor) -> torch.device:
        return x.device

    @staticmethod
    def address(x: Tensor) -> int:
        """Return where the samples of a plain tensor lie; 0 for one without memory, which the core refuses."""
        return x.data_ptr()

    @staticmethod
    def are_plain(waveforms: list[Tensor]) -> bool:
        """Return whether the core may be called on their memory at once: nothing would come of torch's dispatcher."""
        if not is_plain() or forward_ad._current_level >= 0 or torch.autograd._profiler_enabled():
            return False
        needs_no_gradient = not torch.is_grad_enabled()
        for x in waveforms:
            if type(x) is not Tensor or not x.is_cpu or not (needs_no_gradient or not x.requires_grad):
                return False
            if not has_memory(x) or x.is_neg():
                return False
        return True

    @staticmethod
    def empty(shape: Sequence[int], dtype: str, device: Any = CPU) -> Tensor:
        return torch.empty(shape, dtype=getattr(torch, dtype), device=device)

    @staticmethod
    def cast(x: Tensor, dtype: str) -> Tensor:
        return x.to(getattr(torch, dtype))


TENSORS = TensorLibrary()
add_library(TENSORS)


def as_float(waveform: Tensor, dtype: torch.dtype) -> Tensor:
    """Return samples in [-1, 1] as `dtype`, channels ``[channels, num_samples]`` averaged; differentiable."""
    scale = FULL_SCALE.get(waveform.dtype)
    x = waveform.to(dtype) if scale is None else waveform.to(dtype) * scale
    return x.mean(0) if x.dim() == 2 else x


def double_or_float(waveform: Tensor) -> torch.dtype:
    """Return the dtype in which samples are resampled: float64 for float64 ones, else float32."""
    return torch.float64 if waveform.dtype == torch.float64 else torch.float32
