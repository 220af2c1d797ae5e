"""One process of tests/test_distributed.py; run by torchrun."""

import os
import sys
import time

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mmlm_fast import distributed, ops, reference
from mmlm_fast.ops import contrastive
from mmlm_fast.ops.paths import Path, forced

SIZES = {1: [13], 2: [9, 5], 3: [7, 0, 6], 4: [6, 3, 1, 5]}
TOLERANCE = 1e-6  # relative, as promised


def whole_batch() -> tuple[torch.Tensor, ...]:
    torch.manual_seed(5)
    num = sum(SIZES[dist.get_world_size()])
    x, y = (F.normalize(torch.randn(num, 24), dim=1) for _ in range(2))
    return x, y, torch.tensor(9.0), torch.tensor(-3.0), torch.randint(0, 4, (num,))


def own_rows() -> slice:
    rank, sizes = dist.get_rank(), SIZES[dist.get_world_size()]
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def close(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    error = (actual - expected).norm() / expected.norm().clamp(min=1e-30)
    assert error <= TOLERANCE, f"rank {dist.get_rank()}: {what}: {error:.2e}"


def check_one(kind: str, exchange: str, averaged: bool, ids: bool, known: bool) -> None:
    """Value, gradients of features and scalars against one process with the whole batch."""
    x, y, scale, bias, all_ids = whole_batch()
    count, own = dist.get_world_size(), own_rows()
    scalars = [scale] if kind == "clip" else [scale, bias]
    leaves = [t.clone().requires_grad_() for t in (x, y, *scalars)]
    expected = getattr(ops, f"{kind}_loss")(*leaves, positive_ids=all_ids if ids else None)
    whole = torch.autograd.grad(expected, leaves)
    mine = [t.clone().requires_grad_() for t in (x[own], y[own], *scalars)]
    loss = getattr(distributed, f"{kind}_loss")(
        *mine,
        exchange=exchange,
        averaged_by_ddp=averaged,
        positive_ids=all_ids[own] if ids else None,
        sizes=SIZES[count] if known else None,
        timeout_seconds=60,
    )
    what = f"{kind} {exchange} averaged={averaged} ids={ids} known={known}"
    close(loss, expected, what)
    grads, factor = torch.autograd.grad(loss, mine), count if averaged else 1
    for g, e in zip(grads[:2], whole[:2], strict=True):
        if len(g):
            close(g, factor * e[own], what)
    for g, e in zip(grads[2:], whole[2:], strict=True):  # shares of the scalars' gradients
        total = g.clone()
        dist.all_reduce(total)
        close(total, factor * e, what)


def losses() -> None:
    for kind in ("clip", "siglip"):
        for exchange in ("gather", "ring"):
            for averaged, ids, known in ((False, False, False), (True, False, True), (False, True, True)):
                check_one(kind, exchange, averaged, ids, known)
        with reference():
            for averaged, ids in ((False, False), (True, True)):
                check_one(kind, "gather", averaged, ids, False)
    x, y, scale, _, ids = whole_batch()
    own = own_rows()
    with torch.no_grad():
        loss = distributed.clip_loss(x[own], y[own], scale, exchange="ring")
    close(loss, ops.clip_loss(x, y, scale), "without gradients")
    # pairs of ids: rows and columns in different numbers
    last = dist.get_rank() == dist.get_world_size() - 1
    columns = slice(own.start, own.stop - last)
    loss = distributed.clip_loss(x[own], y[columns], scale, positive_ids=(ids[own], ids[columns]), exchange="ring")
    close(loss, ops.clip_loss(x, y[:-1], scale, positive_ids=(ids, ids[:-1])), "pairs of ids")


class Tallest(TorchDispatchMode):
    """Most rows of a tensor as wide as the features."""

    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.dim() == 2 and t.shape[1] == 24:
                self.rows = max(self.rows, len(t))
        return out


def ring() -> None:
    """No process ever has more rows in one tensor than a batch; with a gather it has all."""
    x, y, scale, bias, _ = whole_batch()
    own, sizes = own_rows(), SIZES[dist.get_world_size()]
    mine = [t[own].clone().requires_grad_() for t in (x, y)]
    for exchange, expected in (("ring", max(sizes)), ("gather", sum(sizes))):
        for loss in (
            lambda e=exchange: distributed.clip_loss(*mine, scale, exchange=e),
            lambda e=exchange: distributed.siglip_loss(*mine, scale, bias, exchange=e),
        ):
            with Tallest() as tallest:
                torch.autograd.grad(loss(), mine)
            assert tallest.rows == expected, (exchange, tallest.rows, expected)


def compiled() -> None:
    """Inside a compiled function the exchange runs as it is."""
    x, y, scale, *_ = whole_batch()
    own = own_rows()
    function = torch.compile(lambda x, y: 2 * distributed.clip_loss(x * 1, y, scale), backend="aot_eager")
    close(function(x[own], y[own]), 2 * ops.clip_loss(x, y, scale), "compiled")


def half() -> None:
    x, y, scale, *_ = whole_batch()
    own = own_rows()
    for exchange in ("gather", "ring"):
        mine = [t[own].bfloat16().requires_grad_() for t in (x, y)]
        loss = distributed.clip_loss(*mine, scale, exchange=exchange, averaged_by_ddp=False)
        leaves = [t.bfloat16().requires_grad_() for t in (x, y)]
        expected = ops.clip_loss(*leaves, scale)
        close(loss, expected, "bfloat16")
        for g, e in zip(torch.autograd.grad(loss, mine), torch.autograd.grad(expected, leaves), strict=True):
            # float32 sums in another order, rounded once: a unit in the last place here and there
            torch.testing.assert_close(g, e[own], rtol=torch.finfo(g.dtype).eps, atol=0)


def gather() -> None:
    rank, count = dist.get_rank(), dist.get_world_size()
    sizes, own = SIZES[count], own_rows()
    x = torch.arange(sum(sizes) * 2.0).view(-1, 2)
    leaf = x[own].clone().requires_grad_()
    out = distributed.gather_with_gradients(leaf, sizes=sizes)
    assert out.equal(x)
    places = torch.arange(1.0, len(x) + 1)[:, None]
    (grad,) = torch.autograd.grad((out * places * (rank + 1)).sum(), leaf)
    assert grad.equal((places * sum(range(1, count + 1)))[own].expand(-1, 2))


def derivatives() -> None:
    """Second derivatives, forward mode and torch.func through the gather; fast losses refuse and name the remedy."""
    x, y, scale, bias, _ = whole_batch()
    own, count = own_rows(), dist.get_world_size()
    along = tuple(torch.randn_like(t) for t in (x, y))
    for kind, scalars in (("clip", [scale]), ("siglip", [scale, bias])):

        def alone(x, y, kind=kind, scalars=scalars):
            return getattr(ops, f"{kind}_loss")(x, y, *scalars)

        def together(x, y, kind=kind, scalars=scalars):
            return getattr(distributed, f"{kind}_loss")(x, y, *scalars)

        with reference():
            first = torch.autograd.functional.vjp(alone, (x, y))[1]
            second = torch.autograd.functional.hvp(alone, (x, y), along)[1]
        tangent = sum((g * t).sum() for g, t in zip(first, along, strict=True))
        mine, step = (x[own], y[own]), (along[0][own], along[1][own])
        with reference():
            for g, e in zip(torch.autograd.functional.hvp(together, mine, step)[1], second, strict=True):
                assert (g - count * e[own]).norm() <= 1e-4 * (1 + g.norm()), kind
        close(torch.func.jvp(together, mine, step)[1], tangent, kind)
        for g, e in zip(torch.func.grad(together, (0, 1))(*mine), first, strict=True):
            assert (g - count * e[own]).norm() <= 1e-5, kind
        if count > 1:
            leaves = [t.clone().requires_grad_() for t in mine]
            gradients = torch.autograd.grad(together(*leaves), leaves, create_graph=True)
            with pytest.raises(RuntimeError, match=f"second derivatives of distributed.{kind}_loss"):
                torch.autograd.grad(gradients[0].sum(), leaves, allow_unused=True)


def training() -> None:
    """Two steps under DDP: parameters as after two steps of one process on the whole batch."""
    from torch.nn.parallel import DistributedDataParallel

    from mmlm_fast.nn import ClipLoss

    class Towers(torch.nn.Module):
        def __init__(self, **keywords):
            super().__init__()
            torch.manual_seed(3)
            self.image, self.text = torch.nn.Linear(24, 16), torch.nn.Linear(24, 16)
            self.loss = ClipLoss(**keywords)

        def forward(self, x, y):
            return self.loss(F.normalize(self.image(x), dim=1), F.normalize(self.text(y), dim=1))

    def train(model, x, y):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(2):
            optimizer.zero_grad()
            model(x, y).backward()
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    x, y, *_ = whole_batch()
    own = own_rows()
    alone = train(Towers(distributed=False), x, y)
    for exchange in ("gather", "ring"):
        together = train(DistributedDataParallel(Towers(exchange=exchange)), x[own], y[own])
        torch.testing.assert_close(together, alone)


def dead() -> None:
    """The last rank dies; the others must say so. Not before all are connected: that would be torch's error."""
    x, y, scale, *_ = whole_batch()
    dist.barrier()
    if dist.get_rank() == dist.get_world_size() - 1:
        os._exit(7)
    distributed.clip_loss(x, y, scale, exchange=os.environ["EXCHANGE"])


def asleep() -> None:
    """The last rank does not take part."""
    x, y, scale, *_ = whole_batch()
    if dist.get_rank() == dist.get_world_size() - 1:
        time.sleep(60)
    start = time.perf_counter()
    try:
        distributed.siglip_loss(x, y, scale, -3.0, sizes=[len(x)] * dist.get_world_size(), timeout_seconds=3)
    except distributed.DistributedError as error:
        print(f"after {time.perf_counter() - start:.0f} s: {error}", flush=True)
        os._exit(9)


if __name__ == "__main__":
    torch.set_num_threads(1)
    contrastive.TILE["cpu"] = 4
    dist.init_process_group("gloo")
    with forced(Path.NATIVE):
        for name in sys.argv[1:]:
            globals()[name]()
    dist.barrier()
    dist.destroy_process_group()
