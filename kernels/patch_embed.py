"""Triton kernel for `patchify`: 8-bit pixels to patches. Contract: mmlm_fast/ops/patch_embed.py.

Memory-bound. Floor: a byte read and a number written for each pixel.

Legend: B pictures, C channels, P patch size, m patches a side that a merger joins.
"""

import torch
import triton.language as tl
from torch import Tensor

from mmlm_kernels.launch import ceil_div, kernel, next_power_of_2

TILE = 2048  # pixels of a program


@kernel(
    do_not_specialize=["patches", "width", "rows_of_patches", "stride_b", "stride_c", "stride_y"],
    do_not_specialize_on_alignment=["stride_x"],
)
def _patchify_kernel(pixels_ptr, scales, shifts, out_ptr, patches, width, rows_of_patches, stride_b, stride_c,
                     stride_y, stride_x, UNIT: tl.constexpr, WIDTH_UNIT: tl.constexpr, P: tl.constexpr, M: tl.constexpr,
                     REPEATS: tl.constexpr, C: tl.constexpr, BLOCK_P: tl.constexpr,
                     BLOCK_X: tl.constexpr):  # fmt: skip
    """Part of a row of patches: pixels are read as they lie, along the picture's rows.

    Strides other than that of neighbours in a row are in units of UNIT, the width in those of WIDTH_UNIT: so it is
    known how many pixels can be loaded and stored at once.
    """
    row = tl.program_id(0).to(tl.int64)
    b, y = row // rows_of_patches, row % rows_of_patches
    i, x = tl.arange(0, BLOCK_P), tl.program_id(1) * BLOCK_X + tl.arange(0, BLOCK_X)
    mask = (i < P)[:, None] & (x < width * WIDTH_UNIT)[None, :]
    column, j = x // P, x % P
    block = (y // M) * (width * WIDTH_UNIT // (P * M)) + column // M
    n = b * patches + block * (M * M) + (y % M) * M + column % M
    pixels = pixels_ptr + b * stride_b * UNIT
    pixels += (y * P + i)[:, None] * stride_y * UNIT + x[None, :] * stride_x
    out = out_ptr + (n * (C * REPEATS * P * P) + j)[None, :] + (i * P)[:, None]
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
        rows, block_p = height // patch_size, next_power_of_2(patch_size)
        block_x, width_unit = max(16, TILE // block_p), 16 if width % 16 == 0 else patch_size
        _patchify_kernel[(batch * rows, ceil_div(width, block_x))](
            pixels, tuple(scale), tuple(shift), out, patches, width // width_unit, rows, *(s // unit for s in strides),
            stride_x, UNIT=unit, WIDTH_UNIT=width_unit, P=patch_size, M=merge_size, REPEATS=repeats, C=channels,
            BLOCK_P=block_p, BLOCK_X=block_x,
        )  # fmt: skip
    return out
