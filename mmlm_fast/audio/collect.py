"""Blocks of samples mixed down and resampled as they come, in the memory of the result and two blocks."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmlm_fast.audio.decoders import HEADROOM, Block
from mmlm_fast.audio.resample import resample
from mmlm_fast.audio.sinc import num_resampled

_ZERO_CROSSINGS, _ROLLOFF = 6, 0.99  # of `resample`, by default


def reach_of(old_rate: int, new_rate: int) -> int:
    """How many samples of the old rate on each side an output of the new one depends on, a multiple of a period."""
    common = math.gcd(old_rate, new_rate)
    old, new = old_rate // common, new_rate // common
    return -(-math.ceil(_ZERO_CROSSINGS * old / (min(old, new) * _ROLLOFF)) // old) * old


def _is_finite(x: np.ndarray) -> bool:
    return x.dtype.kind != "f" or not x.size or all(map(math.isfinite, torch.from_numpy(x).aminmax()))


class Collector:
    """Joins blocks to what `resample` gives of all of them together, bit for bit.

    Every output is a sum over its own samples in an order of its own, so a piece that begins at a whole period of the
    two rates and reaches as far as the filter gives the same numbers. Where the rate of the blocks changes, what
    follows is resampled as a clip of its own.

    Args:
        sampling_rate: Of the result; None for that of the first block.
        mono: Average the channels.
        expected: Samples a channel that will come, as far as known, else -1: to make room at once.
    """

    def __init__(self, sampling_rate: int | None, mono: bool, expected: int = -1) -> None:
        self.sampling_rate, self._mono, self._expected = sampling_rate, mono, expected
        self.rate = 0  # of the blocks
        self.num_received = 0
        self._rest: np.ndarray | None = None  # the latest samples, from a whole period on
        self._num_given = 0  # results of the rest that were given already
        self._first: Tensor | None = None  # results [rows, n], while there is one piece
        self._out: np.ndarray | None = None  # all of them, with room for more
        self._length = 0

    def add(self, block: Block) -> None:
        """Take the next samples; they must stay until the next block but one.

        Raises:
            ValueError: for NaN or infinite samples, and for another number of channels than before without `mono`.
        """
        samples, rate, rest = block.samples, block.sampling_rate, self._rest
        if not _is_finite(samples):
            raise ValueError("it holds NaN or infinite samples")
        if rest is not None and samples.shape[1] != rest.shape[1] and not self._mono:
            raise ValueError(
                f"the number of its channels changes from {rest.shape[1]} to {samples.shape[1]} after "
                f"{self.num_received} samples: mono=True averages them"
            )
        if rest is not None:
            # Only here, not when it came: most files are one block, which then goes through once.
            self._give(is_last=rate != self.rate)
            rest = self._rest
        if self.sampling_rate is None:
            self.sampling_rate = rate
        self.rate = rate
        self.num_received += len(samples)
        if rest is None or not len(rest):
            self._rest = samples
        elif rest.shape[1] != samples.shape[1] or rest.dtype != samples.dtype:
            self._rest = np.concatenate([self._as_float(rest), self._as_float(samples)])
        elif len(rest) <= HEADROOM:
            begin = HEADROOM - len(rest)
            block.room[begin:HEADROOM] = rest
            self._rest = block.room[begin : HEADROOM + block.length]
        else:
            self._rest = np.concatenate([rest, samples])

    def finish(self) -> Tensor:
        """The whole, ``[num_samples]`` with `mono`, else ``[channels, num_samples]``."""
        if self._rest is not None:
            self._give(is_last=True)
        if self._out is not None:
            out, length = self._out, self._length
            for row in range(1, len(out)):  # close the gaps between rows, in the same memory
                flat = out.reshape(-1)
                for at in range(0, length, 1 << 20):
                    count = min(1 << 20, length - at)
                    flat[row * length + at : row * length + at + count] = out[row, at : at + count].copy()
            self._out = None
            out.resize((len(out), length), refcheck=False)
            whole = torch.from_numpy(out)
        elif self._first is not None:
            whole = self._first
        else:
            whole = torch.empty(1, 0, dtype=torch.float32, device="cpu")
        return whole[0] if self._mono else whole

    def _give(self, is_last: bool) -> None:
        """Give the results that need nothing beyond the rest, and keep what the next ones need of it."""
        assert self.sampling_rate is not None
        assert self._rest is not None
        rest, given = self._rest, self._num_given
        if is_last:
            self._put(self._resampled(rest)[:, given:])
            self._rest, self._num_given = None, 0
            return
        common = math.gcd(self.rate, self.sampling_rate)
        old, new = self.rate // common, self.sampling_rate // common
        reach = reach_of(old, new) if old != new else 0
        periods = max(len(rest) - reach, 0) // old
        if periods * new > given:
            self._put(self._resampled(rest[: periods * old + reach])[:, given : periods * new])
            kept = max(periods - reach // old, 0)
            self._rest, self._num_given = rest[kept * old :].copy(), (periods - kept) * new
        elif len(rest) > HEADROOM:
            self._rest = rest.copy()

    def _resampled(self, samples: np.ndarray) -> Tensor:
        out = self._as_rows(samples, self.rate, self.sampling_rate)
        if samples.dtype.kind == "f" and not _is_finite(out.numpy()):
            raise ValueError("its samples are too large to be mixed or resampled in float32")
        return out

    def _as_float(self, samples: np.ndarray) -> np.ndarray:
        return self._as_rows(samples, 1, 1).numpy().T

    def _as_rows(self, samples: np.ndarray, old_rate: int, new_rate: Any) -> Tensor:
        """``[1 or channels, n]`` in float32."""
        x = torch.from_numpy(samples)
        if self._mono:
            return resample(x, old_rate, new_rate, channel_dim=1)[None]  # type: ignore[call-overload]
        return resample(x.t().contiguous(), old_rate, new_rate)  # type: ignore[return-value]

    def _put(self, piece: Tensor) -> None:
        if self._out is None and self._first is None:
            self._first, self._length = piece, piece.shape[1]
            return
        needed = self._length + piece.shape[1]
        if self._out is None or needed > self._out.shape[1]:
            room = needed + needed // 2
            if self._out is None and self._expected >= 0 and self.sampling_rate is not None:
                room = max(num_resampled(self._expected, self.rate, self.sampling_rate), needed)
            before = self._first if self._out is None else self._out
            try:
                out = np.empty((len(piece), room), np.float32)
            except (MemoryError, ValueError):  # more than there can be: a header that lies
                out = np.empty((len(piece), needed + needed // 2), np.float32)
            out[:, : self._length] = before[:, : self._length]  # type: ignore[index]
            self._out, self._first = out, None
        self._out[:, self._length : needed] = piece
        self._length = needed
