"""Elementary functions that tables are made of, in float32 or float64.

Peers make theirs with torch, whose float32 logarithms and cosines differ from numpy's in the last bit. So torch's are
used as soon as torch is loaded, for torchaudio's bits; without torch numpy's, in float64 and rounded once.
"""

import sys
from typing import Any

import numpy as np

from mmlm_fast.audio.tables import ByteCache

Array = np.ndarray


class NumpyFunctions:
    """numpy's, computed in float64 whatever the dtype."""

    def cos(self, x: Array) -> Array:
        return np.cos(x.astype(np.float64)).astype(x.dtype)

    def sin(self, x: Array) -> Array:
        return np.sin(x.astype(np.float64)).astype(x.dtype)

    def exp(self, x: Array) -> Array:
        return np.exp(x.astype(np.float64)).astype(x.dtype)

    def log(self, x: Array) -> Array:
        return np.log(x.astype(np.float64)).astype(x.dtype)

    def power(self, base: Any, exponent: Any) -> Array:
        dtype = getattr(base, "dtype", None) or exponent.dtype
        return np.power(np.asarray(base, np.float64), np.asarray(exponent, np.float64)).astype(dtype)

    def linspace(self, first: float, last: float, count: int, dtype: str) -> Array:
        # torch's: each half counted from its own end, products and sums rounded together.
        kind = np.dtype(dtype).type
        a, b, i = kind(first), kind(last), np.arange(count)
        step = np.float64((b - a) / kind(max(count - 1, 1)))
        return np.where(i < count // 2, np.float64(a) + step * i, np.float64(b) - step * (count - 1 - i)).astype(dtype)

    def cosine_window(self, length: int, periodic: bool, alpha: float, dtype: str) -> Array:
        # torch's, step by step in its dtype.
        phase = np.arange(length, dtype=dtype) * np.dtype(dtype).type(2 * np.pi / max(length - (not periodic), 1))
        return np.ones(1, dtype) if length == 1 else self.cos(phase) * np.dtype(dtype).type(alpha - 1) + alpha


_functions: Any = NumpyFunctions()
_with_torch = False
# What is kept of tables, to be forgotten when the functions change.
DEPENDENT: list[ByteCache] = []


def use(functions: Any) -> None:
    """Make tables with these functions from now on."""
    global _functions, _with_torch
    _functions, _with_torch = functions, True
    for cache in DEPENDENT:
        cache.clear()


def functions() -> Any:
    """Return torch's functions where torch is loaded, else numpy's."""
    if not _with_torch and hasattr(sys.modules.get("torch"), "compile"):  # not in the midst of its import
        import mmlm_fast.audio.elementary_torch  # noqa: F401
    return _functions
