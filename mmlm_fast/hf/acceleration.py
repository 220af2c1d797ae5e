"""`accelerate`: swap parts of a model or processor for faster ones, each proved on the user's own object."""

import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import FeatureExtractionMixin, PreTrainedModel, ProcessorMixin

from mmlm_fast.audio.extractors import EXTRACTORS, NOT_REPLACED, drop_in
from mmlm_fast.hf import loss
from mmlm_fast.nn import LazyLinear

# Two float32 computations of a logarithm differ by this much where a bin nearly cancels, and by a tenth of it in the
# mean, relative to the largest feature (tests/test_audio_extractors.py compares each with float64).
MAX_DIFFERENCE = 2e-3
MEAN_DIFFERENCE = 1e-4


@dataclass(frozen=True)
class Replaced:
    path: str  # attribute of the object, "" for the object itself
    name: str
    max_difference: float | None  # to the original on a test input, relative; None where not verified
    note: str = ""


@dataclass(frozen=True)
class Refused:
    path: str
    name: str
    reason: str


@dataclass
class Acceleration:
    """What `accelerate` did; print it. `undo` gives the original back."""

    replaced: list[Replaced] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    _originals: list[tuple[Any, type, type]] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Give every object its original class back; its state was never touched."""
        while self._originals:
            target, ours, original = self._originals.pop()
            target.__class__ = _instead(type(target), ours, original)
            head = target.get_output_embeddings() if hasattr(target, "get_output_embeddings") else None
            if type(head) is LazyLinear:  # a new one, of a resized vocabulary
                head.__class__ = nn.Linear  # type: ignore[assignment]

    def _change(self, target: Any, cls: type) -> None:
        self._originals.append((target, cls, type(target)))
        target.__class__ = cls

    def __str__(self) -> str:
        lines = []
        for r in self.replaced:
            proof = "not verified" if r.max_difference is None else f"largest difference {r.max_difference:.1e}"
            lines.append(f"replaced {r.path or 'this object'}: {r.name} ({proof}{r.note and '; '}{r.note})")
        lines += [f"left     {r.path or 'this object'}: {r.name}: {r.reason}" for r in self.refused]
        return "\n".join(lines) or "nothing to replace was found"


def accelerate(
    model: Any, *, only: Collection[str] | None = None, exclude: Collection[str] = (), verify: bool = True
) -> Acceleration:
    """Replace what this package does faster, in place, each piece proved against what it replaces.

    So far:

    - the audio feature extractor of a processor, or a feature extractor itself. Its class is changed to the drop-in of
      the same name; its settings, and what it saves, stay as they are. Before that both run on a test clip, and the
      replacement is refused where keys, shapes, types, masks or features differ.
    - the head of a language model (see `mmlm_fast.hf.loss`): in training ``model(**inputs, labels=labels)`` computes
      its loss without logits; who reads ``outputs.logits`` gets those of the forward pass then. Parameters and state
      dict stay as they are. Calls without labels, in evaluation, of compiled models, and of heads with hooks, adapters
      or sharded weights are the original's.

    Args:
        model: A transformers model, processor or feature extractor, or a module that holds models (PEFT's, DDP).
        only: Replace only these classes, by name.
        exclude: Leave these classes, by name.
        verify: Run the proof. Without it a replacement is kept unseen.

    Returns:
        The report: print it; `.replaced`, `.refused`, `.undo()`.

    Raises:
        ValueError: for any other object.
    """
    for name, names in (("only", only), ("exclude", exclude)):
        if isinstance(names, str):
            raise ValueError(f"{name} must be a collection of class names, got the string {names!r}")
    result = Acceleration()
    for path, part, replace in _parts_of(model):
        name = type(part).__name__
        if (only is not None and name not in only) or name in exclude:
            result.refused.append(Refused(path, name, "left out by only or exclude"))
            continue
        reason, difference, changes = replace(part, verify)
        if reason is not None:
            result.refused.append(Refused(path, name, reason))
            continue
        for target, cls in changes:
            if type(target) is not cls:
                result._change(target, cls)
        compiled = "_orig_mod" in path.split(".")
        note = "in compiled code the head is the original's, so this saves nothing there" if compiled else ""
        result.replaced.append(Replaced(path, name, difference, note))
    return result


def _instead(cls: type, ours: type, original: type) -> type:
    """`cls` with `original` where it has `ours`: itself, or below what parametrizations or FSDP made of it since."""
    if cls is ours:
        return original
    if ours not in cls.__mro__:
        return cls
    names = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
    return type(cls)(cls.__name__, tuple(_instead(base, ours, original) for base in cls.__bases__), names)


# Why not, the largest difference, and the objects to change with their new classes.
Replacement = tuple[str | None, float | None, list[tuple[Any, type]]]


def _parts_of(model: Any) -> list[tuple[str, Any, Callable[[Any, bool], Replacement]]]:
    """Path, part, and what finds its replacement."""
    if isinstance(model, FeatureExtractionMixin):
        return [("", model, _replace_extractor)]
    if isinstance(model, ProcessorMixin):
        parts = vars(model).items()
        return [(path, part, _replace_extractor) for path, part in parts if isinstance(part, FeatureExtractionMixin)]
    if isinstance(model, nn.Module) and any(isinstance(m, PreTrainedModel) for m in model.modules()):
        return [(path, head, partial(_replace_head, owner)) for path, owner, head in loss.heads_of(model)]
    raise ValueError(
        f"accelerate takes a transformers model, processor or feature extractor, got {type(model).__name__}"
        + (", which holds no such model" if isinstance(model, nn.Module) else "")
    )


def _replace_head(model: Any, head: nn.Module, verify: bool) -> Replacement:
    reason, difference = loss.why_not(model, head, verify)
    return reason, difference, [] if reason else [(head, LazyLinear), (model, loss.without_logits(model.__class__))]


def _replace_extractor(extractor: Any, verify: bool) -> Replacement:
    reason, difference = _why_not(extractor, verify)
    return reason, difference, [] if reason else [(extractor, drop_in(type(extractor).__name__))]


def _why_not(extractor: Any, verify: bool) -> tuple[str | None, float | None]:
    """Why not, or the largest difference found."""
    cls, name = type(extractor), type(extractor).__name__
    if name not in EXTRACTORS:
        return NOT_REPLACED.get(name, "no drop-in of this name"), None
    try:
        replacement = drop_in(name)
    except AttributeError as error:
        return str(error), None
    if cls is replacement:
        return "accelerated already", None
    if cls is not replacement.__bases__[1]:
        return f"a subclass of its own, {cls.__module__}.{cls.__qualname__}, whose changes would be lost", None
    if not verify:
        return None, None
    twin: Any = object.__new__(replacement)
    twin.__dict__.update(extractor.__dict__)
    clip = _test_clip(int(getattr(extractor, "sampling_rate", 16000)))
    try:
        theirs = _call(extractor, clip)
    except Exception as error:
        return f"the original fails on a test clip, so nothing can be proved: {type(error).__name__}: {error}", None
    try:
        ours = _call(twin, clip)
    except Exception as error:
        return f"the replacement fails on a test clip: {type(error).__name__}: {error}", None
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


def _compare(ours: Any, theirs: Any) -> tuple[str | None, float | None]:
    if list(ours) != list(theirs):
        return f"keys {list(ours)} where the original has {list(theirs)}", None
    largest = 0.0
    for key in theirs:
        a, b = np.asarray(ours[key]), np.asarray(theirs[key])
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"{key} is {a.dtype} {a.shape} where the original has {b.dtype} {b.shape}", None
        if b.dtype.kind != "f":
            if not np.array_equal(a, b):
                return f"{key} differs", None
            continue
        finite = np.isfinite(b)
        if not np.array_equal(np.isfinite(a), finite):
            return f"{key} is not finite where the original is, or the other way round", None
        difference = np.abs(a[finite] - b[finite])
        scale = max(1.0, float(np.abs(b[finite]).max(initial=0)))
        worst, mean = (
            float(difference.max(initial=0)) / scale,
            float(difference.sum() / max(difference.size, 1)) / scale,
        )
        if worst > MAX_DIFFERENCE or mean > MEAN_DIFFERENCE:
            return f"{key} differs by up to {worst:.1e}, {mean:.1e} in the mean, relative to its largest value", None
        largest = max(largest, worst)
    return None, largest
