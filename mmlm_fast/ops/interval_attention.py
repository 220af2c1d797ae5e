"""Attention where each query sees one interval of keys: every mask of a multimodal model, without a mask in memory."""

import math
import threading
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from mmlm_fast.masks import IntervalMask
from mmlm_fast.ops._derivatives import differentiable, distinct, refuse_twice
from mmlm_fast.ops._native import NATIVE_TYPES
from mmlm_fast.ops._op import HAS_TRITON, Op
from mmlm_fast.ops._registry import autocast, check_floating, on_device, plain_float, register_op
from mmlm_fast.ops.paths import TORCH, forced_path, using_reference

# On a CPU the call of our core costs more than torch's; below this many scores that decides.
OP = Op(
    "interval_attention",
    smallest=2**17,
    counts="scores",
    otherwise=TORCH,
    torch_where="where nothing is masked, or what a causal mask hides, and it has one that is as fast",
    functions=("interval_attention", "interval_attention_varlen"),
)


def interval_attention_ref(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: IntervalMask | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The definition: dense scores, softmax in float32, as transformers' eager attention computes it."""
    groups = query.shape[1] // max(key.shape[1], 1)
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query @ key.transpose(-1, -2)) * scale  # [B, Hq, Sq, Skv]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.to(_lse_dtype(query.dtype))
    if mask is not None:
        scores = scores.masked_fill(~mask.dense(key.shape[2])[:, None], -torch.inf)
    least = torch.finfo(scores.dtype).min
    largest = scores.detach().amax(-1, keepdim=True).clamp(min=least) if key.shape[2] else scores.sum(-1, keepdim=True)
    if sinks is not None:
        sinks = sinks.to(scores.dtype)[None, :, None, None]
        largest = torch.maximum(largest, sinks.detach()) if key.shape[2] else sinks.detach().expand_as(largest)
    weights = torch.exp(scores - largest)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks - largest)
    empty = total == 0
    total = total.masked_fill(empty, 1)
    out = (weights / total).to(value.dtype) @ value
    if not return_lse:
        return out
    return out, (largest + total.log()).masked_fill(empty, -torch.inf)[..., 0]


def interval_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: IntervalMask | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend: softmax(scale · QKᵀ)·V, where query i of sample b sees the keys ``mask.lo[b, i] <= j < mask.hi[b, i]``.

    Memory beyond inputs and output is O(B·H·S), forward and backward. Gradients are computed without atomics: the same
    bits every time.

    Args:
        query: ``[B, Hq, Sq, D]``, float32, float16, bfloat16 or float64. Strides are free; a last dimension that is not
            dense is copied.
        key, value: ``[B, Hkv, Skv, D]`` and ``[B, Hkv, Skv, Dv]``; Hkv divides Hq, and head h reads head h · Hkv / Hq.
        mask: `IntervalMask` for Sq queries, of B samples or one for all; None: every query sees every key. A query that
            sees no key gives zeros, and no gradient.
        scale: Of the scores, a number of any sign; ``D ** -0.5`` by default.
        softcap: With it the scaled scores s become ``softcap · tanh(s / softcap)`` (Gemma 2).
        sinks: ``[Hq]``: one more logit a head in the softmax, without a value (gpt-oss).
        return_lse: Also return the log of the softmax's denominator, sinks included, for merging partial attentions. It
            is differentiable.

    Returns:
        ``[B, Hq, Sq, Dv]`` in the dtype of the query; scores and sums in float32 (float64 for float64), rounded once.
        Where our kernels computed it, its memory is laid out ``[B, Sq, Hq, Dv]``: ``transpose(1, 2).flatten(2)`` copies
        nothing. With `return_lse` also ``[B, Hq, Sq]`` in float32, −inf for a query without keys.

    Raises:
        ValueError: for shapes, dtypes, devices or options that do not go together.

    Source: FlashAttention-2 (Dao 2023) for the algorithm; what is seen is FlexAttention's and transformers' mask
    functions, which for multimodal models are all intervals.
    """
    query, key, value = autocast(query, key, value)  # type: ignore[assignment]
    _check_inputs(query, key, value, mask)
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be positive, got {softcap}")
    if isinstance(scale, Tensor):
        raise ValueError("scale must be a number, got a tensor: multiply the query by it")
    scale = plain_float(query.shape[-1] ** -0.5 if scale is None else scale)
    if not -math.inf < scale < math.inf:
        raise ValueError(f"scale must be finite, got {scale}")
    if sinks is not None:
        check_floating("sinks", sinks)
        if sinks.shape != (query.shape[1],) or sinks.device != query.device:
            raise ValueError(
                f"sinks must be [{query.shape[1]}] on {query.device}, got {tuple(sinks.shape)} on {sinks.device}"
            )
    if using_reference():
        return interval_attention_ref(
            query, key, value, mask, scale=scale, softcap=softcap, sinks=sinks, return_lse=return_lse
        )
    if scale <= 0:  # kernels, torch's too, scale what they have masked with −inf: a positive one keeps it that
        query, scale = (query * 0, 1.0) if scale == 0 else (-query, -scale)
    if softcap is None and sinks is None and not return_lse:
        call = _facts(query, key, value, mask)
        if _takes_sdpa(call):
            return refuse_twice(_sdpa(query, key, value, call, scale), "interval_attention, which torch's kernel took")
    sees_all = mask is None or mask.kind_for(key.shape[2]) == "full"
    lo, hi = (None, None) if mask is None or sees_all else (mask.lo, mask.hi)
    softcap = 0.0 if softcap is None else plain_float(softcap)
    out, lse = _IntervalAttention.apply(*distinct([query, key, value]), sinks, lo, hi, scale, softcap, return_lse)
    return (out, lse) if return_lse else out


def interval_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend inside each of the sequences packed end to end, without padding.

    Args:
        query: ``[Tq, Hq, D]``.
        key, value: ``[Tk, Hkv, D]`` and ``[Tk, Hkv, Dv]``.
        cu_seqlens_q: Where each sequence begins, and the last ends: integers ``[num_sequences + 1]``. On CUDA never
            read on the host.
        cu_seqlens_k: The same for the keys; by default the queries' own.
        is_causal: Causal inside each sequence, aligned at its end.
        scale, softcap, sinks: As in `interval_attention`.

    Returns:
        ``[Tq, Hq, Dv]``, contiguous; queries beyond the last sequence give zeros.

    Raises:
        ValueError: as `interval_attention`; and, only where looking is free (a CPU, outside torch.compile), for
            `cu_seqlens` that are none: lengths, decreasing, not from 0, beyond the tokens.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor) or tensor.dim() != 3:
            raise ValueError(f"{name} must be [tokens, heads, size], got {_shape(tensor)}")
    if cu_seqlens_k is None and query.shape[0] != key.shape[0]:
        raise ValueError(
            f"cu_seqlens_k must be given where keys are not as many as queries, got {_shape(key)} for {_shape(query)}"
        )
    mask = IntervalMask.packed(
        cu_seqlens_q, query.shape[0], is_causal=is_causal, cu_seqlens_k=cu_seqlens_k, kv_len=key.shape[0]
    )
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    out = interval_attention(q, k, v, mask, scale=scale, softcap=softcap, sinks=sinks)
    assert isinstance(out, Tensor)
    return out[0].transpose(0, 1)


def _shape(thing: object) -> object:
    return tuple(thing.shape) if isinstance(thing, Tensor) else type(thing).__name__


def _check_inputs(query: Tensor, key: Tensor, value: Tensor, mask: IntervalMask | None) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_floating(name, tensor)
        if tensor.dim() != 4:
            raise ValueError(f"{name} must be [B, heads, tokens, size], got {tuple(tensor.shape)}")
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise ValueError(f"{name} must be {query.dtype} on {query.device}, got {tensor.dtype} on {tensor.device}")
    batch, heads, q_len, size = query.shape
    if key.shape[0] != batch or key.shape[3] != size or value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"key must be [{batch}, Hkv, Skv, {size}] and value [{batch}, Hkv, Skv, Dv], got {tuple(key.shape)} and "
            f"{tuple(value.shape)}"
        )
    if key.shape[1] == 0 or heads % key.shape[1]:
        raise ValueError(f"heads of key must divide those of query, got {key.shape[1]} for {heads}")
    if size == 0 or value.shape[3] == 0:
        raise ValueError(f"head size must be at least 1, got {size} and {value.shape[3]}")
    if mask is None:
        return
    if not isinstance(mask, IntervalMask):
        raise ValueError(
            f"mask must be an IntervalMask, got {type(mask).__name__}; IntervalMask.from_dense takes a bool tensor"
        )
    if mask.q_len != q_len or mask.batch_size not in (1, batch):
        raise ValueError(
            f"mask must be for {batch} samples (or 1) of {q_len} queries, got {mask.batch_size} of {mask.q_len}"
        )
    if mask.device != query.device:
        raise ValueError(f"mask must be on {query.device}, got {mask.device}")


# ---- the best kernel there is where nothing is masked --------------------------------------------------------------

# cuDNN builds a plan for each shape, which takes as long as hundreds of calls (0.02 to 1 s): for queries that make it
# worth while, of shapes that come again. A pass through a model calls a shape once a layer: a few calls do not say so.
CUDNN_QUERIES, CUDNN_CALLS = 512, 128
# Shapes that are counted, and shapes that get a plan, of each thread.
COUNTED_SHAPES, PLANNED_SHAPES = 256, 32


class Call(NamedTuple):
    """What decides which kernel a call takes: plain facts, so that a test can cross them without a GPU."""

    device: str
    capability: int  # major one, of a CUDA device
    dtype: torch.dtype
    kind: str | None  # of the mask
    grouped: bool
    q_len: int
    kv_len: int
    size: int
    value_size: int
    scores: int
    is_compiling: bool = False
    has_triton: bool = True
    flash_allowed: bool = True
    cudnn_allowed: bool = True


def _facts(query: Tensor, key: Tensor, value: Tensor, mask: IntervalMask | None) -> Call:
    (batch, heads, q_len, size), (kv_heads, kv_len, value_size) = query.shape, value.shape[1:]
    is_compiling, on_cuda = torch.compiler.is_compiling(), query.is_cuda
    return Call(
        device=query.device.type,
        capability=_capability(query.device.index) if on_cuda else 0,
        dtype=query.dtype,
        kind="full" if mask is None else mask.kind_for(kv_len),
        grouped=True if heads != kv_heads else False,  # noqa: SIM210  a symbol under dynamic shapes
        q_len=q_len,
        kv_len=kv_len,
        size=size,
        value_size=value_size,
        scores=batch * heads * q_len * kv_len,
        is_compiling=is_compiling,
        has_triton=HAS_TRITON,
        flash_allowed=on_cuda and _flash_allowed(),
        # What is counted must be a shape: of plain tensors, not of symbols.
        cudnn_allowed=on_cuda
        and not is_compiling
        and type(query) in (Tensor, torch.nn.Parameter)
        and torch.backends.cuda.cudnn_sdp_enabled(),
    )


@cache
def _capability_of(index: int) -> int:
    return torch.cuda.get_device_capability(index)[0] if torch.cuda.is_available() else 0


def _capability(index: int) -> int:
    return _capability_of(index)


def _flash_allowed() -> bool:
    return torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.is_flash_attention_available()


# While tracing Dynamo calls these two, and takes what they say for constants.
_capability._dynamo_marked_constant = True  # type: ignore[attr-defined]
_flash_allowed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _takes_sdpa(call: Call) -> bool:
    """Whether torch's attention is to take the call, and not ours."""
    wanted = forced_path()
    if wanted is None:
        return _sdpa_is_best(call)
    return wanted == TORCH and call.kind is not None and call.kv_len > 0


def _sdpa_is_best(call: Call) -> bool:
    """Whether torch's attention takes a call faster than ours."""
    if call.kind is None or call.kv_len == 0:
        return False
    if call.device == "cuda":
        return _has_flash(call) or _has_efficient(call) or not _has_kernel(call)
    if call.kind == "full":
        return True
    return call.device == "cpu" and not call.is_compiling and call.scores < OP.least()


def _has_kernel(call: Call) -> bool:
    largest = max(call.size, call.value_size)
    return call.has_triton and call.capability >= 8 and largest <= _largest_head(call.dtype)


def _has_flash(call: Call) -> bool:
    """What torch's flash attention takes, grouped heads too."""
    if call.dtype not in (torch.float16, torch.bfloat16) or call.capability < 8 or not call.flash_allowed:
        return False
    return call.size == call.value_size and call.size <= 256 and (call.kind != "causal" or call.q_len == call.kv_len)


def _has_efficient(call: Call) -> bool:
    """What torch's memory-efficient attention takes. Where neither does, its math path holds all scores."""
    unit = 4 if call.dtype == torch.float32 else 8
    rows_aligned = call.size % unit == 0 and call.value_size % unit == 0
    return not call.grouped and call.dtype != torch.float64 and rows_aligned


def torch_kernel(call: Call) -> str:
    """Which of torch's kernels takes a call.

    Returns:
        "cudnn"; "flash"; "sdpa": as `scaled_dot_product_attention` chooses; "packed", "repeated": it chooses too, but
        for grouped heads without a kernel of their own, which would take its math path, so that the queries of a group
        are made rows of one head, or where a causal mask tells rows apart, keys and values repeated.
    """
    if call.device != "cuda":
        return "sdpa"
    if not _has_flash(call):
        return "sdpa" if not call.grouped else "packed" if call.kind == "full" else "repeated"
    # From 2.11 on torch itself takes cuDNN first on these two: a plan for each new length, while decoding each token.
    # A compiled graph has one shape, unless it decodes.
    if call.capability not in (9, 10) or (call.is_compiling and call.q_len != 1):
        return "sdpa"
    if call.size % 8 or call.scores == 0:  # it pads heads, and knows what to do with nothing
        return "sdpa"
    if call.capability == 9 and call.cudnn_allowed and call.q_len >= CUDNN_QUERIES:  # on Blackwell it is the slower one
        return "cudnn"
    return "flash"


def _sdpa(query: Tensor, key: Tensor, value: Tensor, call: Call, scale: float) -> Tensor:
    is_causal = call.kind == "causal"
    if call.device == "cuda" and not call.is_compiling:  # rows that are not dense are the math path's
        query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    kernel = torch_kernel(call)
    if kernel == "cudnn":
        wants_lse = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
        if _cudnn_takes(query, key, value, is_causal, wants_lse):
            return torch.ops.aten._scaled_dot_product_cudnn_attention(
                query, key, value, None, wants_lse, 0.0, is_causal, False, scale=scale
            )[0]
        kernel = torch_kernel(call._replace(cudnn_allowed=False))
    if kernel == "flash":
        return torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, 0.0, is_causal, False, scale=scale
        )[0]
    attend, groups = torch.nn.functional.scaled_dot_product_attention, query.shape[1] // key.shape[1]
    if kernel == "packed":
        rows = query.unflatten(1, (key.shape[1], groups)).flatten(2, 3)  # [B, Hkv, G·Sq, D]
        out = attend(rows, key, value, scale=scale)
        return out.unflatten(2, (groups, query.shape[2])).flatten(1, 2)
    if kernel == "repeated":
        key, value = (x[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2) for x in (key, value))
        return attend(query, key, value, is_causal=is_causal, scale=scale)
    return attend(query, key, value, is_causal=is_causal, scale=scale, enable_gqa=call.grouped)


class _Shapes(threading.local):
    """Shapes that cuDNN could take: how often they came, and those it has been given. torch's plans are a thread's."""

    def __init__(self) -> None:
        self.counts: dict[tuple, int] = {}
        self.planned: set[tuple] = set()


_shapes = _Shapes()


def _comes_again(key: tuple) -> bool:
    """Whether a shape has come often enough, this time included, for a plan; shapes long not seen are forgotten."""
    if key in _shapes.planned:
        return True
    counts = _shapes.counts
    count = counts.pop(key, 0) + 1
    if count >= CUDNN_CALLS and len(_shapes.planned) < PLANNED_SHAPES:
        _shapes.planned.add(key)
        return True
    counts[key] = count
    if len(counts) > COUNTED_SHAPES:
        del counts[next(iter(counts))]
    return False


def _cudnn_takes(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, wants_lse: bool) -> bool:
    # What torch finds a plan by: batch, heads, lengths, sizes, strides, and whether a backward pass follows.
    shape = tuple((*x.shape, *x.stride()) for x in (query, key, value))
    if not _comes_again((query.device.index, query.dtype, is_causal, wants_lse, shape)):
        return False
    parameters = torch.backends.cuda.SDPAParams(query, key, value, None, 0.0, is_causal, query.shape[1] != key.shape[1])
    with on_device(query.device.index):  # torch looks at the current device
        return torch.backends.cuda.can_use_cudnn_attention(parameters)


# ---- the native core: float32 and bfloat16 on a CPU ----------------------------------------------------------------


def _heads(x: Tensor) -> tuple[int, ...]:
    return (x.data_ptr(), *x.stride()[:3])


def _native(x: Tensor) -> Tensor:
    """As the native core reads it: a number type it knows, rows dense."""
    if x.dtype not in NATIVE_TYPES:
        x = x.float()
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _is_native(query: Tensor, key: Tensor) -> bool:
    return query.device.type == "cpu" and query.dtype != torch.float64 and query.numel() > 0 and key.numel() > 0


def _native_bounds(lo: Tensor | None, hi: Tensor | None) -> tuple[int, int, int]:
    if lo is None or hi is None:
        return 0, 0, 0
    return lo.data_ptr(), hi.data_ptr(), 0 if lo.shape[0] == 1 else lo.shape[1]


def _portable_fwd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lo: Tensor | None,
    hi: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from mmlm_fast import _C

    if not _is_native(query, key):
        return _chunked_fwd(query, key, value, lo, hi, sinks, scale, softcap)
    (batch, heads, q_len, size), (kv_heads, kv_len, value_size) = query.shape, value.shape[1:]
    dtype = query.dtype
    query, key, value = _native(query), _native(key), _native(value)
    lo, hi = (None, None) if lo is None or hi is None else (lo.contiguous(), hi.contiguous())
    out = _heads_last(batch, heads, q_len, value_size, query)
    largest, total = (query.new_empty(batch, heads, q_len, dtype=torch.float32) for _ in range(2))
    sinks = None if sinks is None else sinks.float().contiguous()
    _C.attention_forward(
        NATIVE_TYPES[query.dtype], (batch, heads, kv_heads, q_len, kv_len, size, value_size), scale, softcap,
        (_heads(query), _heads(key), _heads(value), _heads(out)), *_native_bounds(lo, hi),
        0 if sinks is None else sinks.data_ptr(), largest.data_ptr(), total.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out if out.dtype == dtype else out.to(dtype), largest, total


def _portable_bwd(
    grad: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lo: Tensor | None,
    hi: Tensor | None,
    out: Tensor,
    largest: Tensor,
    total: Tensor,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from mmlm_fast import _C

    if not _is_native(query, key):
        return _chunked_bwd(grad, grad_lse, query, key, value, lo, hi, out, largest, total, scale, softcap)
    (batch, heads, q_len, size), (kv_heads, kv_len, value_size) = query.shape, value.shape[1:]
    dtype = query.dtype
    query, key, value, grad, out = (_native(x) for x in (query, key, value, grad, out))
    lo, hi = (None, None) if lo is None or hi is None else (lo.contiguous(), hi.contiguous())
    largest, total = largest.contiguous(), total.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    dq = _heads_last(batch, heads, q_len, size, query)
    dk = _heads_last(batch, kv_heads, kv_len, size, query)
    dv = _heads_last(batch, kv_heads, kv_len, value_size, query)
    delta = torch.empty_like(total)
    _C.attention_backward(
        NATIVE_TYPES[query.dtype], (batch, heads, kv_heads, q_len, kv_len, size, value_size), scale, softcap,
        (_heads(query), _heads(key), _heads(value), _heads(out)), *_native_bounds(lo, hi), largest.data_ptr(),
        total.data_ptr(), (_heads(grad), _heads(dq), _heads(dk), _heads(dv)),
        0 if grad_lse is None else grad_lse.data_ptr(), delta.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return dq.to(dtype), dk.to(dtype), dv.to(dtype), delta


# ---- float64, and what no kernel takes, on any device ---------------------------------------------------------------

# Scores a step holds, in numbers: 32 MiB in float64, little beside the dense mask of a long sequence.
STEP_SCORES = 2**22


def _lse_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _heads_last(batch: int, heads: int, length: int, size: int, like: Tensor) -> Tensor:
    return like.new_empty(batch, length, heads, size).transpose(1, 2)


def _steps(query: Tensor, key: Tensor, lo: Tensor | None, hi: Tensor | None):
    """Rows of queries, the keys they need, and which of these each sees (None: all)."""
    batch, heads, q_len, _ = query.shape
    kv_len = key.shape[2]
    rows = max(1, min(q_len, STEP_SCORES // max(1, batch * heads * kv_len)))
    for start in range(0, q_len, rows):
        stop = min(start + rows, q_len)
        if lo is None or hi is None:
            yield slice(start, stop), slice(0, kv_len), None
            continue
        low, high = lo[:, start:stop].clamp(min=0), hi[:, start:stop].clamp(max=kv_len)
        first, last = 0, kv_len
        if lo.device.type == "cpu":  # elsewhere looking would wait for the device
            alive = high > low
            first = int(torch.where(alive, low, kv_len).min()) if alive.numel() else kv_len
            last = max(first, int(torch.where(alive, high, 0).max()) if alive.numel() else 0)
        keys = torch.arange(first, last, device=lo.device)
        visible = (keys >= low[..., None]) & (keys < high[..., None])
        yield slice(start, stop), slice(first, last), visible[:, None, None]


def _step_scores(
    query: Tensor, key: Tensor, visible: Tensor | None, scale: float, softcap: float
) -> tuple[Tensor, Tensor | None]:
    """Scores [B, Hkv, G, rows, keys] with −inf where not visible, and tanh of the capped ones."""
    scores = torch.matmul(query, key.transpose(-1, -2)[:, :, None]).mul_(scale)
    tanh = None
    if softcap:
        tanh = torch.tanh_(scores.div_(softcap))
        scores = tanh * softcap
    if visible is not None:
        scores.masked_fill_(~visible, -torch.inf)
        tanh = None if tanh is None else tanh.masked_fill_(~visible, 0)  # its slope meets weights of 0, and may be NaN
    return scores, tanh


def _chunked_fwd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lo: Tensor | None,
    hi: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    (batch, heads, q_len, _), (kv_heads, _, value_size) = query.shape, value.shape[1:]
    dtype = _lse_dtype(query.dtype)
    out = _heads_last(batch, heads, q_len, value_size, query)
    largest, total = (query.new_empty(batch, heads, q_len, dtype=dtype) for _ in range(2))
    grouped = (batch, kv_heads, heads // kv_heads)
    sink = None if sinks is None else sinks.to(dtype).view(1, *grouped[1:], 1)
    for rows, keys, visible in _steps(query, key, lo, hi):
        q = query[:, :, rows].unflatten(1, grouped[1:]).to(dtype)
        scores, _ = _step_scores(q, key[:, :, keys].to(dtype), visible, scale, softcap)
        m = scores.amax(-1) if scores.shape[-1] else scores.new_full(scores.shape[:-1], -torch.inf)
        if sink is not None:
            m = torch.maximum(m, sink)
        weights = scores.sub_(torch.where(m == -torch.inf, 0, m)[..., None]).exp_()
        t = weights.sum(-1)
        if sink is not None:
            t = t + torch.exp(sink - m)
        weights.div_(torch.where(t == 0, 1, t)[..., None])
        out[:, :, rows] = torch.matmul(weights, value[:, :, None, keys].to(dtype)).flatten(1, 2).to(out.dtype)
        largest[:, :, rows], total[:, :, rows] = m.flatten(1, 2), t.flatten(1, 2)
    return out, largest, total


def _chunked_bwd(
    grad: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lo: Tensor | None,
    hi: Tensor | None,
    out: Tensor,
    largest: Tensor,
    total: Tensor,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (batch, heads, q_len, size), (kv_heads, kv_len, value_size) = query.shape, value.shape[1:]
    grouped = (kv_heads, heads // kv_heads)
    dtype = total.dtype
    dq = _heads_last(batch, heads, q_len, size, query)
    dk = _heads_last(batch, kv_heads, kv_len, size, key.new_empty(0, dtype=dtype)).zero_()
    dv = _heads_last(batch, kv_heads, kv_len, value_size, value.new_empty(0, dtype=dtype)).zero_()
    delta = (grad.to(dtype) * out.to(dtype)).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    for rows, keys, visible in _steps(query, key, lo, hi):
        q, g = (x[:, :, rows].unflatten(1, grouped).to(dtype) for x in (query, grad))
        k, v = (x[:, :, keys].to(dtype) for x in (key, value))
        m, t, d = (x[:, :, rows].unflatten(1, grouped)[..., None] for x in (largest, total, delta))
        scores, tanh = _step_scores(q, k, visible, scale, softcap)
        weights = scores.sub_(torch.where(m == -torch.inf, 0, m)).exp_().div_(torch.where(t == 0, 1, t))
        dv[:, :, keys] += (weights.transpose(-1, -2) @ g).sum(2)
        dscores = torch.matmul(g, v.transpose(-1, -2)[:, :, None]).sub_(d).mul_(weights)
        if tanh is not None:
            dscores.mul_(1 - tanh * tanh)
        dscores.mul_(scale)
        dq[:, :, rows] = (dscores @ k[:, :, None]).flatten(1, 2).to(dq.dtype)
        dk[:, :, keys] += (dscores.transpose(-1, -2) @ q).sum(2)
    return dq, dk.to(key.dtype), dv.to(value.dtype), delta


def _fake_fwd(query, key, value, lo, hi, sinks, scale, softcap):
    batch, heads, q_len, _ = query.shape
    largest, total = (query.new_empty(batch, heads, q_len, dtype=_lse_dtype(query.dtype)) for _ in range(2))
    return _heads_last(batch, heads, q_len, value.shape[3], query), largest, total


def _fake_bwd(grad, grad_lse, query, key, value, lo, hi, out, largest, total, scale, softcap):
    gradients = []
    for x in (query, key, value):
        batch, heads, length, size = x.shape
        gradients.append(_heads_last(batch, heads, length, size, x))
    return (*gradients, total.new_empty(total.shape))


def _largest_head(dtype: torch.dtype) -> int:
    """Not float64; and float32 tiles of larger heads do not fit into registers."""
    return 0 if dtype == torch.float64 else 128 if dtype == torch.float32 else 512


def _kernel_takes(query: Tensor, key: Tensor, value: Tensor, *_: object) -> bool:
    return max(query.shape[-1], value.shape[-1]) <= _largest_head(query.dtype)


# Result: the output, and of each row's scores (sinks included) the largest and Σ exp(score − largest). Their
# log-sum-exp alone would not do: its rounding error is larger than that of the weights. A softcap of 0 is none.
_fwd = register_op("interval_attention_fwd", portable=_portable_fwd, fake=_fake_fwd, kernel_takes=_kernel_takes)
# Result: gradients of query, key and value, and Σ dO·O − dLSE of each row, of which that of the sinks is made.
_bwd = register_op(
    "interval_attention_bwd",
    portable=_portable_bwd,
    fake=_fake_bwd,
    kernel_takes=lambda grad, grad_lse, *rest: _kernel_takes(*rest),
)


def _again(ctx, grads, query, key, value, sinks, lo, hi, *_):
    scale, softcap = ctx.options
    mask = None if lo is None else IntervalMask(lo, hi)
    outputs = interval_attention_ref(
        query, key, value, mask, scale=scale, softcap=softcap or None, sinks=sinks, return_lse=True
    )
    return outputs, (query, key, value, sinks)


class _IntervalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, sinks, lo, hi, scale, softcap, return_lse):
        out, largest, total = _fwd(query, key, value, lo, hi, sinks, scale, softcap)
        ctx.save_for_backward(query, key, value, sinks, lo, hi, out, largest, total)
        ctx.options = scale, softcap
        ctx.set_materialize_grads(False)
        return out, largest + total.log() if return_lse else None

    @staticmethod
    @differentiable(_again)
    def backward(ctx, grad, grad_lse):
        query, key, value, sinks, lo, hi, out, largest, total = ctx.saved_tensors
        grad = torch.zeros_like(out) if grad is None else grad
        dq, dk, dv, delta = _bwd(grad, grad_lse, query, key, value, lo, hi, out, largest, total, *ctx.options)
        dsinks = None
        if sinks is not None:  # a sink's weight is exp(sink − largest) / total, and its value is zero
            weights = torch.exp(sinks.to(total.dtype)[None, :, None] - largest) / total
            dsinks = (weights * -delta).sum((0, 2)).to(sinks.dtype)
        return dq, dk, dv, dsinks, None, None, None, None, None
