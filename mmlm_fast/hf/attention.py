"""Our attention as an implementation of transformers: ``model.set_attn_implementation("mmlm_fast")``.

Towers whose images or clips lie packed in one sequence hand over ``cu_seqlens`` in one call, as to a flash attention,
instead of a Python loop over the pieces. ``"mmlm_flash"`` is another name for the same.
"""

import sys
import threading
import weakref
from contextlib import suppress
from functools import cache, lru_cache, wraps
from inspect import Parameter, signature, unwrap
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mmlm_fast.hf.interval_mask import interval_mask, say_once
from mmlm_fast.masks import IntervalMask, require
from mmlm_fast.ops.interval_attention import interval_attention
from mmlm_fast.ops.parts import RECORDS
from mmlm_fast.ops.paths import FORCED, is_transformed

NAME, PACKED_NAME = "mmlm_fast", "mmlm_flash"
_LEAST = RECORDS["interval_attention"].least()


def register() -> None:
    """Make both names known to transformers; importing `mmlm_fast.hf` does it."""
    for name in (NAME, PACKED_NAME):
        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, interval_mask)
    _wrap(PreTrainedModel, "get_correct_attn_implementation", _when_requested)
    with suppress(ImportError):  # where this version of transformers has it
        from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager

        _wrap(ContinuousBatchingManager, "switch_to_cb_friendly_attn", _batched_by_torch)


def _wrap(owner: Any, name: str, wrapper: Any) -> None:
    """Replace a function of `owner` by ``wrapper(function)``, once, where this version of transformers has it."""
    inner = getattr(owner, name, None)
    if inner is not None and not hasattr(inner, "_mmlm_fast"):
        outer: Any = wraps(inner)(wrapper(inner))
        outer._mmlm_fast = True
        setattr(owner, name, outer)


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
        kwargs: ``cu_seq_lens_q`` and ``cu_seq_lens_k`` are heeded, beside any mask, but for cross-attention, which is
            handed those of the text: on a CPU a ValueError says where they cannot be such, elsewhere nothing looks.
            Everything else is not ours.

    Returns:
        ``[B, Q, Hq, D]``, and no weights.
    """
    if attention_mask is None and query.is_cpu and not FORCED and not is_dynamo_compiling() and _is_small(query, key):
        plain = not dropout and softcap is None and s_aux is None and position_bias is None and cache is None
        plain = plain and not kwargs.get("output_attentions") and kwargs.get("cu_seq_lens_q") is None
        if plain:  # as torch's would be chosen in the end, and a look at more would make a small call slower
            return sdpa_attention_forward(module, query, key, value, None, 0.0, scaling, is_causal)
    if kwargs.get("output_attentions"):
        _say("mmlm_fast: attention weights are never formed, output_attentions=True gives none; use eager")
    is_causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    bounds = attention_mask if attention_mask is not None and attention_mask.dtype == torch.int32 else None
    if bounds is not None and bounds.shape[1:] != (1, query.shape[2], 2):
        raise ValueError(
            f"attention_mask must be bool or floating [B, 1 or H, {query.shape[2]}, {key.shape[2]}], or the int32 "
            f"[B, 1, {query.shape[2]}, 2] of interval_mask, got {bounds.dtype} {tuple(bounds.shape)}"
        )
    mask = None if bounds is None else _intervals(bounds)
    reason = _why_dense(attention_mask, mask, dropout, position_bias, cache)
    cu_seqlens = kwargs.get("cu_seq_lens_q")
    if cu_seqlens is not None and cache is None and _is_of_the_text(module, is_causal):
        for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
            if not isinstance(kwargs.get(name), (Tensor, type(None))):
                raise ValueError(f"{name} must be a tensor, got {type(kwargs[name]).__name__}")
        sizes = query.shape[2], key.shape[2], bool(is_causal) and attention_mask is None, query.shape[0]
        chunk_size = None if bounds is None else _chunk_size(module)
        mask = _packed(cu_seqlens, kwargs.get("cu_seq_lens_k"), *sizes, bounds, chunk_size)
    if reason is not None:
        _say(f"mmlm_fast: {type(module).__name__}: {reason}; torch's attention runs with a dense mask")
        dense = _dense_mask(attention_mask if bounds is None else None, mask, key.shape[2])
        if softcap is not None or s_aux is not None:
            return _dense(query, key, value, dense, dropout, scaling, is_causal, softcap, s_aux), None
        options = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, "position_bias": position_bias}
        return sdpa_attention_forward(module, query, key, value, dense, cache=cache, **options, **kwargs)
    if query.shape[0] != key.shape[0]:  # learned queries, one set for all samples
        batch = max(query.shape[0], key.shape[0])
        query, key, value = (x.expand(batch, -1, -1, -1) for x in (query, key, value))
    if mask is None and is_causal and query.shape[2] > 1:
        # Behind the queries an empty static cache has room, as in transformers' sdpa; the mask was plainly causal.
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
        mask = _causal(query.shape[2], key.shape[2], query.device)
    out = interval_attention(query, key, value, mask, scale=scaling, softcap=softcap, sinks=s_aux)
    return out.transpose(1, 2).contiguous(), None


def _is_small(query: Tensor, key: Tensor) -> bool:
    batch, heads, q_len, _ = query.shape
    return q_len == 1 or batch * heads * q_len * key.shape[2] < _LEAST


_PACKERS: list[type] = []  # attention modules that take ``cu_seqlens`` of their own


def _is_of_the_text(module: nn.Module, is_causal: bool) -> bool:
    """Whether ``cu_seq_lens`` are of what a module attends to: encoders, towers and cross-attention get the decoder's,
    too."""
    if is_causal:
        return "CrossAttention" not in type(module).__name__
    config = getattr(module, "config", None)
    if isinstance(module, tuple(_PACKERS)) or config is None:
        return True
    is_text = hasattr(config, "vocab_size") and not getattr(config, "is_encoder_decoder", False)
    return is_text and "CrossAttention" not in type(module).__name__


def _intervals(attention_mask: Tensor) -> IntervalMask:
    return IntervalMask(attention_mask[:, 0, :, 0], attention_mask[:, 0, :, 1])


def _dense_mask(attention_mask: Tensor | None, intervals: IntervalMask | None, kv_len: int) -> Tensor | None:
    """What both show, as one mask, bool or additive."""
    if intervals is None:
        return attention_mask
    visible = intervals.dense(kv_len)[:, None]
    if attention_mask is None:
        return visible
    if attention_mask.dtype == torch.bool:
        return attention_mask & visible
    return attention_mask.masked_fill(~visible, torch.finfo(attention_mask.dtype).min)


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
    if torch.compiler.is_compiling() or is_transformed() or _get_current_dispatch_mode() is not None:
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


def _packed(
    cu_q: Tensor,
    cu_k: Tensor | None,
    q_len: int,
    kv_len: int,
    is_causal: bool,
    batch: int = 1,
    attention_mask: Tensor | None = None,
    chunk_size: int | None = None,
) -> IntervalMask:
    """The packed sequences, and of them what the intervals of `attention_mask` show, if it holds some.

    Made once of tensors that have not changed since: it is a dozen launches, in each layer.
    """
    tensors = cu_q, cu_k, attention_mask
    given = [t for t in tensors if t is not None]
    sizes: Any = q_len, kv_len, is_causal, batch, chunk_size
    # Of inference tensors changes are not counted; fakes and other subclasses end with what made them.
    if not _may_keep(cu_q.device) or any(type(t) is not Tensor or t.is_inference() for t in given):
        return _make_packed(*tensors, *sizes)
    kept = _masks.packed.setdefault(cu_q, {})
    place = *sizes, _stream(cu_q.device), *map(id, tensors)
    state = [t._version for t in given]
    if place in kept:
        known, sources, copies, mask = kept[place]
        same = known == state and all(source() is t for source, t in zip(sources, given, strict=True))
        # A collator's buffer is written past the count of versions. On a GPU, where looking would stall, no copies.
        if same and all(torch.equal(kept_, t) for kept_, t in zip(copies, given, strict=False)):
            return mask
    with torch.inference_mode(False):
        mask = _make_packed(*tensors, *sizes)
    if len(kept) >= MAX_MASKS:
        kept.clear()
    copies = [t.clone() for t in given] if cu_q.device.type == "cpu" else []
    kept[place] = state, [weakref.ref(t) for t in given], copies, mask
    return mask


def _make_packed(
    cu_q: Tensor,
    cu_k: Tensor | None,
    attention_mask: Tensor | None,
    q_len: int,
    kv_len: int,
    is_causal: bool,
    batch: int,
    chunk_size: int | None,
) -> IntervalMask:
    options: dict[str, Any] = dict(cu_seqlens_k=cu_k, kv_len=batch * kv_len)
    mask = IntervalMask.packed(cu_q, batch * q_len, is_causal=is_causal, **options)
    lo, hi = mask.lo, mask.hi
    # A query's own key is the last that causal shows.
    own = hi if chunk_size is None else IntervalMask.packed(cu_q, batch * q_len, is_causal=True, **options).hi - 1
    if batch > 1:  # sequences are counted through all rows
        row = torch.arange(0, batch * kv_len, kv_len, device=lo.device, dtype=torch.int32)[:, None]
        lo, hi, own = (x.view(batch, q_len) - row for x in (lo, hi, own))
        inside = ((lo >= 0) & (hi <= kv_len)) | (hi <= lo)
        require(inside.all(), "cu_seq_lens_q: a sequence goes over the end of a row of the batch")
    intervals = None if attention_mask is None else _intervals(attention_mask)
    if chunk_size is not None:  # counted from where a sequence begins, behind the padding, not from the row
        if intervals is not None:
            padding = torch.where(intervals.hi > intervals.lo, intervals.lo, kv_len).amin(-1, keepdim=True)
            intervals = IntervalMask(padding.expand_as(intervals.lo), intervals.hi)
            lo = torch.maximum(lo, padding)
        lo = lo + (own - lo).clamp(min=0) // chunk_size * chunk_size
    mask = IntervalMask(lo, torch.maximum(lo, hi))
    return mask if intervals is None else intervals & mask


def _chunk_size(module: nn.Module) -> int | None:
    """Of an attention in chunks, as Llama 4's layers without full attention are."""
    config: Any = getattr(module, "config", None)
    kinds, layer = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    if not kinds or layer is None or kinds[layer] != "chunked_attention":
        return None
    return config.attention_chunk_size


# ---- what transformers asks a name for -------------------------------------------------------------------------------


def _when_requested(inner: Any) -> Any:
    """A model is to run on our attention: its modules learn to hand over what they pack, before their first call."""

    def get_correct_attn_implementation(self, requested_attention, *args, **kwargs):
        if requested_attention == PACKED_NAME:
            requested_attention = NAME  # for a name with "flash" transformers would load a package
        if requested_attention == NAME:
            for cls in type(self).__mro__:
                _ask_for_packed_calls(cls.__module__)
        return inner(self, requested_attention, *args, **kwargs)

    return get_correct_attn_implementation


@cache
def _ask_for_packed_calls(module_name: str) -> None:
    """Attention modules that take ``cu_seqlens`` ask `is_flash_attention_requested` whether to loop over the pieces, a
    function that sees ``"flash"`` in a name: in their file it shall see it in ours, for the configurations of these."""
    module = sys.modules.get(module_name)
    takers = [
        cls
        for cls in vars(module).values()
        if isinstance(cls, type) and issubclass(cls, nn.Module) and cls.__module__ == module_name
        if "cu_seqlens" in signature(cls.forward).parameters
    ]
    _PACKERS.extend(takers)
    if not hasattr(module, "is_flash_attention_requested"):
        return
    towers = [cls for cls in takers if "is_flash_attention_requested" in unwrap(cls.forward).__code__.co_names]
    arguments = [signature(cls.__init__).parameters.get("config") for cls in towers]
    annotations = [Parameter.empty if a is None else a.annotation for a in arguments]
    configs: Any = tuple(a if isinstance(a, type) and a is not Parameter.empty else object for a in annotations)

    def asks(inner: Any) -> Any:
        def is_flash_attention_requested(config: Any = None, *args, **kwargs):
            if isinstance(config, configs) and not args and not kwargs and config._attn_implementation == NAME:
                return True
            return inner(config, *args, **kwargs)

        return is_flash_attention_requested

    if configs:
        _wrap(module, "is_flash_attention_requested", asks)


def _batched_by_torch(inner: Any) -> Any:
    """Continuous batching takes torch's or eager attention, by their names, and a dense mask of its own: they run until
    it is stopped."""

    def switch_to_cb_friendly_attn(self, model, *args, **kwargs):
        before = {"": model.config._attn_implementation}
        if before[""] not in (NAME, PACKED_NAME):
            return inner(self, model, *args, **kwargs)
        for name in model.config.sub_configs:
            if getattr(model.config, name) is not None:
                before[name] = getattr(model.config, name)._attn_implementation
        try:
            model.set_attn_implementation("sdpa")
        except ValueError:  # with sinks
            model.set_attn_implementation("paged|eager")
        try:
            inner(self, model, *args, **kwargs)
        except BaseException:
            model.set_attn_implementation(before)
            raise
        self._original_attn_impl = before
        return None

    return switch_to_cb_friendly_attn


# ---- what no kernel of ours takes ------------------------------------------------------------------------------------


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
