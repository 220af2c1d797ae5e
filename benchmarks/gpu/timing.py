"""Stage `time`: the cases of the report, ours beside what users have; nothing is checked in float64 here.

Stage `warm` runs beside the checks and compiles what the cases compare with, so that Inductor finds it in its cache.
"""

import fcntl
import gc
import os
import re
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mmlm_benchmarks import harness
from mmlm_benchmarks.gpu.correctness import described, raise_if_lost
from mmlm_benchmarks.gpu.device import Device
from mmlm_benchmarks.gpu.facts import Facts
from mmlm_benchmarks.gpu.job import CASES, TURN
from mmlm_benchmarks.gpu.plan import TIMES

COMPILED = ("torch.compile", "FlexAttention")
SECONDS_A_PROVIDER = 0.15
# What ours counts before it builds a plan for a shape that comes often: a step of a model is behind that.
SETTLING_CALLS, SETTLING_SECONDS = 130, 4.0


def run(name: str, device: Device, facts: Facts, left: Callable[[], float], warm_only: bool = False) -> bool:
    """Time the cases of one job, or only compile what they compare with. Returns whether all of them ran."""
    path, num_compiled, budget = TIMES[name]
    num_compiled = 0 if device.is_stand_in else num_compiled
    cases = cases_of(import_module(f"mmlm_benchmarks.{path}"), device)
    if warm_only:
        compiled = [compile_case(case, facts) for case in cases[:num_compiled]]
        return all(compiled)
    import triton  # noqa: F401  before the turn: others are timed meanwhile

    if device.type == "cuda":
        torch.cuda.init()
    take_turn()
    begin, good = time.perf_counter(), True
    wanted = re.compile(os.environ.get(CASES, ""))
    for index, case in enumerate(cases):
        if not wanted.search(case.name):
            continue
        if time.perf_counter() - begin > budget or left() < 3:
            facts.write("not timed", case=case.name, reason="no time left")
            continue
        seconds = SECONDS_A_PROVIDER if not device.is_stand_in else 0.01
        try:
            good &= time_case(case, index < num_compiled, facts, seconds)
        except Exception as error:  # the other cases go on
            good = False
            failed(facts, case, "any", error)
    return good


def cases_of(module: ModuleType, device: Device) -> list[harness.Case]:
    if not device.is_stand_in:
        return module.cases(device.type)
    module.cases("cuda")  # what is made there must at least come to be
    return module.cases(device.type, "tiny")[:4]


_locks: list[Any] = []  # held until the process ends, however it ends: until then its memory is on the device


def take_turn() -> None:
    """Wait for the right to use the device alone; what a process imports before overlaps with another's timing."""
    path = os.environ.get(TURN)
    if not path:
        return
    _locks.append(Path(path).open("w"))  # noqa: SIM115
    fcntl.flock(_locks[-1], fcntl.LOCK_EX)
    Path(f"{path}.{os.getpid()}").touch()  # the job's limit begins here


def compile_case(case: harness.Case, facts: Facts) -> bool:
    """First calls of what is compiled; they run beside the checks, which makes them slower than alone."""
    args = case.inputs()[0]
    good = True
    for provider in COMPILED:
        if provider in case.providers:
            start = time.perf_counter()
            ran, _ = call_once(case, provider, args, facts)
            good &= ran
            facts.write("compile", case=case.name, provider=provider, seconds=time.perf_counter() - start)
    return good


def time_case(case: harness.Case, is_compiled: bool, facts: Facts, seconds: float = SECONDS_A_PROVIDER) -> bool:
    """Time one case, `seconds` a provider; a provider that fails is a fact and is left out."""
    facts.write("try", case=case.name)
    gc.collect()
    torch.cuda.empty_cache()
    inputs = case.inputs()
    names = [p for p in case.providers if is_compiled or p != "torch.compile"]
    if case.ours in names:
        settle(case, inputs[0], facts)
    usable, outputs = {}, {}
    for provider in names:
        ran, outputs[provider] = call_once(case, provider, inputs[0], facts)
        if ran:
            usable[provider] = case.providers[provider]
    told = differ(outputs, case.ours)
    outputs.clear()
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


def settle(case: harness.Case, args: tuple, facts: Facts) -> None:
    """Attention that torch computes counts calls of a shape before cuDNN gets it."""
    if case.group != "interval_attention" or "causal" not in case.name or not harness.on_cuda(args):
        return
    start, calls = time.perf_counter(), 0
    try:
        while calls < SETTLING_CALLS and time.perf_counter() - start < SETTLING_SECONDS:
            case.providers[case.ours](*args)
            calls += 1
            if calls % 8 == 0:
                torch.cuda.synchronize()  # or the queue, not the clock, would say how long this takes
    except Exception as error:
        failed(facts, case, case.ours, error)
    if calls < SETTLING_CALLS:
        facts.write("not settled", case=case.name, calls=calls)


def call_once(case: harness.Case, provider: str, args: tuple, facts: Facts) -> tuple[bool, Tensor | None]:
    """Whether a provider runs, and its first output: None where a call gives nothing, as training steps do."""
    try:
        leaves = pytree.tree_leaves(case.providers[provider](*args))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except Exception as error:  # what a peer cannot do must not cost ours its row
        failed(facts, case, provider, error)
        return False, None
    return True, leaves[0] if leaves and isinstance(leaves[0], Tensor) else None


def failed(facts: Facts, case: harness.Case, provider: str, error: Exception) -> None:
    traceback.print_exc()
    ours = provider in (case.ours, "any")
    facts.write("failed", case=case.name, group=case.group, provider=provider, ours=ours, message=described(error))
    raise_if_lost(error)


@torch.no_grad()
def differ(outputs: dict[str, Tensor | None], ours: str) -> dict[str, float | None]:
    """Relative difference of each output to ours, so that all time one computation."""
    expected = outputs.get(ours)
    found: dict[str, float | None] = {}
    for provider, out in outputs.items():
        if expected is None or out is None or out.shape != expected.shape:
            found[provider] = None
        else:
            found[provider] = float((out - expected).norm(dtype=torch.float32) / expected.norm(dtype=torch.float32))
    return found
