"""Tables of the audio functions as tensors, made once on each device."""

from collections.abc import Callable, Hashable, Sequence
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from mmlm_fast.audio.plain import plain_torch

# A few hundred KiB a function, rate and dtype; what comes when this is full is made again at every call.
MAX_BYTES = 256 * 2**20

# Nothing in here is let go: a captured CUDA graph knows a table by its address.
_kept: dict[tuple, tuple[Tensor, ...]] = {}
_kept_bytes = 0
_lock = Lock()


def kept_tables(
    key: Hashable, make: Callable[[], Sequence[np.ndarray]], dtype: torch.dtype | None, like: Tensor
) -> tuple[Tensor, ...]:
    """Return the arrays of `make` as tensors on the device of `like`, in `dtype` or their own; not to be written to.

    Copying to a GPU waits for it, so that every stream may use what was kept: the first call of each function, dtype
    and device does, later ones wait for nothing.

    Args:
        key: What determines the arrays: those of one key are the same.

    Raises:
        RuntimeError: where a CUDA graph is captured and the tables are not there yet.
    """
    device = like.device
    # What a compiler traces is its own to keep, and so is what is made of fake tensors or of other subclasses.
    if torch.compiler.is_compiling() or type(like) not in (Tensor, torch.nn.Parameter):
        return tuple(torch.tensor(array, dtype=dtype, device=device) for array in make())
    tables = _kept.get((key, dtype, device))
    return _make((key, dtype, device), make) if tables is None else tables


def _make(place: tuple, make: Callable[[], Sequence[np.ndarray]]) -> tuple[Tensor, ...]:
    global _kept_bytes
    _, dtype, device = place
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"a CUDA graph cannot capture the first call of an audio function on {device}, which copies its tables "
            f"there: call the function once before, with the same options"
        )
    with plain_torch():  # later calls use them, in other modes and with gradients
        tables = tuple(torch.tensor(array, dtype=dtype, device=device) for array in make())
    size = sum(t.nbytes for t in tables)
    with _lock:
        if place not in _kept and _kept_bytes + size <= MAX_BYTES:
            _kept[place] = tables
            _kept_bytes += size
        return _kept.get(place, tables)
