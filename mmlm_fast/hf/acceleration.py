"""`accelerate`: swap parts of a model or processor for faster ones, each proved on the user's own object."""

import os
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import transformers
from torch import nn

from mmlm_fast.hf.changing import why_unproved
from mmlm_fast.hf.kinds import attentions, extractors, heads, methods, mlps, norms, patches, rewrites
from mmlm_fast.hf.proof import RefusedError
from mmlm_fast.hf.site import ALREADY, Site
from mmlm_fast.ops.parts import RECORDS

KINDS: tuple[Callable[[nn.Module], Iterator[Site]], ...] = (
    heads.find,
    attentions.find,
    norms.find,
    rewrites.find,
    mlps.find,
    mlps.find_activations,
    patches.find,
    methods.find,
)  # fmt: skip


TESTED = "5.17.0", "5.24.0"  # of transformers: tests/versions.md
TESTED_PARTS = [tuple(int(part) for part in version.split(".")[:2]) for version in TESTED]


class NothingReplaced(ValueError):
    """`accelerate` found nothing that it could replace; its text says what there was, and why not."""


@dataclass(frozen=True)
class Replaced:
    """A place that something of ours has taken."""

    path: str  # attribute of the object, "" for the object itself
    name: str  # class of what is there
    max_difference: float | None  # to the exact result on a test input, relative; None where not verified
    note: str = ""
    kind: str = ""


@dataclass(frozen=True)
class Refused:
    """A place that stays as it was."""

    path: str
    name: str
    reason: str
    kind: str = ""


@dataclass
class Acceleration:
    """What `accelerate` did; print it. `undo` gives the original back."""

    replaced: list[Replaced] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    is_plan: bool = False
    unknown: list[str] = field(default_factory=list)  # in only or exclude, and nothing's name here
    names: set[str] = field(default_factory=set, repr=False)  # that `only` and `exclude` could have said
    _model: Any = field(default=None, repr=False)
    _undo: list[Callable[[], None]] = field(default_factory=list, repr=False)

    def is_of(self, model: Any) -> bool:
        """Whether it is of this object, or of one that it wraps."""
        return model is self._model or (isinstance(model, nn.Module) and any(m is self._model for m in model.modules()))

    def undo(self) -> None:
        """Give every object its original behaviour back; its state was never touched."""
        while self._undo:
            self._undo.pop()()

    def as_dict(self) -> dict[str, Any]:
        """The same as numbers and strings, for JSON."""
        return {
            "replaced": [asdict(r) for r in self.replaced],
            "refused": [asdict(r) for r in self.refused],
            "transformers": transformers.__version__,
        }

    def __str__(self) -> str:
        groups: dict[tuple, list[Replaced | Refused]] = {}
        for r in self.replaced:
            groups.setdefault((r.kind, r.name, r.note), []).append(r)
        for f in self.refused:
            groups.setdefault((f.kind, f.name, f.reason), []).append(f)
        lines = [_line(group, self.is_plan) for group in groups.values()]
        if self.unknown:
            lines.append(f"only and exclude: nothing here is named {', '.join(self.unknown)}")
        if _is_unseen(transformers.__version__):
            lines.append(
                f"transformers {transformers.__version__} is none of those that this was tested with ({TESTED[0]} to "
                f"{TESTED[-1]}): forwards that changed there are left as they are"
            )
        return "\n".join(lines) or "nothing to replace was found"


def _is_unseen(version: str) -> bool:
    """Whether a version lies outside those that the tests ran with."""
    parts = tuple(int(part) for part in version.split(".")[:2])
    return not TESTED_PARTS[0] <= parts <= TESTED_PARTS[-1]


def _line(group: list[Any], is_plan: bool) -> str:
    first = group[0]
    where = first.path or "this object"
    count = f"{len(group)} × {first.name}" if len(group) > 1 else f"{where}: {first.name}"
    if isinstance(first, Refused):
        return f"left     {count} ({first.kind}): {first.reason}"
    proved = [r.max_difference for r in group if r.max_difference is not None]
    proof = f"largest error {max(proved):.1e}" if proved else "not verified"
    what = "; ".join(part for part in (first.kind, proof, first.note) if part)
    return f"{'would replace' if is_plan else 'replaced'} {count} ({what})"


def accelerate(
    model: Any,
    *,
    only: Collection[str | type] | None = None,
    exclude: Collection[str | type] = (),
    verify: bool = True,
    plan_only: bool = False,
    strict: bool = True,
    quiet: bool = False,
) -> Acceleration:
    """Replace what this package does faster, in place, each piece proved against what it replaces.

    Places are found by what their source computes, not by the name of a class, so that a forward that changed in a new
    version of transformers is left, not guessed. Places of one kind and shape are proved once, on their own weights:
    output and gradients may err by twice what the original errs. No forward pass of the model is needed.

    What is replaced:

    - the audio feature extractor of a processor, or a feature extractor itself.
    - the head of a language model: in training ``model(**inputs, labels=labels)`` computes its loss without logits; who
      reads ``outputs.logits`` gets those of the forward pass then.
    - the loss of a CLIP or SigLIP: ``model(**inputs, return_loss=True)`` in training, likewise without logits.
    - attention that transformers looks up by name, where that is its default, sdpa.
    - RMS norms, with the sum before them where a layer's forward allows; layer norms with such a sum.
    - gated MLPs, rotary embeddings, activations of several passes, placeholders filled by ``masked_scatter``,
      convolutions that cut pictures into patches, positions of M-RoPE, deepstack and pixel shuffles.

    Everything keeps its parameters, hooks, name and state dict; adapters in it keep working. Compiled code has the
    original's forwards, but for attention. Which path a call takes depends on device, dtype and size, as `doctor` says.

    Args:
        model: Any module, also wrapped (PEFT, DDP, ``torch.compile``), or a processor or feature extractor.
        only: Replace only these: classes, kinds as the report names them, or paths of modules.
        exclude: Leave these.
        verify: Run the proof. Without it a replacement is kept unseen.
        plan_only: Change nothing; say what would be done. Weights may be on the meta device.
        strict: Raise where nothing at all was replaced.
        quiet: Do not print the report.

    Returns:
        The report: `.replaced`, `.refused`, `.undo()`.

    Raises:
        NothingReplaced: (a ValueError) with `strict`, where nothing was replaced and nothing is accelerated already.
        ValueError: for any other object.
    """
    only, exclude = None if only is None else _names("only", only), _names("exclude", exclude)
    result = Acceleration(is_plan=plan_only, _model=model)
    proved: dict[Any, float | str] = {}
    try:
        for site in _sites_of(model):
            _treat(site, result, proved, only, exclude, verify and not plan_only)
    except BaseException:
        result.undo()
        raise
    result.unknown = [n for n in (*(only or ()), *exclude) if n not in result.names]
    if strict and not result.replaced and not any(r.reason == ALREADY for r in result.refused):
        raise NothingReplaced(f"nothing was replaced (strict=False allows that):\n{result}")
    if not quiet and os.environ.get("RANK", "0") == "0":
        print(result)
    return result


def _sites_of(model: Any) -> Iterator[Site]:
    if extractors.has_extractors(model):
        yield from extractors.find(model)
    elif isinstance(model, nn.Module):
        for find in KINDS:
            yield from find(model)
    else:
        raise ValueError(
            f"accelerate takes a module, a transformers processor or feature extractor, got {type(model).__name__}"
        )


def _treat(
    site: Site,
    result: Acceleration,
    proved: dict[Any, float | str],
    only: Collection[str] | None,
    exclude: Collection[str],
    verify: bool,
) -> None:
    reason, difference = site.reason, None
    result.names.update(_names_of(site), site.also)
    among = _names_of(site)
    if reason is None and ((only is not None and not among & {*only}) or (among | {*site.also}) & {*exclude}):
        reason = "left out by only or exclude"
    if reason is None and not result.is_plan and isinstance(site.target, nn.Module):
        reason = why_unproved(site.target)
    note = "; ".join(part for part in (site.note, _why_original(site)) if part)
    if reason is None and verify and site.prove is not None and not _why_original(site):
        key = (site.kind, site.alike if site.alike is not None else site.path)
        if key not in proved:
            try:
                with torch.inference_mode(False):  # tensors made in it could not be kept for a backward pass
                    proved[key] = site.prove()
            except RefusedError as error:
                proved[key] = str(error)
        outcome = proved[key]
        reason, difference = (outcome, None) if isinstance(outcome, str) else (None, outcome)
    if reason is not None or site.apply is None:
        result.refused.append(Refused(site.path, site.name, reason or "", site.kind))
        return
    if not result.is_plan:
        result._undo.append(site.apply())
    result.replaced.append(Replaced(site.path, site.name, difference, note, site.kind))


def _names(argument: str, names: Any) -> tuple[str, ...]:
    if isinstance(names, (str, type)) or not isinstance(names, Iterable):
        raise ValueError(f"{argument} must be a collection of names, got {names!r}")
    found = tuple(name.__name__ if isinstance(name, type) else name for name in names)
    if not all(isinstance(name, str) for name in found):
        raise ValueError(f"{argument} must hold kinds, classes and paths, got {found!r}")
    return found


def _names_of(site: Site) -> set[str]:
    """Its class, its kind, and the paths of what it lies in."""
    parts = site.path.split(".")
    return {site.name, site.kind, *(".".join(parts[:i]) for i in range(1, len(parts) + 1))} - {""}


def _why_original(site: Site) -> str:
    """Why calls of this dtype and device are the original's whatever their size; empty where they are not."""
    if site.op is None or site.like is None:
        return ""
    record, device = RECORDS[site.op], site.like.device.type
    dtypes = record.native if device == "cpu" else record.kernel
    if device in ("cpu", "cuda") and site.like.dtype not in dtypes and record.otherwise == "REFERENCE":
        return f"the original runs in {str(site.like.dtype).removeprefix('torch.')} on {device}"
    return ""
