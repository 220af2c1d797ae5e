"""Check, then time in pairs, then measure memory: one row per case and provider."""

import ctypes
import gc
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple, cast

import torch
from torch.utils import _pytree as pytree

from mmlm_benchmarks.report import schema
from mmlm_fast.testing import Difference

Call = Callable[..., Any]
# On CUDA the device is kept busy before a call is timed, for longer than the host needs to launch it: the launches then
# wait for the device, and what Python and the driver need for them stays out of the number.
SHORTEST_LEAD, LONGEST_LEAD = 1e-3, 0.05  # seconds
LEAD_CLOCK_HZ = 2.0e9  # of the counter that `torch.cuda._sleep` waits on: not below that of any card
LONG = 20.0  # seconds of one case
OWN_FORMULA = "our own formula"  # the baseline where no library is installed that does the job: no headline counts it
# What audio is compared with where it is installed, by the name that is imported.
PEERS = {
    "librosa": "librosa",
    "torchaudio": "torchaudio",
    "kaldi_native_fbank": "kaldi-native-fbank",
    "whisper": "openai-whisper",
    "faster_whisper": "faster-whisper",
    "scipy": "scipy",
    "lhotse": "lhotse",
    "soxr": "soxr",
}

GPU_PEERS = ("FlexAttention", "Liger", "cuDNN")  # their kernels, or those that beat eager, are a GPU's


class Example(NamedTuple):
    """Hold a call of an op, which sweeps of the tests and of the GPU suite run where nothing more is written for it."""

    name: str
    draw: Callable[[torch.dtype], tuple]
    fast: Callable
    reference: Callable

    def of_floats(self, dtype: torch.dtype) -> tuple[Callable, list[torch.Tensor]]:
        """Return the op as a function of the floating-point tensors among what is drawn, and these."""
        leaves, form = pytree.tree_flatten(self.draw(dtype))
        floats = [i for i, x in enumerate(leaves) if isinstance(x, torch.Tensor) and x.is_floating_point()]

        def call(*tensors: torch.Tensor) -> Any:
            args = dict(enumerate(leaves)) | dict(zip(floats, tensors, strict=True))
            return self.fast(*pytree.tree_unflatten([*args.values()], form))

        return call, [leaves[i] for i in floats]


@dataclass(frozen=True)
class Case:
    """Describe one job at one size, done by several providers."""

    group: str  # op stem, "audio" or "model"
    name: str
    shape_from: str  # the model or setting the size is taken from
    inputs: Callable[[], list[tuple]]  # drawn outside the timed region; calls rotate through the list
    providers: dict[str, Call]  # what is timed; the first is the baseline
    # provider -> differences to the exact result for the first inputs; empty where a provider computes another thing
    check: Callable[[dict[str, Call], tuple], dict[str, list[Difference]]]
    bytes_moved: int = 0  # each input read once, each output written once; 0: not stated
    flops: int = 0
    ours: str = "mmlm_fast"
    example: "Example | None" = None  # of an op's cases: the op and its formula as functions of what is drawn


@dataclass(frozen=True)
class Row:
    """Hold what one provider needs for a case; `schema.Row` is what results.json holds of it."""

    group: str
    case: str
    shape_from: str
    provider: str
    ours: bool
    median_ms: float
    p20_ms: float
    p80_ms: float
    speedup: float  # over the case's baseline; ours: median of paired ratios, others: ratio of medians
    speedup_p20: float | None
    speedup_p80: float | None
    ours_faster: float | None  # this provider's time over ours, median of paired ratios; None for ours
    ours_faster_p20: float | None
    ours_faster_p80: float | None
    ours_faster_low: float | None  # 95 % confidence interval of that median
    ours_faster_high: float | None
    peak_mib: float | None  # beyond what was held before the call
    relative_error: float | None  # norm, against float64
    allowed_error: float | None
    threads: int
    bytes_moved: int
    flops: int
    host_us: float | None = None  # until a call returns, on CUDA: Python, checks, launches


def run(case: Case, seconds: float = 2.0) -> list[Row]:
    """Check, time and measure one case.

    Raises:
        AssertionError: if a provider misses the accuracy rule; nothing is timed then.
    """
    inputs = case.inputs()
    differences = case.check(case.providers, inputs[0])
    for d in differences.get(case.ours, []):
        assert d.ok, f"{case.name}: error {d.error:.3e}, allowed {d.allowed:.3e}"
    samples = time_pairs(case.providers, case.ours, inputs, seconds)
    return rows_of(case, samples, inputs[0], differences)


def rows_of(
    case: Case,
    samples: dict[str, list[tuple[float, float]]],
    args: tuple,
    differences: dict[str, list[Difference]] | None = None,
    providers: dict[str, Call] | None = None,
) -> list[Row]:
    """Make a row for each provider, by default all of the case, of what `time_pairs` measured; measure memory."""
    providers = case.providers if providers is None else providers
    baseline = next(iter(samples))
    baseline_seconds = median(theirs for theirs, _ in samples[baseline])
    rows = []
    for provider, call in providers.items():
        is_ours = provider == case.ours
        pairs = samples[baseline if is_ours else provider]
        seconds = spread([own if is_ours else theirs for theirs, own in pairs])
        ratios = [theirs / own for theirs, own in pairs]
        ratio, certain = spread(ratios), interval(ratios)
        errors = (differences or {}).get(provider, [])
        worst = max(errors, key=lambda d: d.error / d.allowed if d.allowed else 0.0, default=None)
        rows.append(
            Row(
                group=case.group,
                case=case.name,
                shape_from=case.shape_from,
                provider=provider,
                ours=is_ours,
                median_ms=1e3 * seconds.median,
                p20_ms=1e3 * seconds.p20,
                p80_ms=1e3 * seconds.p80,
                speedup=ratio.median if is_ours else baseline_seconds / seconds.median,
                speedup_p20=ratio.p20 if is_ours else None,
                speedup_p80=ratio.p80 if is_ours else None,
                ours_faster=None if is_ours else ratio.median,
                ours_faster_p20=None if is_ours else ratio.p20,
                ours_faster_p80=None if is_ours else ratio.p80,
                ours_faster_low=None if is_ours else certain.low,
                ours_faster_high=None if is_ours else certain.high,
                peak_mib=peak_memory_mib(call, args),
                relative_error=worst.relative if worst else None,
                allowed_error=worst.allowed / worst.scale if worst and worst.scale else None,
                threads=torch.get_num_threads(),
                bytes_moved=case.bytes_moved,
                flops=case.flops,
                host_us=1e6 * host_seconds(call, args) if on_cuda(args) else None,
            )
        )
    return rows


class Spread(NamedTuple):
    """Hold the median of some values, and their 20th and 80th percentile."""

    median: float
    p20: float
    p80: float


def spread(values: list[float]) -> Spread:
    """Return the median, the 20th and the 80th percentile of values."""
    if len(values) < 2:
        return Spread(median=values[0], p20=values[0], p80=values[0])
    cuts = quantiles(values, n=10, method="inclusive")
    return Spread(median=median(values), p20=cuts[1], p80=cuts[7])


class Interval(NamedTuple):
    """Hold the ends of a confidence interval."""

    low: float
    high: float


def interval(values: Sequence[float]) -> Interval:
    """Return the 95 % confidence interval of a median, by order statistics; of fewer than six values their range."""
    ordered, n = sorted(values), len(values)
    first = max(0, math.floor((n - 1.96 * math.sqrt(n)) / 2))
    return Interval(low=ordered[first], high=ordered[n - 1 - first])


def goes_on(pairs: int, passed: float, seconds: float) -> bool:
    """Say whether more pairs are to be timed: six at least, for an interval of 95 %, three where they take long."""
    return pairs < 3 or passed < seconds or (pairs < 6 and passed < LONG)


def missing_peers(device: str) -> list[str]:
    """List what could be compared with and is not, each with the reason."""
    missing = [f"{package} (not installed)" for name, package in PEERS.items() if find_spec(name) is None]
    if device == "cpu":
        return [*missing, *(f"{name} (on a GPU alone)" for name in GPU_PEERS)]
    return [*missing, *(["Liger (not installed)"] if find_spec("liger_kernel") is None else [])]


def time_pairs(
    providers: dict[str, Call], ours: str, inputs: list[tuple], seconds: float
) -> dict[str, list[tuple[float, float]]]:
    """Time every other provider in pairs of seconds: theirs, and ours right after it, on the same inputs."""
    samples: dict[str, list[tuple[float, float]]] = {p: [] for p in providers if p != ours}
    leads = {}
    for provider, call in providers.items():
        if timed(call, inputs[0]) < 0.2:  # warm-up: compilation, caches, allocator
            call(*inputs[-1])
        leads[provider] = lead_seconds(call, inputs[0])
    start, turn = time.perf_counter(), 0
    while goes_on(turn, time.perf_counter() - start, seconds) and turn < 1000:
        args = inputs[turn % len(inputs)]
        for provider, pairs in samples.items():
            theirs = timed(providers[provider], args, leads[provider])
            pairs.append((theirs, timed(providers[ours], args, leads[ours])))
        turn += 1
    return samples


def timed(call: Call, args: tuple, lead: float = SHORTEST_LEAD) -> float:
    """Return the seconds of one call; on CUDA the device's, which has been kept busy for `lead` seconds before."""
    if not on_cuda(args):
        start = time.perf_counter()
        call(*args)
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(int(lead * LEAD_CLOCK_HZ))
    first.record()
    call(*args)
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1e3


def lead_seconds(call: Call, args: tuple) -> float:
    """Return for how long the device is kept busy before a call is timed; 0 on a CPU."""
    return min(LONGEST_LEAD, max(SHORTEST_LEAD, 1.5 * host_seconds(call, args))) if on_cuda(args) else 0.0


def host_seconds(call: Call, args: tuple, calls: int = 3) -> float:
    """Return the median seconds until a call returns: Python, checks, launches, and what it waits for a device."""
    samples = []
    for _ in range(calls):
        if on_cuda(args):
            torch.cuda.synchronize()
        start = time.perf_counter()
        call(*args)
        samples.append(time.perf_counter() - start)
    return median(samples)


def on_cuda(args: Any) -> bool:
    """Say whether a tensor among arguments is on a GPU."""
    return torch.cuda.is_available() and any(isinstance(a, torch.Tensor) and a.is_cuda for a in _flat(args))


def _flat(args: Any) -> Iterator[Any]:
    return iter(torch.utils._pytree.tree_leaves(args))


def peak_memory_mib(call: Call, args: tuple) -> float | None:
    """Measure the memory of one call beyond what is held before: the allocator's peak on CUDA, else resident pages."""
    gc.collect()
    if on_cuda(args):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call(*args)
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # freed memory goes back, so that it counts when it is taken again
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
        before = _status_kib("VmRSS")
        call(*args)
        return max(0, _status_kib("VmHWM") - before) / 1024
    except (OSError, AttributeError):
        return None


def _status_kib(key: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{key}:")[1].split()[0])


@dataclass(frozen=True)
class Machine:
    """Hold rates measured here, for the fraction of the hardware limit."""

    bytes_per_second: float
    flops_per_second: float

    def fraction_of_limit(self, row: schema.Row) -> float | None:
        """Return the time that a row's bytes and flops need at these rates, over the time taken."""
        seconds = max(row["bytes_moved"] / self.bytes_per_second, row["flops"] / self.flops_per_second)
        return seconds / (row["median_ms"] / 1e3) if seconds else None

    def best_of(self, other: "Machine") -> "Machine":
        """Return the better rate of each kind."""
        return Machine(
            max(self.bytes_per_second, other.bytes_per_second), max(self.flops_per_second, other.flops_per_second)
        )


def measure_machine(device: str) -> Machine:
    """Measure the rates of copies (bytes read and written) and of matrix products, in float32, or bfloat16 on CUDA."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    source = torch.ones(2**28 if device == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)
    copy = min(timed(lambda s: target.copy_(s), (source,)) for _ in range(8))
    size = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = min(timed(torch.matmul, (a, b)) for _ in range(40))  # the best of many: neighbours only ever slow it
    return Machine(2 * source.numel() * source.element_size() / copy, 2 * size**3 / product)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch use so many threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def others_load(seconds: float = 1.0) -> float | None:
    """Measure how much of a core, averaged over all, other programs take while this one waits; None: not known.

    The load average is no such number: it remembers what this program, or what installed it, did a minute ago.
    """
    before = _busy_and_total()
    time.sleep(seconds)
    after = _busy_and_total()
    if before is None or after is None or after[1] == before[1]:
        return None
    return (after[0] - before[0]) / (after[1] - before[1])


def _busy_and_total() -> tuple[int, int] | None:
    """Read the clock ticks of all cores since the start from Linux: busy or stolen by other machines, and all."""
    fields = next((line.split()[1:] for line in _lines("/proc/stat") if line.startswith("cpu ")), [])
    if len(fields) < 8:
        return None
    ticks = [int(field) for field in fields[:8]]
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)  # less idle, waiting for a disk


def commit() -> str | None:
    """Name the checkout's commit: MMLM_COMMIT where a copy without git's data is measured, else what git says."""
    import subprocess

    if name := os.environ.get("MMLM_COMMIT"):
        return name
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        described = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    except OSError:  # no git
        return None
    return described.stdout.strip() or None


def environment(device: str) -> schema.Environment:
    """Describe this machine and the versions on it; what other programs take is not among it."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import mmlm_fast
    from mmlm_fast import core

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    cpu = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    packages = ["torch", "triton", "transformers", "numpy", *PEERS.values()]
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu,
        "device_type": device,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": core.active_isa(),
        "load_average": round(os.getloadavg()[0], 2),
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "mmlm_fast": mmlm_fast.__version__,
        "python": platform.python_version(),
        "packages": {name: number for name in packages if (number := installed(name))},
        "cuda": torch.version.cuda,
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def rows_as_json(rows: list[Row], job: str) -> list[schema.Row]:
    """Return rows of a job as results.json holds them, with four digits."""
    return [cast(schema.Row, _four_digits(row) | {"fraction_of_limit": None, "job": job}) for row in rows]


def _four_digits(row: Row) -> dict[str, Any]:
    return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in asdict(row).items()}
