"""transformers' mask functions as intervals of keys, without a mask of queries × keys in memory.

transformers hands a mask implementation not a mask but a function of (batch, head, query, key), composed of a few known
ones; what they close over says all. Each known one is an interval a row, conjunctions intersect, disjunctions unite.
The result travels as an int32 tensor ``[B, 1, Q, 2]`` (lo, hi): models and generate() pass on, slice and move a 4-D
tensor.
"""

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils

from mmlm_fast.masks import _each_id_runs_once, _runs

# Models that compute with the mask that the interface returns, so that it must be the dense one.
READ_THEIR_MASK = frozenset(
    ["siglip2_vision_model", "siglip2", "gemma4_assistant", "nemotron_asr_streaming", "parakeet_encoder",
     "parakeet_ctc", "pix2struct", "switch_transformers", "falcon", "longformer", "luke", "visual_bert", "beit",
     "deepseek_v32", "deepseek_v4", "glm_moe_dsa", "qwen4_exp", "mistral_large4", "dots3_note", "axk2", "hy_v4",
     "minimax_m3_vl", "granite_speech5", "swin"]
)  # fmt: skip
Bounds = tuple[Tensor, Tensor]


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
        bool mask ``[B, 1, Q, K]``, said once.
    """
    arguments = dict(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        mask_function=mask_function, attention_mask=attention_mask, device=device, config=config, **kwargs,
    )  # fmt: skip
    if getattr(config, "model_type", None) in READ_THEIR_MASK:
        return _dense(arguments)
    if torch.compiler.is_compiling():
        return _by_evaluation(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, device
        )
    try:
        padding = _padding(attention_mask, kv_length, kv_offset, device)
        plain = padding is None and isinstance(q_offset, int)
        if plain and allow_is_causal_skip and mask_function is masking_utils.causal_mask_function:
            if q_length == kv_length and q_offset == kv_offset:
                return None
            if q_length == 1 and q_offset + 1 >= kv_offset + kv_length:
                return None
        if plain and allow_is_bidirectional_skip and mask_function is masking_utils.bidirectional_mask_function:
            return None
        position = torch.arange(q_length, device=device) + q_offset
        everything = kv_offset, kv_offset + kv_length
        lo, hi = _walk(mask_function, position[None].expand(batch_size, -1), everything)
    except _NotAnInterval as error:
        say_once(f"mmlm_fast: {error}: no interval of keys a query; torch's attention runs with a dense mask")
        return _dense(arguments)
    lo, hi = lo.clamp(*everything), hi.clamp(*everything)
    if padding is not None:
        lo, hi = torch.maximum(lo, padding[0]), torch.minimum(hi, padding[1])
    return _as_tensor(lo - kv_offset, hi - kv_offset, batch_size)


def _as_tensor(lo: Tensor, hi: Tensor, batch_size: int) -> Tensor:
    hi = hi.clamp(min=0)
    bounds = torch.stack([torch.minimum(lo.clamp(min=0), hi), hi], dim=-1).to(torch.int32)
    return bounds.expand(batch_size, -1, -1)[:, None].contiguous()


def _dense(arguments: dict[str, Any]) -> Tensor:
    return masking_utils.sdpa_mask(**arguments, allow_is_causal_skip=False, allow_is_bidirectional_skip=False)


# ---- from what the functions close over ----------------------------------------------------------------------------


def _closure(function: Callable) -> dict[str, Any]:
    cells = function.__closure__ or ()
    return {name: cell.cell_contents for name, cell in zip(function.__code__.co_freevars, cells, strict=True)}


def _walk(function: Callable, position: Tensor, everything: tuple[int, int]) -> Bounds:
    """Bounds ``[B, Q]`` of the keys that `function` allows the queries at `position` ``[B, Q]``."""
    name = getattr(function, "__qualname__", repr(function)).partition(".")[0]
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
            part_lo, part_hi = _walk(part, position, everything)
            lo, hi = torch.maximum(lo, part_lo), torch.minimum(hi, part_hi)
        return lo, hi
    if name == "or_masks":
        return _union([_walk(part, position, everything) for part in closed["mask_functions"]])
    if name == "sliding_window_overlay":
        return position - closed["sliding_window"] + 1, highest
    if name == "sliding_window_bidirectional_overlay":
        return position - closed["sliding_window"], position + closed["sliding_window"] + 1
    if name == "chunked_overlay":
        size, start = closed["chunk_size"], closed["left_padding"].to(position.device)[:, None]
        begin = torch.div(position - start, size, rounding_mode="floor") * size + start
        return begin, begin + size
    if name == "blockwise_overlay":
        return _block(closed["block_sequence_ids"].to(position.device), position)
    if name == "packed_sequence_mask_function":
        begin, end = _runs(closed["packed_sequence_mask"].to(position.device))
        return _at(begin, position), _at(end, position)
    if name == "remap_positions_for_packed_sequence":
        # The inner function sees positions inside each sequence: the same interval, shifted to where the sequence is.
        inside = _at(closed["position_ids"].to(position.device), position)
        lo, hi = _walk(closed["mask_function"], inside, (0, everything[1]))
        return lo + position - inside, hi + position - inside
    raise _NotAnInterval(f"transformers' mask function {name}")


def _at(values: Tensor, position: Tensor) -> Tensor:
    values = values.expand(position.shape[0], -1)
    return values.gather(1, position.clamp(0, values.shape[1] - 1))


def _block(ids: Tensor, position: Tensor) -> Bounds:
    """Runs of one id ≥ 0; text, and what lies behind the ids (tokens generated since), sees nothing here."""
    if not bool(_each_id_runs_once(ids)):
        raise _NotAnInterval("an image that stands in two places")
    begin, end = _runs(ids)
    inside = (_at(ids, position) >= 0) & (position < ids.shape[1])
    return torch.where(inside, _at(begin, position), 0), torch.where(inside, _at(end, position), 0)


def _union(parts: list[Bounds]) -> Bounds:
    lo, hi = parts[0]
    for part_lo, part_hi in parts[1:]:
        mine, theirs = hi > lo, part_hi > part_lo
        both = mine & theirs
        if bool((both & (torch.maximum(lo, part_lo) > torch.minimum(hi, part_hi))).any()):
            raise _NotAnInterval("a union with a gap")
        joined = torch.minimum(lo, part_lo), torch.maximum(hi, part_hi)
        lo = torch.where(both, joined[0], torch.where(mine, lo, part_lo))
        hi = torch.where(both, joined[1], torch.where(mine, hi, part_hi))
    return lo, hi


def _padding(attention_mask: Tensor | None, kv_length: int, kv_offset: int, device: Any) -> Bounds | None:
    """Bounds ``[B, 1]`` of the keys that are not padding; None where all are there. One look at the mask."""
    if attention_mask is None:
        return None
    there = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    there = there[:, kv_offset : kv_offset + kv_length].to(device=device, dtype=torch.bool)
    count = there.sum(1)
    first = there.int().argmax(1)
    last = there.shape[1] - there.flip(1).int().argmax(1)
    holes, full = torch.stack([((last - first != count) & (count > 0)).any(), there.all()]).tolist()
    if holes:
        raise _NotAnInterval("padding with holes")
    if full:
        return None
    empty = count == 0
    lo, hi = first.masked_fill(empty, 0) + kv_offset, last.masked_fill(empty, 0) + kv_offset
    return lo[:, None], hi[:, None]


# ---- by evaluation, where Dynamo cannot look into closures ---------------------------------------------------------


def _by_evaluation(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor,
    kv_offset: int,
    mask_function: Callable,
    attention_mask: Tensor | None,
    device: Any,
) -> Tensor:
    """First and last visible key of each row, asserted on the device; Inductor fuses predicate and reduction."""
    if attention_mask is not None:
        padding = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
        mask_function = masking_utils.and_masks(mask_function, masking_utils.padding_mask_function(padding))
    batch = torch.arange(batch_size, device=device)[:, None, None, None]
    head = torch.zeros((1, 1, 1, 1), dtype=torch.int64, device=device)
    query = (torch.arange(q_length, device=device) + q_offset)[None, None, :, None]
    key = torch.arange(kv_length, device=device)
    visible = mask_function(batch, head, query, (key + kv_offset)[None, None, None, :])
    visible = visible.expand(batch_size, 1, q_length, kv_length)[:, 0]
    lo, hi = torch.where(visible, key, kv_length).amin(-1), torch.where(visible, key + 1, 0).amax(-1)
    count = visible.sum(-1)
    torch._assert_async(
        ((hi - lo == count) | (count == 0)).all(), "mmlm_fast: under torch.compile masks must be one interval a query"
    )
    return _as_tensor(lo, hi, batch_size)
