"""What every drop-in's call makes sure of: as many clips out as in, no samples that the original refuses, no NaN.

The core takes float samples. What else an original takes (integers, as floats of thousands; no samples) is for its own
code to answer; where that raises, whatever it raises, it is a ValueError here.
"""

import inspect
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmlm_fast.audio.extractors import hooks
from mmlm_fast.audio.extractors.shared import NOT_OURS
from mmlm_fast.audio.plain import has_memory, in_plain_torch, is_plain
from mmlm_fast.ops.paths import reference, using_reference

_USUAL_TYPES = frozenset((np.dtype(np.float32), np.dtype(np.float64), torch.float32, torch.float64))
# What code that expects other samples ends in.
_ENDS = (TypeError, IndexError, KeyError, AttributeError, AssertionError, RuntimeError, ArithmeticError)


def guarded(call: Callable) -> Callable:
    """Decorate a drop-in's ``__call__``."""
    plain = in_plain_torch(call)
    parameters = list(inspect.signature(call).parameters)[1:]
    names = [name for name in parameters if name == parameters[0] or name == "audio_target"]

    @wraps(call)
    def guarded_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if using_reference():
            return plain(self, *args, **kwargs)
        direct = getattr(self, "_direct", None)
        if direct is not None and is_plain():
            out = direct(*args, **kwargs)
            if out is not None:
                return out
        given = dict(zip(parameters, args, strict=False)) | kwargs
        counts, is_batch, may_grow, is_float, is_usual = [], False, True, True, True
        checks = getattr(self, "_checks_samples", False)
        for name in names:
            if given.get(name) is None:
                continue
            samples = _Samples(name, hooks.takes_tensors(self))
            value = samples.as_floats(given[name])
            if not (samples.takes_tensors or getattr(self, "_takes_channels", checks)):
                _refuse_channels(value, name)
            counts.append(_num_clips(value))
            if not checks and (counts[-1] == 0 or (isinstance(value, (list, tuple)) and not value)):
                raise ValueError(f"{name} must hold at least one clip, got {_described(given[name])}")
            is_batch = is_batch or _is_batch(value)
            may_grow = may_grow and not _has_channels(value)  # some cut long clips into chunks
            is_float = is_float and samples.are_float and not _is_empty(value)
            is_usual = is_usual and _is_usual(value)
            place = parameters.index(name)
            if place < len(args):
                args = (*args[:place], value, *args[place + 1 :])
            else:
                kwargs[name] = value
        try:
            out = _called(plain, is_float or checks, self, *args, **kwargs)
        except _ENDS as error:
            if is_usual:
                raise
            raise ValueError(
                f"{names[0]} must be a clip or a batch of clips that {type(self).__name__} takes, got "
                f"{_described(given.get(names[0]))}: {type(error).__name__}: {error}"
            ) from error
        _check(out, counts, is_batch, may_grow, type(self).__name__)
        return out

    return guarded_call


def _called(call: Callable, is_ours: bool, *args: Any, **kwargs: Any) -> Any:
    """Call a drop-in, or the original's own code: also for settings that only that has an answer to."""
    if is_ours:
        with suppress(*NOT_OURS):
            return call(*args, **kwargs)
    with reference():
        return call(*args, **kwargs)


class _Samples:
    """Walks through clips: their samples as float32 or float64 where they are floats, in arrays for who wants those."""

    def __init__(self, name: str, takes_tensors: bool) -> None:
        self.name, self.takes_tensors, self.are_float = name, takes_tensors, True

    @in_plain_torch
    def as_floats(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            if not value or not isinstance(value[0], (list, tuple, np.ndarray, Tensor)):
                return value
            found = [self.as_floats(clip) for clip in value]
            return value if all(a is b for a, b in zip(found, value, strict=True)) else type(value)(found)
        if isinstance(value, Tensor):
            return self._tensor(value)
        return self._array(value) if isinstance(value, np.ndarray) else value

    def _tensor(self, value: Tensor) -> Tensor | np.ndarray:
        if not has_memory(value):
            raise ValueError(f"{self.name} must hold samples, got a {type(value).__name__} of a mode or a transform")
        if value.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{self.name} needs a gradient, which features of arrays have not: pass it detached")
        self._refuse_complex(value.is_complex(), value)
        self.are_float = self.are_float and value.is_floating_point()
        value = value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
        as_it_is = self.takes_tensors or not value.is_floating_point()  # integers are the original's to answer
        return value if as_it_is else value.detach().cpu().numpy()

    def _array(self, value: np.ndarray) -> np.ndarray:
        if isinstance(value, np.ma.MaskedArray):
            if np.ma.is_masked(value):
                raise ValueError(f"{self.name} must hold samples, got a masked array: fill or remove what is masked")
            value = value.data
        if value.dtype == object:
            return value
        self._refuse_complex(value.dtype.kind == "c", value)
        self.are_float = self.are_float and value.dtype.kind == "f"
        if value.dtype.kind == "f" and value.dtype not in (
            np.float32,
            np.float64,
        ):  # halves, long, the other byte order
            return value.astype(np.float32 if value.dtype.itemsize <= 4 else np.float64)
        return value

    def _refuse_complex(self, is_complex: bool, value: Any) -> None:
        if is_complex:
            raise ValueError(f"{self.name} must hold real samples, got {_described(value)}")


def _is_batch(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return bool(value) and isinstance(value[0], (list, tuple, np.ndarray, Tensor))
    return isinstance(value, (np.ndarray, Tensor)) and value.ndim > 1


def _is_empty(value: Any) -> bool:
    """Whether it is one clip without samples, which some originals pad."""
    return isinstance(value, (np.ndarray, Tensor)) and value.ndim == 1 and len(value) == 0


def _has_channels(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return _is_batch(value) and any(getattr(clip, "ndim", 1) > 1 for clip in value)
    return isinstance(value, (np.ndarray, Tensor)) and value.ndim > 2


def _refuse_channels(value: Any, name: str) -> None:
    """Before numpy pads every axis of them, to gigabytes."""
    if _has_channels(value):
        for clip in value:
            shape = getattr(clip, "shape", ())
            if sum(n != 1 for n in shape) > 1:
                raise ValueError(
                    f"{name} must hold mono clips, [num_samples], got shape {tuple(shape)}: mix down first"
                )


def _num_clips(value: Any) -> int:
    return len(value) if _is_batch(value) else 1


def _is_usual(value: Any) -> bool:
    """Whether an error is not for want of the right samples: floats, a clip or a batch of them."""
    clips = value if isinstance(value, (list, tuple)) else [value]
    if not clips or not all(getattr(clip, "dtype", None) in _USUAL_TYPES for clip in clips):
        return False
    return all(clip.ndim == 1 and len(clip) > 0 for clip in clips)


def _described(value: Any) -> str:
    if isinstance(value, (np.ndarray, Tensor)):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)}{f', the first {_described(value[0])}' if value else ''}"
    return type(value).__name__


@in_plain_torch
def _check(out: Any, counts: list[int], is_batch: bool, may_grow: bool, name: str) -> None:
    values = list(out.values()) if hasattr(out, "values") else []
    wanted = max(counts, default=1)
    if is_batch and values and hasattr(values[0], "__len__"):
        found = len(values[0])
        if found < wanted or (found > wanted and not may_grow):
            raise ValueError(
                f"{name} got {wanted} clip{'s' if wanted > 1 else ''} and gave features of {found}: pass a list of 1-D "
                f"arrays"
            )
    for key, value in zip(out, values, strict=True) if values else ():
        for what, why in _WRONG.items():
            bad = [i for i, clip in enumerate(_features_of(value)) if what(clip)]
            if bad:
                raise ValueError(
                    f"{key} of clip{'s' if len(bad) > 1 else ''} {', '.join(map(str, bad[:10]))} would be {why}"
                )


_WRONG: dict[Callable[[np.ndarray], bool], str] = {
    lambda clip: clip.size == 0: "empty: too short for a frame",
    lambda clip: bool(np.isnan(clip).any()): "NaN, as transformers' are: too short to be normalised over its frames",
}


def _features_of(value: Any) -> list[np.ndarray]:
    """The features of each clip, where something may be wrong with them."""
    if isinstance(value, Tensor):
        is_numpys = value.device.type == "cpu" and value.dtype in (torch.float32, torch.float64)
        value = value.detach().numpy() if is_numpys else None
    if isinstance(value, np.ndarray) and value.dtype == object:
        value = list(value)
    if isinstance(value, (list, tuple)):
        arrays = [np.asarray(clip) for clip in value if isinstance(clip, (np.ndarray, Tensor))]
        return [array for array in arrays if array.dtype.kind == "f"]
    if not isinstance(value, np.ndarray) or value.ndim < 2 or value.dtype.kind != "f":
        return []
    # One number tells of most: a sum is NaN where a term is.
    return list(value) if value.size == 0 or np.isnan(value.sum()) else []
