"""Audio feature extractors, alone or in a processor, as the drop-ins of the same name."""

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from transformers import FeatureExtractionMixin, ProcessorMixin

from mmlm_fast.audio.extractors import EXTRACTORS, NOT_REPLACED, drop_in
from mmlm_fast.hf.proof import RefusedError
from mmlm_fast.hf.site import ALREADY, Site

KIND = "feature extractor"

# Two float32 computations of a logarithm differ by this much where a bin nearly cancels, and by a tenth of it in the
# mean, relative to the largest feature (tests/test_audio_extractors.py compares each with float64).
MAX_DIFFERENCE = 2e-3
MEAN_DIFFERENCE = 1e-4


def find(thing: Any) -> Iterator[Site]:
    """The extractor itself, or those of a processor."""
    parts = {"": thing} if isinstance(thing, FeatureExtractionMixin) else vars(thing)
    for path, part in parts.items():
        if isinstance(part, FeatureExtractionMixin):
            site = Site(KIND, path, type(part).__name__, part, reason=_why_not(part))
            site.prove, site.apply = functools.partial(_prove, part), functools.partial(_apply, part)
            yield site


def has_extractors(thing: Any) -> bool:
    return isinstance(thing, (FeatureExtractionMixin, ProcessorMixin))


def _apply(extractor: Any) -> Callable[[], None]:
    original = type(extractor)
    extractor.__class__ = drop_in(original.__name__)

    def undo() -> None:
        extractor.__class__ = original

    return undo


def _why_not(extractor: Any) -> str | None:
    cls, name = type(extractor), type(extractor).__name__
    if name not in EXTRACTORS:
        return NOT_REPLACED.get(name, "no drop-in of this name")
    try:
        replacement = drop_in(name)
    except AttributeError as error:
        return str(error)
    if cls is replacement:
        return ALREADY
    if cls is not replacement.__bases__[1]:
        return f"a subclass of its own, {cls.__module__}.{cls.__qualname__}, whose changes would be lost"
    return None


def _prove(extractor: Any) -> float:
    """The largest difference found on a test clip."""
    twin: Any = object.__new__(drop_in(type(extractor).__name__))
    twin.__dict__.update(extractor.__dict__)
    clip = _test_clip(int(getattr(extractor, "sampling_rate", 16000)))
    try:
        theirs = _call(extractor, clip)
    except Exception as error:
        raise RefusedError(
            f"the original fails on a test clip, so nothing can be proved: {type(error).__name__}: {error}"
        ) from error
    try:
        ours = _call(twin, clip)
    except Exception as error:
        raise RefusedError(f"the replacement fails on a test clip: {type(error).__name__}: {error}") from error
    return _compare(ours, theirs)


def _test_clip(sampling_rate: int) -> np.ndarray:
    """Two seconds of a rising tone in noise, some silence and a click."""
    t = np.arange(2 * sampling_rate) / sampling_rate
    clip = 0.3 * np.sin(2 * np.pi * (100 + 400 * t) * t) + 0.01 * np.random.default_rng(0).standard_normal(len(t))
    clip[sampling_rate // 2 : sampling_rate] = 0
    clip[3 * sampling_rate // 2] = 0.9
    return clip.astype(np.float32)


def _call(extractor: Any, clip: np.ndarray) -> Any:
    parameters = inspect.signature(type(extractor).__call__).parameters
    options: dict[str, Any] = {"sampling_rate": getattr(extractor, "sampling_rate", None), "return_tensors": "np"}
    options["generator"] = np.random.default_rng(0)  # of UnivNet's noise
    options = {name: value for name, value in options.items() if name in parameters}
    state, torch_state = np.random.get_state(), torch.random.get_rng_state()
    np.random.seed(0)
    torch.manual_seed(0)  # dither
    try:
        if "audio_target" in parameters:
            return extractor(audio_target=clip, **options)
        return extractor([clip], **options)
    finally:
        np.random.set_state(state)
        torch.random.set_rng_state(torch_state)


def _compare(ours: Any, theirs: Any) -> float:
    if list(ours) != list(theirs):
        raise RefusedError(f"keys {list(ours)} where the original has {list(theirs)}")
    largest = 0.0
    for key in theirs:
        a, b = np.asarray(ours[key]), np.asarray(theirs[key])
        if a.shape != b.shape or a.dtype != b.dtype:
            raise RefusedError(f"{key} is {a.dtype} {a.shape} where the original has {b.dtype} {b.shape}")
        if b.dtype.kind != "f":
            if not np.array_equal(a, b):
                raise RefusedError(f"{key} differs")
            continue
        finite = np.isfinite(b)
        if not np.array_equal(np.isfinite(a), finite):
            raise RefusedError(f"{key} is not finite where the original is, or the other way round")
        difference = np.abs(a[finite] - b[finite])
        scale = max(1.0, float(np.abs(b[finite]).max(initial=0)))
        worst, mean = (
            float(difference.max(initial=0)) / scale,
            float(difference.sum() / max(difference.size, 1)) / scale,
        )
        if worst > MAX_DIFFERENCE or mean > MEAN_DIFFERENCE:
            raise RefusedError(
                f"{key} differs by up to {worst:.1e}, {mean:.1e} in the mean, relative to its largest value"
            )
        largest = max(largest, worst)
    return largest
