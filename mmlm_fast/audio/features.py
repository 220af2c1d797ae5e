"""Checked clips to features: by the core at once where nothing surrounds the call, else by torch's op."""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from mmlm_fast.audio.sinc import native_resampler, num_resampled, read
from mmlm_fast.audio.spec import (
    Layout,
    Prepared,
    Spec,
    is_tracing,
    num_threads,
    prepared,
    raise_not_finite,
    run,
    torch_is_loaded,
)
from mmlm_fast.audio.waveforms import Clips, native_format


def features_of(spec: Any, clips: Clips, num_samples: int | None = None) -> Any:
    """Compute features: ``[*batch, *layout.shape(frames)]``, or a list where a sequence of clips came.

    Args:
        spec: A `Spec`; its key in a graph that is being traced.
        clips: From `clips_of`.
        num_samples: Every clip is padded with zeros to that length.
    """
    if _goes_to_core(clips):
        return _in_core(spec, clips, num_samples)
    from mmlm_fast.audio.spectral import features_of_tensors

    return by_tensors(lambda tensors: features_of_tensors(spec, tensors, num_samples), clips)


def resample_clips(clips: Clips, orig_freq: int, new_freq: int, options: tuple) -> Any:
    """Resample checked clips: ``[*batch, M]``, or a list where a sequence of clips came."""
    if not _goes_to_core(clips):
        from mmlm_fast.audio.resample_op import resample_tensors

        return by_tensors(lambda tensors: resample_tensors(tensors, orig_freq, new_freq, options), clips)
    library, waveforms = clips.library, clips.waveforms
    if not waveforms:
        if clips.batch is None:
            return []
        shape = (*clips.batch, num_resampled(clips.num_samples, orig_freq, new_freq))
        return library.empty(shape, "float64" if clips.is_double else "float32", clips.device)
    is_double = waveforms[0].dtype == library.double
    lengths = [num_resampled(w.shape[-1], orig_freq, new_freq) for w in waveforms]
    out = library.empty((sum(lengths),), "float64" if is_double else "float32")
    read(library, waveforms, orig_freq, new_freq, options, lengths, library.address(out), is_double)
    if clips.batch is not None:
        return out.reshape(*clips.batch, lengths[0])
    return [out[end - n : end] for n, end in zip(lengths, np.cumsum(lengths).tolist(), strict=True)]


def by_tensors(function: Callable[[Clips], Any], clips: Clips) -> Any:
    """Call a function of clips of tensors, for arrays with these as tensors and its result as arrays."""
    if not clips.are_arrays:
        return function(clips)
    from mmlm_fast.audio.tensors import TENSORS

    tensors = [TENSORS.admit(w, "waveform") for w in clips.waveforms]
    out = function(clips._replace(waveforms=tensors, library=TENSORS))
    return [x.numpy() for x in out] if isinstance(out, list) else out.numpy()


def as_torch_does(function: Callable[[Any], Any], x: Any) -> Any:
    """Call a function of tensors or arrays: where torch is loaded with a tensor for an array, for the same bits."""
    if not isinstance(x, np.ndarray) or not torch_is_loaded():
        return function(x)
    from mmlm_fast.audio.tensors import TENSORS

    return function(TENSORS.admit(x, "features")).numpy()


def _goes_to_core(clips: Clips) -> bool:
    return not is_tracing() and not wants_reference() and clips.library.are_plain(clips.waveforms)


def wants_reference() -> bool:
    """Return whether the call is within `mmlm_fast.reference()`, which torch's formulas then answer."""
    paths = sys.modules.get("mmlm_fast.ops.paths")
    return paths is not None and paths.using_reference()


def checked_lengths(layout: Layout, clips: Clips, num_samples: int | None) -> list[int]:
    """Return the samples that each clip counts as, resampled and padded.

    Raises:
        ValueError: for clips that are too short for a frame, or longer than `num_samples`.
    """
    lengths = [num_resampled(w.shape[-1], clips.orig_freq, layout.sampling_rate) for w in clips.waveforms]
    if num_samples is not None:
        for n in lengths:
            if n > num_samples:
                raise ValueError(f"clips must have at most num_samples={num_samples} samples, got {n}: cut them first")
        lengths = [num_samples] * len(lengths)
        if not lengths:
            layout.check_length(num_samples)
    for n in lengths:
        layout.check_length(n)
    return lengths


def _in_core(spec: Spec, clips: Clips, num_samples: int | None) -> Any:
    made, library = prepared(spec), clips.library
    layout = made.layout
    lengths = checked_lengths(layout, clips, num_samples)
    if not lengths:
        if clips.batch is None:
            return []
        frames = layout.num_frames(clips.num_samples if num_samples is None else num_samples)
        return library.empty((*clips.batch, *layout.shape(frames)), spec.dtype, clips.device)
    counts = [layout.num_frames(n) for n in lengths]
    if clips.batch is None:
        rows = [library.empty(layout.shape(n), spec.compute_dtype) for n in counts]
        starts = [library.address(row) for row in rows]
    else:
        rows = [library.empty((*clips.batch, *layout.shape(counts[0])), spec.compute_dtype)]
        start, step = library.address(rows[0]), counts[0] * layout.num_out * rows[0].itemsize
        starts = [start + i * step for i in range(len(counts))]
    run_clips(made, clips, lengths, counts, starts)
    if spec.dtype != spec.compute_dtype:
        rows = [library.cast(row, spec.dtype) for row in rows]
    return rows if clips.batch is None else rows[0]


def run_clips(made: Prepared, clips: Clips, num_samples: list[int], num_frames: list[int], starts: list[int]) -> None:
    """Compute the features of clips, each with zeros up to its `num_samples`, dense at the addresses `starts`."""
    library, waveforms, layout = clips.library, clips.waveforms, made.layout
    format = native_format(library, waveforms, native_resampler(clips.orig_freq, layout.sampling_rate))
    addresses, num_input = [library.address(w) for w in waveforms], [w.shape[-1] for w in waveforms]
    if not layout.bins_first:
        run(made.plan, format, addresses, num_input, num_samples, num_frames, starts, made.num_out)
    elif len(num_frames) == 1 or len(set(num_frames)) == 1:
        run(made.plan, format, addresses, num_input, num_samples, num_frames, starts, num_frames[0])
    else:  # rows of different lengths: a call each
        for a, i, n, f, start in zip(addresses, num_input, num_samples, num_frames, starts, strict=True):
            run(made.plan, format, [a], [i], [n], [f], [start], f)


def run_rows(
    spec: Spec, clips: list[np.ndarray], num_samples: list[int], num_frames: list[int], out: np.ndarray
) -> None:
    """Compute features of dense 1-D clips of one dtype, each with zeros up to `num_samples`, in rows of one array.

    Args:
        out: ``[num_clips, rows, columns]`` in the spec's `compute_dtype`, bins and frames in the spec's order, with
            room for `num_frames` of each clip.
    """
    bad = prepared(spec).plan.run_rows(clips, num_samples, num_frames, out, num_threads())
    if bad:
        raise_not_finite(bad)
