"""Tables by value: what tells one array of numbers from another, and caches bounded in bytes."""

import base64
from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import wraps
from threading import Lock
from typing import Any, Generic, TypeVar

import numpy as np

from mmlm_fast import _C

V = TypeVar("V")


class ByteCache(Generic[V]):
    """Keep what was used last, up to a number of bytes in all; the very last whatever its size. For any threads.

    Args:
        max_bytes: Of all values.
        size_of: Bytes of a value with its key.
    """

    def __init__(self, max_bytes: int, size_of: Callable[[V], int]) -> None:
        self.max_bytes, self.num_bytes = max_bytes, 0
        self._size_of, self._lock = size_of, Lock()
        self._kept: OrderedDict[Hashable, tuple[V, int]] = OrderedDict()
        self._latest: tuple[Hashable, Any] = (None, None)
        self._generation = 0

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._kept.clear()
            self._latest = (None, None)
            self._generation += 1
            self.num_bytes = 0

    def get(self, key: Hashable, make: Callable[[], V]) -> V:
        """Return the value kept for `key`, or a new one."""
        latest = self._latest
        if latest[0] is key and key is not None:
            return latest[1]
        with self._lock:
            known = self._kept.get(key)
            if known is not None:
                self._kept.move_to_end(key)
                self._latest = (key, known[0])
                return known[0]
        generation = self._generation
        value = make()
        size = self._size_of(value)
        with self._lock:
            if generation != self._generation:  # forgotten in the meantime, and what was made may be of before
                return value
            known = self._kept.setdefault(key, (value, size))
            if known[0] is value:
                self.num_bytes += size
            self._kept.move_to_end(key)
            while self.num_bytes > self.max_bytes and len(self._kept) > 1:
                self.num_bytes -= self._kept.popitem(last=False)[1][1]
            return known[0]


def kept_within(max_bytes: int, size_of: Callable[[Any], int]) -> Callable[[Callable], Callable]:
    """Decorate a function of hashable arguments to keep its results; see `ByteCache`."""

    def decorate(function: Callable) -> Callable:
        cache: ByteCache = ByteCache(max_bytes, size_of)

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            return cache.get((args, tuple(sorted(kwargs.items()))), lambda: function(*args, **kwargs))

        call.cache = cache  # type: ignore[attr-defined]
        return call

    return decorate


class Table:
    """Numbers by value: equal and of one hash where shape and float64 numbers are the same.

    The array given stays the caller's, who may write to it: its numbers are looked at again with each `Table.of`.

    Attributes:
        array: The numbers in float64, read-only.
        least: The least of them and 0; NaN if one is.
    """

    __slots__ = ("_hash", "array", "digest", "least")

    def __init__(self, array: np.ndarray) -> None:
        self.array = np.add(array, 0.0, order="C", dtype=np.float64)  # a copy, without -0
        self.array.setflags(write=False)
        self.digest = (self.array.shape, *_C.digest(self.array))
        self.least = float(self.array.min(initial=0.0))
        self._hash = hash(self.digest)

    @classmethod
    def of(cls, numbers: Any, *, transposed: bool = False) -> "Table":
        """Return the table of an array, or of a CPU tensor; of its transpose where that is asked for."""
        array = numbers if type(numbers) is np.ndarray and numbers.dtype.kind == "f" else _array_of(numbers)
        if not array.flags.c_contiguous:
            array = np.ascontiguousarray(array)
        key = (_C.digest(array), array.shape, array.dtype, transposed)
        return _TABLES.get(key, lambda: cls(array.T if transposed else array))

    @classmethod
    def from_text(cls, text: str) -> "Table":
        """Read back what `text` wrote."""
        shape, _, numbers = text.partition(":")
        array = np.frombuffer(base64.b64decode(numbers), "<f8")
        return cls(array.reshape([int(n) for n in shape.split("x")]))

    def text(self) -> str:
        """Write shape and numbers down, all their bits."""
        numbers = base64.b64encode(self.array.astype("<f8").tobytes()).decode()
        return f"{'x'.join(map(str, self.array.shape))}:{numbers}"

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Table) and self.digest == other.digest)

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple:
        return Table, (self.array,)


class TableError(ValueError):
    """What holds no real numbers."""


def _array_of(numbers: Any) -> np.ndarray:
    if hasattr(numbers, "detach"):
        numbers = numbers.detach().cpu()
        numbers = (numbers if numbers.dtype.itemsize >= 4 else numbers.float()).numpy()
    array = np.asarray(numbers)
    if array.dtype.kind not in "fiub":
        raise TableError(f"a table must hold real numbers, got {type(numbers).__name__} of {array.dtype}")
    return array


_TABLES: ByteCache[Table] = ByteCache(16 * 2**20, lambda table: table.array.nbytes + 512)
