"""Stage `candidates`: rows of attention's tile tables, timed on the card; the next table is chosen from these facts.

The names of jobs end in ``:compile`` or ``:time``. The first fills Triton's cache beside the tests, the second times.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

from mmlm_benchmarks import harness
from mmlm_benchmarks.gpu.correctness import described, raise_if_lost
from mmlm_benchmarks.gpu.device import Device
from mmlm_benchmarks.gpu.facts import Facts
from mmlm_benchmarks.gpu.timing import take_turn
from mmlm_fast.masks import IntervalMask

Row = tuple[int, int, int, int]  # block of queries, block of keys, warps, stages
# Kernel and head size -> candidates beside the shipped row, which is timed first. Chosen by instructions counted in
# compiled code: a warpgroup's product takes 64 rows, so that eight warps want 128 of the operand that has rows.
ROWS: dict[str, dict[int, list[Row]]] = {
    "fwd": {
        64: [(128, 128, 4, 3), (128, 64, 4, 2), (128, 128, 8, 2)],
        80: [(64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 4, 2)],
        128: [(128, 128, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2)],
        256: [(64, 32, 8, 2), (128, 64, 8, 2), (128, 32, 8, 2), (64, 64, 4, 2)],
    },
    "dkv": {
        64: [(32, 128, 8, 2), (64, 64, 4, 2), (32, 64, 4, 1)],
        80: [(32, 64, 4, 1), (32, 64, 8, 2), (32, 128, 8, 2)],
        128: [(32, 64, 4, 2), (32, 64, 8, 2), (32, 128, 8, 1)],
        256: [(64, 64, 8, 1), (32, 64, 8, 1)],
    },
    "dq": {
        64: [(128, 64, 8, 2), (128, 64, 4, 2)],
        80: [(64, 32, 8, 2), (128, 64, 8, 2)],
        128: [(128, 64, 8, 2), (128, 32, 8, 2), (64, 64, 4, 2)],
        256: [(32, 32, 8, 1), (64, 32, 4, 1), (64, 32, 8, 1)],
    },
}
SECONDS = 0.1


def run(name: str, device: Device, facts: Facts, left: Callable[[], float]) -> bool:
    """Compile or time the candidates of one kernel and head size; those that fail are facts as well."""
    job, _, what = name.partition(":")
    kernel, _, size = job.partition("_")
    call, args, flops = step(kernel, int(size), device)
    rows: list[Row | None] = [None, *ROWS[kernel][int(size)]]  # None: the row that is shipped
    good = True  # while the shipped row works
    if what == "time":
        take_turn()
    for row in rows[:2] if device.is_stand_in else rows:
        if left() < 3:
            break
        told: dict[str, Any] = {"kernel": kernel, "head_size": int(size), "row": row}
        begin = time.perf_counter()
        try:
            with chosen(kernel, row):
                call(*args)
                device.synchronize()
                told["compile_seconds"] = time.perf_counter() - begin
                if what == "time":
                    facts.write("candidate", **told, **measured(call, args, flops))
        except Exception as error:  # too much shared memory, say
            facts.write("candidate", **told, failed=described(error, 500))
            raise_if_lost(error)
            good &= row is not None
    return good


def measured(call: Callable, args: tuple, flops: int) -> dict[str, float]:
    lead = harness.lead_seconds(call, args)
    times = [harness.timed(call, args, lead) for _ in range(3)]
    begin = time.perf_counter()
    while time.perf_counter() - begin < SECONDS:
        times.append(harness.timed(call, args, lead))
    median, low, high = harness.spread(times)
    return {"median_ms": 1e3 * median, "p20_ms": 1e3 * low, "p80_ms": 1e3 * high, "tflops": flops / median / 1e12}


def step(kernel: str, size: int, device: Device) -> tuple[Callable, tuple, int]:
    """A call of the launcher, causal, four query heads to a key head, its inputs, and its flops.

    The backward launcher runs both of its kernels: what differs between rows of one is that one's.
    """
    launchers = import_module("mmlm_kernels.interval_attention")
    length, heads, kv_heads = (24, 2, 1) if device.is_stand_in else (4096, 16, 4)
    q, k, v = (
        torch.randn(1, length, h, size, device=device.type, dtype=torch.bfloat16).transpose(1, 2)
        for h in (heads, kv_heads, kv_heads)
    )
    mask = IntervalMask.causal(length).to(device.type)
    scale = size**-0.5
    forward = (q, k, v, mask.lo, mask.hi, None, scale, 0.0)
    flops = 2 * size * heads * length * length
    if kernel == "fwd":
        return launchers.interval_attention_fwd, forward, flops
    out, largest, total = launchers.interval_attention_fwd(*forward)
    grad = torch.randn_like(out)
    return (
        launchers.interval_attention_bwd,
        (grad, None, q, k, v, mask.lo, mask.hi, out, largest, total, scale, 0.0),
        int(2.5 * flops),
    )


@contextmanager
def chosen(kernel: str, row: Row | None) -> Iterator[None]:
    """Give a kernel's tile tables for 16-bit types this row alone; None leaves them."""
    module = import_module("mmlm_kernels.interval_attention_tiles")
    tiles = module.TILES
    kept = dict(tiles)
    if row is not None:
        tiles.update({key: [(512, *row)] for key in kept if key[0].split(",")[0] == kernel and key[1] == 2})
    _look_up_anew(module)
    try:
        yield
    finally:
        tiles.update(kept)
        _look_up_anew(module)


def _look_up_anew(module: ModuleType) -> None:
    module.blocks.cache_clear()
    module.kernels_of_keys.cache_clear()
