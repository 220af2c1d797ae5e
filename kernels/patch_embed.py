"""Triton kernel for `patchify`: 8-bit pixels to patches. Contract: mmlm_fast/ops/patch_embed.py.

Memory-bound. Floor: a byte read and a number written for each pixel.

Legend: B pictures, C channels, P patch size, m patches a side that a merger joins.
"""

import torch
import triton.language as tl
from torch import Tensor

from mmlm_kernels.launch import kernel, next_power_of_2


@kernel(
    do_not_specialize=["patches", "columns_of_patches", "stride_b", "stride_c", "stride_y"],
    do_not_specialize_on_alignment=["stride_x"],
)
def _patchify_kernel(pixels_ptr, scales, shifts, out_ptr, patches, columns_of_patches, stride_b, stride_c, stride_y,
                     stride_x, UNIT: tl.constexpr, P: tl.constexpr, M: tl.constexpr, REPEATS: tl.constexpr,
                     C: tl.constexpr, BLOCK_P: tl.constexpr):  # fmt: skip
    """Strides other than that of neighbours in a row are in units of UNIT, which lets loads be wide."""
    patch = tl.program_id(0).to(tl.int64)
    n = patch % patches
    inside, block = n % (M * M), n // (M * M)
    blocks_x = columns_of_patches // M
    y0 = ((block // blocks_x) * M + inside // M) * P
    x0 = ((block % blocks_x) * M + inside % M) * P
    i, j = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_P)
    mask = (i < P)[:, None] & (j < P)[None, :]
    pixels = pixels_ptr + patch // patches * stride_b * UNIT
    pixels += (y0 + i)[:, None] * stride_y * UNIT + (x0 + j)[None, :] * stride_x
    out = out_ptr + patch * (C * REPEATS * P * P) + i[:, None] * P + j[None, :]
    for c in tl.static_range(C):
        value = tl.load(pixels, mask=mask, other=0).to(tl.float32) * scales[c] + shifts[c]
        value = value.to(out_ptr.dtype.element_ty)
        for k in tl.static_range(REPEATS):
            tl.store(out + (c * REPEATS + k) * P * P, value, mask=mask)
        pixels += stride_c * UNIT


def patchify(
    pixels: Tensor,
    scale: list[float],
    shift: list[float],
    patch_size: int,
    merge_size: int,
    repeats: int,
    dtype: torch.dtype,
) -> Tensor:
    batch, channels, height, width = pixels.shape
    patches = height * width // patch_size**2
    out = pixels.new_empty(batch, patches, channels * repeats * patch_size**2, dtype=dtype)
    if out.numel():
        *strides, stride_x = pixels.stride()
        unit = 16 if all(stride % 16 == 0 for stride in strides) else 1
        _patchify_kernel[(batch * patches,)](
            pixels, tuple(scale), tuple(shift), out, patches, width // patch_size, *(s // unit for s in strides),
            stride_x, UNIT=unit, P=patch_size, M=merge_size, REPEATS=repeats, C=channels,
            BLOCK_P=next_power_of_2(patch_size),
        )  # fmt: skip
    return out
