"""Normalisation of features over the frames of a clip."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mmlm_fast import _C
from mmlm_fast.audio.arguments import whole
from mmlm_fast.audio.features import as_torch_does, wants_reference
from mmlm_fast.audio.spec import is_tracing
from mmlm_fast.audio.waveforms import ARRAYS, Samples

_FLOATS = (np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64))


class Statistics(NamedTuple):
    """What is done with mean and deviation; see `standardize`."""

    ddof: int = 0
    eps_inside: float = 0.0
    eps_outside: float = 0.0
    means: bool = True
    variances: bool = True
    padding: float = 0.0


def standardize(
    features: Samples,
    num_valid: int | Sequence[int] | None = None,
    *,
    per: str = "bin",
    ddof: int = 0,
    eps_inside: float = 0.0,
    eps_outside: float = 0.0,
    means: bool = True,
    variances: bool = True,
    padding: float = 0.0,
) -> Samples:
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
        A new tensor or array like `features`; statistics are accumulated in float64 on a CPU. Differentiable.

    Raises:
        ValueError: for other shapes, a count that is not between 0 and the frames, or integer features.
    """
    given: Any = features
    is_array = isinstance(given, np.ndarray)
    if is_array and (is_tracing() or wants_reference()):
        return as_torch_does(
            lambda x: standardize(
                x, num_valid, per=per, ddof=ddof, eps_inside=eps_inside, eps_outside=eps_outside, means=means,
                variances=variances, padding=padding,
            ),
            given,
        )  # fmt: skip
    if not is_array and not hasattr(given, "is_floating_point"):
        raise ValueError(f"features must be a tensor or an array, got {type(given).__name__}")
    if is_array:
        given = ARRAYS.admit(given, "features")
    is_floating = given.dtype in _FLOATS if is_array else given.is_floating_point()
    if not is_floating or given.ndim < 2:
        raise ValueError(
            f"features must be floating point, [*batch, frames, bins], got {given.dtype} {tuple(given.shape)}"
        )
    if per not in ("bin", "clip"):
        raise ValueError(f'per must be "bin" or "clip", got {per!r}')
    frames, bins = given.shape[-2:]
    flat = given.reshape(math.prod(given.shape[:-2]), frames, bins)
    how = Statistics(whole("ddof", ddof, 0, 1), eps_inside, eps_outside, means, variances, padding)
    if num_valid is None:
        counts = [frames] * len(flat)
    elif isinstance(num_valid, Sequence) or getattr(num_valid, "ndim", 0) > 0:
        what = f"one count a clip, from 0 to {frames}"
        counts = [whole("num_valid", n, 0, frames, what) for n in num_valid]  # type: ignore[union-attr]
    else:
        counts = [whole("num_valid", num_valid, 0, frames)] * len(flat)
    if len(counts) != len(flat):
        raise ValueError(f"num_valid must be one count a clip, from 0 to {frames}, got {counts} for {len(flat)} clips")
    if is_array:
        return _of_array(flat, counts, per, how).reshape(given.shape)  # type: ignore[return-value]
    from mmlm_fast.audio.reference import standardized

    return standardized(flat, counts, per, how).reshape(given.shape)  # type: ignore[return-value]


def _of_array(flat: np.ndarray, counts: list[int], per: str, how: Statistics) -> np.ndarray:
    out = np.array(flat, np.float64 if flat.dtype == np.float64 else np.float32, order="C")
    clips, frames, bins = out.shape
    if per == "bin":
        standardize_rows(ARRAYS.address(out), out.shape, out.dtype == np.float64, counts, how)
    else:  # all numbers of a clip as one bin
        shape = (clips, frames * bins, 1)
        standardize_rows(ARRAYS.address(out), shape, out.dtype == np.float64, [n * bins for n in counts], how)
    return out.astype(flat.dtype, copy=False)


def standardize_in_place(features: np.ndarray, num_valid: Sequence[int], **how: Any) -> None:
    """Standardise each bin of dense features ``[clips, frames, bins]`` of float32 or float64; see `standardize`."""
    if not features.flags.c_contiguous or features.dtype not in (np.float32, np.float64) or features.ndim != 3:
        raise ValueError(
            f"features must be dense, [clips, frames, bins] of float32 or float64, got {features.dtype} "
            f"{features.shape}"
        )
    is_double = features.dtype == np.float64
    standardize_rows(ARRAYS.address(features), features.shape, is_double, num_valid, Statistics(**how))


def standardize_rows(
    start: int, shape: Sequence[int], is_double: bool, num_valid: Sequence[int], how: Statistics
) -> None:
    """Standardise each bin of dense features ``[clips, frames, bins]`` at address `start`, in the core."""
    clips, frames, bins = shape
    step = frames * bins * (8 if is_double else 4)
    starts = [start + i * step for i in range(clips)]
    _C.standardize(starts, [frames] * clips, list(num_valid), bins, is_double, *how)
