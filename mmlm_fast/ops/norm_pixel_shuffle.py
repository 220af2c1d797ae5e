"""Join r × r neighbouring patches into one token (space to depth), with the norm before or behind it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmlm_fast.ops._derivatives import differentiable, recorded, unseen
from mmlm_fast.ops._native import address, core, floats, number_type, rows
from mmlm_fast.ops._op import REFERENCE, Op
from mmlm_fast.ops._registry import check_floating, plain_float, register_op
from mmlm_fast.ops.add_norm import KINDS, MAX_KERNEL_SIZE, add_norm_ref, check_parameters

OP = Op("norm_pixel_shuffle", smallest=2**20, functions=("norm_pixel_shuffle", "patch_merge"))
NORM_AT = ("none", "before", "after")  # in the order of the native core


def gather_ref(
    x: Tensor,
    index: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: str | None = None,
    norm_at: str = "before",
    channels_first: bool = False,
    eps: float = 1e-6,
) -> Tensor:
    """Rows of x ``[N, C]`` joined by index ``[M, K]`` to ``[M, K·C]``."""
    if norm is not None and norm_at == "before":
        x = add_norm_ref(x, None, weight, bias, norm, eps)[0]
    out = x[index]  # [M, K, C]
    out = (out.transpose(1, 2) if channels_first else out).flatten(1)
    if norm is not None and norm_at == "after":
        out = add_norm_ref(out, None, weight, bias, norm, eps)[0]
    return out


def norm_pixel_shuffle_ref(
    x: Tensor,
    factor: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: str | None = None,
    norm_at: str = "before",
    channels_first: bool = False,
    eps: float = 1e-6,
) -> Tensor:
    """The views, permutation and copy of transformers' `pixel_shuffle`; see `norm_pixel_shuffle`."""
    if norm is not None and norm_at == "before":
        x = add_norm_ref(x, None, weight, bias, norm, eps)[0]
    batch, height, width, size = x.shape
    x = x.reshape(batch, height // factor, factor, width // factor, factor, size)
    x = x.permute(0, 1, 3, 5, 2, 4) if channels_first else x.permute(0, 1, 3, 2, 4, 5)
    x = x.reshape(batch, height * width // factor**2, size * factor**2)
    if norm is not None and norm_at == "after":
        x = add_norm_ref(x, None, weight, bias, norm, eps)[0]
    return x


def norm_pixel_shuffle(
    x: Tensor,
    factor: int,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: str | None = None,
    norm_at: str = "before",
    channels_first: bool = False,
    eps: float = 1e-6,
) -> Tensor:
    """Join each factor × factor square of patches into one token, and normalise patches or tokens.

    Args:
        x: ``[B, height, width, C]``, in patches; both divisible by `factor`.
        factor: r.
        weight, bias: Of the norm: ``[C]`` before, ``[r²C]`` behind; in the dtype of `x` or float32, or None.
        norm: ``layer``, ``rms`` or None.
        norm_at: ``before`` (each patch) or ``after`` (each joined token).
        channels_first: Order within a token: (channel, y, x), as ``unfold`` makes it (Mistral 3); else (y, x, channel).
        eps: Of the norm.

    Returns:
        ``[B, height·width/r², r²C]``, computed in float32 and rounded once. Kept for the backward pass: `x` and the
        weight where there is a norm, else nothing of that size.

    Raises:
        ValueError: for shapes, dtypes or devices that do not go together.

    Source: pixel_shuffle and multi_modal_projector of transformers' InternVL (layer norm behind), Idefics3 / SmolVLM
    (none), Llama 4 (none).
    """
    check_floating("x", x)
    if x.dim() != 4 or factor < 1 or x.shape[1] % factor or x.shape[2] % factor:
        raise ValueError(
            f"x must be [B, height, width, C] with height and width divisible by factor {factor}, got {tuple(x.shape)}"
        )
    _check_norm(x, factor**2, weight, bias, norm, norm_at)
    if OP.path(x, fits=not _is_too_wide(x, factor, norm, norm_at)) == REFERENCE:
        return norm_pixel_shuffle_ref(x, factor, weight, bias, norm, norm_at, channels_first, eps)
    batch, height, width, size = x.shape
    index = grid_index(height, width, factor, x.device)
    if batch != 1:
        index = (torch.arange(batch, device=x.device)[:, None, None] * (height * width) + index).flatten(0, 1)
    out = _gather(x.reshape(batch * height * width, size), index, weight, bias, norm, norm_at, channels_first, eps)
    return out.view(batch, height * width // factor**2, size * factor**2)


def patch_merge(
    x: Tensor,
    factor: int,
    sizes: Sequence[tuple[int, int]] | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: str | None = None,
    norm_at: str = "before",
    channels_first: bool = False,
    eps: float = 1e-6,
) -> Tensor:
    """`norm_pixel_shuffle` of the packed patches of pictures of different sizes.

    Args:
        x: ``[N, C]``: the patches of all pictures, each row by row.
        factor: r.
        sizes: (height, width) of each picture in patches, numbers on the host; their products sum to N. None: the r²
            patches of a token already follow each other, as in Qwen2-VL.
        weight, bias, norm, norm_at, channels_first, eps: As in `norm_pixel_shuffle`.

    Returns:
        ``[N/r², r²C]``.

    Raises:
        ValueError: for shapes, dtypes or devices that do not go together.

    Source: PatchMerger of transformers' Qwen2-VL (layer norm before), Qwen2.5-VL (rms before), Qwen3-VL (either);
    Mistral3PatchMerger (channels first).
    """
    check_floating("x", x)
    parts = factor**2
    if x.dim() != 2 or factor < 1 or x.shape[0] % parts:
        raise ValueError(f"x must be [N, C] with N divisible by {parts}, got {tuple(x.shape)}")
    if isinstance(sizes, Tensor):
        if sizes.is_cuda:
            raise ValueError(
                "sizes must be numbers on the host, got a CUDA tensor: reading it would wait for the device"
            )
        sizes = sizes.tolist()
    if sizes is not None:
        sizes = [(int(h), int(w)) for h, w in sizes]
        if any(h % factor or w % factor for h, w in sizes) or sum(h * w for h, w in sizes) != x.shape[0]:
            raise ValueError(
                f"sizes must be divisible by factor {factor} and hold {x.shape[0]} patches together, got {sizes}"
            )
    _check_norm(x, parts, weight, bias, norm, norm_at)
    if sizes is None:
        index = torch.arange(x.shape[0], device=x.device).view(-1, parts)
    else:
        first, pieces = 0, [torch.empty(0, parts, dtype=torch.int64, device=x.device)]
        for height, width in sizes:
            pieces.append(grid_index(height, width, factor, x.device) + first)
            first += height * width
        index = torch.cat(pieces)
    if OP.path(x, fits=not _is_too_wide(x, factor, norm, norm_at)) == REFERENCE:
        return gather_ref(x, index, weight, bias, norm, norm_at, channels_first, eps)
    return _gather(x, index, weight, bias, norm, norm_at, channels_first, eps)


def _check_norm(x, parts, weight, bias, norm, norm_at):
    if norm not in (None, "layer", "rms"):
        raise ValueError(f"norm must be layer, rms or None, got {norm!r}")
    if norm_at not in ("before", "after"):
        raise ValueError(f"norm_at must be before or after, got {norm_at!r}")
    if x.shape[-1] == 0:
        raise ValueError(f"x must have a last size of at least 1, got {tuple(x.shape)}")
    if norm is None and (weight is not None or bias is not None):
        raise ValueError("weight and bias belong to a norm, got norm None")
    check_parameters(x, x.shape[-1] * (parts if norm_at == "after" else 1), weight=weight, bias=bias)


def _is_too_wide(x: Tensor, factor: int, norm: str | None, norm_at: str) -> bool:
    """For the CUDA kernel, whose programs hold what is normalised."""
    return x.is_cuda and norm is not None and x.shape[-1] * (factor**2 if norm_at == "after" else 1) > MAX_KERNEL_SIZE


def grid_index(height: int, width: int, factor: int, device: torch.device) -> Tensor:
    """``[height·width/r², r²]``: the patches of each square, row by row."""
    grid = torch.arange(height * width, device=device).view(height // factor, factor, width // factor, factor)
    return grid.transpose(1, 2).reshape(-1, factor**2)


def _gather(x, index, weight, bias, norm, norm_at, channels_first, eps):
    at = "none" if norm is None else norm_at
    return recorded(_NormPixelShuffle, x, weight, bias, index, at, norm == "layer", channels_first, plain_float(eps))


def _native_fwd(
    x: Tensor,
    index: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    norm_at: str,
    is_layer: bool,
    channels_first: bool,
    eps: float,
) -> Tensor:
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = x.new_empty(index.shape[0], index.shape[1] * x.shape[1])
    weight, bias = floats(weight), floats(bias)
    core().norm_pixel_shuffle_fwd(
        number_type(x), index.shape[0], x.shape[1], index.shape[1], index.data_ptr(), channels_first,
        NORM_AT.index(norm_at), is_layer, address(weight), address(bias), eps, rows(x), rows(out),
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def _native_bwd(
    grad: Tensor,
    x: Tensor | None,
    index: Tensor,
    weight: Tensor | None,
    bias_dtype: torch.dtype | None,
    norm_at: str,
    is_layer: bool,
    channels_first: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    size = grad.shape[1] // index.shape[1]
    if x is not None:
        x = x if x.stride(-1) == 1 else x.contiguous()
    dx, wide = grad.new_empty(index.numel(), size), floats(weight)
    width = grad.shape[1] if norm_at == "after" else size
    dweight = None if weight is None else grad.new_zeros(width, dtype=torch.float32)
    dbias = None if bias_dtype is None else grad.new_zeros(width, dtype=torch.float32)
    core().norm_pixel_shuffle_bwd(
        number_type(grad), index.shape[0], size, index.shape[1], index.data_ptr(), channels_first,
        NORM_AT.index(norm_at), is_layer, address(wide), eps, rows(x), rows(grad), rows(dx), address(dweight),
        address(dbias), torch.get_num_threads(),
    )  # fmt: skip
    return (
        dx,
        grad.new_empty(0) if dweight is None or weight is None else dweight.to(weight.dtype),
        grad.new_empty(0) if dbias is None else dbias.to(bias_dtype),
    )


def _fake_bwd(grad, x, index, weight, bias_dtype, norm_at, is_layer, channels_first, eps):
    size = grad.shape[1] // index.shape[1]
    width = grad.shape[1] if norm_at == "after" else size
    return (
        grad.new_empty(index.numel(), size),
        grad.new_empty(0) if weight is None else weight.new_empty(weight.shape),
        grad.new_empty(0) if bias_dtype is None else grad.new_empty(width, dtype=bias_dtype),
    )


_fwd = register_op(
    "norm_pixel_shuffle_fwd",
    native=_native_fwd,
    fake=lambda x, index, *_: x.new_empty(index.shape[0], index.shape[1] * x.shape[1]),
)
# `index` is a permutation of the rows of x; x is given only where there is a norm.
_bwd = register_op("norm_pixel_shuffle_bwd", native=_native_bwd, fake=_fake_bwd)


def _again(ctx, grads, x, weight, index):
    norm_at, is_layer, channels_first, eps = ctx.options
    (grad,) = grads
    x = unseen((index.numel(), grad.shape[1] // index.shape[1]), grad) if x is None else x
    width = x.shape[1] * (index.shape[1] if norm_at == "after" else 1)
    bias = None if ctx.bias_dtype is None else unseen((width,), x.new_empty(0, dtype=ctx.bias_dtype))
    norm = None if norm_at == "none" else KINDS[is_layer]
    return (gather_ref(x, index, weight, bias, norm, norm_at, channels_first, eps),), (x, weight, bias)


class _NormPixelShuffle(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, index, norm_at, is_layer, channels_first, eps):
        ctx.set_materialize_grads(False)
        ctx.options = (norm_at, is_layer, channels_first, eps)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(None if norm_at == "none" else x, weight, index)
        return _fwd(x, index, weight, bias, *ctx.options)

    @staticmethod
    @differentiable(_again)
    def backward(ctx, grad):
        x, weight, index = ctx.saved_tensors
        dx, dweight, dbias = _bwd(grad, x, index, weight, ctx.bias_dtype, *ctx.options)
        return (
            dx,
            None if weight is None else dweight,
            None if ctx.bias_dtype is None else dbias,
            None, None, None, None, None,
        )  # fmt: skip
