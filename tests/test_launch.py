"""Quick launches hand the driver exactly what Triton's own do.

In a process of its own, without the interpreter: kernels are compiled for a GPU that is not there, and what would be
launched is noted, twice: as `mmlm_kernels.launch` does it, and as Triton does.
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
tl = triton.language

from mmlm_kernels.launch import kernel  # noqa: E402

HERE = Path(__file__)


@kernel(do_not_specialize=["any_integer"])
def copy_kernel(x_ptr, out_ptr, integer, any_integer, number, BLOCK: tl.constexpr, FLAG: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at).to(tl.float32)
    if FLAG:
        x += number
    tl.store(out_ptr + at, (x + integer + any_integer).to(out_ptr.dtype.element_ty))


@pytest.fixture(scope="module")
def found():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-P", HERE], capture_output=True, text=True, env=environment, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_the_same_as_tritons_own(found):
    """Types, dtypes, alignment, integers of every kind, constants, options: each alone and several at once."""
    assert found["launches"] >= 45
    assert found["different"] == []


def test_binaries_are_told_apart(found):
    """As many as there are kinds of arguments: a launch that finds another kind's binary gives wrong numbers."""
    assert found["binaries"] >= 12


def test_quick_where_it_was_seen(found):
    assert found["quick"] > found["launches"]
    assert found["quick with 64 bits"] == 0


def test_launchers_of_ops(found):
    assert found["ops"] == {"glu": True, "add_norm": True, "qk_norm_rope": True, "interval_attention": True}


def test_the_gpu_suite_sees_quick_launches(found):
    assert found["recorded"] == ["copy_kernel"]


def test_hooks_are_told(found):
    """A profiler that comes later sees launches that were quick before."""
    assert found["hook before"] == [False, False]
    assert found["hook after"] == [True, True]
    assert found["hook gone"] == [False, False]


def main():
    from triton import knobs

    from mmlm_benchmarks.no_gpu import NoGpu
    from mmlm_kernels.add_norm import add_norm_bwd, add_norm_fwd
    from mmlm_kernels.glu import glu_bwd, glu_fwd
    from mmlm_kernels.interval_attention import interval_attention_bwd, interval_attention_fwd
    from mmlm_kernels.qk_norm_rope import qk_norm_rope_fwd

    noted, own = [], []
    triton.runtime.driver.set_active(NoGpu(90, lambda *told: noted.append(told)))

    def plain(told):
        """What differs between two calls of a launcher that give the same: tensors made anew."""
        return [(str(x.dtype), tuple(x.shape), x.stride()) if isinstance(x, torch.Tensor) else x for x in told]

    jit = type(copy_kernel.jit)
    run = jit.run
    jit.run = lambda self, *a, **k: own.append(self) or run(self, *a, **k)

    memory = torch.zeros(4096, dtype=torch.float32)
    tensors = [memory, memory[1:], memory.bfloat16(), memory.bfloat16()[1:]]
    integers = [1, 2, 16, 17, 2**31 - 1, 2**31, 2**40, -1]
    calls = [((x, memory, 5, 7, 0.5), {"BLOCK": 1024, "FLAG": True}) for x in tensors]
    calls += [((memory, memory, n, 7, 0.5), {"BLOCK": 1024, "FLAG": True}) for n in integers]
    calls += [((memory, memory, 5, n, 0.5), {"BLOCK": 1024, "FLAG": True}) for n in integers]
    calls += [((memory, memory, 5, 7, f), {"BLOCK": 1024, "FLAG": True}) for f in (1.0, 0.0, 3, float("inf"), 1e30)]
    calls += [((memory, memory, 5, 7, 0.5), {"FLAG": f, "BLOCK": b}) for f, b in ((True, 1024), (False, 512))]
    calls += [((memory, memory, 5, 7, 0.5), {"BLOCK": 1024, "FLAG": True, "num_warps": w}) for w in (4, 8)]
    draw = random.Random(0)
    for _ in range(20):
        few = [draw.choice([1, 16, 5, 2**33]) for _ in range(2)]
        arguments = (draw.choice(tensors), draw.choice(tensors), *few, 0.25)
        calls.append((arguments, {"BLOCK": draw.choice([512, 1024]), "FLAG": draw.choice([True, False])}))
    different, quick, wide, functions = [], 0, 0, set()
    for arguments, options in calls * 2:
        before = len(own)
        copy_kernel[(3, 2)](*arguments, **options)
        is_quick = len(own) == before
        quick += is_quick
        wide += is_quick and any(isinstance(x, int) and x >= 2**31 for x in arguments)
        ours = noted.pop()
        copy_kernel.jit[(3, 2)](*arguments, **options)
        theirs = noted.pop()
        functions.add(theirs[4])
        # the chains of hooks are empty: None stands for them, and for what is made for them
        same = ours[:6] == theirs[:6] and all(a is b or a == b for a, b in zip(ours[9:], theirs[9:], strict=True))
        if not same:
            different.append(str((arguments[2:], options)))

    x, weight = torch.empty(8, 1152, dtype=torch.bfloat16), torch.empty(1152, dtype=torch.bfloat16)
    q, kv = (torch.empty(1, 64, h, 64, dtype=torch.bfloat16).transpose(1, 2) for h in (4, 2))
    table, bounds = torch.empty(1, 64, 32, dtype=torch.bfloat16), torch.zeros(1, 64, dtype=torch.int32)
    keys = kv, kv, bounds, bounds

    def attend():
        return interval_attention_fwd(q, *keys, None, 1.0, 0.0)

    launchers = {
        "glu": lambda: (glu_fwd(x, x, None, "silu"), glu_bwd(x, x, x, None, "silu", True)),
        "add_norm": lambda: (
            add_norm_fwd(x, x, weight, None, False, 1e-6, 0.0),
            add_norm_bwd(x, None, x, weight, None, False, 1e-6, 0.0),
        ),
        "qk_norm_rope": lambda: qk_norm_rope_fwd(q, kv, table, table, None, None, 1e-6, 0.0, False),
        "interval_attention": lambda: interval_attention_bwd(q, None, q, *keys, *attend(), 1.0, 0.0),
    }  # fmt: skip
    ops = {}
    for name, call in launchers.items():
        call()
        own.clear()
        first = [plain(told) for told in noted]
        noted.clear()
        call()
        second = [plain(told) for told in noted]
        noted.clear()
        drop = [[told[:6] + told[9:] for told in launches] for launches in (first, second)]
        ops[name] = not own and len(first) > 0 and drop[0] == drop[1]

    hooks, kept = {}, knobs.runtime.launch_enter_hook
    for when, hook in (("before", kept), ("after", lambda *_: None), ("gone", kept)):
        if hook is kept:
            knobs.runtime.launch_enter_hook = kept
        elif hasattr(kept, "add"):
            kept.add(hook)
        else:
            knobs.runtime.launch_enter_hook = hook
        arguments, options = calls[0]
        told = []
        for start in (copy_kernel, copy_kernel.jit):
            noted.clear()
            start[(3, 2)](*arguments, **options)
            chain = noted[0][7]
            told.append(bool(getattr(chain, "calls", chain)))
        hooks[f"hook {when}"] = told
        if hook is not kept and hasattr(kept, "remove"):
            kept.remove(hook)
    from mmlm_benchmarks.gpu.correctness import recorded_launches

    names = recorded_launches()
    own.clear()
    arguments, options = calls[0]
    copy_kernel[(3, 2)](*arguments, **options)
    hooks["recorded"] = sorted(names) if not own else "was not quick"
    found = {"launches": len(calls), "different": different, "binaries": len(functions), "quick": quick}
    print(json.dumps(found | {"quick with 64 bits": wide, "ops": ops} | hooks))


if __name__ == "__main__":
    main()
