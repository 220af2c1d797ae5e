"""Rotations of queries and keys, known by the fingerprints of transformers' functions."""

import inspect
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from mmlm_fast.hf import proof
from mmlm_fast.hf.fingerprint import fingerprint
from mmlm_fast.hf.site import is_small
from mmlm_fast.masks import require
from mmlm_fast.ops.parts import RECORDS
from mmlm_fast.ops.paths import REFERENCE
from mmlm_fast.ops.qk_norm_rope import qk_norm_rope, qk_norm_rope_ref

_OP = RECORDS["qk_norm_rope"]
LEAST = _OP.least()


@dataclass(frozen=True)
class Rotation:
    """A function ``(q, k, cos, sin, unsqueeze_dim=1)``, or of one tensor ``(x, cos, sin, unsqueeze_dim=1)``.

    Args:
        tensors: How many it rotates.
        axis: Of the tables where the heads are missing, if it is not an argument.
        keeps_dtype: Whether the result has the dtype of its input, not that of its product with the tables.
        partial: Whether heads may be longer than the tables are wide; the rest passes.
        interleaved: Whether pairs are neighbours, which follow the first half of the tables.
    """

    tensors: int = 2
    axis: int | None = None
    keeps_dtype: bool = False
    partial: bool = False
    interleaved: bool = False


# By the fingerprint of the function; one of the models that have it.
ROTATIONS = {
    "8ea902713cc8f357": Rotation(),  # llama
    "37bdf47456b8a12c": Rotation(partial=True),  # gpt_neox
    "4161ca33996d5d63": Rotation(partial=True),  # glmasr
    "2a1ffc39f5460972": Rotation(partial=True),  # nemotron
    "60b4f146a0665ccf": Rotation(keeps_dtype=True),  # olmo
    "1f1054987286400a": Rotation(keeps_dtype=True),  # modernbert
    "09feb0a3fc4e2c24": Rotation(axis=-2, keeps_dtype=True),  # qwen2_vl, of towers
    "10cdd75f3c4be8a1": Rotation(partial=True, interleaved=True),  # glm
    "7deca12f04fffd03": Rotation(tensors=1),  # gemma4
}


def known(function: Any) -> Rotation | None:
    """How a function rotates; None where it is none of those known."""
    if not isinstance(function, FunctionType):
        return None
    return ROTATIONS.get(fingerprint(function) or "")


def rotated(function: Any, *args: Any, **kwargs: Any) -> Any:
    """What ``function(*args, **kwargs)`` gives, in one pass where that is faster."""
    if not args or not isinstance(args[0], Tensor) or is_small(LEAST, args[0]):
        return function(*args, **kwargs)
    rotation = known(function)
    found = None if rotation is None else _rotated(rotation, function, args, kwargs)
    return function(*args, **kwargs) if found is None else found


def _rotated(rotation: Rotation, function: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    names = _parameters(function)
    given = dict(zip(names, args, strict=False)) | kwargs
    if any(name not in given for name in names[: rotation.tensors + 2]):
        return None
    xs = [given[name] for name in names[: rotation.tensors]]
    cos, sin = (given[name] for name in names[rotation.tensors : rotation.tensors + 2])
    axis = rotation.axis if rotation.axis is not None else given.get("unsqueeze_dim", 1)
    tensors = [*xs, cos, sin]
    if any(type(t) not in (Tensor, nn.Parameter) for t in tensors) or cos.requires_grad or sin.requires_grad:
        return None
    heads = _heads_axis(axis, xs[0].dim(), cos.dim())
    if heads is None or any(x.dim() != xs[0].dim() for x in xs) or cos.shape != sin.shape or cos.dtype != sin.dtype:
        return None
    q = [_as_heads(x, heads) for x in xs]
    table_rows = cos.shape[0] if cos.dim() == 3 else 1
    width, size = cos.shape[-1], q[0].shape[-1]
    fits = (
        all(x.shape[0] == q[0].shape[0] and x.shape[2:] == q[0].shape[2:] and x.dtype == q[0].dtype for x in q)
        and table_rows in (1, q[0].shape[0])
        and cos.shape[-2] == q[0].shape[2]
        and all(t.device == q[0].device for t in tensors)
        and (width == size or (rotation.partial and width < size))
        and width % 2 == 0
        and q[0].numel() > 0
    )
    if _OP.path(q[0], fits=fits) == REFERENCE:
        return None
    tables = _halves(cos, sin, rotation.interleaved)
    if tables is None:
        return None
    dtype = q[0].dtype if rotation.keeps_dtype else torch.promote_types(q[0].dtype, cos.dtype)
    first, second = qk_norm_rope(
        q[0].to(dtype), q[1].to(dtype) if len(q) == 2 else None, *tables, interleaved=rotation.interleaved
    )
    outs = [_as_given(x, heads, xs[0].dim()) for x in (first, second) if x is not None]
    return tuple(outs) if rotation.tensors == 2 else outs[0]


@cache
def _parameters(function: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


def _heads_axis(axis: Any, dims: int, table_dims: int) -> int | None:
    """The axis of a query along which the tables are one, counted from behind: -3 or -2."""
    if not isinstance(axis, int) or dims not in (3, 4) or table_dims not in (2, 3) or dims != table_dims + 1:
        return None
    place = (axis if axis >= 0 else axis + table_dims + 1) - dims
    return place if place in (-3, -2) else None


def _as_heads(x: Tensor, heads: int) -> Tensor:
    """``[B, heads, S, D]``, a view."""
    x = x if x.dim() == 4 else x[None]
    return x if heads == -3 else x.transpose(1, 2)


def _as_given(x: Tensor, heads: int, dims: int) -> Tensor:
    x = x if heads == -3 else x.transpose(1, 2)
    return x if dims == 4 else x[0]


# ---- the tables, whose halves are equal ------------------------------------------------------------------------------

_kept = WeakTensorKeyDictionary()


def _halves(cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor] | None:
    """The first halves of both tables, dense; None where the others are not the same.

    That is looked at once for each table, which the layers of a model share: on a CPU at once, on CUDA by an assertion
    on the device, since what makes tables in transformers repeats its frequencies.
    """
    half = cos.shape[-1] // 2
    can_keep = not (cos.is_inference() or sin.is_inference())
    state = (cos._version, sin._version, interleaved) if can_keep else None
    kept = _kept.get(cos) if can_keep else None
    if kept is not None and kept[0] == state and kept[1]() is sin:
        return kept[2]
    first = cos[..., :half].contiguous(), sin[..., :half].contiguous()
    same = True
    if not interleaved:
        equal = (cos[..., half:] == first[0]).all() & (sin[..., half:] == first[1]).all()
        if cos.is_cuda:
            require(equal, "position_embeddings: cos and sin must repeat themselves in the second half of a head")
        else:
            same = bool(equal)
    found = first if same else None
    if can_keep:
        _kept[cos] = state, weakref.ref(sin), found
    return found


# ---- proof -----------------------------------------------------------------------------------------------------------

HEADS, LENGTH, SIZE = 4, 8, 32


def prove(functions: Sequence[Callable[..., Any]], weight: Tensor | None) -> float:
    """The functions that a forward calls, on random heads and real tables."""
    dtype = torch.float32 if weight is None else weight.dtype
    like = torch.empty(0, dtype=dtype, device="cpu" if weight is None else weight.device)
    return max((_prove(function, like) for function in functions), default=0.0)


def _prove(function: Callable[..., Any], like: Tensor) -> float:
    rotation = known(function)
    assert rotation is not None
    places, pairs = torch.arange(LENGTH, device="cpu"), torch.arange(SIZE // 2, device="cpu")
    angles = torch.outer(places.float(), 1e2 ** -(2 * pairs / SIZE).float())
    table = torch.cat([angles, angles], -1).to(like.device)
    cos, sin = (t if rotation.axis == -2 else t[None] for t in (table.cos(), table.sin()))
    shape = (LENGTH, HEADS, SIZE) if rotation.axis == -2 else (2, HEADS, LENGTH, SIZE)
    tensors = [proof.random(*shape, like=like, seed=i) for i in range(rotation.tensors)]
    cos, sin = cos.to(like.dtype), sin.to(like.dtype)

    def tables(x: Tensor) -> tuple[Tensor, Tensor]:
        return cos.to(x.dtype), sin.to(x.dtype)

    def ours(*x: Tensor) -> Any:
        found = _rotated(rotation, function, (*x, *tables(x[0])), {})
        if found is None:
            raise proof.RefusedError("none of our paths takes it")
        return found

    def exact(*x: Tensor) -> Any:
        half = SIZE // 2
        heads = [t.transpose(0, 1)[None] if rotation.axis == -2 else t for t in x]
        c, s = (t[..., :half] if t.dim() == 3 else t[None, :, :half] for t in tables(x[0]))
        outs = [qk_norm_rope_ref(t, None, c, s, interleaved=rotation.interleaved)[0] for t in heads]
        return [t[0].transpose(0, 1) if rotation.axis == -2 else t for t in outs]

    return proof.prove(lambda *x: function(*x, *tables(x[0])), ours, exact, tensors)
