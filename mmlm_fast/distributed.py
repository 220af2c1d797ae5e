"""Contrastive losses over the batches of several processes, and a gather with gradients, on torch.distributed.

Every process holds its rows (pictures) and its columns (texts). It computes its rows against all columns, which come to
it all at once (``exchange="gather"``) or block by block round a ring (``"ring"``: never more than two blocks of columns
at a time). Only one of the two modalities travels; gathering both, to compute both halves on every process, costs twice
the flops. Statistics of the columns, four numbers each, are reduced over the processes.

All processes of the group call the function together, with batches of any sizes, empty ones too, and either all want
gradients or none does. A process that died, or does not take part, ends the call with `DistributedError` in bounded
time: at once where the connection breaks (Gloo), else after `timeout_seconds` or the group's own timeout. On NCCL
torch's watchdog ends the job after the group's timeout.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmlm_fast.ops.clip_loss import NAMES, OP, clip_over
from mmlm_fast.ops.clip_loss import clip_loss as local_clip_loss
from mmlm_fast.ops.contrastive import DIAGONAL, IDS, Positives, check_pairs, positives_of, scalar_tensor
from mmlm_fast.ops.parts import autocast, with_formed_gradients
from mmlm_fast.ops.paths import REFERENCE
from mmlm_fast.ops.siglip_loss import siglip_loss as local_siglip_loss
from mmlm_fast.ops.siglip_loss import siglip_over

EXCHANGES = ("gather", "ring")


class DistributedError(RuntimeError):
    """Another process died or does not take part."""


class _Peers:
    """The processes of a group, with sizes of their batches, and every collective this file uses."""

    def __init__(
        self, group: Any, sizes: Sequence[int] | None, own: int, device: torch.device, timeout_seconds: float | None
    ) -> None:
        self.group, self.timeout = group, None if timeout_seconds is None else timedelta(seconds=timeout_seconds)
        self.rank, self.count = dist.get_rank(group), dist.get_world_size(group)
        if sizes is None:
            mine = torch.tensor([own], dtype=torch.int64, device=device)
            found = [torch.empty_like(mine) for _ in range(self.count)]
            with self.watched():
                works = [dist.all_gather(found, mine, group=group, async_op=True)]
            self.wait(works)
            sizes = torch.cat(found).tolist()
        self.sizes = [int(size) for size in sizes]
        if len(self.sizes) != self.count or self.sizes[self.rank] != own:
            raise ValueError(
                f"sizes must hold the batch of each of the {self.count} processes, {own} for rank {self.rank}, got "
                f"{self.sizes}"
            )
        self.firsts = [sum(self.sizes[:rank]) for rank in range(self.count)]

    @contextmanager
    def watched(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise DistributedError(
                f"rank {self.rank} of {self.count} lost the others in an exchange of features: a process died, or did "
                f"not make the same call in time ({type(error).__name__}: {str(error).splitlines()[0]})"
            ) from error

    def wait(self, works: Iterable[Any]) -> None:
        """Start the exchanges, where `works` is a generator, and wait for all of them."""
        with self.watched():
            for work in list(works):
                if work is not None:
                    work.wait() if self.timeout is None else work.wait(self.timeout)

    def reduce(self, x: Tensor, op: Any) -> Tensor:
        """Over all processes, in place."""
        with self.watched():
            works = [dist.all_reduce(x, op, group=self.group, async_op=True)]
        self.wait(works)
        return x

    def gather(self, x: Tensor) -> Tensor:
        """Rows of all processes, of their sizes, in the order of ranks."""
        out = x.new_empty(sum(self.sizes), *x.shape[1:])
        blocks = list(out.split(self.sizes))
        blocks[self.rank].copy_(x)
        # One broadcast a process: collectives of uneven sizes are not for every backend.
        self.wait(
            dist.broadcast(block, self._global(rank), group=self.group, async_op=True)
            for rank, block in enumerate(blocks)
            if block.numel()
        )
        return out

    def scatter_sum(self, x: Tensor) -> Tensor:
        """The own rows of the sum over all processes of ``[all rows, …]``; x is overwritten."""
        blocks = x.split(self.sizes)
        self.wait(
            dist.reduce(block, self._global(rank), group=self.group, async_op=True)
            for rank, block in enumerate(blocks)
            if block.numel()
        )
        return blocks[self.rank].clone()

    def pass_on(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> list[Any]:
        """Start sending the first of each pair to the next process and receiving the second from the one before."""
        after, before = (self._global((self.rank + step) % self.count) for step in (1, -1))
        calls = []
        for sent, received in pairs:
            if sent.numel():
                calls.append(dist.P2POp(dist.isend, sent, after, group=self.group))
            if received.numel():
                calls.append(dist.P2POp(dist.irecv, received, before, group=self.group))
        with self.watched():
            return dist.batch_isend_irecv(calls) if calls else []

    def _global(self, rank: int) -> int:
        return rank if self.group is None else dist.get_global_rank(self.group, rank)


class _Together(ABC):
    """An `Exchange` between processes; `rows` and `columns` are of the same processes, with their own sizes."""

    def __init__(self, rows: _Peers, columns: _Peers) -> None:
        self.peers = columns
        self.first_row = rows.firsts[rows.rank]
        self.total = sum(columns.sizes)

    def sum(self, x: Tensor) -> Tensor:
        return self.peers.reduce(x, dist.ReduceOp.SUM)

    def max(self, x: Tensor) -> Tensor:
        return self.peers.reduce(x, dist.ReduceOp.MAX)

    @abstractmethod
    def blocks(self, y: Tensor) -> Iterator[tuple[int, Tensor]]: ...
    @abstractmethod
    def blocks_with_gradients(self, y: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, Tensor, Tensor]]: ...

    def own_gradient(self) -> Tensor:
        return self._gradient

    _gradient: Tensor


class _Gather(_Together):
    """All columns at hand."""

    def blocks(self, y: Tensor) -> Iterator[tuple[int, Tensor]]:
        self._everything = self.peers.gather(y)
        yield 0, self._everything

    def blocks_with_gradients(self, y: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, Tensor, Tensor]]:
        everything = self._everything if hasattr(self, "_everything") else self.peers.gather(y)
        gradient = everything.new_zeros(everything.shape, dtype=dtype)
        yield 0, everything, gradient
        self._gradient = self.peers.scatter_sum(gradient)


class _Ring(_Together):
    """Blocks go from process to process; the next one travels while this one is worked on."""

    def blocks(self, y: Tensor) -> Iterator[tuple[int, Tensor]]:
        peers, block = self.peers, y.contiguous()
        for step in range(peers.count):
            owner, incoming = (peers.rank - step) % peers.count, (peers.rank - step - 1) % peers.count
            works, received = [], block
            if step + 1 < peers.count:
                received = y.new_empty(peers.sizes[incoming], *y.shape[1:])
                works = peers.pass_on([(block, received)])
            yield peers.firsts[owner], block
            peers.wait(works)
            block = received

    def blocks_with_gradients(self, y: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, Tensor, Tensor]]:
        """A block's gradient travels behind it and comes home after a whole turn."""
        peers = self.peers
        gradient = y.new_zeros(y.shape, dtype=dtype)
        for step, (first, block) in enumerate(self.blocks(y)):
            if step:  # the gradient of the block that is here was filled by the process before
                received = y.new_zeros(block.shape, dtype=dtype)
                peers.wait(peers.pass_on([(gradient, received)]))
                gradient = received
            yield first, block, gradient
        if peers.count > 1:
            home = y.new_zeros(y.shape, dtype=dtype)
            peers.wait(peers.pass_on([(gradient, home)]))
            gradient = home
        self._gradient = gradient


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    positive_ids: Tensor | tuple[Tensor, Tensor] | None = None,
    group: Any = None,
    exchange: str = "gather",
    averaged_by_ddp: bool = True,
    sizes: Sequence[int] | None = None,
    timeout_seconds: float | None = None,
) -> Tensor:
    """Compute `mmlm_fast.ops.clip_loss` of the batches of all processes, joined in the order of ranks.

    Args:
        image_features: ``[n, D]``, this process's rows; n may differ between processes, and be 0.
        text_features: ``[n, D]``; ``[m, D]`` with a pair of `positive_ids`.
        logit_scale: The same number on all processes.
        positive_ids: As in `mmlm_fast.ops.clip_loss`, of this process's rows and columns; equal ids on different
            processes are positive too.
        group: Process group; None: all processes. Without torch.distributed, or with one process: the loss on one.
        exchange: ``gather``: all columns on every process. ``ring``: two blocks of columns at a time.
        averaged_by_ddp: DDP, FSDP and Trainer average the gradients of parameters over processes. True: gradients are
            multiplied by the number of processes, so that after averaging they are those of one process with the whole
            batch (as open_clip's are). False: each process gets the plain gradients of its own features, and its share
            of that of `logit_scale`, to be summed.
        sizes: Rows of each process, if known: saves an exchange, in which CUDA waits.
        timeout_seconds: For each exchange on Gloo; None: the group's own.

    Returns:
        The loss of the whole batch, the same on all processes. Not traced by torch.compile.

    Raises:
        ValueError: as `mmlm_fast.ops.clip_loss` does, and for other options.
        DistributedError: another process died or does not take part.
    """
    _check_options(exchange, timeout_seconds)
    if not _several(group):
        return local_clip_loss(image_features, text_features, logit_scale, positive_ids=positive_ids)
    return _untraced(_clip_loss)(
        image_features, text_features, logit_scale, positive_ids, group, exchange, averaged_by_ddp, sizes,
        timeout_seconds,
    )  # fmt: skip


def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    positive_ids: Tensor | tuple[Tensor, Tensor] | None = None,
    group: Any = None,
    exchange: str = "ring",
    averaged_by_ddp: bool = True,
    sizes: Sequence[int] | None = None,
    timeout_seconds: float | None = None,
) -> Tensor:
    """Compute `mmlm_fast.ops.siglip_loss` of the batches of all processes; see `clip_loss` for what is the same.

    Each block of columns is seen once: one turn of the ring.
    """
    _check_options(exchange, timeout_seconds)
    if not _several(group):
        return local_siglip_loss(image_features, text_features, logit_scale, logit_bias, positive_ids=positive_ids)
    return _untraced(_siglip_loss)(
        image_features, text_features, logit_scale, logit_bias, positive_ids, group, exchange, averaged_by_ddp, sizes,
        timeout_seconds,
    )  # fmt: skip


def gather_with_gradients(
    x: Tensor,
    *,
    group: Any = None,
    sizes: Sequence[int] | None = None,
    timeout_seconds: float | None = None,
) -> Tensor:
    """Rows of all processes, in the order of ranks; the backward pass sums what all processes send back.

    Args:
        x: ``[n, …]``; n may differ between processes.
        group, sizes, timeout_seconds: As in `clip_loss`.

    Returns:
        ``[sum of n, …]``. All processes must run its backward pass.
    """
    if not isinstance(x, Tensor) or x.dim() < 1:
        raise ValueError(f"x must be a tensor [n, …], got {getattr(x, 'shape', type(x).__name__)}")
    _check_options("gather", timeout_seconds)
    if not _several(group):
        return x
    return _Gathered.apply(x, _Peers(group, sizes, x.shape[0], x.device, timeout_seconds))


class _Linear(torch.autograd.Function):
    """A linear map of rows over processes, and its transpose: derivatives of any order, forward and backward."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, _Peers], output: Tensor) -> None:
        ctx.peers = inputs[1]

    @classmethod
    def jvp(cls, ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return cls.forward(tangent, ctx.peers)


class _Gathered(_Linear):
    @staticmethod
    def forward(x: Tensor, peers: _Peers) -> Tensor:
        return peers.gather(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _ScatteredSum.apply(grad, ctx.peers), None


class _ScatteredSum(_Linear):
    @staticmethod
    def forward(x: Tensor, peers: _Peers) -> Tensor:
        # in float32: Gloo adds half precision in half precision
        wide = torch.promote_types(x.dtype, torch.float32)
        return peers.scatter_sum(x.to(wide, copy=True, memory_format=torch.contiguous_format)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Gathered.apply(grad, ctx.peers), None


def _check_options(exchange: str, timeout_seconds: float | None) -> None:
    if exchange not in EXCHANGES:
        raise ValueError(f"exchange must be one of {', '.join(EXCHANGES)}, got {exchange!r}")
    if timeout_seconds is not None and not timeout_seconds > 0:
        raise ValueError(f"timeout_seconds must be positive or None, got {timeout_seconds}")


def _several(group: Any) -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


def _untraced(function: Callable) -> Callable:
    """Collectives in the order of Python, not of a graph. Not a decorator: that would import the compiler."""
    return torch.compiler.disable(function) if torch.compiler.is_compiling() else function


def _clip_loss(x, y, logit_scale, positive_ids, group, exchange, averaged, sizes, timeout_seconds):
    check_pairs(x, y, NAMES, {"logit_scale": logit_scale}, positive_ids, None)
    scalars = [scalar_tensor(logit_scale, x)]

    def over(inputs: tuple, needed: list[bool], positives: Positives, peers: _Together, num_rows: Tensor) -> list:
        x, y, scale = inputs
        return clip_over(x, y, scale, positives, False, needed, peers)

    return _loss(over, local_clip_loss, x, y, scalars, positive_ids, group, exchange, averaged, sizes, timeout_seconds)


def _siglip_loss(x, y, logit_scale, logit_bias, positive_ids, group, exchange, averaged, sizes, timeout_seconds):
    scalars = {"logit_scale": logit_scale, "logit_bias": logit_bias}
    check_pairs(x, y, NAMES, scalars, positive_ids, None)

    def over(inputs: tuple, needed: list[bool], positives: Positives, peers: _Together, num_rows: Tensor) -> list:
        x, y, scale, bias = inputs
        return siglip_over(x, y, scale, bias, positives, needed, peers, num_rows)

    numbers = [scalar_tensor(s, x) for s in scalars.values()]
    return _loss(
        over, local_siglip_loss, x, y, numbers, positive_ids, group, exchange, averaged, sizes, timeout_seconds
    )


def _loss(
    over: Callable,
    local: Callable,
    x: Tensor,
    y: Tensor,
    scalars: list[Tensor],
    positive_ids: Any,
    group: Any,
    exchange: str,
    averaged: bool,
    sizes: Sequence[int] | None,
    timeout_seconds: float | None,
) -> Tensor:
    x, y = autocast(x, y)  # type: ignore[assignment]
    positives = positives_of(x, y, positive_ids, None, 0)
    if positives.kind == DIAGONAL and x.shape[0] != y.shape[0]:
        raise ValueError(f"without positive_ids rows and columns are pairs: got {x.shape[0]} and {y.shape[0]}")
    rows = columns = _Peers(group, sizes, x.shape[0], x.device, timeout_seconds)
    if positives.kind == IDS:
        assert positives.column_ids is not None
        assert positives.row_ids is not None
        if not isinstance(positive_ids, Tensor):  # columns of another number
            columns = _Peers(group, None, y.shape[0], x.device, timeout_seconds)
        positives = Positives(IDS, row_ids=positives.row_ids, column_ids=columns.gather(positives.column_ids))
    if OP.path(x, OP.least()) == REFERENCE:
        return _reference(local, x, y, scalars, positives, rows, columns, averaged)
    num_rows = torch.full((), sum(rows.sizes), dtype=torch.float32, device=x.device)
    factor = rows.count if averaged else 1

    def forward(inputs: tuple, needed: list[bool]) -> tuple[Tensor, list[Tensor]]:
        # All processes exchange alike, whichever of their own inputs want gradients.
        peers = (_Gather if exchange == "gather" else _Ring)(rows, columns)
        loss, *formed = over(inputs, [any(needed)] * len(needed), positives, peers, num_rows)
        return loss, [g.mul_(factor) if n else g.new_empty(0) for g, n in zip(formed, needed, strict=True)]

    return with_formed_gradients(f"distributed.{local.__name__}", forward, x, y, *scalars)


def _reference(
    local: Callable,
    x: Tensor,
    y: Tensor,
    scalars: list[Tensor],
    positives: Positives,
    rows: _Peers,
    columns: _Peers,
    averaged: bool,
) -> Tensor:
    """Everything gathered, the whole loss on every process."""
    ids = None
    if positives.kind == IDS:
        assert positives.row_ids is not None
        ids = (rows.gather(positives.row_ids), positives.column_ids)
    everything = _Gathered.apply(x, rows), _Gathered.apply(y, columns)
    loss = local(*everything, *scalars, positive_ids=ids)
    # The gather sums the equal gradients of all processes: what averaging expects.
    return loss if averaged else loss.detach() + (loss - loss.detach()) / rows.count
