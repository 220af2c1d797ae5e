"""Make Triton's interpreter trustworthy for bfloat16, or refuse.

The interpreter keeps bf16 as uint16: casts truncate, `tl.dot` and arithmetic work on the bit patterns (triton-lang
issues 10945 and 11585). Here casts round to nearest even, dots widen first, and bf16 arithmetic raises, so that a
kernel that forgets `.to(tl.float32)` fails instead of passing by luck. And Triton 3.6 with a numpy of after it is
repaired, which is what a machine with a GPU may have.
"""

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


def install() -> None:
    interpreter._patch_lang_tensor = _patch_lang_tensor
    interpreter._convert_float = _convert_float
    interpreter.InterpreterBuilder.create_dot = _dot
    for name in ("binary_op", "unary_op", "ternary_op"):
        _refuse_bf16(name)
