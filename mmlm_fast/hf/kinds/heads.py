"""Heads of language models, whose loss needs no logits: see `mmlm_fast.hf.loss`."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from mmlm_fast.hf import loss
from mmlm_fast.hf.changing import change, instead
from mmlm_fast.hf.proof import RefusedError
from mmlm_fast.hf.site import Site
from mmlm_fast.nn import LazyLinear

KIND = "language-model head"


def find(model: nn.Module) -> Iterator[Site]:
    """Heads whose logits the loss of their model reads."""
    for path, owner, head in loss.heads_of(model):
        site = Site(KIND, path, type(head).__name__, head, op="linear_cross_entropy")
        site.reason = loss.why_not(owner, head)
        site.prove = functools.partial(_prove, head)
        site.apply = functools.partial(_apply, owner, head)
        if "_orig_mod" in path.split("."):
            site.note = "in compiled code the head is the original's, so this saves nothing there"
        yield site


def _prove(head: nn.Module) -> float:
    reason, difference = loss.proved(head)
    if reason is not None or difference is None:
        raise RefusedError(reason or "nothing was compared")
    return difference


def _apply(owner: Any, head: Any) -> Callable[[], None]:
    undo_model = change(owner, loss.without_logits)
    if type(head) is not LazyLinear:
        head.__class__ = LazyLinear

    def undo() -> None:
        undo_model()
        for linear in (head, owner.get_output_embeddings()):  # the second: a new one, of a resized vocabulary
            if isinstance(linear, nn.Linear):
                linear.__class__ = instead(type(linear), LazyLinear, nn.Linear)

    return undo
