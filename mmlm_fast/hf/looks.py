"""What the host must know of masks that lie on a GPU, for which it waits as seldom as it can.

A mask is intervals only if the padding has no holes and no image stands in two places, which the values say. On a CPU
looking is free. On a GPU the host waits, so

- all that one call asks is read together, and remembered with the tensor it is about;
- a decoding step asks nothing. Its mask is a new tensor, the last one and a column of ones, so that what was known of
  the last one holds; an assertion on the device holds the caller to it. Who does otherwise gets an error, never another
  result. Where the last mask could not be continued by ones (holes, padding on the right), the step is not looked at
  either: transformers' dense mask of one query is small, and always right.
"""

import threading
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

MAX_ANSWERS = 16  # that are remembered of a tensor: a mask kept for ever is asked about many lengths


class Shape(IntEnum):
    """Of the padding of all samples, from the most to the least that a mask can be taken for."""

    FULL = 0  # none
    LEFT = 1  # none, or on the left
    RUN = 2  # on either side
    HOLES = 3


class Seen(NamedTuple):
    """The mask that was known last."""

    device: torch.device
    batch_size: int
    length: int
    shape: Shape
    is_prompt: bool  # of several queries, or a step after such a one: not of a single query that somebody asked about


class _State(threading.local):
    def __init__(self) -> None:
        self.last: Seen | None = None
        self.answers = WeakTensorKeyDictionary()


_state = _State()


def looking_is_free(device: torch.device) -> bool:
    return device.type == "cpu"


def continued(last: Seen | None, device: torch.device, batch_size: int, length: int) -> Shape | None:
    """What is to be expected of the padding in a decoding step; None where the step does not follow what was seen last.

    The same length is the next kind of layer's mask in the same step, or a cross-attention's.
    """
    if last is None or (last.device, last.batch_size) != (device, batch_size):
        return None
    if length == last.length:
        return last.shape if last.is_prompt else None
    if length == last.length + 1:
        return last.shape if last.shape <= Shape.LEFT else Shape.HOLES
    return None


def is_run(there: Tensor) -> Tensor:
    """Whether what is True in each row of ``[B, K]`` stands together."""
    return (there[:, 1:] & ~there[:, :-1]).sum(1).add(there[:, 0]).le(1).all() if there.shape[1] else ~there.any()


class Questions:
    """What one mask asks of tensors on a device: collected with `ask`, read together by `read`."""

    def __init__(self, device: Any, q_length: int) -> None:
        self.device = torch.device(device)
        self.are_free = looking_is_free(self.device)
        self.is_step = q_length == 1
        self._asked: list[tuple[Sequence[Tensor], Callable[..., None], Tensor | None, tuple]] = []

    @property
    def are_unwanted(self) -> bool:
        """A decoding step on a GPU: assert, do not ask."""
        return self.is_step and not self.are_free

    def ask(
        self,
        facts: Callable[[], Sequence[Tensor]],
        then: Callable[..., None],
        about: Tensor | None = None,
        key: tuple = (),
    ) -> None:
        """Give the values of `facts`, bool scalars, to `then`: when they are read, or here if the tensor `about` which
        they say something, by `key`, has not changed since they were."""
        answers = self._recall(about, key)
        if answers is None:
            self._asked.append((facts(), then, about, key))
        else:
            then(*answers)

    def read(self) -> None:
        asked, self._asked = self._asked, []
        if not asked:
            return
        values = iter(torch.stack([fact for facts, *_ in asked for fact in facts]).tolist())
        answered = [tuple(next(values) for _ in facts) for facts, *_ in asked]
        for (_, _, about, key), answers in zip(asked, answered, strict=True):
            self._remember(about, key, answers)
        for (_, then, _, _), answers in zip(asked, answered, strict=True):
            then(*answers)

    def _recall(self, about: Tensor | None, key: tuple) -> tuple[bool, ...] | None:
        if self.are_free or about is None or about.is_inference():  # whose changes are not counted
            return None
        version, answers = _state.answers.get(about, {}).get(key, (None, None))
        return answers if version == about._version else None

    def _remember(self, about: Tensor | None, key: tuple, answers: tuple[bool, ...]) -> None:
        if self.are_free or about is None or about.is_inference():
            return
        known = _state.answers.setdefault(about, {})
        if len(known) >= MAX_ANSWERS:
            known.clear()
        known[key] = about._version, answers

    def expected(self, mask: Tensor) -> Shape | None:
        """What a decoding step's padding mask ``[B, K]`` must be for the step to follow the last; None: to be asked."""
        if not self.are_unwanted:
            return None
        batch_size, length = mask.shape
        shape = continued(_state.last, self.device, batch_size, length)
        if shape is not None:
            _state.last = Seen(self.device, batch_size, length, shape, True)
        return shape

    def saw(self, mask: Tensor, shape: Shape) -> None:
        if not self.are_free:
            _state.last = Seen(self.device, mask.shape[0], mask.shape[1], shape, not self.is_step)
