"""What a header states of a file's length, and the bytes that it is read from."""

import struct
from dataclasses import dataclass, field
from typing import BinaryIO

# Sizes near 2^31 and 2^32 and round billions are what programs write who do not know the length yet.
NEAR_THE_TOP = 1 << 13
BILLION = 10**9


@dataclass(frozen=True)
class Stated:
    num_samples: int = -1  # a channel; -1: not known
    rate: int = 0  # of these samples, where it may differ from the decoder's
    is_exact: bool = False  # decoders give as many or have lost some; of lossy codecs they differ by a frame
    is_padded: bool = False  # what the last frames hold beyond it is no part of the clip
    problem: str | None = None  # what its sizes say is wrong with it
    is_guessed: bool = False  # libsndfile guesses the length, stops there, and is not to be believed
    is_unknown: bool = False  # the header has a placeholder where the length belongs
    patch: tuple[int, bytes] | None = None  # bytes to read at a place in the file, for decoders that do not know it
    end: int = -1  # where the file ends and something else may follow; -1: not known
    parts: tuple[tuple[int, int], ...] = field(default=())  # of a chained file: first byte and end of each


class Bytes:
    """A range of a file, read at absolute places; what is not there reads as less."""

    def __init__(self, file: BinaryIO, start: int, end: int) -> None:
        self.file, self.start, self.size = file, start, end - start

    def at(self, place: int, count: int) -> bytes:
        if not 0 <= place < self.size:
            return b""
        self.file.seek(self.start + place)
        return self.file.read(min(count, self.size - place))

    def number(self, place: int, kind: str) -> int:
        held = self.at(place, struct.calcsize(kind))
        return struct.unpack(kind, held)[0] if len(held) == struct.calcsize(kind) else 0


def is_placeholder(size: int) -> bool:
    return is_near_the_top(size) or (size >= BILLION and size % (BILLION // 10) == 0)


def is_near_the_top(size: int) -> bool:
    return any(top - NEAR_THE_TOP <= size <= top for top in (2**31, 2**32, 2**63, 2**64))


def cut(size: int, held: int, of: str = " of samples") -> Stated:
    return Stated(problem=f"cut short: its header promises {size} bytes{of}, {held} are there")


def unknown(data: Bytes, place: int, size: bytes) -> Stated:
    return Stated(is_unknown=True, patch=(data.start + place, size))


def another(place: int) -> Stated:
    return Stated(problem=f"another file follows behind its end, at byte {place}: which of them is meant?")


def ranges(data: Bytes, begins: list[int]) -> tuple[tuple[int, int], ...]:
    if len(begins) == 1:
        return ()
    ends = [*begins[1:], data.size]
    return tuple((data.start + a, data.start + b) for a, b in zip(begins, ends, strict=True))
