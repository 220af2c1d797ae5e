"""What a small call of an op costs on the host, in this tree and, side by side, in another commit.

    python -m mmlm_benchmarks.calls                     microseconds of each call
    python -m mmlm_benchmarks.calls --against HEAD~1    of both trees in turns, and how much this one takes of the other

Small inputs take the PyTorch formula; "native" forces the native core where the tree knows how to. Launchers of kernels
run on CPU tensors: all that happens on the host but for the last step, the driver's.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"mmlm_fast": "mmlm_fast", "mmlm_kernels": "kernels", "mmlm_benchmarks": "benchmarks"}
CALLS, REPEATS = 400, 15  # of a measurement, whose quickest repeat counts


def cases() -> dict[str, Callable]:
    import torch

    from mmlm_fast import ops
    from mmlm_fast.masks import IntervalMask

    torch.set_num_threads(1)
    x, wide, weight = torch.randn(2, 2), torch.randn(2, 16), torch.ones(2)
    q, mask = torch.randn(1, 1, 16, 8), IntervalMask.causal(16)
    return {
        "add_norm of 2 x 2": lambda: ops.add_norm(x, x, weight),
        "glu of 2 x 16": lambda: ops.glu(wide, wide),
        "interval_attention of 1 x 1 x 16": lambda: ops.interval_attention(q, q, q, mask),
    }


def launchers() -> dict[str, Callable]:
    """At sizes of Qwen2.5-VL-7B, compiled for an H100 and launched nowhere."""
    import torch
    import triton

    from mmlm_kernels.add_norm import add_norm_bwd, add_norm_fwd
    from mmlm_kernels.interval_attention import interval_attention_bwd, interval_attention_fwd
    from mmlm_kernels.qk_norm_rope import qk_norm_rope_fwd

    try:
        from mmlm_no_gpu import NoGpu  # of this tree, also beside another one's packages
    except ImportError:
        from mmlm_benchmarks.no_gpu import NoGpu

    triton.runtime.driver.set_active(NoGpu(90))

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=torch.bfloat16)

    length, size = 512, 128  # short enough that no head's work is divided, whose sum a CPU would do here
    q, kv = (empty(1, length, heads, size).transpose(1, 2) for heads in (28, 4))
    one, cache, x, weight = empty(1, 28, 1, size), empty(1, 4, 4096, size), empty(64, 3584), empty(3584)
    lo, hi = torch.zeros(1, length, dtype=torch.int32), torch.full((1, length), length, dtype=torch.int32)
    first, last = lo[:, :1].contiguous(), hi[:, :1].contiguous()
    table, scale = empty(1, length, size // 2), size**-0.5
    out, largest, total = interval_attention_fwd(q, kv, kv, lo, hi, None, scale, 0.0)
    return {
        "attention": lambda: interval_attention_fwd(q, kv, kv, lo, hi, None, scale, 0.0),
        "attention, backward": lambda: interval_attention_bwd(
            out, None, q, kv, kv, lo, hi, out, largest, total, scale, 0.0
        ),
        "attention, decoding": lambda: interval_attention_fwd(one, cache, cache, first, last, None, scale, 0.0),
        "rope": lambda: qk_norm_rope_fwd(q, kv, table, table, None, None, 1e-6, 0.0, False),
        "norm": lambda: add_norm_fwd(x, x, weight, None, False, 1e-6, 0.0),
        "norm, backward": lambda: add_norm_bwd(x, x, x, weight, None, False, 1e-6, 0.0),
    }


def microseconds() -> dict[str, float]:
    """Of each case, of each in the native core, and of each launcher."""
    try:
        from mmlm_fast.ops.paths import Path as Way
        from mmlm_fast.ops.paths import forced

        ways = {"": nullcontext, ", native": lambda: forced(Way.NATIVE)}
    except ImportError:
        ways = {"": nullcontext}
    found = {}
    for name, call in cases().items():
        for way, context in ways.items():
            with context():
                found[name + way] = _quickest(call)
    return found | {f"launcher of {name}": _quickest(call) for name, call in launchers().items()}


def _quickest(call: Callable) -> float:
    for _ in range(20):
        call()
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        for _ in range(CALLS):
            call()
        times.append(time.perf_counter() - begin)
    return min(times) / CALLS * 1e6


def in_tree(tree: Path) -> dict[str, float]:
    """Measured by a process of its own that imports from `tree`."""
    with tempfile.TemporaryDirectory() as site:
        for package, folder in PACKAGES.items():
            (Path(site) / package).symlink_to(tree / folder)
        environment = os.environ | {"PYTHONPATH": site}
        code = "import json; from mmlm_calls import microseconds; print(json.dumps(microseconds()))"
        for name in ("calls", "no_gpu"):  # what measures is the same in both
            (Path(site) / f"mmlm_{name}.py").symlink_to(Path(__file__).resolve().with_name(f"{name}.py"))
        done = subprocess.run(
            [sys.executable, "-P", "-c", code], capture_output=True, text=True, env=environment, check=False
        )
    if done.returncode:
        raise RuntimeError(f"{tree}: {done.stderr[-2000:]}")
    return json.loads(done.stdout)


def against(revision: str, rounds: int) -> list[tuple[str, float, float | None, float | None]]:
    """(case, microseconds here, there, median of here / there), the trees in turns."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        subprocess.run(["git", "-C", ROOT, "worktree", "add", "-q", "--detach", tree, revision], check=True)
        try:
            for core in (ROOT / "mmlm_fast").glob("_C*.so"):  # one binary: what differs is Python
                (tree / "mmlm_fast" / core.name).symlink_to(core)
            pairs = [(in_tree(ROOT), in_tree(tree)) for _ in range(rounds)]
        finally:
            subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", tree], check=True)
    rows = []
    for name in pairs[0][0]:
        here = median(a[name] for a, _ in pairs)
        if name not in pairs[0][1]:
            rows.append((name, here, None, None))
            continue
        rows.append((name, here, median(b[name] for _, b in pairs), median(a[name] / b[name] for a, b in pairs)))
    return rows


def main(argv: list[str] | None = None) -> int:
    """Print a line a case; returns 0."""
    parser = argparse.ArgumentParser(
        prog="python -m mmlm_benchmarks.calls",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--against", metavar="REVISION", help="a commit of this repository to compare with")
    parser.add_argument("--rounds", type=int, default=7, help="turns of both trees (default: %(default)s)")
    options = parser.parse_args(argv)
    if not options.against:
        for name, us in microseconds().items():
            print(f"{us:7.1f} us  {name}")
        return 0
    for name, here, there, ratio in against(options.against, options.rounds):
        other = "" if there is None else f"  there {there:7.1f} us  {ratio:.2f} of it"
        print(f"{here:7.1f} us{other}  {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
