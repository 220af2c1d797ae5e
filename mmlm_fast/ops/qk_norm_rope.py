"""Rotary position embeddings of queries and keys, after their optional per-head RMSNorm, in one pass."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmlm_fast.ops._derivatives import differentiable, recorded, unseen
from mmlm_fast.ops._native import address, core, number_type
from mmlm_fast.ops._op import REFERENCE, Op
from mmlm_fast.ops._registry import check_floating, plain_float, register_op
from mmlm_fast.ops.add_norm import add_norm_ref, check_parameters, with_offset

OP = Op("qk_norm_rope", smallest=2**16)


def rope_tables(
    position_ids: Tensor,
    inv_freq: Tensor,
    *,
    sections: Sequence[int] | None = None,
    interleaved_sections: bool = False,
    scaling: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Compute cos and sin of position·inv_freq once for all layers of a forward pass.

    Args:
        position_ids: Integers ``[B, S]``, or ``[A, B, S]`` with A axes (3 for M-RoPE: time, height, width; 2 for
            pictures: height, width).
        inv_freq: ``[R/2]`` float, one a rotating pair; for axes of their own frequencies, concatenated.
        sections: How many of the pairs follow each axis, with sum R/2, e.g. Qwen2-VL's ``[16, 24, 24]``. Needed with A
            axes.
        interleaved_sections: The axes take turns, as in Qwen3-VL: pair i follows axis i mod A while that axis has
            pairs left by ``sections``, axis 0 otherwise. Else contiguous, as in Qwen2-VL.
        scaling: Multiplies both (the ``attention_scaling`` of YaRN and its like).

    Returns:
        ``(cos, sin)``, each ``[B, S, R/2]`` in float32: half the width of transformers' ``position_embeddings``, whose
        halves are equal, and not rounded to the model's dtype.

    Raises:
        ValueError: if axes, sections and frequencies do not go together.

    Source: Su et al. 2021; M-RoPE: Qwen2-VL (Wang et al. 2024), interleaved: Qwen3-VL; transformers' rotary classes.
    """
    if inv_freq.dim() != 1 or position_ids.dim() not in (2, 3):
        raise ValueError(
            f"inv_freq must be [R/2] and position_ids [B, S] or [axes, B, S], got {tuple(inv_freq.shape)} and "
            f"{tuple(position_ids.shape)}"
        )
    inv_freq = inv_freq.float()
    if position_ids.dim() == 2:
        if sections is not None:
            raise ValueError(f"sections need position_ids [axes, B, S], got {tuple(position_ids.shape)}")
        angles = position_ids[..., None].float() * inv_freq
    else:
        sections = list(sections or ())
        if len(sections) != position_ids.shape[0] or sum(sections) != inv_freq.shape[0]:
            raise ValueError(
                f"sections must be one a axis with sum {inv_freq.shape[0]}, got {sections} for "
                f"{position_ids.shape[0]} axes"
            )
        spans = _axes(sections, interleaved_sections)
        positions = position_ids.float()
        angles = torch.cat([positions[axis, ..., None] * inv_freq[first:last] for axis, first, last in spans], dim=-1)
    return angles.cos() * scaling, angles.sin() * scaling


def _axes(sections: list[int], interleaved: bool) -> list[tuple[int, int, int]]:
    """(axis, first pair, last pair + 1) of runs of pairs."""
    if interleaved:
        n, total = len(sections), sum(sections)
        owner = [i % n if i % n and i < sections[i % n] * n else 0 for i in range(total)]
    else:
        owner = [axis for axis, count in enumerate(sections) for _ in range(count)]
    spans: list[tuple[int, int, int]] = []
    for i, axis in enumerate(owner):
        if spans and spans[-1][0] == axis:
            spans[-1] = (axis, spans[-1][1], i + 1)
        else:
            spans.append((axis, i, i + 1))
    return spans


def qk_norm_rope_ref(
    query: Tensor,
    key: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    query_weight: Tensor | None = None,
    key_weight: Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """See `qk_norm_rope`; in the dtype of the inputs, as transformers' functions."""
    out = _rope_ref(query, cos, sin, query_weight, eps, offset, interleaved)
    return out, None if key is None else _rope_ref(key, cos, sin, key_weight, eps, offset, interleaved)


def _rope_ref(x, cos, sin, weight, eps, offset, interleaved):
    if weight is not None:
        x = add_norm_ref(x, None, weight, None, "rms", eps, offset)[0]
    cos, sin = (t[:, None].to(x.dtype) for t in (cos, sin))  # [B or 1, 1, S, R/2]
    half = cos.shape[-1]
    turning, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        a, b = turning.unflatten(-1, (half, 2)).unbind(-1)
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    else:
        a, b = turning.split(half, dim=-1)
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    return torch.cat([turned, rest], dim=-1)


def qk_norm_rope(
    query: Tensor,
    key: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    query_weight: Tensor | None = None,
    key_weight: Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Normalise each head (where there are weights), then rotate its first R numbers by its position.

    Args:
        query: ``[B, Hq, S, D]``, any strides: a view of a packed projection will do.
        key: ``[B, Hk, S, D]`` or None.
        cos, sin: ``[B or 1, S, R/2]`` or ``[S, R/2]`` from `rope_tables`, R ≤ D; the other D − R numbers pass.
        query_weight, key_weight: ``[D]`` of the RMSNorm of each head, in the dtype of `query` or float32; both or none.
        eps, offset: Of that norm, as in `add_norm`.
        interleaved: Pairs are neighbours (2i, 2i+1), as in GPT-J, Llama 4 and GLM; else (i, i + R/2).

    Returns:
        Rotated query and key in the dtype of the inputs, laid out ``[B, S, heads, D]`` in memory; computed in float32
        and rounded once. Kept for the backward pass: the tables, and the inputs only where there is a norm.

    Raises:
        ValueError: for shapes, dtypes or devices that do not go together, or tables that require a gradient: they get
            none.

    Source: apply_rotary_pos_emb of transformers' Llama, Qwen2-VL, Qwen3 (q_norm, k_norm), Gemma3 (offset 1), and
    apply_rotary_pos_emb_vision.
    """
    given = [("query", query)] if key is None else [("query", query), ("key", key)]
    for name, x in given:
        check_floating(name, x)
        if x.dim() != 4 or x.shape[-1] == 0:
            raise ValueError(f"{name} must be [B, heads, S, D], got {tuple(x.shape)}")
        if x.dtype != query.dtype or x.device != query.device:
            raise ValueError(f"{name} must be {query.dtype} on {query.device}, got {x.dtype} on {x.device}")
        if x.shape[0] != query.shape[0] or x.shape[2:] != query.shape[2:]:
            raise ValueError(
                f"key must be [{query.shape[0]}, heads, {query.shape[2]}, {query.shape[3]}], got {tuple(x.shape)}"
            )
    cos, sin = _check_tables(cos, sin, query)
    if key is not None and (query_weight is None) != (key_weight is None):
        raise ValueError("query_weight and key_weight must both be given or neither")
    check_parameters(query, query.shape[-1], query_weight=query_weight, key_weight=key_weight)
    if OP.path(query) == REFERENCE:
        return qk_norm_rope_ref(query, key, cos, sin, query_weight, key_weight, eps, offset, interleaved)
    tensors = (query, key, query_weight, key_weight, cos, sin)
    out, out_key = recorded(_QkNormRope, *tensors, plain_float(eps), plain_float(offset), interleaved)
    return out, None if key is None else out_key


def _check_tables(cos: Tensor, sin: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
    check_floating("cos", cos)
    check_floating("sin", sin)
    if cos.requires_grad or sin.requires_grad:
        raise ValueError("cos and sin must not require a gradient: they get none")
    if cos.dim() == 2 and sin.dim() == 2:
        cos, sin = cos[None], sin[None]
    batch, _, length, size = query.shape
    if cos.shape != sin.shape or cos.dim() != 3 or cos.shape[0] not in (1, batch) or cos.shape[1] != length:
        raise ValueError(
            f"cos and sin must be [1 or {batch}, {length}, R/2], got {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    if 2 * cos.shape[-1] > size:
        raise ValueError(f"cos and sin must be at most half as wide as a head ({size}), got {cos.shape[-1]}")
    if cos.device != query.device or sin.device != query.device or cos.dtype != sin.dtype:
        raise ValueError(f"cos and sin must be of one dtype on {query.device}, got {cos.device} and {sin.device}")
    return cos, sin


def _heads(x: Tensor) -> tuple[int, ...]:
    return (x.data_ptr(), *x.stride()[:3])


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def heads_last(x: Tensor) -> Tensor:
    """Empty, shaped like x ``[B, heads, S, D]``, laid out ``[B, S, heads, D]``."""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)


def _native_one(x, cos, sin, weight, eps, offset, interleaved, inverse):
    x, out, weight = _dense(x), heads_last(x), with_offset(weight, offset)
    batch, heads, length, size = x.shape
    if x.numel():
        core().qk_norm_rope_fwd(
            number_type(x), (batch, heads, length, size, cos.shape[-1]), interleaved, inverse, cos.data_ptr(),
            sin.data_ptr(), 0 if cos.shape[0] == 1 else cos.stride(0), address(weight),
            -1.0 if weight is None else eps, _heads(x), _heads(out), torch.get_num_threads(),
        )  # fmt: skip
    return out


def _native_fwd(
    query: Tensor,
    key: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    eps: float,
    offset: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    cos, sin = (t.float().contiguous() for t in (cos, sin))
    out = _native_one(query, cos, sin, query_weight, eps, offset, interleaved, False)
    if key is None:
        return out, query.new_empty(0)
    return out, _native_one(key, cos, sin, key_weight, eps, offset, interleaved, False)


def _native_bwd_one(grad, x, cos, sin, weight, eps, offset, interleaved):
    if weight is None:
        return _native_one(grad, cos, sin, None, 0.0, 0.0, interleaved, True), grad.new_empty(0)
    x, grad, dx, wide = _dense(x), _dense(grad), heads_last(grad), with_offset(weight, offset)
    batch, heads, length, size = grad.shape
    dweight = grad.new_zeros(size, dtype=torch.float32)
    if grad.numel():
        core().qk_norm_rope_bwd(
            number_type(grad), (batch, heads, length, size, cos.shape[-1]), interleaved, cos.data_ptr(),
            sin.data_ptr(), 0 if cos.shape[0] == 1 else cos.stride(0), address(wide), eps, _heads(x), _heads(dx),
            _heads(grad), dweight.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
    return dx, dweight.to(weight.dtype)


def _native_bwd(
    grad: Tensor,
    grad_key: Tensor | None,
    query: Tensor | None,
    key: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    eps: float,
    offset: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    cos, sin = (t.float().contiguous() for t in (cos, sin))
    dquery, dweight = _native_bwd_one(grad, query, cos, sin, query_weight, eps, offset, interleaved)
    if grad_key is None:
        return dquery, grad.new_empty(0), dweight, grad.new_empty(0)
    dkey, dkey_weight = _native_bwd_one(grad_key, key, cos, sin, key_weight, eps, offset, interleaved)
    return dquery, dkey, dweight, dkey_weight


def _fake_fwd(query, key, cos, sin, query_weight, key_weight, eps, offset, interleaved):
    return heads_last(query), query.new_empty(0) if key is None else heads_last(key)


def _fake_bwd(grad, grad_key, query, key, cos, sin, query_weight, key_weight, eps, offset, interleaved):
    dkey = grad.new_empty(0) if grad_key is None else heads_last(grad_key)
    key_weight = None if grad_key is None else key_weight
    weights = [grad.new_empty(0) if w is None else w.new_empty(w.shape) for w in (query_weight, key_weight)]
    return heads_last(grad), dkey, *weights


_fwd = register_op("qk_norm_rope_fwd", native=_native_fwd, fake=_fake_fwd)
# `query` and `key` are given only where there is a norm. Result: gradients of query, key and the two weights.
_bwd = register_op("qk_norm_rope_bwd", native=_native_bwd, fake=_fake_bwd)


def _again(ctx, grads, cos, sin, query, key, query_weight, key_weight):
    if query is None:  # rotated alone
        like = next(g for g in grads if g is not None)
        query, key = (unseen(shape, like) for shape in ctx.shapes)
    out, out_key = qk_norm_rope_ref(
        query, key if ctx.has_key else None, cos, sin, query_weight, key_weight, *ctx.options
    )
    return (out, out_key), (query, key, query_weight, key_weight)


class _QkNormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, query_weight, key_weight, cos, sin, eps, offset, interleaved):
        ctx.set_materialize_grads(False)
        out, out_key = _fwd(query, key, cos, sin, query_weight, key_weight, eps, offset, interleaved)
        has_norm = query_weight is not None
        ctx.has_key, ctx.options = key is not None, (eps, offset, interleaved)
        ctx.shapes = out.shape, out_key.shape
        kept = (query, key, query_weight, key_weight) if has_norm else (None,) * 4
        ctx.save_for_backward(cos, sin, *kept)
        return out, out_key

    @staticmethod
    @differentiable(_again)
    def backward(ctx, grad, grad_key):
        cos, sin, query, key, query_weight, key_weight = ctx.saved_tensors
        like = grad_key if grad is None else grad
        if grad is None or grad_key is None:  # of queries or keys alone
            shape, key_shape = ctx.shapes
            grad = like.new_zeros(shape) if grad is None else grad
            grad_key = like.new_zeros(key_shape) if grad_key is None else grad_key
        dquery, dkey, dweight, dkey_weight = _bwd(
            grad, grad_key if ctx.has_key else None, query, key, cos, sin, query_weight, key_weight, *ctx.options
        )
        has_norm = query_weight is not None
        return (
            dquery,
            dkey if ctx.has_key else None,
            dweight if has_norm else None,
            dkey_weight if has_norm and ctx.has_key else None,
            None, None, None, None, None,
        )  # fmt: skip
