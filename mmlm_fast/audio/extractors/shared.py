"""What the drop-ins share: an extractor's own tables as specs, clips as the core reads them, calls of the core."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging

import mmlm_fast.audio.elementary_torch  # noqa: F401
from mmlm_fast.audio.extractors.hooks import is_as_made
from mmlm_fast.audio.features import run_rows
from mmlm_fast.audio.spec import Spec, SpecError, prepared
from mmlm_fast.audio.tables import TableError
from mmlm_fast.ops.paths import using_reference

_Base: Any = Any if TYPE_CHECKING else object


class Original(_Base):
    """What a mixin is mixed into: attributes and methods come from the class that is replaced."""

    def _takes_original(self, method: str) -> bool:
        """Whether the original's `method` is to run: in `reference()`, and where something that it calls is not the
        original's own."""
        return using_reference() or not is_as_made(self, method)


def rows_of(waveform: Any) -> np.ndarray:
    """Return ``[num_clips, num_samples]`` as the native core reads it."""
    array = waveform.detach().cpu().numpy() if isinstance(waveform, Tensor) else np.asarray(waveform)
    array = array if array.dtype in (np.float32, np.float64) else array.astype(np.float32)
    array = np.ascontiguousarray(array)
    return array.reshape(-1, array.shape[-1]) if array.ndim != 2 else array


def one_clip(waveform: Any) -> np.ndarray:
    """Return the one clip that a method takes as ``[1, num_samples]``, whatever axes of one it has."""
    array = waveform.detach().cpu().numpy() if isinstance(waveform, Tensor) else np.asarray(waveform)
    squeezed = np.squeeze(array)
    if squeezed.ndim > 1:
        raise ValueError(f"a clip must be mono, [num_samples], got shape {array.shape}: mix down first")
    return rows_of(squeezed.reshape(1, -1))


# Settings that the core has no plan for: the original's own code is to answer.
NOT_OURS = (SpecError, TableError)


def check_settings(spec: Spec, frames: int = 0) -> None:
    """Raise SpecError where the core has no plan for a spec, or a number of frames is none."""
    if spec.why_not or frames < 0:
        raise SpecError(spec.why_not or f"{frames} frames")


def features(spec: Spec, waveform: Any, frames: int) -> np.ndarray:
    """Compute features ``[num_clips, …]`` of ``[num_clips, num_samples]``, `frames` of each clip."""
    check_settings(spec, frames)
    rows, num_out = rows_of(waveform), prepared(spec).num_out
    shape = (num_out, frames) if spec.bins_first else (frames, num_out)
    out = np.empty((len(rows), *shape), spec.compute_dtype)
    run_rows(spec, list(rows), [rows.shape[1]] * len(rows), [frames] * len(rows), out)
    return out


def num_frames(spec: Spec, waveform: Any) -> int:
    """Return how many frames a spec makes of ``[*batch, num_samples]``."""
    check_settings(spec)
    return prepared(spec).layout.num_frames(waveform.shape[-1])


def refuse_short(num_samples: int, needed: int) -> None:
    """Raise ValueError for a clip of fewer samples than needed."""
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


def check_rate(extractor: Any, sampling_rate: int | None) -> None:
    """Warn, as the original does, where a call says no sampling rate, and raise ValueError for another."""
    if sampling_rate is None:
        module = next(c.__module__ for c in type(extractor).__mro__ if c.__module__.startswith("transformers"))
        logging.get_logger(module).warning(
            f"It is strongly recommended to pass the `sampling_rate` argument to `{type(extractor).__name__}()`. "
            "Failing to do so can result in silent errors that might be hard to debug."
        )
    elif sampling_rate != extractor.sampling_rate:
        raise ValueError(
            f"sampling_rate must be the {extractor.sampling_rate} that {type(extractor).__name__} was made for, got "
            f"{sampling_rate}: resample the audio first"
        )


def mono_clips(raw_speech: Any) -> list[np.ndarray] | None:
    """Return contiguous float32 clips of the usual inputs: one array or tensor, or a list of them; None for others."""
    clips = raw_speech if isinstance(raw_speech, (list, tuple)) else [raw_speech]
    arrays = []
    for clip in clips:
        array = clip.detach().cpu().numpy() if isinstance(clip, Tensor) else clip
        if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype not in (np.float32, np.float64):
            return None
        arrays.append(np.ascontiguousarray(array, dtype=np.float32))
    return arrays or None
