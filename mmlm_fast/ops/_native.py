"""How tensors go to the native core: addresses, strides, a number type it knows."""

from functools import cache
from typing import Any

from torch import Tensor, bfloat16, float32

NATIVE_TYPES = {float32: 0, bfloat16: 1}

NONE = (0, 0)  # rows that are not given


@cache
def core() -> Any:
    """The extension module, loaded by the first call that needs it."""
    from mmlm_fast import _C

    return _C


def number_type(x: Tensor) -> int:
    return NATIVE_TYPES[x.dtype]


def as_rows(x: Tensor) -> Tensor:
    """``[..., size]`` whose rows `rows` can name: one stride between them, dense. A copy only where no view does it."""
    if x.is_contiguous():
        return x
    x = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1])
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def rows(x: Tensor | None) -> tuple[int, int]:
    """Address and stride of the rows of what `as_rows` returned."""
    if x is None or not x.numel():
        return NONE
    return x.data_ptr(), x.shape[-1] if x.is_contiguous() else x.stride(-2)


def num_rows(x: Tensor) -> int:
    return x.numel() // x.shape[-1]


def floats(x: Tensor | None) -> Tensor | None:
    """A small parameter in float32, dense."""
    if x is None or (x.dtype == float32 and x.is_contiguous()):
        return x
    return x.to(float32).contiguous()


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
