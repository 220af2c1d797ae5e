"""Stage `time`: the cases of the report, ours beside what users have; nothing is checked in float64 here.

Stage `warm` runs beside the checks and compiles what the cases compare with, so that Inductor finds it in its cache.
"""

import fcntl
import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mmlm_benchmarks import harness
from mmlm_benchmarks.gpu.correctness import raise_if_lost
from mmlm_benchmarks.gpu.device import Device
from mmlm_benchmarks.gpu.facts import Facts
from mmlm_benchmarks.gpu.job import TURN
from mmlm_benchmarks.gpu.plan import TIMES

COMPILED = ("torch.compile", "FlexAttention")
SECONDS_A_PROVIDER = 0.15
SETTLING_CALLS, SETTLING_SECONDS = 130, 1.5


def run(name: str, device: Device, facts: Facts, left: Callable[[], float], warm_only: bool = False) -> bool:
    """Time the cases of one job, or only compile what they compare with. Returns whether all of them ran."""
    path, num_compiled, budget = TIMES[name]
    num_compiled = 0 if device.is_stand_in else num_compiled
    module = import_module(f"mmlm_benchmarks.{path}")
    good = True
    if warm_only:
        for case in cases_of(module, device)[:num_compiled]:
            good &= compile_case(case, facts)
        return good
    with turn():
        begin, cases = time.perf_counter(), cases_of(module, device)
        for index, case in enumerate(cases):
            if time.perf_counter() - begin > budget or left() < 3:
                facts.write("not timed", case=case.name, reason="no time left")
                continue
            seconds = SECONDS_A_PROVIDER if not device.is_stand_in else 0.01
            good &= time_case(case, index < num_compiled, facts, seconds)
    return good


def cases_of(module: ModuleType, device: Device) -> list[harness.Case]:
    if not device.is_stand_in:
        return module.cases(device.type)
    module.cases("cuda")  # what is made there must at least come to be
    return module.cases(device.type, "tiny")[:4]


@contextmanager
def turn() -> Iterator[None]:
    """Wait for the right to use the device alone; what a process imports before overlaps with another's timing."""
    path = os.environ.get(TURN)
    if not path:
        yield
        return
    with Path(path).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # is given back when the process ends, however it ends
        Path(f"{path}.{os.getpid()}").touch()  # its limit begins here
        yield


def compile_case(case: harness.Case, facts: Facts) -> bool:
    """The first call of what is compiled: what a user waits for."""
    args = case.inputs()[0]
    good = True
    for provider in COMPILED:
        if provider in case.providers:
            start = time.perf_counter()
            good &= call_once(case, provider, args, facts)
            facts.write("compile", case=case.name, provider=provider, seconds=time.perf_counter() - start)
    return good


def time_case(case: harness.Case, is_compiled: bool, facts: Facts, seconds: float = SECONDS_A_PROVIDER) -> bool:
    """Time one case, `seconds` a provider; a provider that fails is a fact and is left out."""
    facts.write("try", case=case.name)
    torch.cuda.empty_cache()
    gc.collect()
    try:
        inputs = case.inputs()
    except Exception as error:  # memory, most likely
        raise_if_lost(error)
        facts.write("failed", case=case.name, provider="inputs", message=f"{type(error).__name__}: {error}"[:800])
        return False
    names = [p for p in case.providers if is_compiled or p != "torch.compile"]
    usable = {p: case.providers[p] for p in names if call_once(case, p, inputs[0], facts)}
    told = differ(case, usable, inputs[0])
    settle(usable, case.ours, inputs[0])
    others = [p for p in usable if p != case.ours]
    if case.ours not in usable:
        return False
    if not others:
        usable = {"none": usable[case.ours], **usable}  # time_pairs wants a partner; its row is ours again
    samples = harness.time_pairs(usable, case.ours, inputs, seconds * len(usable))
    for row in harness.rows_of(case, samples, inputs[0], providers=usable):
        if row.provider != "none":
            facts.write("time", **asdict(row), differs=told.get(row.provider))
    return len(usable) == len(names)


def settle(providers: dict[str, Callable], ours: str, args: tuple) -> None:
    """Call ours as often as it counts before it builds a plan for a shape that comes often: that is what steps are."""
    if ours in providers and harness.on_cuda(args):
        start, calls = time.perf_counter(), 0
        while calls < SETTLING_CALLS and time.perf_counter() - start < SETTLING_SECONDS:
            providers[ours](*args)
            calls += 1


def call_once(case: harness.Case, provider: str, args: tuple, facts: Facts) -> bool:
    try:
        case.providers[provider](*args)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except Exception as error:  # what a peer cannot do must not cost ours its row
        facts.write("failed", case=case.name, provider=provider, message=f"{type(error).__name__}: {error}"[:800])
        raise_if_lost(error)
        return False
    return True


@torch.no_grad()
def differ(case: harness.Case, providers: dict[str, Callable], args: tuple) -> dict[str, float | None]:
    """Relative difference of each provider's first output to the baseline's, so that all time one computation."""
    baseline = first_output(providers, next(iter(providers), ""), args)
    found: dict[str, float | None] = {}
    for provider in providers:
        out = first_output(providers, provider, args)
        if baseline is None or out is None or out.shape != baseline.shape:
            found[provider] = None
        else:
            found[provider] = float((out - baseline).norm(dtype=torch.float32) / baseline.norm(dtype=torch.float32))
    return found


def first_output(providers: dict[str, Callable], provider: str, args: tuple) -> Tensor | None:
    """None where a call gives nothing, as training steps do."""
    if provider not in providers:
        return None
    try:
        leaves: list[Any] = pytree.tree_leaves(providers[provider](*args))
    except RuntimeError:  # a training step wants gradients
        return None
    return leaves[0] if leaves and isinstance(leaves[0], Tensor) else None
