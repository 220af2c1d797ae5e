"""Plans of the native core from an extractor's own tables, and what the drop-ins share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mmlm_fast import _C
from mmlm_fast.audio.extractors.hooks import is_as_made
from mmlm_fast.audio.spectral import run_native
from mmlm_fast.audio.tables import ByteCache
from mmlm_fast.ops.paths import using_reference

_Base: Any = Any if TYPE_CHECKING else object


class Original(_Base):
    """What a mixin is mixed into: attributes and methods come from the class that is replaced."""

    def _takes_original(self, method: str) -> bool:
        """Whether the original's `method` is to run: in `reference()`, and where something that it calls is not the
        original's own."""
        return using_reference() or not is_as_made(self, method)


# A plan, and the tables that it was made of: they belong to extractors, which may be gone.
_PLANS: ByteCache[tuple[list, "_C.SpectralPlan"]] = ByteCache(
    64 * 2**20, lambda kept: kept[1].num_bytes + sum(table.nbytes for table in kept[0])
)


def _identity(array: Any) -> Any:
    """What tells this table from another. Arrays become read-only: a change in place would go unnoticed."""
    if isinstance(array, np.ndarray):
        array.setflags(write=False)
        return id(array)
    if isinstance(array, Tensor):
        return id(array), 0 if array.is_inference() else array._version  # they have no count of changes
    return array


def cached_plan(key: tuple, tables: list, make: Callable[[], "_C.SpectralPlan"]) -> "_C.SpectralPlan":
    """The plan for `key` and the identity of `tables`, which are kept so that no other array can have it."""
    return _PLANS.get((*key, *map(_identity, tables)), lambda: (tables, make()))[1]


def as_filters(filters: Any) -> np.ndarray:
    """``[num_filters, bins]`` in float64 from ``[bins, num_filters]``."""
    return np.asarray(filters, dtype=np.float64).T


@dataclass(frozen=True)
class Framing:
    """Frames of `frame_length` samples every `hop_length`, transformed at `n_fft`."""

    frame_length: int
    hop_length: int
    n_fft: int

    def centred(self, edge: str) -> tuple[dict[str, Any], Callable[[int], int]]:
        """Options and number of frames where frame t is centred at sample t * hop_length."""
        middle = self.n_fft // 2
        offset = (self.n_fft - self.frame_length) // 2 - middle
        return dict(edge=edge, offset=offset), lambda n: 1 + (n + 2 * middle - self.n_fft) // self.hop_length

    def whole(self, span: int | None = None) -> tuple[dict[str, Any], Callable[[int], int]]:
        """The same where only frames (or spans) that fit are taken."""
        span = self.n_fft if span is None else span
        offset = (span - self.frame_length) // 2 if span == self.n_fft else 0
        return dict(edge="none", offset=offset), lambda n: max(0, (n - span) // self.hop_length + 1)

    def options(self) -> dict[str, int]:
        return dict(frame_length=self.frame_length, hop_length=self.hop_length, n_fft=self.n_fft)


def rows_of(waveform: Any) -> np.ndarray:
    """``[num_clips, num_samples]`` as the native core reads it."""
    array = waveform.detach().cpu().numpy() if isinstance(waveform, Tensor) else np.asarray(waveform)
    array = array if array.dtype in (np.float32, np.float64) else array.astype(np.float32)
    array = np.ascontiguousarray(array)
    return array.reshape(-1, array.shape[-1]) if array.ndim != 2 else array


def one_clip(waveform: Any) -> np.ndarray:
    """The same for a method that takes one clip: ``[1, num_samples]``, whatever axes of one it has."""
    array = waveform.detach().cpu().numpy() if isinstance(waveform, Tensor) else np.asarray(waveform)
    squeezed = np.squeeze(array)
    if squeezed.ndim > 1:
        raise ValueError(f"a clip must be mono, [num_samples], got shape {array.shape}: mix down first")
    return rows_of(squeezed.reshape(1, -1))


def features(plan: "_C.SpectralPlan", waveform: Any, frames: int, *, bins_first: bool, dtype: Any = np.float32) -> Any:
    """Features ``[num_clips, …]`` of ``[num_clips, num_samples]``."""
    rows = rows_of(waveform)
    shape = (plan.num_out, frames) if bins_first else (frames, plan.num_out)
    out = np.empty((len(rows), *shape), dtype)
    run_native(plan, list(rows), [rows.shape[1]] * len(rows), [frames] * len(rows), out)
    return out


FLOAT64 = dict(double_precision=True)
FLOAT64_OUT = dict(double_precision=True, double_output=True)
# What transformers' audio_utils.spectrogram does: transform in float64, keep complex64.
AS_NUMPY = dict(double_precision=True, round_spectrum=True)


def refuse_short(num_samples: int, needed: int) -> None:
    if num_samples < needed:
        raise ValueError(f"a clip needs at least {needed} samples after padding, got {num_samples}")


def is_cpu(device: Any) -> bool:
    return device is None or torch.device(device).type == "cpu"


def has_torchaudio() -> bool:
    from transformers.utils import is_torchaudio_available

    return is_torchaudio_available()


def pads_to_longest(padding: Any) -> bool:
    return padding is True or str(getattr(padding, "value", padding)) == "longest"


def rounded_up(count: int, multiple: int | None) -> int:
    return count if not multiple else -(-count // multiple) * multiple


def rate_is_wrong(extractor: Any, sampling_rate: int | None) -> bool:
    """Whether the original is to raise its own error; its warning where there is no rate."""
    from transformers.utils import logging

    if sampling_rate is None:
        module = next(c.__module__ for c in type(extractor).__mro__ if c.__module__.startswith("transformers"))
        logging.get_logger(module).warning(
            f"It is strongly recommended to pass the `sampling_rate` argument to `{type(extractor).__name__}()`. "
            "Failing to do so can result in silent errors that might be hard to debug."
        )
    return sampling_rate is not None and sampling_rate != extractor.sampling_rate


def mono_clips(raw_speech: Any) -> list[np.ndarray] | None:
    """Contiguous float32 clips of the usual inputs: one array or tensor, or a list of them; None for others."""
    clips = raw_speech if isinstance(raw_speech, (list, tuple)) else [raw_speech]
    arrays = []
    for clip in clips:
        array = clip.detach().cpu().numpy() if isinstance(clip, Tensor) else clip
        if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype not in (np.float32, np.float64):
            return None
        arrays.append(np.ascontiguousarray(array, dtype=np.float32))
    return arrays or None
