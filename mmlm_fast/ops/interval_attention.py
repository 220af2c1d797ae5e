"""Attention where each query sees one interval of keys: every mask of a multimodal model, without a mask in memory."""

import math
from typing import Literal, overload

import torch
from torch import Tensor

from mmlm_fast.masks import IntervalMask
from mmlm_fast.ops._derivatives import differentiable, recorded, refuse_twice
from mmlm_fast.ops._interval_chunked import chunked_bwd, chunked_fwd, heads_last, lse_dtype
from mmlm_fast.ops._native import NATIVE_TYPES, core
from mmlm_fast.ops._op import Op
from mmlm_fast.ops._registry import autocast, check_floating, plain_float, register_op
from mmlm_fast.ops._torch_attention import Call, facts, has_efficient, has_flash, sdpa
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


@overload
def interval_attention_ref(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: IntervalMask | None = ...,
    *,
    scale: float | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
def interval_attention_ref(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: IntervalMask | None = ...,
    *,
    scale: float | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@overload
def interval_attention_ref(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: IntervalMask | None = ...,
    *,
    scale: float | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    return_lse: bool = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...


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
    scores = scores.to(lse_dtype(query.dtype))
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


@overload
def interval_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: IntervalMask | None = ...,
    *,
    scale: float | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
def interval_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: IntervalMask | None = ...,
    *,
    scale: float | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@overload
def interval_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: IntervalMask | None = ...,
    *,
    scale: float | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    return_lse: bool = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...


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
        call = facts(query, key, value, mask)
        if _takes_sdpa(call):
            return refuse_twice(sdpa(query, key, value, call, scale), "interval_attention, which torch's kernel took")
    sees_all = mask is None or mask.kind_for(key.shape[2]) == "full"
    lo, hi = (None, None) if mask is None or sees_all else (mask.lo, mask.hi)
    softcap = 0.0 if softcap is None else plain_float(softcap)
    out, lse = recorded(_IntervalAttention, query, key, value, sinks, lo, hi, scale, softcap, return_lse)
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
    return out[0].transpose(0, 1)


def _shape(thing: object) -> object:
    return tuple(thing.shape) if isinstance(thing, Tensor) else type(thing).__name__


def _check_inputs(query: Tensor, key: Tensor, value: Tensor, mask: IntervalMask | None) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_floating(name, tensor)
        if tensor.dim() != 4:
            raise ValueError(f"{name} must be [B, heads, tokens, size], got {tuple(tensor.shape)}")
        if tensor is not query and (tensor.dtype != query.dtype or tensor.device != query.device):
            raise ValueError(f"{name} must be {query.dtype} on {query.device}, got {tensor.dtype} on {tensor.device}")
    batch, heads, q_len, size = query.shape
    kv_batch, kv_heads, kv_len, key_size = key.shape
    *of_keys, value_size = value.shape
    if kv_batch != batch or key_size != size or of_keys != [kv_batch, kv_heads, kv_len]:
        raise ValueError(
            f"key must be [{batch}, Hkv, Skv, {size}] and value [{batch}, Hkv, Skv, Dv], got {tuple(key.shape)} and "
            f"{tuple(value.shape)}"
        )
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"heads of key must divide those of query, got {kv_heads} for {heads}")
    if size == 0 or value_size == 0:
        raise ValueError(f"head size must be at least 1, got {size} and {value_size}")
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


# ---- whether torch's own attention takes a call, or our kernel -----------------------------------------------------


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
        return has_flash(call) or has_efficient(call) or not _has_kernel(call)
    if call.kind == "full":
        return True
    return call.device == "cpu" and not call.is_compiling and call.scores < OP.least()


def _largest_head(dtype: torch.dtype) -> int:
    """Not float64; and float32 tiles of larger heads do not fit into registers."""
    return 0 if dtype == torch.float64 else 128 if dtype == torch.float32 else 512


def _has_kernel(call: Call) -> bool:
    largest = max(call.size, call.value_size)
    return call.has_triton and call.capability >= 8 and largest <= _largest_head(call.dtype)


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
    if not _is_native(query, key):
        return chunked_fwd(query, key, value, lo, hi, sinks, scale, softcap)
    (batch, heads, q_len, size), (kv_heads, kv_len, value_size) = query.shape, value.shape[1:]
    dtype = query.dtype
    query, key, value = _native(query), _native(key), _native(value)
    lo, hi = (None, None) if lo is None or hi is None else (lo.contiguous(), hi.contiguous())
    out = heads_last(batch, heads, q_len, value_size, query)
    largest, total = (query.new_empty(batch, heads, q_len, dtype=torch.float32) for _ in range(2))
    sinks = None if sinks is None else sinks.float().contiguous()
    core().interval_attention_fwd(
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
    if not _is_native(query, key):
        return chunked_bwd(grad, grad_lse, query, key, value, lo, hi, out, largest, total, scale, softcap)
    (batch, heads, q_len, size), (kv_heads, kv_len, value_size) = query.shape, value.shape[1:]
    dtype = query.dtype
    query, key, value, grad, out = (_native(x) for x in (query, key, value, grad, out))
    lo, hi = (None, None) if lo is None or hi is None else (lo.contiguous(), hi.contiguous())
    largest, total = largest.contiguous(), total.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    dq = heads_last(batch, heads, q_len, size, query)
    dk = heads_last(batch, kv_heads, kv_len, size, query)
    dv = heads_last(batch, kv_heads, kv_len, value_size, query)
    delta = torch.empty_like(total)
    core().interval_attention_bwd(
        NATIVE_TYPES[query.dtype], (batch, heads, kv_heads, q_len, kv_len, size, value_size), scale, softcap,
        (_heads(query), _heads(key), _heads(value), _heads(out)), *_native_bounds(lo, hi), largest.data_ptr(),
        total.data_ptr(), (_heads(grad), _heads(dq), _heads(dk), _heads(dv)),
        0 if grad_lse is None else grad_lse.data_ptr(), delta.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return dq.to(dtype), dk.to(dtype), dv.to(dtype), delta


# ---- registration and gradients ------------------------------------------------------------------------------------


def _fake_fwd(query, key, value, lo, hi, sinks, scale, softcap):
    batch, heads, q_len, _ = query.shape
    largest, total = (query.new_empty(batch, heads, q_len, dtype=lse_dtype(query.dtype)) for _ in range(2))
    return heads_last(batch, heads, q_len, value.shape[3], query), largest, total


def _fake_bwd(grad, grad_lse, query, key, value, lo, hi, out, largest, total, scale, softcap):
    gradients = []
    for x in (query, key, value):
        batch, heads, length, size = x.shape
        gradients.append(heads_last(batch, heads, length, size, x))
    return (*gradients, total.new_empty(total.shape))


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
