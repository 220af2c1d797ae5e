"""Contrastive losses over all pairs of rows and columns, a tile of pairs at a time.

A tile's dot products are one matrix product; a pass over the tile makes statistics of it, or overwrites it with the
gradients of the pairs, which two more products carry to the features. Columns come in blocks from an `Exchange`: all at
once on one process, from the other processes' turn by turn (mmlm_fast/distributed.py).

Legend: N rows, M columns (over all processes), D features, S scale.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from mmlm_fast.ops._registry import check_floating
from mmlm_fast.ops.paths import KERNEL, forced_path

# Rows and columns of a tile. On a CPU it stays in the caches. On a GPU it takes 512 MiB in half precision: one of
# 4,096, which an H100's L2 holds, costs a dozen launches for 40 µs of products, and the host was three times slower.
TILE = {"cpu": 1024, "cuda": 16384}
PADDING = 16  # numbers between a tile's rows: rows a power of two apart would share the few places of a cache
DIAGONAL, IDS, WEIGHTS = 0, 1, 2


@dataclass(frozen=True)
class Positives:
    """Which pairs belong together: row i and column i + offset; or equal ids; or weights ``[N, M]``."""

    kind: int = DIAGONAL
    offset: int = 0
    row_ids: Tensor | None = None
    column_ids: Tensor | None = None
    weights: Tensor | None = None

    def tile(self, i: slice, j: slice) -> "Positives":
        if self.kind == IDS:
            assert self.row_ids is not None
            assert self.column_ids is not None
            return replace(self, row_ids=self.row_ids[i], column_ids=self.column_ids[j])
        if self.kind == WEIGHTS:
            assert self.weights is not None
            return replace(self, weights=self.weights[i, j])
        return replace(self, offset=self.offset + i.start - j.start)

    def dense(self, logits: Tensor) -> Tensor:
        """Weights like `logits` ``[N, M]``."""
        if self.kind == WEIGHTS:
            assert self.weights is not None
            return self.weights.to(logits.dtype)
        if self.kind == IDS:
            assert self.row_ids is not None
            assert self.column_ids is not None
            return (self.row_ids[:, None] == self.column_ids[None, :]).to(logits.dtype)
        places, columns = (torch.arange(size, device=logits.device) for size in logits.shape)
        return (places[:, None] + self.offset == columns[None, :]).to(logits.dtype)

    def arguments(self) -> tuple[int, int, Tensor | None, Tensor | None, Tensor | None]:
        return self.kind, self.offset, self.row_ids, self.column_ids, self.weights


class Exchange(Protocol):
    """Where columns come from, and what is summed over processes. `first`: of a block, among all columns."""

    total: int
    first_row: int

    def blocks(self, y: Tensor) -> Iterator[tuple[int, Tensor]]: ...
    def blocks_with_gradients(self, y: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, Tensor, Tensor]]: ...
    def own_gradient(self) -> Tensor: ...
    def sum(self, x: Tensor) -> Tensor: ...
    def max(self, x: Tensor) -> Tensor: ...


class Local:
    """One process: all columns are here."""

    first_row = 0

    def __init__(self, total: int) -> None:
        self.total = total

    def blocks(self, y: Tensor) -> Iterator[tuple[int, Tensor]]:
        yield 0, y

    def blocks_with_gradients(self, y: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, Tensor, Tensor]]:
        self._gradient = y.new_zeros(y.shape, dtype=dtype)
        yield 0, y, self._gradient

    def own_gradient(self) -> Tensor:
        return self._gradient

    def sum(self, x: Tensor) -> Tensor:
        return x

    def max(self, x: Tensor) -> Tensor:
        return x


def check_pairs(
    x: Tensor, y: Tensor, names: tuple[str, str], scalars: dict[str, Any], positive_ids: Any, targets: Any
) -> None:
    for name, tensor in zip(names, (x, y), strict=True):
        check_floating(name, tensor)
        if tensor.dim() != 2 or tensor.shape[-1] == 0:
            raise ValueError(f"{name} must be [N, D] with D of at least 1, got shape {tuple(tensor.shape)}")
    if x.shape[1] != y.shape[1] or x.dtype != y.dtype or x.device != y.device:
        got = [(tuple(t.shape), str(t.dtype), str(t.device)) for t in (x, y)]
        raise ValueError(f"{names[0]} and {names[1]} must share D, dtype and device, got {got[0]} and {got[1]}")
    for name, scalar in scalars.items():
        if isinstance(scalar, Tensor):
            if scalar.numel() != 1 or not scalar.is_floating_point() or scalar.device != x.device:
                raise ValueError(
                    f"{name} must be one floating-point number on {x.device}, got {tuple(scalar.shape)} in "
                    f"{scalar.dtype} on {scalar.device}"
                )
        elif isinstance(scalar, bool) or not isinstance(scalar, (int, float)):  # no union for Dynamo of 2.8
            raise ValueError(f"{name} must be a number or a tensor of one, got {type(scalar).__name__}")
    if positive_ids is not None and targets is not None:
        raise ValueError("positive_ids and targets say the same thing: pass one")


def positives_of(x: Tensor, y: Tensor, positive_ids: Any, targets: Tensor | None, offset: int) -> Positives:
    """
    Args:
        x, y: ``[N, D]`` and ``[M, D]``.
        positive_ids: None, ids ``[N]`` of rows and columns alike, or a pair of ids ``[N]`` and ``[M]``.
        targets: None or ``[N, M]``.
        offset: Of the diagonal.
    """
    if isinstance(offset, bool) or not isinstance(offset, int):
        raise ValueError(f"offset must be an int, got {type(offset).__name__}")
    if offset and (positive_ids is not None or targets is not None):
        raise ValueError(f"offset shifts the diagonal, which positive_ids and targets replace: got offset {offset}")
    if positive_ids is not None:
        pair = (positive_ids, positive_ids) if isinstance(positive_ids, Tensor) else tuple(positive_ids)
        if len(pair) != 2:
            raise ValueError(f"positive_ids must be a tensor or a pair of them, got {len(pair)}")
        for ids, features in zip(pair, (x, y), strict=True):
            if not isinstance(ids, Tensor) or ids.dtype != torch.int64 or ids.shape != features.shape[:1]:
                raise ValueError(
                    f"positive_ids must be int64 [{features.shape[0]}], got {getattr(ids, 'dtype', type(ids))} "
                    f"{tuple(getattr(ids, 'shape', ()))}"
                )
            if ids.device != x.device:
                raise ValueError(f"positive_ids must be on {x.device}, got {ids.device}")
        return Positives(IDS, row_ids=pair[0].contiguous(), column_ids=pair[1].contiguous())
    if targets is not None:
        check_floating("targets", targets)
        if targets.shape != (x.shape[0], y.shape[0]) or targets.device != x.device or targets.requires_grad:
            raise ValueError(
                f"targets must be [{x.shape[0]}, {y.shape[0]}] on {x.device} without gradient, got "
                f"{tuple(targets.shape)} on {targets.device}{', with gradient' if targets.requires_grad else ''}"
            )
        return Positives(WEIGHTS, weights=targets)
    return Positives(offset=offset)


def scalar_tensor(value: Any, like: Tensor) -> Tensor:
    """A number or tensor of one number as a scalar in the precision of the logits."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    if isinstance(value, Tensor):
        return value.reshape(()).to(dtype)
    return torch.full((), value, dtype=dtype, device=like.device)


def tile_size(x: Tensor) -> int:
    """Rows and columns of a tile of dot products of `x`."""
    tile = TILE.get(x.device.type, TILE["cpu"])
    return max(1, tile // 2) if x.is_cuda and x.dtype == torch.float32 else tile


def has_pairs(x: Tensor, y: Tensor) -> bool:
    return bool(x.shape[0] and y.shape[0])


def tile_dtype(x: Tensor) -> torch.dtype:
    """Of dot products: on a CPU half precision gains nothing, its products are several times slower than float32's."""
    return torch.float32 if x.device.type == "cpu" and forced_path() != KERNEL else x.dtype


def each_tile(
    x: Tensor,
    y: Tensor,
    positives: Positives,
    first_row: int,
    first_column: int,
    visit: Callable[..., None],
    kept: Tensor | None = None,
) -> Tensor | None:
    """``visit(i, j, dots, x tile, y tile, positives of the tile)`` with the dot products of each tile.

    Returns:
        Where all pairs are one tile, its dot products: given back as `kept`, they are not computed again.
    """
    tile, (num_rows, num_columns) = tile_size(x), (x.shape[0], y.shape[0])
    dtype = tile_dtype(x)
    shape = min(tile, num_rows), min(tile, num_columns) + PADDING
    buffer = x.new_empty(shape, dtype=dtype) if kept is None else kept
    for begin in range(0, num_rows, tile):
        i = slice(begin, min(begin + tile, num_rows))
        x_tile = x[i].to(dtype)
        for start in range(0, num_columns, tile):
            j = slice(start, min(start + tile, num_columns))
            y_tile = y[j].to(dtype)
            dots = buffer[: i.stop - i.start, : j.stop - j.start]
            if kept is None:
                torch.mm(x_tile, y_tile.T, out=dots)
            columns = slice(first_column + j.start, first_column + j.stop)
            place = replace(positives, offset=positives.offset + first_row) if positives.kind == DIAGONAL else positives
            visit(i, j, dots, x_tile, y_tile, place.tile(i, columns))
    return buffer if num_rows <= tile and num_columns <= tile else None


def add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a·b, `out` in float32."""
    if b.dtype == torch.float32:
        out.addmm_(a, b)
    elif out.is_cuda:  # no half-precision product is written and read again
        torch.ops.aten.addmm.dtype_out(out, a, b, torch.float32, out=out)
    else:
        out += a @ b


def native_positives(p: Positives) -> tuple[tuple[int, int, int, int, int, int], list[Tensor]]:
    """For the native core, and the tensors to keep alive meanwhile."""
    if p.kind == IDS:
        assert p.row_ids is not None
        assert p.column_ids is not None
        return (IDS, 0, p.row_ids.data_ptr(), p.column_ids.data_ptr(), 0, 0), [p.row_ids, p.column_ids]
    if p.kind == WEIGHTS:
        assert p.weights is not None
        weights = p.weights.float()
        weights = weights if weights.stride(1) == 1 else weights.contiguous()
        return (WEIGHTS, 0, 0, 0, weights.data_ptr(), weights.stride(0)), [weights]
    return (DIAGONAL, p.offset, 0, 0, 0, 0), []
