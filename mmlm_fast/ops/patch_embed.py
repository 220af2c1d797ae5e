"""Patches from 8-bit pixels: rescaled, normalised and cut in one pass, then one matrix product."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mmlm_fast.ops._native import core, number_type
from mmlm_fast.ops._op import REFERENCE, Op
from mmlm_fast.ops._registry import check_like, register_op

OP = Op("patch_embed", functions=("patchify", "patch_embed"))
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def patchify_ref(
    pixels: Tensor,
    patch_size: int,
    scale: Tensor,
    shift: Tensor,
    merge_size: int = 1,
    repeats: int = 1,
) -> Tensor:
    """Patches of ``pixels·scale + shift``; see `patchify`. In the dtype of `scale`."""
    batch, channels, height, width = pixels.shape
    x = pixels.to(scale.dtype) * scale[:, None, None] + shift[:, None, None]
    p, m = patch_size, merge_size
    x = x.reshape(batch, channels, height // (p * m), m, p, width // (p * m), m, p)
    x = x.permute(0, 2, 5, 3, 6, 1, 4, 7)[..., None, :, :].expand(*[-1] * 6, repeats, -1, -1)
    return x.reshape(batch, height * width // p**2, channels * repeats * p**2)


def patchify(
    pixels: Tensor,
    patch_size: int,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    rescale: float = 1 / 255,
    merge_size: int = 1,
    temporal_patch_size: int = 1,
    channels_last: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Cut pictures into patches of (pixels·rescale − mean)/std.

    Args:
        pixels: uint8 ``[B, C, height, width]``, or ``[B, height, width, C]`` with `channels_last`; any strides.
        patch_size: P; height and width are divisible by P·`merge_size`.
        mean, std, rescale: As in transformers' image processors.
        merge_size: m: the m² patches that a merger joins follow each other, as in Qwen-VL; 1: row by row.
        temporal_patch_size: How often a still picture is repeated in a patch, as in Qwen-VL's ``pixel_values``.
        dtype: Of the result: float32, float16, bfloat16 or float64.

    Returns:
        ``[B, height·width/P², C·temporal·P²]``, each patch in the order (channel, time, y, x): the order of the weight
        of the convolution that it is multiplied with. Computed in float32 and rounded once. No gradient.

    Raises:
        ValueError: for shapes or dtypes that do not fit, or a standard deviation of 0.

    Source: rescale_and_normalize and the patches of transformers' CLIP, SigLIP and Qwen2-VL image processors.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be float32, float16, bfloat16 or float64, got {dtype}")
    _check_pixels(pixels, patch_size * merge_size, mean, std, channels_last)
    if patch_size < 1 or merge_size < 1 or temporal_patch_size < 1:
        raise ValueError(
            f"patch_size, merge_size and temporal_patch_size must be at least 1, got {patch_size}, {merge_size}, "
            f"{temporal_patch_size}"
        )
    if channels_last:
        pixels = pixels.permute(0, 3, 1, 2)
    scale = [rescale / s for s in std]
    shift = [-m / s for m, s in zip(mean, std, strict=True)]
    like = torch.empty(0, dtype=dtype, device=pixels.device)
    if OP.path(like) == REFERENCE:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        table = torch.tensor([scale, shift], dtype=wide, device=pixels.device)
        return patchify_ref(pixels, patch_size, table[0], table[1], merge_size, temporal_patch_size).to(dtype)
    return _patchify(pixels, scale, shift, patch_size, merge_size, temporal_patch_size, dtype)


def _check_pixels(pixels: Tensor, step: int, mean: Sequence[float], std: Sequence[float], channels_last: bool) -> None:
    if not isinstance(pixels, Tensor) or pixels.dtype != torch.uint8 or pixels.dim() != 4:
        got = f"{pixels.dtype} {tuple(pixels.shape)}" if isinstance(pixels, Tensor) else type(pixels).__name__
        raise ValueError(f"pixels must be uint8 [B, C, height, width], got {got}")
    height, width, channels = pixels.shape[1:] if channels_last else (*pixels.shape[2:], pixels.shape[1])
    if step < 1 or height % step or width % step:
        raise ValueError(
            f"height and width must be divisible by patch_size·merge_size = {step}, got {height} × {width}"
        )
    if len(mean) != channels or len(std) != channels:
        raise ValueError(f"mean and std must be {channels} numbers, one a channel, got {len(mean)} and {len(std)}")
    if any(s == 0 for s in std):
        raise ValueError(f"std must not be 0, got {list(std)}")


def patch_embed_ref(
    pixels: Tensor, weight: Tensor, bias: Tensor | None, mean: Sequence[float], std: Sequence[float], rescale: float
) -> Tensor:
    """What an image processor and a convolution do: three passes over the pixels, then the convolution."""
    dtype, channels = weight.dtype, pixels.shape[1]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = pixels.to(wide) * rescale
    means, stds = (torch.tensor(t, dtype=wide, device=pixels.device).view(channels, 1, 1) for t in (mean, std))
    x = ((x - means) / stds).to(dtype)
    if weight.dim() == 5:
        x = x[:, :, None].expand(-1, -1, weight.shape[2], -1, -1)
        return F.conv3d(x, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)
    return F.conv2d(x, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)


def patch_embed(
    pixels: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    rescale: float = 1 / 255,
    channels_last: bool = False,
) -> Tensor:
    """Embed the patches of 8-bit pictures: the processor's rescaling and normalising and the tower's convolution.

    Args:
        pixels, mean, std, rescale, channels_last: As in `patchify`.
        weight: ``[E, C, P, P]`` of a ``Conv2d``, or ``[E, C, T, P, P]`` of a ``Conv3d`` whose T frames are the same
            still picture: its taps are summed first, which is exact and halves the work for T = 2.
        bias: ``[E]`` or None.

    Returns:
        ``[B, patches, E]`` in the dtype of the weight, row by row. Gradients for weight and bias. On a CPU a ``Conv2d``
        stays torch's convolution behind the plain formula, which is as fast.

    Raises:
        ValueError: as `patchify`, or for a weight or bias that does not fit.

    Source: patch_embedding of transformers' CLIP and SigLIP, Qwen2VLPatchEmbed.
    """
    if not isinstance(weight, Tensor) or weight.dim() not in (4, 5) or weight.shape[-1] != weight.shape[-2]:
        got = tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(f"weight must be [E, C, P, P] or [E, C, T, P, P], got {got}")
    if weight.dtype not in DTYPES:
        raise ValueError(f"weight must be floating point, got {weight.dtype}")
    if bias is not None:
        check_like("bias", bias, weight, (weight.shape[0],))
    patch_size = weight.shape[-1]
    _check_pixels(pixels, patch_size, mean, std, channels_last)
    channels = pixels.shape[3 if channels_last else 1]
    if channels != weight.shape[1] or pixels.device != weight.device:
        raise ValueError(
            f"pixels must have {weight.shape[1]} channels on {weight.device}, got {channels} on {pixels.device}"
        )
    if weight.dim() == 4 and pixels.device.type == "cpu":  # torch's convolution is as fast as our passes (measured)
        pixels = pixels.permute(0, 3, 1, 2) if channels_last else pixels
        return patch_embed_ref(pixels, weight, bias, mean, std, rescale)
    patches = patchify(
        pixels, patch_size, mean=mean, std=std, rescale=rescale, channels_last=channels_last, dtype=weight.dtype
    )
    taps = weight.sum(2) if weight.dim() == 5 else weight
    return F.linear(patches, taps.flatten(1), bias)


def _native(
    pixels: Tensor,
    scale: list[float],
    shift: list[float],
    patch_size: int,
    merge_size: int,
    repeats: int,
    dtype: torch.dtype,
) -> Tensor:
    batch, channels, height, width = pixels.shape
    out = pixels.new_empty(batch, height * width // patch_size**2, channels * repeats * patch_size**2, dtype=dtype)
    table = torch.tensor([scale, shift], dtype=torch.float32)
    if out.numel():
        core().patchify(
            number_type(out), (batch, channels, height, width), pixels.stride(), patch_size, merge_size, repeats,
            pixels.data_ptr(), table[0].data_ptr(), table[1].data_ptr(), out.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
    return out


def _fake(pixels, scale, shift, patch_size, merge_size, repeats, dtype):
    batch, channels, height, width = pixels.shape
    return pixels.new_empty(batch, height * width // patch_size**2, channels * repeats * patch_size**2, dtype=dtype)


_patchify = register_op("patchify", native=_native, fake=_fake)
