"""Make Triton's interpreter trustworthy for bfloat16, or refuse.

The interpreter keeps bf16 as uint16: casts truncate, `tl.dot` and arithmetic work on the bit patterns (triton-lang
issues 10945 and 11585). Here casts round to nearest even, dots widen first, and bf16 arithmetic raises, so that a
kernel that forgets `.to(tl.float32)` fails instead of passing by luck. Loads and stores outside the tensors of a
launch raise: on a GPU they read what lies there, or end the process. And Triton 3.6 with a numpy of after it is
repaired, which is what a machine with a GPU may have.
"""

from collections.abc import Iterable, Iterator
from functools import cache

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_TORCH = {tl.float64: torch.float64, tl.float32: torch.float32, tl.float16: torch.float16, tl.bfloat16: torch.bfloat16}
_BITS = {2: (torch.int16, np.uint16), 4: (torch.int32, np.uint32), 8: (torch.int64, np.uint64)}
_BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor, np.left_shift, np.right_shift)


def _convert_float(values, source, target, rounding_mode, _original=interpreter._convert_float):
    if source not in _TORCH or target not in _TORCH or values.size == 0:
        return _original(values, source, target, rounding_mode)
    bits = bytearray(np.ascontiguousarray(values).tobytes())
    converted = torch.frombuffer(bits, dtype=_TORCH[source]).to(_TORCH[target])
    as_int, as_uint = _BITS[converted.element_size()]
    return converted.view(as_int).numpy().view(as_uint).reshape(np.shape(values))


def _dot(self, a, b, *rest, _original=interpreter.InterpreterBuilder.create_dot):
    def widen(handle):
        return self.cast_impl(handle, tl.float32) if handle.dtype.scalar == tl.bfloat16 else handle

    return _original(self, widen(a), widen(b), *rest)


def _refuse_bf16(name: str) -> None:
    original = getattr(interpreter.InterpreterBuilder, name)

    def guarded(self, *args):
        *operands, function = args
        if function not in _BITWISE and any(
            getattr(getattr(h, "dtype", None), "scalar", None) == tl.bfloat16 for h in operands
        ):
            raise TypeError(f"bf16 {getattr(function, '__name__', name)}: load, then .to(tl.float32), then compute")
        return original(self, *args)

    setattr(interpreter.InterpreterBuilder, name, guarded)


def _patch_lang_tensor(tensor, *scope, _original=interpreter._patch_lang_tensor) -> None:
    """A scalar is an array of one number, of which numpy 2.4 and later make no int: Triton 3.6's loop bounds."""
    _original(tensor, *scope)
    set_attr = scope[0].set_attr if scope else setattr  # 3.5 takes no scope
    set_attr(tensor, "__index__", lambda self: self.handle.data.item())


def _tensors(arguments: Iterable) -> Iterator[torch.Tensor]:
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            yield argument
        elif isinstance(argument, tuple):
            yield from _tensors(argument)


class _Memory:
    """The addresses that the launch under way may touch: from the first to the last number of each of its tensors."""

    ranges = np.empty((0, 2), np.int64)

    @classmethod
    def of_launch(cls, arguments: Iterable) -> None:
        found = []
        for x in _tensors(arguments):
            if x.numel():
                last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
                found.append((x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()))
        cls.ranges = np.array(found, np.int64).reshape(-1, 2)

    @classmethod
    def check(cls, what: str, pointers, mask) -> None:
        addresses = np.atleast_1d(pointers.data).astype(np.int64)
        addresses = addresses[np.broadcast_to(mask.data, addresses.shape).astype(bool)]
        if not addresses.size:
            return
        size = pointers.get_element_ty().primitive_bitwidth // 8
        starts, ends = cls.ranges[:, 0], cls.ranges[:, 1] - size
        if ((starts <= addresses.min()) & (addresses.max() <= ends)).any():  # of one tensor, as they nearly always are
            return
        outside = ~((starts <= addresses[:, None]) & (addresses[:, None] <= ends)).any(1)
        if outside.any():
            nearest = addresses[outside][0] - starts
            nearest = nearest[np.abs(nearest).argmin()] if nearest.size else 0
            raise IndexError(
                f"{what} of {outside.sum()} of {addresses.size} numbers of {size} bytes outside the tensors of the "
                f"launch, the first {nearest} bytes from the start of the nearest one"
            )


class _Language:
    """What of Triton's language the launch under way has replaced; None between launches."""

    replaced: set | None = None


def _patch_lang(fn, _original=interpreter._patch_lang):
    """Triton replaces the language again at each call of a device function, which takes half of a kernel's time."""
    modules = _modules_of(fn)
    if _Language.replaced is not None and modules <= _Language.replaced:
        return None
    scope = _original(fn)
    if _Language.replaced is not None:
        _Language.replaced |= modules
    return scope


@cache
def _modules_of(fn) -> frozenset[str]:
    return frozenset(v.__name__ for v in fn.__globals__.values() if v is tl or v is tl.core)


def _launch(self, *args, _original=interpreter.GridExecutor.__call__, **kwargs):
    before, _Language.replaced = _Language.replaced, set()
    try:
        return _original(self, *args, **kwargs)
    finally:
        _Language.replaced = before


def _numbers(shape) -> tuple:
    return tuple(x.value if isinstance(x, tl.constexpr) else x for x in getattr(shape, "values", shape))


def _block_init(self, element_ty, shape, _original=tl.block_type.__init__, _known={}) -> None:  # noqa: B006
    """Of each shape once: half of what the interpreter does is to describe shapes."""
    key = _numbers(shape)
    if key not in _known:
        _original(self, element_ty, shape)
        _known[key] = self.shape, self.numel
    self.element_ty = element_ty
    self.shape, self.numel = _known[key]
    self.name = f"<{self.shape}, {element_ty}>"


def _tensor_init(self, handle, type, _original=tl.tensor.__init__, _known={}) -> None:  # noqa: B006
    key = _numbers(type.shape) if type.is_block() else ()
    if key not in _known:
        _original(self, handle, type)
        _known[key] = self.shape, self.numel
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = _known[key]


_NUMPY = {dtype.name: interpreter._get_np_dtype(dtype) for dtype in (
    tl.int1, tl.float16, tl.float32, tl.float64, tl.int8, tl.uint8, tl.int16, tl.uint16, tl.int32, tl.uint32, tl.int64,
    tl.uint64, tl.bfloat16,
)}  # fmt: skip


def _get_np_dtype(dtype, _original=interpreter._get_np_dtype):
    """The original makes its table at each call."""
    scalar = getattr(dtype, "element_ty", dtype) if isinstance(dtype, tl.block_type) else dtype
    known = None if isinstance(scalar, tl.pointer_type) else _NUMPY.get(scalar.name)
    return _original(dtype) if known is None else known


def _init_args_hst(self, args, kwargs, _original=interpreter.GridExecutor._init_args_hst):
    on_host, named = _original(self, args, kwargs)
    _Memory.of_launch([*on_host, *named.values()])
    return on_host, named


def _masked_load(self, ptrs, mask, *rest, _original=interpreter.InterpreterBuilder.create_masked_load):
    _Memory.check("load", ptrs, mask)
    return _original(self, ptrs, mask, *rest)


def _masked_store(self, ptrs, value, mask, *rest, _original=interpreter.InterpreterBuilder.create_masked_store):
    _Memory.check("store", ptrs, mask)
    return _original(self, ptrs, value, mask, *rest)


def install() -> None:
    interpreter.GridExecutor.__call__ = _launch
    interpreter._patch_lang = _patch_lang
    tl.block_type.__init__ = _block_init
    tl.tensor.__init__ = _tensor_init
    interpreter._get_np_dtype = _get_np_dtype
    interpreter.GridExecutor._init_args_hst = _init_args_hst
    interpreter.InterpreterBuilder.create_masked_load = _masked_load
    interpreter.InterpreterBuilder.create_masked_store = _masked_store
    interpreter._patch_lang_tensor = _patch_lang_tensor
    interpreter._convert_float = _convert_float
    interpreter.InterpreterBuilder.create_dot = _dot
    for name in ("binary_op", "unary_op", "ternary_op"):
        _refuse_bf16(name)
