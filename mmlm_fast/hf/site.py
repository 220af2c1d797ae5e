"""A place in a model that something of ours can take."""

import functools
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from mmlm_fast.ops.paths import FORCED, forced_path

ALREADY = "accelerated already"


@dataclass
class Site:
    """One place, and what would be done there.

    Args:
        kind: What it is, in words: sites are counted by it.
        path: Attribute of the object that was given, "" for the object itself.
        name: Class of what is there.
        target: What is there.
        apply: Makes the replacement; returns what takes it back.
        reason: Why it is left as it is; None where it is not.
        alike: Sites of one kind for which this is equal are proved once; None: each for itself.
        prove: Returns the largest error found, relative; raises `RefusedError`. None: nothing to prove.
        op: Name of the record that says which path a call takes.
        op_kind: Of that op, where its path depends on it.
        like: A tensor of the dtype and device of what it works on.
        note: What else is to be said.
        also: Classes of which it takes a part, which keeps it from those who exclude one.
    """

    kind: str
    path: str
    name: str
    target: Any
    apply: Callable[[], Callable[[], None]] | None = None
    reason: str | None = None
    alike: Hashable = None
    prove: Callable[[], float] | None = None
    op: str | None = None
    op_kind: str | None = None
    like: Tensor | None = None
    note: str = ""
    also: tuple[str, ...] = ()


WIDEST = 8  # what a layer makes of its input has at most so many times its elements


def is_small(least: int, x: Any) -> bool:
    """Whether a call of an op on `x` is sure to be its formula: asked first, as it is all that a small call pays for.

    Args:
        least: What the op's record says its own paths are worth while for on a CPU.
    """
    return x.numel() < least and x.is_cpu and (not FORCED or forced_path() is None)


def unless_tiny(cls: Any, least: int, ours: Callable[..., Any]) -> Any:
    """A forward that is that of `cls` for what is too small for the ops in `ours`, else `ours`.

    That is a step of decoding on a CPU: between two layers the weights go through all caches, and then what is read to
    decide costs more than what is computed. Compiled or traced, it is `ours`, which has no sizes to look at.

    Args:
        least: How many numbers the forward's first argument must have to be more.
    """

    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        x: Any = args[0] if args else next(iter(kwargs.values()), None)
        has_size = type(x) is Tensor and not is_dynamo_compiling() and not _is_tracing()
        if has_size and x.numel() < least and x.is_cpu and not FORCED and x.is_floating_point():
            return cls.forward(self, *args, **kwargs)
        return ours(self, *args, **kwargs)

    return forward


_is_tracing = torch._C._get_tracing_state
