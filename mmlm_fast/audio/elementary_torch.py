"""torch's elementary functions for tables; importing this makes tables with them from then on."""

import functools
from typing import Any

import numpy as np
import torch

from mmlm_fast.audio import elementary
from mmlm_fast.audio.plain import in_plain_torch
from mmlm_fast.audio.spec import PLAIN_TYPES

Array = np.ndarray


class TorchFunctions:
    """torch's, in the dtype of what is given."""

    @in_plain_torch
    def cos(self, x: Array) -> Array:
        return torch.from_numpy(x).cos().numpy()

    @in_plain_torch
    def sin(self, x: Array) -> Array:
        return torch.from_numpy(x).sin().numpy()

    @in_plain_torch
    def exp(self, x: Array) -> Array:
        return torch.from_numpy(x).exp().numpy()

    @in_plain_torch
    def log(self, x: Array) -> Array:
        return torch.from_numpy(x).log().numpy()

    @in_plain_torch
    def power(self, base: Any, exponent: Any) -> Array:
        as_tensor = [torch.from_numpy(x) if isinstance(x, np.ndarray) else x for x in (base, exponent)]
        return torch.pow(*as_tensor).numpy()

    @in_plain_torch
    def linspace(self, first: float, last: float, count: int, dtype: str) -> Array:
        return torch.linspace(first, last, count, dtype=getattr(torch, dtype), device="cpu").numpy()

    @in_plain_torch
    def cosine_window(self, length: int, periodic: bool, alpha: float, dtype: str) -> Array:
        make = torch.hann_window if alpha == 0.5 else functools.partial(torch.hamming_window, alpha=alpha)
        return make(length, periodic, dtype=getattr(torch, dtype), device="cpu").numpy()


elementary.use(TorchFunctions())
PLAIN_TYPES.add(torch.dtype)
