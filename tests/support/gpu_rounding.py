"""Let Triton's interpreter round float32 as a GPU does, which its numpy does not.

Products that ask for tf32, or for three of them, are of numbers rounded to 10 bits, and their sums are cut off, 8 terms
at a time, as tensor cores do it. exp, exp2, division and 1/√ are as far off as their approximate instructions may be
(PTX ISA: 2 ulp; a product with log₂ e before exp2), and exp2 flushes what is below 2⁻¹²⁶. What a float32 test finds in
this mode it would find on a GPU.

Turned on by MMLM_FAST_GPU_ROUNDING=1 (tests/conftest.py).
"""

import os

import numpy as np
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle

IS_ON = os.environ.get("MMLM_FAST_GPU_ROUNDING") == "1"
TERMS = 8  # of a sum of tensor cores before it is cut off
LOG2E = np.float32(1.4426950408889634)
_draw = np.random.default_rng(0)


def _off_by_an_ulp(exact: np.ndarray) -> np.ndarray:
    """From float64; a number of float32, such as exp2(0) and 1 / 1, stays what it is, as it does on a GPU."""
    off = (exact * (1 + _draw.uniform(-1, 1, np.shape(exact)) * 2.0**-23)).astype(np.float32)
    return np.where(exact == exact.astype(np.float32), exact.astype(np.float32), off)


def _float32_alone(function):
    """The function where all operands are float32, numpy's own where not; without its warnings."""

    def call(original, *operands):
        with np.errstate(all="ignore"):
            exact = all(np.asarray(x).dtype == np.float32 for x in operands)
            return function(*operands) if exact else original(*operands)

    return call


@_float32_alone
def _exp2(x):
    y = _off_by_an_ulp(np.exp2(np.asarray(x, np.float64)))
    return np.where(np.abs(y) < 2.0**-126, np.float32(0), y)


@_float32_alone
def _exp(x):
    return _off_by_an_ulp(np.exp2((x * LOG2E).astype(np.float64)))


@_float32_alone
def _divide(a, b):
    return _off_by_an_ulp(np.divide(np.asarray(a, np.float64), b))


@_float32_alone
def _rsqrt(x):
    return _off_by_an_ulp(1 / np.sqrt(np.asarray(x, np.float64)))


def _tf32(x: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


def _towards_zero(x: np.ndarray) -> np.ndarray:
    y = x.astype(np.float32)
    is_beyond = (np.abs(y.astype(np.float64)) > np.abs(x)) & np.isfinite(y)
    return np.where(is_beyond, np.nextafter(y, np.float32(0)), y)


def _tensor_core(a: np.ndarray, b: np.ndarray, total: np.ndarray) -> np.ndarray:
    a, b = a.astype(np.float64), b.astype(np.float64)
    for k in range(0, a.shape[-1], TERMS):
        total = _towards_zero(total.astype(np.float64) + a[..., k : k + TERMS] @ b[..., k : k + TERMS, :])
    return total


def _dot(self, a, b, d, precision, *rest, _original=interpreter.InterpreterBuilder.create_dot):
    name = str(precision).upper()
    if "TF32" not in name or a.data.dtype != np.float32 or b.data.dtype != np.float32:
        return _original(self, a, b, d, precision, *rest)
    with np.errstate(all="ignore"):
        large_a, large_b = _tf32(a.data), _tf32(b.data)
        total = np.zeros(np.shape(d.data), np.float32)
        if "X3" in name:
            total = _tensor_core(_tf32(a.data - large_a), large_b, total)
            total = _tensor_core(large_a, _tf32(b.data - large_b), total)
            total = np.where(np.isnan(total), np.float32(0), total)  # as Triton does: infinities have no small part
        total = _tensor_core(large_a, large_b, total)
        return TensorHandle((total + d.data).astype(np.float32), d.dtype.scalar)


def install() -> None:
    """Once, after `interpreter.install`, whose product it takes for other types."""
    builder = interpreter.InterpreterBuilder
    builder.create_exp = lambda self, x: self.unary_op(x, lambda v: _exp(np.exp, v))
    builder.create_exp2 = lambda self, x: self.unary_op(x, lambda v: _exp2(np.exp2, v))
    builder.create_fdiv = lambda self, a, b: self.binary_op(a, b, lambda v, w: _divide(np.divide, v, w))
    builder.create_rsqrt = lambda self, x: self.unary_op(x, lambda v: _rsqrt(lambda u: 1 / np.sqrt(u), v))
    original = builder.create_dot
    builder.create_dot = lambda self, *args: _dot(self, *args, _original=original)
