"""Add a branch to the residual stream and normalise the sum, in one pass."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmlm_fast.ops._derivatives import differentiable, recorded, unseen
from mmlm_fast.ops._native import address, as_rows, core, floats, num_rows, number_type, rows
from mmlm_fast.ops._op import REFERENCE, Op
from mmlm_fast.ops._registry import check_floating, plain_float, register_op

KINDS = ("rms", "layer")
OP = Op("add_norm", smallest={"rms": 2**19, "layer": 2**20})
MAX_KERNEL_SIZE = 8192  # a row stays in a program's registers


def add_norm_ref(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    kind: str = "rms",
    eps: float = 1e-6,
    offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The normalised sum and the sum; see `add_norm`."""
    total = x if residual is None else x + residual
    wide = total if total.dtype == torch.float64 else total.float()
    weight, bias = (None if t is None else t.to(wide.dtype) for t in (weight, bias))
    if weight is not None:
        weight = weight + offset
    if kind == "layer":
        return F.layer_norm(wide, wide.shape[-1:], weight, bias, eps).to(total.dtype), total
    out = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    out = out if weight is None else out * weight
    return (out if bias is None else out + bias).to(total.dtype), total


def add_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    kind: str = "rms",
    eps: float = 1e-6,
    offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Compute r = x + residual and y = norm(r)·(offset + weight) + bias.

    ``kind="rms"``: r / √(mean(r²) + eps). ``kind="layer"``: (r − mean) / √(var + eps).

    Args:
        x: ``[..., H]``, float32 / float16 / bfloat16 / float64: the output of attention or of an MLP.
        residual: Like `x`; where dtypes differ both are promoted. None: r is x.
        weight, bias: ``[H]`` in the dtype of the sum or float32, or None.
        kind: ``rms`` or ``layer``.
        eps: Under the root.
        offset: Added to the weight: 1.0 for Gemma.

    Returns:
        ``(y, r)``, shaped like `x`, in the dtype of the sum; y is computed in float32 from the rounded r, and rounded
        once. Kept for the backward pass: r and the weight, nothing else.

    Raises:
        ValueError: for shapes, dtypes or devices that do not go together, or an unknown kind.

    Source: RMSNorm (Zhang & Sennrich 2019), LayerNorm (Ba et al. 2016), in transformers' LlamaRMSNorm, Gemma3RMSNorm
    (offset 1) and torch.nn.LayerNorm.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    check_floating("x", x)
    if x.dim() < 1 or x.shape[-1] == 0:
        raise ValueError(f"x must be [..., H] with H of at least 1, got shape {tuple(x.shape)}")
    if residual is not None:
        check_floating("residual", residual)
        if residual.shape != x.shape or residual.device != x.device:
            raise ValueError(
                f"residual must have shape {tuple(x.shape)} on {x.device}, got {tuple(residual.shape)} on "
                f"{residual.device}"
            )
        if residual.dtype != x.dtype:
            dtype = torch.promote_types(x.dtype, residual.dtype)
            x, residual = x.to(dtype), residual.to(dtype)
    check_parameters(x, x.shape[-1], weight=weight, bias=bias)
    fits = not x.is_cuda or x.shape[-1] <= MAX_KERNEL_SIZE
    if OP.path(x, kind=kind, fits=fits) == REFERENCE:
        return add_norm_ref(x, residual, weight, bias, kind, eps, offset)
    arguments = (weight, bias, kind == "layer", plain_float(eps), plain_float(offset))
    if residual is None:
        return recorded(_AddNorm, x, None, *arguments)[0], x
    return recorded(_AddNorm, x, residual, *arguments)


def check_parameters(like: Tensor, size: int, **parameters: Tensor | None) -> None:
    """Each is ``[size]`` in the dtype of `like` or float32, or None."""
    for name, parameter in parameters.items():
        if parameter is None:
            continue
        check_floating(name, parameter)
        if tuple(parameter.shape) != (size,) or parameter.device != like.device:
            raise ValueError(
                f"{name} must have shape ({size},) on {like.device}, got {tuple(parameter.shape)} on {parameter.device}"
            )
        if parameter.dtype not in (like.dtype, torch.float32):
            raise ValueError(f"{name} must be {like.dtype} or float32, got {parameter.dtype}")


def with_offset(weight: Tensor | None, offset: float) -> Tensor | None:
    weight = floats(weight)
    return weight if weight is None or offset == 0 else weight + offset


def _native_fwd(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    is_layer: bool,
    eps: float,
    offset: float,
) -> tuple[Tensor, Tensor]:
    flat, out = as_rows(x), torch.empty_like(x, memory_format=torch.contiguous_format)
    other = None if residual is None else as_rows(residual)
    total = x.new_empty(0) if residual is None else torch.empty_like(out)
    weight, bias = with_offset(weight, offset), floats(bias)
    core().add_norm_fwd(
        number_type(x), num_rows(x), x.shape[-1], is_layer, address(weight), address(bias), eps, rows(flat),
        rows(other), rows(total), rows(out), torch.get_num_threads(),
    )  # fmt: skip
    return out, total


def _native_bwd(
    grad: Tensor | None,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor | None,
    bias_dtype: torch.dtype | None,
    is_layer: bool,
    eps: float,
    offset: float,
) -> tuple[Tensor, Tensor, Tensor]:
    flat, dx = as_rows(total), torch.empty_like(total, memory_format=torch.contiguous_format)
    size = total.shape[-1]
    grad, grad_total = (None if g is None else as_rows(g) for g in (grad, grad_total))
    wide = with_offset(weight, offset)
    dweight = None if weight is None else flat.new_zeros(size, dtype=torch.float32)
    dbias = None if bias_dtype is None else flat.new_zeros(size, dtype=torch.float32)
    core().add_norm_bwd(
        number_type(total), num_rows(total), size, is_layer, address(wide), eps, rows(flat), rows(grad),
        rows(grad_total), rows(dx), address(dweight), address(dbias), torch.get_num_threads(),
    )  # fmt: skip
    return (
        dx,
        total.new_empty(0) if dweight is None or weight is None else dweight.to(weight.dtype),
        total.new_empty(0) if dbias is None else dbias.to(bias_dtype),
    )


def _fake_fwd(x, residual, weight, bias, is_layer, eps, offset):
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    return out, x.new_empty(0) if residual is None else torch.empty_like(out)


def _fake_bwd(grad, grad_total, total, weight, bias_dtype, is_layer, eps, offset):
    return (
        torch.empty_like(total, memory_format=torch.contiguous_format),
        total.new_empty(0) if weight is None else weight.new_empty(weight.shape),
        total.new_empty(0) if bias_dtype is None else total.new_empty(total.shape[-1], dtype=bias_dtype),
    )


_fwd = register_op("add_norm_fwd", native=_native_fwd, fake=_fake_fwd)
_bwd = register_op("add_norm_bwd", native=_native_bwd, fake=_fake_bwd)


def _again(ctx, grads, total, weight):
    is_layer, eps, offset = ctx.options
    bias = None if ctx.bias_dtype is None else unseen(total.shape[-1:], total.new_empty(0, dtype=ctx.bias_dtype))
    out, _ = add_norm_ref(total, None, weight, bias, KINDS[is_layer], eps, offset)
    return (out, total if ctx.has_residual else None), (total, total, weight, bias)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, bias, is_layer, eps, offset):
        ctx.set_materialize_grads(False)
        out, total = _fwd(x, residual, weight, bias, is_layer, eps, offset)
        ctx.has_residual, ctx.options = residual is not None, (is_layer, eps, offset)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(x if residual is None else total, weight)
        return out, total

    @staticmethod
    @differentiable(_again)
    def backward(ctx, grad, grad_total):
        total, weight = ctx.saved_tensors
        if not ctx.has_residual:
            grad_total = None
        if grad is None:
            return grad_total, grad_total, None, None, None, None, None
        dx, dweight, dbias = _bwd(grad, grad_total, total, weight, ctx.bias_dtype, *ctx.options)
        return (
            dx,
            dx if ctx.has_residual else None,
            None if weight is None else dweight,
            None if ctx.bias_dtype is None else dbias,
            None,
            None,
            None,
        )
