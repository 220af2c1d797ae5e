"""transformers' mask functions as intervals of keys, without a mask of queries × keys in memory.

transformers hands a mask implementation not a mask but a function of (batch, head, query, key), composed of a few known
ones; what they close over says all. Each known one is an interval a row, conjunctions intersect, disjunctions unite.
The result travels as an int32 tensor ``[B, 1, Q, 2]`` (lo, hi): models and generate() pass on, slice and move a 4-D
tensor.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils

from mmlm_fast.hf.looks import Questions, Shape, is_run
from mmlm_fast.masks import each_id_runs_once, runs_of_ids
from mmlm_fast.ops.paths import is_transformed

# Models that compute with the mask that the interface returns, so that it must be the dense one.
READ_THEIR_MASK = frozenset(
    ["siglip2_vision_model", "siglip2", "gemma4_assistant", "nemotron_asr_streaming", "parakeet_encoder",
     "parakeet_ctc", "pix2struct", "switch_transformers", "falcon", "longformer", "luke", "visual_bert", "beit",
     "deepseek_v32", "deepseek_v4", "glm_moe_dsa", "qwen4_exp", "mistral_large4", "dots3_note", "axk2", "hy_v4",
     "minimax_m3_vl", "granite_speech5", "swin"]
)  # fmt: skip
Bounds = tuple[Tensor, Tensor]
_HOLES, _TWO_PLACES = "padding with holes", "an image that stands in two places"
_ASSERTED = (
    "mmlm_fast: the attention_mask of a decoding step must be that of the last step and a column of ones; with another "
    "one, use set_attn_implementation('sdpa')"
)


class _NotAnInterval(Exception):
    pass


@cache
def say_once(message: str) -> None:
    warnings.warn(message, stacklevel=3)


def interval_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    *,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    device: Any = "cpu",
    config: Any = None,
    **kwargs: Any,
) -> Tensor | None:
    """What transformers' `AttentionMaskInterface` calls for ``"mmlm_fast"``.

    Returns:
        int32 ``[B, 1, Q, 2]``; None where nothing is masked, or the mask is plainly causal and the attention is told;
        or, for a mask that is no interval a row (holes in the padding, an image in two places), transformers' own dense
        bool mask ``[B, 1, Q, K]``, said once. What it is lies in closures and values, which a compiler does not see:
        the graph breaks here, and where it must not (``fullgraph=True``, exports) a mask that hides more than the
        future is dense, too.
    """
    arguments = dict(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        mask_function=mask_function, attention_mask=attention_mask, device=device, config=config, **kwargs,
    )  # fmt: skip
    if getattr(config, "model_type", None) in READ_THEIR_MASK or is_transformed():
        return _dense(arguments)
    if torch.compiler.is_compiling():
        skips = allow_is_causal_skip and mask_function is masking_utils.causal_mask_function and attention_mask is None
        if skips and isinstance(q_offset, int) and _is_plain(q_length, kv_length, q_offset, kv_offset):
            return None
        if not _may_break_the_graph():
            return _dense(arguments)
        arguments |= dict(
            allow_is_causal_skip=allow_is_causal_skip, allow_is_bidirectional_skip=allow_is_bidirectional_skip
        )
        return _outside_the_graph(**arguments)
    questions = Questions(device, q_length)
    everything = kv_offset, kv_offset + kv_length
    try:
        padding = _padding(attention_mask, kv_length, kv_offset, questions)
        skips_causal = allow_is_causal_skip and mask_function is masking_utils.causal_mask_function
        skips_all = allow_is_bidirectional_skip and mask_function is masking_utils.bidirectional_mask_function
        if isinstance(q_offset, int) and (
            skips_all or (skips_causal and _is_plain(q_length, kv_length, q_offset, kv_offset))
        ):
            questions.read()
            if padding is None or padding.is_full:
                return None
        position = torch.arange(q_length, device=device) + q_offset
        lo, hi = _walk(mask_function, position[None].expand(batch_size, -1), everything, questions)
        questions.read()
    except _NotAnInterval as error:
        say_once(f"mmlm_fast: {error}: no interval of keys a query; torch's attention runs with a dense mask")
        return _dense(arguments)
    lo, hi = lo.clamp(*everything), hi.clamp(*everything)
    if padding is not None and not padding.is_full:
        lo, hi = torch.maximum(lo, padding.lo), torch.minimum(hi, padding.hi)
    return _as_tensor(lo - kv_offset, hi - kv_offset, batch_size)


def _is_plain(q_length: int, kv_length: int, q_offset: int, kv_offset: int) -> bool:
    """Whether a causal mask is the one that attention knows by its name, or hides nothing from the one last query."""
    if q_length == kv_length and q_offset == kv_offset:
        return True
    return q_length == 1 and q_offset + 1 >= kv_offset + kv_length


def _as_tensor(lo: Tensor, hi: Tensor, batch_size: int) -> Tensor:
    """``[B, 1, Q, 2]`` with all `lo` and then all `hi` in memory: each a contiguous view, which no layer copies."""
    hi = hi.clamp(min=0)
    bounds = torch.stack([torch.minimum(lo.clamp(min=0), hi), hi]).to(torch.int32)
    return bounds.expand(-1, batch_size, -1).contiguous().permute(1, 2, 0)[:, None]


def _dense(arguments: dict[str, Any]) -> Tensor:
    return masking_utils.sdpa_mask(**arguments, allow_is_causal_skip=False, allow_is_bidirectional_skip=False)


# ---- from what the functions close over ----------------------------------------------------------------------------


def _closure(function: Callable) -> dict[str, Any]:
    cells = function.__closure__ or ()
    return {name: cell.cell_contents for name, cell in zip(function.__code__.co_freevars, cells, strict=True)}


def _name(function: Callable) -> str:
    return getattr(function, "__qualname__", repr(function)).partition(".")[0]


def _walk(function: Callable, position: Tensor, everything: tuple[int, int], questions: Questions) -> Bounds:
    """Bounds ``[B, Q]`` of the keys that `function` allows the queries at `position` ``[B, Q]``."""
    name = _name(function)
    lowest, highest = (torch.full_like(position, bound) for bound in everything)
    if function is masking_utils.causal_mask_function:
        return lowest, position + 1
    if function is masking_utils.bidirectional_mask_function:
        return lowest, highest
    if getattr(function, "__module__", None) != masking_utils.__name__:
        raise _NotAnInterval(f"a mask function that is not transformers' own ({name})")
    closed = _closure(function)
    if name == "and_masks":
        lo, hi = lowest, highest
        for part in closed["mask_functions"]:
            part_lo, part_hi = _walk(part, position, everything, questions)
            lo, hi = torch.maximum(lo, part_lo), torch.minimum(hi, part_hi)
        return lo, hi
    if name == "or_masks":
        parts = closed["mask_functions"]
        bounds = [_walk(part, position, everything, questions) for part in parts]
        return _union(bounds, questions, has_no_gap=all(map(_holds_its_own_key, parts)))
    if name == "sliding_window_overlay":
        return position - closed["sliding_window"] + 1, highest
    if name == "sliding_window_bidirectional_overlay":
        return position - closed["sliding_window"], position + closed["sliding_window"] + 1
    if name == "chunked_overlay":
        size, start = closed["chunk_size"], closed["left_padding"].to(position.device)[:, None]
        begin = torch.div(position - start, size, rounding_mode="floor") * size + start
        return begin, begin + size
    if name == "blockwise_overlay":
        return _block(closed["block_sequence_ids"].to(position.device), position, questions)
    if name == "packed_sequence_mask_function":
        begin, end = runs_of_ids(closed["packed_sequence_mask"].to(position.device))
        return _at(begin, position), _at(end, position)
    if name == "remap_positions_for_packed_sequence":
        # The inner function sees positions inside each sequence: the same interval, shifted to where the sequence is.
        inside = _at(closed["position_ids"].to(position.device), position)
        lo, hi = _walk(closed["mask_function"], inside, (0, everything[1]), questions)
        return lo + position - inside, hi + position - inside
    raise _NotAnInterval(f"transformers' mask function {name}")


def _at(values: Tensor, position: Tensor) -> Tensor:
    values = values.expand(position.shape[0], -1)
    return values.gather(1, position.clamp(0, values.shape[1] - 1))


def _holds_its_own_key(function: Callable) -> bool:
    """Whether the query's own position is among the keys it sees, if it sees any: unions of such have no gap."""
    name = _name(function)
    if function is masking_utils.causal_mask_function:
        return True
    if getattr(function, "__module__", None) != masking_utils.__name__:
        return False
    if name in ("and_masks", "or_masks"):
        return all(map(_holds_its_own_key, _closure(function)["mask_functions"]))
    return name in (
        "sliding_window_overlay",
        "sliding_window_bidirectional_overlay",
        "chunked_overlay",
        "blockwise_overlay",
    )


def _block(ids: Tensor, position: Tensor, questions: Questions) -> Bounds:
    """Runs of one id ≥ 0; text, and what lies behind the ids (tokens generated since), sees nothing here."""
    inside = (_at(ids, position) >= 0) & (position < ids.shape[1])
    if questions.are_unwanted:  # generated text sees none of the images, however these stand
        torch._assert_async(each_id_runs_once(ids) | ~inside.any(), f"mmlm_fast: {_TWO_PLACES}")
    else:
        questions.ask(lambda: [each_id_runs_once(ids)], _refuse_unless(_TWO_PLACES), ids, ("runs once",))
    begin, end = runs_of_ids(ids)
    return torch.where(inside, _at(begin, position), 0), torch.where(inside, _at(end, position), 0)


def _refuse_unless(reason: str) -> Callable[[bool], None]:
    def then(holds: bool) -> None:
        if not holds:
            raise _NotAnInterval(reason)

    return then


def _union(parts: list[Bounds], questions: Questions, has_no_gap: bool) -> Bounds:
    lo, hi = parts[0]
    for part_lo, part_hi in parts[1:]:
        mine, theirs = hi > lo, part_hi > part_lo
        both = mine & theirs
        if not has_no_gap:
            apart = both & (torch.maximum(lo, part_lo) > torch.minimum(hi, part_hi))
            questions.ask(lambda apart=apart: [~apart.any()], _refuse_unless("a union with a gap"))  # type: ignore[misc]
        joined = torch.minimum(lo, part_lo), torch.maximum(hi, part_hi)
        lo = torch.where(both, joined[0], torch.where(mine, lo, part_lo))
        hi = torch.where(both, joined[1], torch.where(mine, hi, part_hi))
    return lo, hi


@dataclass
class _Padding:
    """Bounds ``[B, 1]`` of the keys that are not padding; whether all are there is known when it was read."""

    lo: Tensor
    hi: Tensor
    is_full: bool = False


def _padding(
    attention_mask: Tensor | None, kv_length: int, kv_offset: int, questions: Questions
) -> _Padding | None:  # fmt: skip
    if attention_mask is None:
        return None
    mask = attention_mask.to(device=questions.device, dtype=torch.bool)
    there = masking_utils.prepare_padding_mask(mask, kv_length, kv_offset)[:, kv_offset : kv_offset + kv_length]
    shape = questions.expected(mask)
    if shape == Shape.HOLES:
        raise _NotAnInterval(_HOLES)
    if shape == Shape.FULL and mask.shape[0] == 1 and kv_offset + kv_length <= mask.shape[1]:
        # A batch of one ends where its sample does; in larger ones a caller may mask the steps of a sample that has
        # ended, which the bounds below take as they come.
        torch._assert_async(there.all(), _ASSERTED)
        return None
    if questions.are_free and bool(there.all()):  # what most calls have, and all that a step of decoding pays for
        return None
    count, first = there.sum(1), there.int().argmax(1)
    last = there.shape[1] - there.flip(1).int().argmax(1)
    empty = count == 0
    lo, hi = first.masked_fill(empty, 0) + kv_offset, last.masked_fill(empty, 0) + kv_offset
    padding = _Padding(lo[:, None], hi[:, None])
    no_holes = ((last - first == count) | empty).all()
    if shape is not None:
        torch._assert_async(no_holes, _ASSERTED)
        return padding

    def facts() -> list[Tensor]:
        if questions.are_free:
            return [no_holes, there.all()]
        ends_with_ones = mask[:, -1:].all()
        return [no_holes, there.all(), mask.all(), is_run(mask), ends_with_ones]

    def then(no_holes: bool, is_full: bool, *whole: bool) -> None:
        padding.is_full = is_full
        if whole:
            all_there, run, ends_with_ones = whole
            shapes = Shape.FULL if all_there else Shape.LEFT if run and ends_with_ones else Shape.RUN
            questions.saw(mask, shapes if run else Shape.HOLES)
        if not no_holes:
            raise _NotAnInterval(_HOLES)

    questions.ask(facts, then, attention_mask, ("padding", kv_length, kv_offset))
    return padding


# ---- under torch.compile, where Dynamo cannot look into closures ---------------------------------------------------


def _may_break_the_graph() -> bool:
    """Whether what is traced may become several graphs: not with ``fullgraph=True``, nor for an export."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        return not InstructionTranslator.current_tx().one_graph
    except AttributeError:  # nothing is traced by Dynamo
        return False


_may_break_the_graph._dynamo_marked_constant = True  # type: ignore[attr-defined]  # Dynamo calls it while tracing


@torch.compiler.disable
def _outside_the_graph(**arguments: Any) -> Tensor | None:
    return interval_mask(**arguments)
