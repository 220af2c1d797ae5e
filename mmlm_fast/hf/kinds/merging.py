"""Features in the place of placeholder tokens, by rows instead of by numbers."""

from typing import Any

import torch
from torch import Tensor, nn

from mmlm_fast.hf import proof
from mmlm_fast.hf.site import is_small
from mmlm_fast.ops.merge_embeddings import scatter_features
from mmlm_fast.ops.parts import RECORDS
from mmlm_fast.ops.paths import REFERENCE

KIND = "placeholder merge"
_OP = RECORDS["merge_embeddings"]
_LEAST = _OP.least()


def scattered(x: Any, mask: Any, source: Any) -> Any:
    """What ``x.masked_scatter(mask, source)`` gives; where the mask marks whole rows, by a prefix sum of rows."""
    found = _by_rows(x, mask, source)
    return x.masked_scatter(mask, source) if found is None else found


def _by_rows(x: Any, mask: Any, source: Any) -> Tensor | None:
    if any(type(t) not in (Tensor, nn.Parameter) for t in (x, mask, source)) or is_small(_LEAST, x):
        return None
    whole = mask.dtype == torch.bool and mask.dim() == x.dim() > 1 and x.numel() > 0
    whole = whole and mask.shape[:-1] == x.shape[:-1]
    whole = whole and (mask.shape[-1] == 1 or (mask.shape[-1] == x.shape[-1] and mask.stride(-1) == 0))
    fits = whole and source.dtype == x.dtype and source.device == x.device == mask.device
    fits = fits and source.dim() > 0 and source.numel() > 0 and source.shape[-1] == x.shape[-1]
    if not fits or _OP.path(x) == REFERENCE:
        return None
    return scatter_features(x, mask[..., 0].int(), {1: source}, spare=True)


def prove(weight: Tensor | None) -> float:
    """A merge of random rows, with and without some to spare."""
    dtype = torch.float32 if weight is None else weight.dtype
    like = torch.empty(0, dtype=dtype, device="cpu" if weight is None else weight.device)
    tensors = [proof.random(2, 8, 32, like=like), proof.random(9, 32, like=like, seed=1)]
    mask = torch.zeros(2, 8, dtype=torch.bool, device=like.device)
    mask[0, 1:5] = mask[1, 2:4] = True

    def ours(x: Tensor, source: Tensor) -> Tensor:
        found = _by_rows(x, mask[..., None].expand_as(x), source)
        if found is None:
            raise proof.RefusedError("none of our paths takes it")
        return found

    def exact(x: Tensor, source: Tensor) -> Tensor:
        return torch.where(mask[..., None], source[(mask.flatten().cumsum(0) - 1).clamp(min=0).view(mask.shape)], x)

    return proof.prove(lambda x, s: x.masked_scatter(mask[..., None].expand_as(x), s), ours, exact, tensors)
