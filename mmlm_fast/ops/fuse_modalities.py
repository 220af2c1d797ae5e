"""Fusion of one feature vector per modality: mean, weighted, gated, attention; missing modalities left out."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmlm_fast.ops._registry import autocast, check_like, check_tokens, register_op, using_reference
from mmlm_fast.ops.concat_linear import concat_linear, concat_linear_ref

MODES = ("mean", "weighted", "gated", "attention")


def fuse_modalities_ref(
    features: Sequence[Tensor],
    mode: str,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    present: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The fused features and the fusion weights; see `fuse_modalities`."""
    num_tokens = _num_tokens(features)
    features = [x.expand(*x.shape[:-2], num_tokens, x.shape[-1]) for x in features]
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
    num_tokens = check_tokens("features", list(features))
    _check_parameters(features, mode, weight, bias)
    if present is not None:
        present = _check_present(present, features, num_tokens)
    if using_reference():
        out, weights = fuse_modalities_ref(features, mode, weight, bias, present)
        weights = weights if mode == "gated" else weights.to(_weights_dtype(weights.dtype))
    elif mode == "gated":
        out, weights = _gated(features, weight, bias, present)
    else:
        out, weights = _FuseModalities.apply(mode, weight, present, *features)
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


def _check_present(present: Tensor, features: Sequence[Tensor], num_tokens: int) -> Tensor:
    wanted = (*features[0].shape[:-2], num_tokens, len(features))
    if not isinstance(present, Tensor) or present.dtype != torch.bool:
        raise ValueError(f"present must be a bool tensor, got {getattr(present, 'dtype', type(present).__name__)}")
    if present.device != features[0].device:
        raise ValueError(f"present must be on {features[0].device}, got {present.device}")
    try:
        return present.expand(wanted)
    except RuntimeError:
        raise ValueError(f"present must broadcast to {wanted}, got {tuple(present.shape)}") from None


def _num_tokens(features: Sequence[Tensor]) -> int:
    return next((x.shape[-2] for x in features if x.shape[-2] != 1), 1)


def _weights_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---- mean, weighted, attention -------------------------------------------------------------------------------------

# Values of one modality handled at a time on a CPU: 1 MiB in float32, so that the chunks of a few modalities meet in
# cache, and enough for two threads (torch splits from 32768 values on). 2**15 was slower than eager, 2**22 no faster.
CHUNK_VALUES = 262144


def _weights(scores: Tensor, present: Tensor | None) -> Tensor:
    """Softmax over the last dimension of what is present; zeros where nothing is."""
    if present is None:
        return scores.softmax(-1)
    return torch.where(present, scores.masked_fill(~present, -torch.inf).softmax(-1), 0)


def _chunks(features: list[Tensor], num_rows: int, present: Tensor | None):
    """Slices of rows, and for each the features' rows in float32 (float64 stays), zero where missing."""
    dtype, hidden_size = _weights_dtype(features[0].dtype), features[0].shape[-1]
    step = max(1, CHUNK_VALUES // max(1, hidden_size))
    for start in range(0, num_rows, step):
        rows = slice(start, start + step)
        chunk = [x[rows].to(dtype) for x in features]
        if present is not None:
            chunk = [torch.where(present[rows, i, None], x, 0) for i, x in enumerate(chunk)]
        yield rows, chunk


def _if_same_dtype(target: Tensor, like: Tensor) -> Tensor | None:
    """`target` as the ``out=`` of a float32 result, or None where that must be rounded first."""
    return target if target.dtype == like.dtype else None


def _as_rows(features: list[Tensor], present: Tensor | None) -> tuple[list[Tensor], Tensor | None]:
    num_tokens = _num_tokens(features)
    rows = [x.expand(*x.shape[:-2], num_tokens, x.shape[-1]).reshape(-1, x.shape[-1]) for x in features]
    return rows, None if present is None else present.reshape(-1, len(features))


def _portable_fwd(
    features: list[Tensor], mode: str, weight: Tensor | None, present: Tensor | None
) -> tuple[Tensor, Tensor]:
    shape = (*features[0].shape[:-2], _num_tokens(features), features[0].shape[-1])
    features, present = _as_rows(features, present)
    num_rows, hidden_size = features[0].shape
    out = features[0].new_empty(num_rows, hidden_size)
    weights = out.new_empty(num_rows, len(features), dtype=_weights_dtype(out.dtype))
    if mode != "attention":  # one row of scores for all rows
        scores = weights.new_zeros(len(features)) if mode == "mean" else weight.to(weights.dtype)  # type: ignore[union-attr]
        weights.copy_(_weights(scores.expand(weights.shape), present))
    else:
        query = weight.to(weights.dtype) * hidden_size**-0.5  # type: ignore[union-attr]
    for rows, chunk in _chunks(features, num_rows, present):
        if mode == "attention":
            scores = torch.stack([(x * query).sum(-1) for x in chunk], -1)  # pairwise sums: closer than BLAS's
            weights[rows] = _weights(scores, None if present is None else present[rows])
        a = weights[rows]
        target = out[rows]
        total = torch.mul(chunk[0], a[:, :1], out=_if_same_dtype(target, chunk[0]))
        for i, x in enumerate(chunk[1:], 1):
            total.addcmul_(x, a[:, i : i + 1])
        if total is not target:
            target.copy_(total)
    return out.view(shape), weights.view(*shape[:-1], len(features))


def _portable_bwd(
    grad: Tensor, features: list[Tensor], weight: Tensor | None, weights: Tensor, present: Tensor | None, mode: str
) -> list[Tensor]:
    shapes = [x.shape for x in features]
    features, present = _as_rows(features, present)
    num_rows, hidden_size = features[0].shape
    flat_grad, weights = grad.reshape(num_rows, hidden_size), weights.reshape(num_rows, len(shapes))
    dfeatures = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in features]
    dweight = None if weight is None else torch.zeros(weight.shape, dtype=weights.dtype, device=weight.device)
    scale = hidden_size**-0.5
    query = weight.to(weights.dtype) * scale if mode == "attention" else None  # type: ignore[union-attr]
    for rows, chunk in _chunks(features, num_rows, present):
        g, a = flat_grad[rows].to(weights.dtype), weights[rows]
        if weight is not None:
            da = torch.stack([(g * x).sum(-1) for x in chunk], -1)
            dscores = a * (da - (a * da).sum(-1, keepdim=True))
        for i, dfeature in enumerate(dfeatures):
            target = dfeature[rows]
            dx = torch.mul(g, a[:, i : i + 1], out=_if_same_dtype(target, g))
            if query is not None and dweight is not None:
                dx.addcmul_(dscores[:, i : i + 1], query)
            if dx is not target:
                target.copy_(dx)
        if query is not None and dweight is not None:
            weighted = chunk[0] * dscores[:, :1]
            for i, x in enumerate(chunk[1:], 1):
                weighted.addcmul_(x, dscores[:, i : i + 1])
            dweight += weighted.sum(0) * scale
        if mode == "weighted":
            assert dweight is not None
            dweight += dscores.sum(0)
    dfeatures = [_sum_to(dx, grad.shape, shape) for dx, shape in zip(dfeatures, shapes, strict=True)]
    return [grad.new_empty(0) if dweight is None else dweight.to(grad.dtype), *dfeatures]


def _sum_to(dx: Tensor, full_shape: torch.Size, shape: torch.Size) -> Tensor:
    """Gradient of a feature that was broadcast over tokens."""
    dx = dx.view(full_shape)
    return dx if dx.shape == shape else dx.sum(-2, keepdim=True)


def _fake_fwd(features, mode, weight, present):
    first = features[0]
    shape = (*first.shape[:-2], _num_tokens(features))
    weights = first.new_empty((*shape, len(features)), dtype=_weights_dtype(first.dtype))
    return first.new_empty((*shape, first.shape[-1])), weights


def _fake_bwd(grad, features, weight, weights, present, mode):
    like = [grad.new_empty(0) if weight is None else weight, *features]
    return [t.new_empty(t.shape) for t in like]


_fwd = register_op(
    "fuse_modalities_fwd(Tensor[] features, str mode, Tensor? weight, Tensor? present) -> (Tensor, Tensor)",
    portable=_portable_fwd,
    kernel="mmlm_kernels.fuse_modalities:fuse_modalities_fwd",
    fake=_fake_fwd,
)
# Result: gradient of weight (empty without one), then of each feature.
_bwd = register_op(
    "fuse_modalities_bwd(Tensor grad, Tensor[] features, Tensor? weight, Tensor weights, Tensor? present, str mode)"
    " -> Tensor[]",
    portable=_portable_bwd,
    kernel="mmlm_kernels.fuse_modalities:fuse_modalities_bwd",
    fake=_fake_bwd,
)


class _FuseModalities(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mode, weight, present, *features):
        out, weights = _fwd(list(features), mode, weight, present)
        ctx.mode, ctx.has_weight, ctx.has_present = mode, weight is not None, present is not None
        optional = [t for t in (weight, present) if t is not None]
        ctx.save_for_backward(weights, *optional, *features)
        ctx.mark_non_differentiable(weights)
        return out, weights

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _grad_weights):
        weights, *rest = ctx.saved_tensors
        weight = rest.pop(0) if ctx.has_weight else None
        present = rest.pop(0) if ctx.has_present else None
        dweight, *dfeatures = _bwd(grad, rest, weight, weights, present, ctx.mode)
        return None, dweight if ctx.has_weight else None, None, *dfeatures


# ---- gated -------------------------------------------------------------------------------------------------------


def _gated(
    features: Sequence[Tensor], weight: Tensor | None, bias: Tensor | None, present: Tensor | None
) -> tuple[Tensor, Tensor]:
    assert weight is not None
    if present is not None:  # the GEMM and its weight gradient must not see what a missing modality holds
        num_tokens = _num_tokens(features)
        features = [x.expand(*x.shape[:-2], num_tokens, x.shape[-1]) for x in features]
        features = [torch.where(present[..., i, None], x, 0) for i, x in enumerate(features)]
    logits = concat_linear(features, weight, bias)
    first, second = (x.expand(logits.shape) for x in features)
    return _GatedMix.apply(first, second, logits, present)


def _effective_gate(logits: Tensor, present: Tensor | None) -> Tensor:
    gate = logits.sigmoid()
    if present is None:
        return gate
    first = present[..., :1]
    return torch.where(present.all(-1, keepdim=True), gate, first.to(gate.dtype))


def _portable_mix_fwd(first: Tensor, second: Tensor, logits: Tensor, present: Tensor | None) -> tuple[Tensor, Tensor]:
    gate = _effective_gate(logits.to(_weights_dtype(logits.dtype)), present)
    # Missing features are zeros by now, so nothing present gives zero.
    return torch.lerp(second.to(gate.dtype), first.to(gate.dtype), gate).to(first.dtype), gate.to(first.dtype)


def _portable_mix_bwd(
    grad: Tensor, first: Tensor, second: Tensor, logits: Tensor, present: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = _weights_dtype(logits.dtype)
    gate, g = _effective_gate(logits.to(dtype), present), grad.to(dtype)
    dfirst = g * gate
    # g·(first − second)·gate·(1 − gate). Where a modality is missing the gate is 0 or 1, and this is zero.
    dlogits = (first.to(dtype) - second.to(dtype)).mul_(dfirst)
    dlogits.addcmul_(dlogits, gate, value=-1)
    return dfirst.to(grad.dtype), (g - dfirst).to(grad.dtype), dlogits.to(grad.dtype)


_mix_fwd = register_op(
    "gated_mix_fwd(Tensor first, Tensor second, Tensor logits, Tensor? present) -> (Tensor, Tensor)",
    portable=_portable_mix_fwd,
    kernel="mmlm_kernels.fuse_modalities:gated_mix_fwd",
    fake=lambda first, second, logits, present: (logits.new_empty(logits.shape), logits.new_empty(logits.shape)),
)
_mix_bwd = register_op(
    "gated_mix_bwd(Tensor grad, Tensor first, Tensor second, Tensor logits, Tensor? present)"
    " -> (Tensor, Tensor, Tensor)",
    portable=_portable_mix_bwd,
    kernel="mmlm_kernels.fuse_modalities:gated_mix_bwd",
    fake=lambda grad, first, second, logits, present: tuple(logits.new_empty(logits.shape) for _ in range(3)),
)


class _GatedMix(torch.autograd.Function):
    @staticmethod
    def forward(ctx, first, second, logits, present):
        out, gate = _mix_fwd(first, second, logits, present)
        ctx.save_for_backward(first, second, logits, present)
        ctx.mark_non_differentiable(gate)
        return out, gate

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _grad_gate):
        first, second, logits, present = ctx.saved_tensors
        return *_mix_bwd(grad, first, second, logits, present), None
