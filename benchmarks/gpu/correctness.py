"""Stage `check`: every op against float64, forward and backward, and in the ways in which models call it."""

import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mmlm_benchmarks.gpu.checks import JOBS, Check
from mmlm_benchmarks.gpu.device import Device
from mmlm_benchmarks.gpu.facts import Facts
from mmlm_fast.testing import Difference, difference, gradient_differences_to_reference, gradients


def run(name: str, device: Device, facts: Facts) -> bool:
    """Run the checks of one job; a fact each. Returns whether all hold.

    Forward and backward of everything come first, the CUDA graphs last: a capture that fails may leave the device of
    this process in a state in which nothing else is to be believed.
    """
    launched = recorded_launches()
    checks, good = [], True
    for check in JOBS[name](device.type, device.is_stand_in):
        checks.append(check)
        for dtype in check.dtypes:
            launched.clear()
            good &= forward_and_backward(check, dtype, facts)
            # Right numbers from a path that was not meant are no proof of the kernel.
            kernels = sorted(launched)
            told = {"check": check.name, "dtype": str(dtype).removeprefix("torch."), "mode": "launched kernels"}
            facts.write("check", **told, ok=bool(kernels) or not check.has_kernel, kernels=kernels)
            good &= bool(kernels) or not check.has_kernel
    for mode, call in MODES.items():
        for check in checks:
            if check.modes and device.has(mode):
                holds = guarded(facts, check.name, torch.bfloat16, mode, lambda c=call, k=check: c(k, device))
                good &= holds
                if mode == "CUDA graph" and not holds:
                    return False
    return good


def run_one_step(name: str, device: Device) -> bool:
    """Run forward and backward of a job's first check, once: something for a profiler to look at."""
    check = next(iter(JOBS[name](device.type, device.is_stand_in)))
    args = drawn(check, torch.bfloat16)
    gradients(check.fast, args, [torch.randn_like(out) for out in pytree.tree_leaves(check.fast(*args))])
    device.synchronize()
    return True


def recorded_launches() -> set[str]:
    """Names of the Triton kernels that are launched from here on."""
    from triton.runtime.jit import KernelInterface

    from mmlm_kernels.launch import Kernel

    names: set[str] = set()
    for kind in (Kernel, KernelInterface):  # ours; and Triton's, which the interpreter's are

        def recording(self: Any, grid: Any, original: Callable = kind.__getitem__) -> Any:
            names.add(self.fn.__name__)
            return original(self, grid)

        kind.__getitem__ = recording
    return names


def forward_and_backward(check: Check, dtype: torch.dtype, facts: Facts) -> bool:
    factor = check.float32_factor if dtype == torch.float32 else 1.0

    def forward() -> dict[str, Any]:
        args = drawn(check, dtype)
        return against_float64(check.fast(*args), check.reference(*args), check.reference(*double(args)), factor)

    def backward() -> dict[str, Any]:
        found = gradient_differences_to_reference(check.fast, check.reference, *drawn(check, dtype))
        return worst_of(found, factor)

    with poisoned():
        good = guarded(facts, check.name, dtype, "forward", forward)
        if check.grads:
            good &= guarded(facts, check.name, dtype, "backward", backward)
    return good


def drawn(check: Check, dtype: torch.dtype) -> tuple:
    torch.manual_seed(0)
    return check.draw(dtype)


def against_float64(actual: Any, twin: Any, exact: Any, factor: float = 1.0) -> dict[str, Any]:
    """The accuracy rule over all tensors, which may err `factor` times what it allows."""
    actual, twin, exact = (pytree.tree_leaves(t) for t in (actual, twin, exact))
    found = [difference(*three) for three in zip(actual, twin, exact, strict=True)]
    return {"nan": sum(int(a.isnan().sum()) for a in actual), **worst_of(found, factor)}


def worst_of(found: list[Difference], factor: float = 1.0) -> dict[str, Any]:
    """Tell the worst of several differences, and its share of what the accuracy rule allows."""
    shares = [d.error / d.allowed if d.allowed else float(d.error > 0) for d in found]
    share, index = max((share, index) for index, share in enumerate(shares))
    worst = found[index]
    told = {"error": worst.error, "allowed": worst.allowed, "relative": worst.relative, "of_allowed": share}
    return {"ok": share <= factor, "worst": index, **told} | ({"factor": factor} if factor != 1 else {})


def guarded(facts: Facts, name: str, dtype: torch.dtype, mode: str, call: Callable[[], dict[str, Any]]) -> bool:
    """Write what `call` found, or its exception; a CUDA error ends the process, whose context is lost."""
    told = {"check": name, "dtype": str(dtype).removeprefix("torch."), "mode": mode}
    facts.write("try", **told)
    start = time.perf_counter()
    try:
        found = call()
    except Exception as error:  # whatever it is, the other checks go on
        traceback.print_exc()
        text = described(error)
        facts.write("check", **told, ok=False, seconds=time.perf_counter() - start, message=text)
        raise_if_lost(error)
        return False
    facts.write("check", **told, **found, seconds=time.perf_counter() - start)
    return bool(found["ok"])


class ContextLostError(RuntimeError):
    """The CUDA context of this process is of no more use."""


def raise_if_lost(error: Exception) -> None:
    text = str(error)
    harmless = ("out of memory", "captur", "invalid argument", "invalid configuration")
    if "CUDA error" in text and not any(words in text for words in harmless):
        raise ContextLostError(text) from error


def described(error: BaseException, length: int = 1200) -> str:
    """The exception, and the one it came from: the first to fail in a capture is told by the second."""
    origin = error.__cause__ or error.__context__
    first = f"{type(error).__name__}: {error}".strip()[:length]
    return first if origin is None else f"{first}\nfrom {type(origin).__name__}: {origin}"[: 2 * length]


@contextmanager
def poisoned() -> Iterator[None]:
    """torch.empty gives NaN, so that an output left unwritten is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def double(tree: Any) -> Any:
    return pytree.tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, tree)


# ---- the ways in which models call an op ---------------------------------------------------------------------------


def compiled(check: Check, device: Device) -> dict[str, Any]:
    """In one graph, forward and backward."""
    args = check.draw(torch.bfloat16)
    torch._dynamo.reset()
    fast = torch.compile(check.fast, fullgraph=True, backend=device.compile_backend)
    found = against_float64(fast(*args), check.reference(*args), check.reference(*double(args)))
    with torch.no_grad():
        grads = [torch.randn_like(out) for out in pytree.tree_leaves(check.fast(*args))]
    eager = gradients(check.fast, args, grads)
    differ = [not torch.equal(a, b) for a, b in zip(gradients(fast, args, grads), eager, strict=True)]
    return found | {"gradients_differ": sum(differ)}


def autocast(check: Check, device: Device) -> dict[str, Any]:
    """float32 inputs under bfloat16 autocast are as near as the formula on bfloat16 inputs."""
    wide = check.draw(torch.float32)
    narrow = pytree.tree_map(lambda t: t.to(torch.bfloat16) if t.is_floating_point() else t, wide)
    with torch.autocast(device.type, torch.bfloat16):
        outs = pytree.tree_leaves(check.fast(*wide))
    twins = pytree.tree_leaves(check.reference(*narrow))
    outs = [out.to(twin.dtype) for out, twin in zip(outs, twins, strict=True)]
    return against_float64(outs, twins, check.reference(*double(wide)))


def same_bits(actual: Any, expected: Any) -> dict[str, Any]:
    pairs = list(zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True))
    return {"ok": all(torch.equal(a, b) for a, b in pairs)}


@torch.no_grad()
def side_stream(check: Check, device: Device) -> dict[str, Any]:
    """Inputs drawn on another stream, behind a long wait, and used there at once."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        device.keep_busy(5e-3)
        args = check.draw(torch.bfloat16)
        actual = check.fast(*args)
    stream.synchronize()
    return same_bits(actual, check.fast(*args))


@torch.no_grad()
def graph(check: Check, device: Device) -> dict[str, Any]:
    """Captured once, replayed on other inputs."""
    args, others = check.draw(torch.bfloat16), check.draw(torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        check.fast(*args)
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        actual = check.fast(*args)
    for static, other in zip(pytree.tree_leaves(args), pytree.tree_leaves(others), strict=True):
        static.copy_(other)
    captured.replay()
    torch.cuda.synchronize()
    return same_bits(actual, check.fast(*others))


def no_sync(check: Check, device: Device) -> dict[str, Any]:
    """Nothing between call and launch waits for the device, forward or backward."""
    args = check.draw(torch.bfloat16)
    leaves = [t.requires_grad_() for t in pytree.tree_leaves(args) if t.is_floating_point()]

    def step() -> None:
        outs = pytree.tree_leaves(check.fast(*args))
        torch.autograd.grad(outs, leaves, [torch.ones_like(out) for out in outs], allow_unused=True)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {"ok": True}


MODES: dict[str, Callable[[Check, Device], dict[str, Any]]] = {
    "autocast": autocast,
    "side stream": side_stream,
    "no sync": no_sync,
    "compile": compiled,
    "CUDA graph": graph,
}
