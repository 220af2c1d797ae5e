"""Our attention as an implementation of transformers: ``model.set_attn_implementation("mmlm_fast")``.

``"mmlm_flash"`` is the same function under a name in which transformers sees a flash attention: towers whose images or
clips lie packed in one sequence then hand over ``cu_seqlens`` in one call, instead of a Python loop over the pieces.
"""

import inspect
import threading
import weakref
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mmlm_fast.hf.interval_mask import interval_mask, say_once
from mmlm_fast.masks import IntervalMask
from mmlm_fast.ops.interval_attention import interval_attention

NAME, PACKED_NAME = "mmlm_fast", "mmlm_flash"


def register() -> None:
    """Make both names known to transformers; importing `mmlm_fast.hf` does it."""
    for name in (NAME, PACKED_NAME):
        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, interval_mask)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers' attention modules call.

    Args:
        query: ``[B, Hq, Q, D]``; `key` and `value` ``[B, Hkv, K, D]``.
        attention_mask: None, the intervals of `interval_mask`, or a dense bool or additive mask.
        kwargs: ``cu_seq_lens_q`` and ``cu_seq_lens_k`` are heeded, everything else is not ours.

    Returns:
        ``[B, Q, Hq, D]``, and no weights.
    """
    if kwargs.get("output_attentions"):
        _say("mmlm_fast: attention weights are never formed, output_attentions=True gives none; use eager")
    is_causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    intervals = None
    if attention_mask is not None and attention_mask.dtype == torch.int32 and attention_mask.shape[-1] == 2:
        intervals = IntervalMask(attention_mask[:, 0, :, 0], attention_mask[:, 0, :, 1])
    reason = _why_dense(attention_mask, intervals, dropout, position_bias, cache)
    if reason is not None:
        _say(f"mmlm_fast: {type(module).__name__}: {reason}; torch's attention runs with a dense mask")
        dense = attention_mask if intervals is None else intervals.dense(key.shape[2])[:, None]
        options = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, "position_bias": position_bias}
        if softcap is not None or s_aux is not None:
            return _dense(query, key, value, dense, dropout, scaling, is_causal, softcap, s_aux), None
        return sdpa_attention_forward(module, query, key, value, dense, cache=cache, **options, **kwargs)
    cu_seqlens = kwargs.get("cu_seq_lens_q")
    if intervals is not None:
        mask: IntervalMask | None = intervals
    elif cu_seqlens is not None:
        mask = _packed(cu_seqlens, kwargs.get("cu_seq_lens_k"), query.shape[2], key.shape[2], bool(is_causal))
    else:
        if query.shape[0] == 1:
            _ask_for_packed_calls(module)
        mask = None
        if is_causal and query.shape[2] > 1:
            # Behind the queries an empty static cache has room, as in transformers' sdpa; the mask was plainly causal.
            key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
            mask = _causal(query.shape[2], key.shape[2], query.device)
    out = interval_attention(query, key, value, mask, scale=scaling, softcap=softcap, sinks=s_aux)
    assert isinstance(out, Tensor)
    return out.transpose(1, 2).contiguous(), None


def _say(message: str) -> None:
    if not torch.compiler.is_compiling():
        say_once(message)


def _why_dense(
    mask: Tensor | None, intervals: IntervalMask | None, dropout: float, position_bias: Any, cache: Any
) -> str | None:
    if mask is not None and intervals is None:
        return "it builds its own dense mask" if mask.dtype != torch.bool else "the mask is no interval of keys a query"
    if dropout > 0:
        return f"attention dropout {dropout:g}"
    if position_bias is not None:
        return "a position bias"
    if cache is not None:
        return "a paged cache"
    return None


# ---- masks that all layers of a forward pass share -------------------------------------------------------------------

MAX_MASKS = 8  # of one cu_seqlens


class _Masks(threading.local):
    def __init__(self) -> None:
        self.packed = WeakTensorKeyDictionary()


_masks = _Masks()


def _may_keep(device: torch.device) -> bool:
    """Not what a compiler traces, nor what a CUDA graph fills only when it is replayed."""
    if torch.compiler.is_compiling():
        return False
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def _stream(device: torch.device) -> int:
    """Nothing orders what one stream makes before what another reads."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


@lru_cache(maxsize=16)
def _kept_causal(q_len: int, kv_len: int, device: torch.device, stream: int) -> IntervalMask:
    with torch.inference_mode(False):  # else training could not use it later
        return IntervalMask.causal(q_len, kv_len, device=device)


def _causal(q_len: int, kv_len: int, device: torch.device) -> IntervalMask:
    if not _may_keep(device):
        return IntervalMask.causal(q_len, kv_len, device=device)
    return _kept_causal(q_len, kv_len, device, _stream(device))


def _packed(cu_q: Tensor, cu_k: Tensor | None, q_len: int, kv_len: int, is_causal: bool) -> IntervalMask:
    """`IntervalMask.packed`, made once of tensors that have not changed since: a dozen launches, in each layer."""
    tensors = [cu_q] if cu_k is None else [cu_q, cu_k]
    # Of inference tensors changes are not counted; fakes and other subclasses end with what made them.
    if not _may_keep(cu_q.device) or any(type(t) is not Tensor or t.is_inference() for t in tensors):
        return IntervalMask.packed(cu_q, q_len, is_causal=is_causal, cu_seqlens_k=cu_k, kv_len=kv_len)
    kept = _masks.packed.setdefault(cu_q, {})
    key = q_len, kv_len, is_causal, _stream(cu_q.device), None if cu_k is None else id(cu_k)
    state = [t._version for t in tensors]
    if key in kept:
        known, of_keys, mask = kept[key]
        if known == state and (of_keys is None or of_keys() is cu_k):
            return mask
    with torch.inference_mode(False):
        mask = IntervalMask.packed(cu_q, q_len, is_causal=is_causal, cu_seqlens_k=cu_k, kv_len=kv_len)
    if len(kept) >= MAX_MASKS:
        kept.clear()
    kept[key] = state, None if cu_k is None else weakref.ref(cu_k), mask
    return mask


# ---- towers that cut their packed sequence into pieces ---------------------------------------------------------------


@lru_cache(maxsize=256)
def _packs_its_input(cls: Any) -> bool:
    return "cu_seqlens" in inspect.signature(cls.forward).parameters


def _ask_for_packed_calls(module: nn.Module) -> None:
    """A tower that has just cut its packed sequence into pieces gives it whole to the name with "flash" from now on."""
    config: Any = getattr(module, "config", None)
    if torch.compiler.is_compiling() or getattr(config, "_attn_implementation", None) != NAME:
        return
    cls: Any = type(module)
    if _packs_its_input(cls):
        config._attn_implementation_internal = PACKED_NAME


def _dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    is_causal: bool,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Eager attention with a soft cap or sinks, where no kernel takes mask or dropout. Returns ``[B, Q, Hq, D]``."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (query @ key.transpose(-1, -2)) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None and is_causal and query.shape[2] > 1:
        mask = IntervalMask.causal(query.shape[2], q_offset=0, kv_len=key.shape[2], device=query.device).dense(
            key.shape[2]
        )
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    scores = scores.float()
    if sinks is not None:
        scores = torch.cat([scores, sinks.float()[None, :, None, None].expand(*scores.shape[:3], 1)], dim=-1)
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    weights = scores.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)[..., : key.shape[2]]
    weights = nn.functional.dropout(weights.to(query.dtype), dropout)
    return (weights @ value).transpose(1, 2).contiguous()
