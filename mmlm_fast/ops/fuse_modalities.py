"""Fusion of one feature vector per modality: mean, weighted, gated, attention; missing modalities left out."""

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from mmlm_fast.ops._derivatives import differentiable, recorded
from mmlm_fast.ops._native import address, as_rows, core, floats, num_rows, number_type, rows
from mmlm_fast.ops._op import REFERENCE, Op
from mmlm_fast.ops._registry import autocast, check_like, check_tokens, num_tokens, register_op
from mmlm_fast.ops.concat_linear import concat_linear, concat_linear_ref

OP = Op("fuse_modalities", smallest=2**18)
MAX_MODALITIES = 16  # of the native core
MODES = ("mean", "weighted", "gated", "attention")


def fuse_modalities_ref(
    features: Sequence[Tensor],
    mode: str,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    present: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The fused features and the fusion weights; see `fuse_modalities`."""
    tokens = num_tokens(features)
    features = [x.expand(*x.shape[:-2], tokens, x.shape[-1]) for x in features]
    if present is not None:
        present = present.expand(*features[0].shape[:-1], len(features))
        # Selected, not multiplied: whatever a missing modality holds, NaN included, must not reach the output.
        features = [torch.where(present[..., i, None], x, 0) for i, x in enumerate(features)]
    if mode == "gated":
        assert weight is not None
        gate = torch.sigmoid(concat_linear_ref(features, weight, bias))
        if present is not None:
            gate = torch.where(present.all(-1, keepdim=True), gate, present[..., :1].to(gate.dtype))
        return gate * features[0] + (1 - gate) * features[1], gate

    stacked = torch.stack(list(features), dim=-2)  # [..., modalities, size]
    if mode == "attention":
        assert weight is not None
        scores = (stacked * weight).sum(-1) * stacked.shape[-1] ** -0.5
    elif mode == "weighted":
        assert weight is not None
        scores = weight.expand(stacked.shape[:-1])
    else:
        scores = stacked.new_zeros(stacked.shape[:-1])
    if present is None:
        weights = scores.softmax(-1)
    else:
        weights = scores.masked_fill(~present, -torch.inf).softmax(-1)
        weights = torch.where(present.any(-1, keepdim=True), weights, 0)
    return (weights[..., None] * stacked).sum(-2), weights


@overload
def fuse_modalities(
    features: Sequence[Tensor],
    mode: str,
    *,
    weight: Tensor | None = ...,
    bias: Tensor | None = ...,
    present: Tensor | None = ...,
    return_weights: Literal[False] = ...,
) -> Tensor: ...


@overload
def fuse_modalities(
    features: Sequence[Tensor],
    mode: str,
    *,
    weight: Tensor | None = ...,
    bias: Tensor | None = ...,
    present: Tensor | None = ...,
    return_weights: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@overload
def fuse_modalities(
    features: Sequence[Tensor],
    mode: str,
    *,
    weight: Tensor | None = ...,
    bias: Tensor | None = ...,
    present: Tensor | None = ...,
    return_weights: bool = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...


def fuse_modalities(
    features: Sequence[Tensor],
    mode: str,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    present: Tensor | None = None,
    return_weights: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Fuse the features of k modalities into one.

    ======== ======================================================= ==========================
    mode     result                                                  parameters
    ======== ======================================================= ==========================
    mean     Σ xₘ / k                                                none
    weighted Σ aₘ·xₘ, a = softmax(w)                                 ``weight`` [k]
    attention Σ aₘ·xₘ, a = softmax over m of (xₘ·q / √H)             ``weight`` [H], the query q
    gated    g·x₁ + (1−g)·x₂, g = σ([x₁; x₂]·Wᵀ + c), k = 2          ``weight`` [H, 2H], ``bias`` [H] or None
    ======== ======================================================= ==========================

    Args:
        features: k ≥ 1 tensors ``[*batch, T or 1, H]``; one with a single token is broadcast over the tokens.
        mode: See the table.
        weight, bias: See the table, in the dtype of the features.
        present: Bool, broadcastable to ``[*batch, T, k]``: False where a sample lacks that modality. It then has no
            part in the result (the mean divides by what is there, the softmax runs over it, the gate takes the other
            one), gets a zero gradient, and may hold anything, NaN included. Nothing present gives zeros.
        return_weights: Also return the fusion weights, for inspection; no gradient flows through them.

    Returns:
        ``[*batch, T, H]`` in the dtype of the features, accumulated in float32 and rounded once; with
        `return_weights` also the weights, ``[*batch, T, k]`` in float32 (float64 for float64), or the gate g,
        ``[*batch, T, H]``.

    Raises:
        ValueError: for an unknown mode, missing or superfluous parameters, or shapes, dtypes or devices that do not
            go together.

    Source: fusion by mean, weights and attention as in multimodal-fusion surveys (Baltrušaitis et al. 2019); the
    gate is the gated multimodal unit (Arevalo et al. 2017) on encoded features.
    """
    if isinstance(features, Tensor):
        raise ValueError("features must be a sequence of tensors, one per modality, got one tensor")
    weight, bias, *features = autocast(weight, bias, *features)  # type: ignore[assignment]
    tokens = check_tokens("features", list(features))
    _check_parameters(features, mode, weight, bias)
    if present is not None:
        present = _check_present(present, features, tokens)
    if OP.path(features[0], fits=len(features) <= MAX_MODALITIES) == REFERENCE:
        out, weights = fuse_modalities_ref(features, mode, weight, bias, present)
        weights = weights if mode == "gated" else weights.to(_weights_dtype(weights.dtype))
    elif mode == "gated":
        out, weights = _gated(features, weight, bias, present)
    else:
        out, weights = recorded(_FuseModalities, mode, weight, present, *features)
    return (out, weights.detach()) if return_weights else out


def _check_parameters(features: Sequence[Tensor], mode: str, weight: Tensor | None, bias: Tensor | None) -> None:
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    hidden_size = features[0].shape[-1]
    if any(x.shape[-1] != hidden_size for x in features):
        raise ValueError(f"features must share their last size, got {[x.shape[-1] for x in features]}")
    if mode == "gated" and len(features) != 2:
        raise ValueError(f"mode gated takes 2 features, got {len(features)}")
    shapes = {"weighted": (len(features),), "attention": (hidden_size,), "gated": (hidden_size, 2 * hidden_size)}
    if mode == "mean":
        if weight is not None:
            raise ValueError("mode mean takes no weight, got one")
    elif weight is None:
        raise ValueError(f"mode {mode} needs weight of shape {shapes[mode]}, got None")
    else:
        check_like("weight", weight, features[0], shapes[mode])
    if bias is not None:
        if mode != "gated":
            raise ValueError(f"mode {mode} takes no bias, got one")
        check_like("bias", bias, features[0], (hidden_size,))


def _check_present(present: Tensor, features: Sequence[Tensor], tokens: int) -> Tensor:
    wanted = (*features[0].shape[:-2], tokens, len(features))
    if not isinstance(present, Tensor) or present.dtype != torch.bool:
        raise ValueError(f"present must be a bool tensor, got {getattr(present, 'dtype', type(present).__name__)}")
    if present.device != features[0].device:
        raise ValueError(f"present must be on {features[0].device}, got {present.device}")
    try:
        return present.expand(wanted)
    except RuntimeError:
        raise ValueError(f"present must broadcast to {wanted}, got {tuple(present.shape)}") from None


def _weights_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---- mean, weighted, attention -------------------------------------------------------------------------------------


def _rows(features: list[Tensor]) -> tuple[list[Tensor], list[bool], int, int]:
    """Each feature as rows, which have one for all tokens, and how many tokens and rows there are."""
    tokens, first = num_tokens(features), features[0]
    count = tokens
    for size in first.shape[:-2]:
        count = count * size
    return [as_rows(x) for x in features], [x.shape[-2] != tokens for x in features], tokens, count


def _flat_present(present: Tensor | None, num: int) -> Tensor | None:
    return None if present is None else present.reshape(-1, num).contiguous()


def _native_fwd(
    features: list[Tensor], mode: str, weight: Tensor | None, present: Tensor | None
) -> tuple[Tensor, Tensor]:
    flat, broadcast, tokens, count = _rows(features)
    num, size = len(features), features[0].shape[-1]
    shape = (*features[0].shape[:-2], tokens)
    out = features[0].new_empty((*shape, size))
    weights, query = out.new_empty((*shape, num), dtype=torch.float32), None
    flat_present = _flat_present(present, num)
    if mode == "attention":
        query = floats(weight) * size**-0.5  # type: ignore[operator]
    else:  # one row of scores for all rows
        scores = weights.new_zeros(num) if mode == "mean" else weight.float()  # type: ignore[union-attr]
        weights.copy_(_weights(scores.expand(weights.shape), present))
    core().fuse_modalities_fwd(
        number_type(out), count, size, tokens, [rows(x) for x in flat], broadcast, address(query),
        address(flat_present), weights.data_ptr(), rows(out), torch.get_num_threads(),
    )  # fmt: skip
    return out, weights


def _weights(scores: Tensor, present: Tensor | None) -> Tensor:
    """Softmax over the last dimension of what is present; zeros where nothing is."""
    if present is None:
        return scores.softmax(-1)
    return torch.where(present, scores.masked_fill(~present, -torch.inf).softmax(-1), 0)


def _native_bwd(
    grad: Tensor, features: list[Tensor], weight: Tensor | None, weights: Tensor, present: Tensor | None, mode: str
) -> list[Tensor]:
    flat, broadcast, tokens, count = _rows(features)
    num, size = len(features), features[0].shape[-1]
    g, weights, flat_present = as_rows(grad), weights.contiguous(), _flat_present(present, num)
    dfeatures = [grad.new_empty(grad.shape) for _ in features]
    scale = size**-0.5
    query = floats(weight) * scale if mode == "attention" else None  # type: ignore[operator]
    dscores = None if weight is None else torch.empty_like(weights)
    dquery = None if query is None else torch.zeros_like(query)
    core().fuse_modalities_bwd(
        number_type(grad), count, size, tokens, [rows(x) for x in flat], broadcast, address(query),
        address(flat_present), weights.data_ptr(), rows(g), [rows(d) for d in dfeatures], address(dscores),
        address(dquery), torch.get_num_threads(),
    )  # fmt: skip
    dfeatures = [_sum_to(dx, x.shape) for dx, x in zip(dfeatures, features, strict=True)]
    if dquery is not None:
        return [(dquery * scale).to(grad.dtype), *dfeatures]
    return [grad.new_empty(0) if dscores is None else dscores.view(-1, num).sum(0).to(grad.dtype), *dfeatures]


def _sum_to(dx: Tensor, shape: torch.Size) -> Tensor:
    """Gradient of a feature that was broadcast over tokens."""
    return dx if dx.shape == shape else dx.sum(-2, keepdim=True)


def _fake_fwd(features, mode, weight, present):
    first = features[0]
    shape = (*first.shape[:-2], num_tokens(features))
    weights = first.new_empty((*shape, len(features)), dtype=_weights_dtype(first.dtype))
    return first.new_empty((*shape, first.shape[-1])), weights


def _fake_bwd(grad, features, weight, weights, present, mode):
    like = [grad.new_empty(0) if weight is None else weight, *features]
    return [t.new_empty(t.shape) for t in like]


_fwd = register_op("fuse_modalities_fwd", native=_native_fwd, fake=_fake_fwd)
# Result: gradient of weight (empty without one), then of each feature.
_bwd = register_op("fuse_modalities_bwd", native=_native_bwd, fake=_fake_bwd)


def _optional(ctx, saved):
    """Weight, presence and features of what was saved behind the fusion weights."""
    weight, present = None, None
    if ctx.has_weight:
        weight, *saved = saved
    if ctx.has_present:
        present, *saved = saved
    return weight, present, list(saved)


def _again(ctx, grads, _weights, *saved):
    weight, present, features = _optional(ctx, saved)
    out, _ = fuse_modalities_ref(features, ctx.mode, weight, None, present)
    return (out, None), (None, weight, None, *features)


class _FuseModalities(torch.autograd.Function):
    @staticmethod
    # `*args` for all: without gradients Dynamo takes a call with as many arguments as forward has names, `ctx` among
    # them, for one of the form without a context.
    def forward(ctx, *args):
        ctx.set_materialize_grads(False)
        mode, weight, present, *features = args
        out, weights = _fwd(list(features), mode, weight, present)
        ctx.mode, ctx.has_weight, ctx.has_present = mode, weight is not None, present is not None
        optional = [t for t in (weight, present) if t is not None]
        ctx.save_for_backward(weights, *optional, *features)
        ctx.mark_non_differentiable(weights)
        return out, weights

    @staticmethod
    @differentiable(_again)
    def backward(ctx, grad, _grad_weights):
        weights, *saved = ctx.saved_tensors
        weight, present, features = _optional(ctx, saved)
        dweight, *dfeatures = _bwd(grad, features, weight, weights, present, ctx.mode)
        return None, dweight if ctx.has_weight else None, None, *dfeatures


# ---- gated -------------------------------------------------------------------------------------------------------


def _gated(
    features: Sequence[Tensor], weight: Tensor | None, bias: Tensor | None, present: Tensor | None
) -> tuple[Tensor, Tensor]:
    assert weight is not None
    if present is not None:  # the GEMM and its weight gradient must not see what a missing modality holds
        tokens = num_tokens(features)
        features = [x.expand(*x.shape[:-2], tokens, x.shape[-1]) for x in features]
        features = [torch.where(present[..., i, None], x, 0) for i, x in enumerate(features)]
    logits = concat_linear(features, weight, bias)
    first, second = (x.expand(logits.shape) for x in features)
    return recorded(_GatedMix, first, second, logits, present)


def _effective_gate(logits: Tensor, present: Tensor | None) -> Tensor:
    gate = logits.sigmoid()
    if present is None:
        return gate
    first = present[..., :1]
    return torch.where(present.all(-1, keepdim=True), gate, first.to(gate.dtype))


def _mix_rows(x: Tensor, like: Tensor) -> Tensor:
    return as_rows(x.expand(like.shape))


def _native_mix_fwd(first: Tensor, second: Tensor, logits: Tensor, present: Tensor | None) -> tuple[Tensor, Tensor]:
    out, gate, flat = logits.new_empty(logits.shape), logits.new_empty(logits.shape), as_rows(logits)
    a, b, present = _mix_rows(first, logits), _mix_rows(second, logits), _flat_present(present, 2)
    core().gated_mix_fwd(
        number_type(logits), num_rows(logits), logits.shape[-1], rows(a), rows(b), rows(flat), address(present),
        rows(out), rows(gate), torch.get_num_threads(),
    )  # fmt: skip
    return out, gate


def _native_mix_bwd(
    grad: Tensor, first: Tensor, second: Tensor, logits: Tensor, present: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    flat, g, present = as_rows(logits), as_rows(grad), _flat_present(present, 2)
    a, b = _mix_rows(first, logits), _mix_rows(second, logits)
    dfirst, dsecond, dlogits = (logits.new_empty(logits.shape) for _ in range(3))
    core().gated_mix_bwd(
        number_type(logits), num_rows(logits), logits.shape[-1], rows(a), rows(b), rows(flat), address(present),
        rows(g), rows(dfirst), rows(dsecond), rows(dlogits), torch.get_num_threads(),
    )  # fmt: skip
    return dfirst, dsecond, dlogits


_mix_fwd = register_op(
    "gated_mix_fwd",
    native=_native_mix_fwd,
    fake=lambda first, second, logits, present: (logits.new_empty(logits.shape), logits.new_empty(logits.shape)),
)
_mix_bwd = register_op(
    "gated_mix_bwd",
    native=_native_mix_bwd,
    fake=lambda grad, first, second, logits, present: tuple(logits.new_empty(logits.shape) for _ in range(3)),
)


def _mix_again(ctx, grads, first, second, logits, present):
    gate = _effective_gate(logits, present)
    return (gate * first + (1 - gate) * second, None), (first, second, logits)


class _GatedMix(torch.autograd.Function):
    @staticmethod
    def forward(ctx, first, second, logits, present):
        ctx.set_materialize_grads(False)
        out, gate = _mix_fwd(first, second, logits, present)
        ctx.save_for_backward(first, second, logits, present)
        ctx.mark_non_differentiable(gate)
        return out, gate

    @staticmethod
    @differentiable(_mix_again)
    def backward(ctx, grad, _grad_gate):
        first, second, logits, present = ctx.saved_tensors
        return *_mix_bwd(grad, first, second, logits, present), None
