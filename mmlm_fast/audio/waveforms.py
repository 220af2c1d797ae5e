"""What a waveform may be: int16, int32, float16, bfloat16, float32 or float64 samples, one clip or many, channels.

Arrays need numpy alone; tensors are looked at by `tensors.TENSORS`, which has the same methods as `ArrayLibrary`.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from mmlm_fast import _C
from mmlm_fast.audio.arguments import whole
from mmlm_fast.audio.spec import is_tracing, torch_is_loaded

if TYPE_CHECKING:
    from torch import Tensor

    Samples = TypeVar("Samples", Tensor, np.ndarray)
    Waveform = Tensor | np.ndarray | Sequence[Tensor | np.ndarray]
else:
    Samples = TypeVar("Samples")
    Waveform = Any

# The native core's codes. Keyed by dtype, in the machine's byte order: looking up its name took longer than a frame.
SAMPLE_TYPES = {np.dtype(t): code for code, t in enumerate((np.int16, np.int32, np.float32, np.float64))}
MAX_CHANNELS = 16
_FLOAT16 = np.dtype(np.float16)


class Clips(NamedTuple):
    """Checked clips of one kind, as one call of the core reads them.

    Attributes:
        waveforms: Of each clip ``[num_samples]``, or ``[channels, num_samples]`` with any strides.
        batch: Shape of the batch; None: a list of clips of their own lengths.
        orig_freq: Rate of the samples; 0: the feature's own.
        are_arrays: Whether arrays came: then arrays are given back.
        library: `ARRAYS` or `TENSORS`, whatever the waveforms are now.
        num_samples: Of an empty batch.
        device: Of a batch of tensors.
        is_double: Whether samples are float64.
    """

    waveforms: list[Any]
    batch: tuple[int, ...] | None
    orig_freq: int
    are_arrays: bool
    library: Any
    num_samples: int = 0
    device: Any = None
    is_double: bool = False


class ArrayLibrary:
    """Waveforms as numpy arrays."""

    kind = np.ndarray
    codes = SAMPLE_TYPES
    others = (_FLOAT16,)
    double = np.dtype(np.float64)

    @staticmethod
    def admit(samples: Any, name: str) -> np.ndarray:
        """Return the samples in the machine's byte order, with strides that the core reads.

        Raises:
            ValueError: for masked samples.
        """
        if type(samples) is not np.ndarray:
            if np.ma.is_masked(samples):
                raise ValueError(f"{name} must hold samples, got a masked array with masked ones: fill or remove them")
            samples = samples.data if isinstance(samples, np.ma.MaskedArray) else np.asarray(samples)
        if not samples.dtype.isnative:
            samples = samples.astype(samples.dtype.newbyteorder("="))
        if min(samples.strides, default=0) < 0 or not samples.flags.aligned:
            samples = samples.copy()
        return samples

    @staticmethod
    def moved(x: np.ndarray, axis: int, to: int) -> np.ndarray:
        return np.moveaxis(x, axis, to)

    @staticmethod
    def as_float32(x: np.ndarray) -> np.ndarray:
        return x.astype(np.float32)

    @staticmethod
    def mixed(x: np.ndarray) -> np.ndarray:
        """Return samples ``[num_samples]`` as dense float32, integers scaled to [-1, 1), channels averaged."""
        if torch_is_loaded():  # the bits of tensors
            import torch

            from mmlm_fast.audio.tensors import TENSORS

            return TENSORS.mixed(torch.from_numpy(x if x.flags.writeable else x.copy())).numpy()
        out = np.empty(x.shape[-1], np.float32)
        format = native_format(ARRAYS, [x], None)
        _C.read_samples(format, [ARRAYS.address(x)], [x.shape[-1]], [ARRAYS.address(out)], False, 1)
        return out

    @staticmethod
    def dense(x: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(x) if x.ndim == 1 else np.ascontiguousarray(x.T).T

    @staticmethod
    def strides(x: np.ndarray) -> tuple[int, ...]:
        return tuple(stride // x.itemsize for stride in x.strides)

    @staticmethod
    def device(x: np.ndarray) -> Any:
        return None

    @staticmethod
    def address(x: np.ndarray) -> int:
        return _C.address_of(x)

    @staticmethod
    def are_plain(waveforms: list[np.ndarray]) -> bool:
        """Return whether the core may be called on their memory at once."""
        return True

    @staticmethod
    def empty(shape: Sequence[int], dtype: str, device: Any = None) -> np.ndarray:
        return np.empty(shape, array_dtype(dtype))

    @staticmethod
    def cast(x: np.ndarray, dtype: str) -> np.ndarray:
        return x.astype(array_dtype(dtype), copy=False)


ARRAYS = ArrayLibrary()


def array_dtype(name: str) -> np.dtype:
    """Return numpy's dtype of a name.

    Raises:
        ValueError: for bfloat16, which numpy has not.
    """
    if name == "bfloat16":
        raise ValueError("numpy has no bfloat16: dtype must be float32, float64 or float16 for arrays")
    return np.dtype(name)


_libraries: list[Any] = []  # the tensors', when they are loaded


def add_library(library: Any) -> None:
    """Let waveforms be of another kind than arrays."""
    _libraries.append(library)


def library_of(waveform: Any) -> Any:
    """Return what the waveform consists of: `ARRAYS` where all clips are arrays, and no graph is being traced."""
    if isinstance(waveform, np.ndarray):
        has_tensors = False
    elif hasattr(waveform, "untyped_storage"):
        has_tensors = True
    else:
        is_sequence = isinstance(waveform, Sequence) and not isinstance(waveform, (str, bytes))
        has_tensors = is_sequence and any(hasattr(clip, "untyped_storage") for clip in waveform)
    if not has_tensors and not is_tracing():
        return ARRAYS
    if not _libraries:
        import mmlm_fast.audio.tensors  # noqa: F401
    return _libraries[0]


def clips_of(waveform: Any, *, channel_dim: int | None = None, orig_freq: int | None = None) -> Clips:
    """Check a waveform: a tensor or array ``[*batch, num_samples]``, or a sequence of 1-D ones.

    With `channel_dim` that dimension of the tensor, or of each clip, holds channels, to be averaged.
    """
    rate = 0 if orig_freq is None else whole("orig_freq", orig_freq, 1, 2**31 - 1, "a rate in whole hertz")
    if channel_dim is not None:
        channel_dim = whole("channel_dim", channel_dim, -64, 63)
    library = library_of(waveform)
    if isinstance(waveform, (np.ndarray, library.kind)):
        are_arrays = isinstance(waveform, np.ndarray)
        x = library.admit(waveform, "waveform")
        _check_kind(library, x, "waveform")
        if channel_dim is None:
            check_mono(x.shape, "waveform")
            batch, inner = x.shape[:-1], x.shape[-1:]
        else:
            x = _channels_last_but_one(library, x, channel_dim)
            batch, inner = x.shape[:-2], x.shape[-2:]
        if x.dtype not in library.codes:
            x = library.as_float32(x)
        if not batch:
            return Clips([x], batch, rate, are_arrays, library)
        rows = list(x.reshape(math.prod(batch), *inner))
        return Clips(rows, batch, rate, are_arrays, library, inner[-1], library.device(x), x.dtype == library.double)
    if isinstance(waveform, (str, bytes)) or not isinstance(waveform, Sequence):
        raise ValueError(
            f"waveform must be a tensor or array of samples, or a sequence of them, got {type(waveform).__name__}"
        )
    clips: list[Any] = []
    for i, given in enumerate(waveform):
        if not isinstance(given, (np.ndarray, library.kind)):
            raise ValueError(
                f"clip {i} must be a 1-D tensor or array of samples, got {type(given).__name__}: a list is one of clips"
            )
        clip = library.admit(given, f"clip {i}")
        _check_kind(library, clip, f"clip {i}")
        if channel_dim is not None and clip.ndim == 2:
            clip = _channels_last_but_one(library, clip, channel_dim)
        elif clip.ndim != 1:
            raise ValueError(f"clip {i} must be a 1-D tensor of samples, got shape {tuple(clip.shape)}")
        if clips and library.device(clip) != library.device(clips[0]):
            raise ValueError(f"clips must be on one device, got {clips[0].device} and {clip.device} (clip {i})")
        clips.append(clip if clip.dtype in library.codes else library.as_float32(clip))
    # No clips are neither: tensors, if torch is loaded.
    are_arrays = all(isinstance(clip, np.ndarray) for clip in waveform) if clips else not torch_is_loaded()
    return Clips(_of_one_format(library, clips), None, rate, are_arrays, library)


def _check_kind(library: Any, x: Any, name: str) -> None:
    if x.dtype not in library.codes and x.dtype not in library.others:
        raise ValueError(
            f"{name} must hold float samples in [-1, 1], or int16 or int32 ones, got {x.dtype} of shape "
            f"{tuple(x.shape)}"
        )


def _of_one_format(library: Any, clips: list[Any]) -> list[Any]:
    """Return the same clips with dtype, channels and strides that one native call can read."""
    if len({(c.dtype, c.shape[:-1]) for c in clips}) > 1:
        return [library.mixed(c) for c in clips]
    if len({library.strides(c) for c in clips}) > 1:
        return [library.dense(c) for c in clips]
    return clips


def check_mono(shape: Sequence[int], name: str) -> None:
    """Refuse ``[num_samples, channels]``, which as a batch would be thousands of clips of two samples each."""
    if len(shape) == 0:
        raise ValueError(f"{name} must be [*batch, num_samples], got a scalar")
    if len(shape) >= 2 and 0 < shape[-1] <= MAX_CHANNELS < shape[-2]:
        raise ValueError(
            f"{name} must be [*batch, num_samples], got shape {tuple(shape)}, which looks like "
            f"[num_samples, channels]: mix down to mono first, {name}.mean(-1), or pass channel_dim=-1"
        )


def _channels_last_but_one(library: Any, x: Any, channel_dim: int) -> Any:
    if x.ndim < 2 or not -x.ndim <= channel_dim < x.ndim:
        raise ValueError(f"channel_dim={channel_dim} is not a dimension of shape {tuple(x.shape)}")
    moved = library.moved(x, channel_dim, -2)
    if moved.shape[-2] == 0:
        raise ValueError(f"a clip needs at least one channel, got shape {tuple(x.shape)}")
    return moved


@lru_cache(maxsize=64)
def _format(kind: int, channels: int, channel_stride: int, stride: int) -> "_C.Format":
    return _C.Format(kind, channels, channel_stride, stride, None)


def native_format(library: Any, waveforms: list[Any], resampler: "_C.Resampler | None") -> "_C.Format":
    """Return how the native core reads these clips, which share dtype, channels and strides."""
    first = waveforms[0]
    strides = library.strides(first)
    layout = (1, 0, strides[0] if first.shape[0] > 1 else 1)
    if len(strides) == 2:
        layout = (first.shape[0], *strides)
    if resampler is None:
        return _format(library.codes[first.dtype], *layout)
    return _C.Format(library.codes[first.dtype], *layout, resampler)  # not kept: it would keep the resampler
