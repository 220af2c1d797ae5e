"""What a later turn of a conversation needs beside the keys and values of the earlier ones: what their tokens were
fused with. It lives with the cache, so that any number of conversations may go on with one model."""

import inspect
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationMixin
from transformers.cache_utils import Cache

Context = tuple[Tensor, Tensor]
# What transformers calls a cache, in calls and in results: from 5.24 on the former.
_PREPARE = inspect.signature(GenerationMixin.prepare_inputs_for_generation)
CACHE = "cache" if "cache" in _PREPARE.parameters else "past_key_values"


def takes_cache(forward: Callable) -> Callable:
    """Decorate a model's forward that takes `past_key_values`: ``cache`` is another name for it.

    Raises:
        ValueError: if both are given.
    """

    @wraps(forward)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "cache" in kwargs:
            given = kwargs.pop("cache")
            if given is not None and kwargs.get("past_key_values") is not None:
                raise ValueError("cache is another name for past_key_values: pass one, got both")
            kwargs["past_key_values"] = given if given is not None else kwargs.get("past_key_values")
        return forward(self, *args, **kwargs)

    return call


class _Fused:
    """A cache of transformers with the features its tokens were fused with: what happens to its rows also happens to
    theirs."""

    fusion: Context | None

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.fusion = None

    def crop(self, *args: Any, **kwargs: Any) -> None:
        super().crop(*args, **kwargs)  # type: ignore[misc]
        if not _num_tokens(self):
            self.fusion = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        if self.fusion is not None:
            context, present = self.fusion
            self.fusion = context.repeat_interleave(repeats, 0), present.repeat_interleave(repeats, 0)

    def _select(self, rows: Tensor) -> None:
        if self.fusion is not None:
            context, present = self.fusion
            self.fusion = context[rows.to(context.device)], present[rows.to(present.device)]

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return _made_again, (type(self).__bases__[1],), self.__dict__


@cache
def _fused(cls: Any) -> Any:
    return type(cls.__name__, (_Fused, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})


def _made_again(cls: Any) -> Any:
    return _fused(cls).__new__(_fused(cls))


def _num_tokens(past_key_values: Any) -> int:
    length = past_key_values.get_seq_length()
    # A static cache counts on the device, where a compiled graph cannot look.
    return 0 if isinstance(length, Tensor) and torch.compiler.is_compiling() else int(length)


def keep_context(past_key_values: Any, context: Context) -> None:
    """Keep what the tokens in a cache were fused with, the first time."""
    if not isinstance(past_key_values, Cache):
        return
    if kept_context(past_key_values) is None:
        past_key_values.fusion = context  # type: ignore[attr-defined]
    if not isinstance(past_key_values, _Fused) and not torch.compiler.is_compiling():  # Dynamo changes no class
        cls: Any = type(past_key_values)
        past_key_values.__class__ = _fused(cls)


def kept_context(past_key_values: Any) -> Context | None:
    """Return what was kept: of B conversations ``[B, k, H]`` and which of it is there, bool ``[B, k]``."""
    return getattr(past_key_values, "fusion", None)


def turn_context(past_key_values: Any, batch_size: int, context: Context | None) -> Context | None:
    """Return what a turn goes on with: what the tokens in its cache were fused with, or else what it brings.

    Args:
        past_key_values: A cache, or None.
        batch_size: Of the turn.
        context: Of what the turn brings; None where it brings nothing to encode.

    Raises:
        ValueError: for another number of conversations; for tokens whose context is nowhere; and for another context
            than the cache's, with which the tokens in it were fused: their keys would be other ones.
    """
    held = kept_context(past_key_values)
    if held is None:
        if context is None and past_key_values is not None and _num_tokens(past_key_values):
            raise ValueError(
                "past_key_values must hold what its tokens were fused with, as a cache does that this model filled, or "
                "pictures and sound must be passed, got neither; where there are none (PEFT's prefix tuning of text, "
                "say), pass fillers with image_mask=False or audio_mask=False for every sample"
            )
        return context
    if held[0].shape[0] != batch_size:
        raise ValueError(f"past_key_values holds {held[0].shape[0]} conversations, got a batch of {batch_size}")
    if context is not None and not _same_but_for_rounding(held, context):
        raise ValueError(
            "pictures, sound and what else is encoded must be those of the first turn, got others: the tokens in "
            "past_key_values were fused with them, so that others need a new cache and the whole conversation"
        )
    return held


# How far a feature may lie from the one held, relative to its length. Encoded again in another batch, under autocast,
# by another kernel or with merged adapters it is rounded otherwise: measured 4e-7 in float32 and, in bfloat16 after 24
# layers, 1.8 %; features of other pictures and sounds lie 26 % away and more.
_ROUNDING = 0.05


def _same_but_for_rounding(held: Context, context: Context) -> bool:
    # What is missing is at the end, as much as the longest sample of the batch wanted.
    longest = max(held[0].shape[1], context[0].shape[1])
    (a, a_present), (b, b_present) = (
        (F.pad(x.float(), (0, 0, 0, longest - x.shape[1])), F.pad(present, (0, longest - x.shape[1])))
        for x, present in (held, context)
    )
    near = (a - b).norm(dim=-1) <= _ROUNDING * a.norm(dim=-1)
    return bool(((a_present == b_present) & (near | ~a_present)).all())  # one look from the host
