"""Type what results.json holds, field by field: ``python -m mmlm_benchmarks.report.schema`` prints it as Markdown."""

from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, NotRequired, TypedDict, get_args, get_origin, get_type_hints, is_typeddict

from mmlm_benchmarks.tables import LEFT, markdown_table


class Environment(TypedDict):
    """Describe the machine, and the versions that ran on it; `stand_in` and `card` are of the GPU suite's results."""

    device: str
    device_type: str
    cores: int | None
    threads: int
    isa: str
    load_average: float
    date: str
    commit: str | None
    mmlm_fast: str
    python: str
    packages: dict[str, str]
    cuda: str | None
    others_load: NotRequired[float | None]
    stand_in: NotRequired[bool]
    card: NotRequired[str | None]


class Asked(TypedDict):
    """Hold the options of a report."""

    device: str
    jobs: list[str]
    full: bool
    learning: bool
    seconds: float
    budget: float | None


class Row(TypedDict):
    """Hold what one provider needs for a case."""

    group: Annotated[str, "audio, model, or the op"]
    job: Annotated[str, "what `mmlm-fast report --ops` calls it"]
    case: Annotated[str, "one job at one size; its rows are one a provider"]
    shape_from: Annotated[str, "the model or setting that the size is taken from"]
    provider: Annotated[str, "who computes it"]
    ours: Annotated[bool, "whether that is mmlm-fast"]
    median_ms: Annotated[float, "of one call; p20_ms and p80_ms: percentiles"]
    p20_ms: float
    p80_ms: float
    speedup: Annotated[float, "over the first provider; ours: median of paired ratios, others: ratio of medians"]
    speedup_p20: float | None
    speedup_p80: float | None
    ours_faster: Annotated[float | None, "its time over ours, median of neighbouring calls; null for ours"]
    ours_faster_p20: float | None
    ours_faster_p80: float | None
    ours_faster_low: Annotated[float | None, "95 % confidence interval of that median"]
    ours_faster_high: float | None
    peak_mib: Annotated[
        float | None, "memory of one call beyond what was held before; null where the system does not tell"
    ]
    relative_error: Annotated[float | None, "norm, against float64; null where a provider computes another thing"]
    allowed_error: Annotated[float | None, "what it may be"]
    threads: Annotated[int, "of torch and of the native core"]
    bytes_moved: Annotated[int, "each input read once, each output written once; 0: not stated"]
    flops: int
    host_us: Annotated[float | None, "until a call returns, on CUDA"]
    fraction_of_limit: Annotated[
        float | None, "time that bytes and flops need at the machine's rates, over the time taken"
    ]


class Job(TypedDict):
    """Name what a model is timed with, before and after `accelerate`."""

    case: str
    shape: Annotated[str, "the configuration, and what of it was left out to fit"]
    kinds: Annotated[list[str], "kinds of place that were replaced"]


class Comparison(TypedDict):
    """Say how far results before and after lie apart: `equal` of tokens, else relative differences."""

    equal: NotRequired[bool]
    difference: NotRequired[float]
    gradients_difference: NotRequired[float]


class Timing(TypedDict):
    """Say how long a job takes, and how much memory, before and after `accelerate`."""

    threads: int
    load: Annotated[float, "load average"]
    stock_s: Annotated[float, "median of a call as transformers has it; ours_s: accelerated"]
    ours_s: float
    speedup: Annotated[float, "median of paired ratios"]
    speedup_p20: float
    speedup_p80: float
    speedup_low: Annotated[float, "95 % confidence interval of that median"]
    speedup_high: float
    stock_mib: Annotated[float | None, "peak memory; ours_mib: accelerated"]
    ours_mib: float | None
    gradients_mib: Annotated[float, "part of both"]


class Accelerated(Job, Comparison, Timing):
    """Hold a job of a Hugging Face model before and after `accelerate`."""


class Generation(TypedDict):
    """Say whether greedy generation of the thin model gives the same tokens in reference and fast form."""

    fusion: str
    tokens: int
    equal: bool


class Control(TypedDict):
    """Hold an evaluation with one modality of other samples; `loss_interval` is of the loss of score by that."""

    metrics: dict[str, Any]
    loss_interval: list[float] | None
    used: bool | None


class Picture(TypedDict):
    """Hold an evaluated picture: its text, what the model said of it, and what it should have said."""

    png: str
    text: str
    said: str
    reference: str


class Training(TypedDict):
    """Hold what the report reads of a training; `mmlm_fast.training.train` returns more."""

    name: str
    data: str
    seed: int
    num_samples: dict[str, int]
    metrics: dict[str, Any]
    chance: float | None
    controls: dict[str, Control]
    history: list[dict[str, float]]
    seconds: float
    gallery: list[Picture]


class ScalingPoint(TypedDict):
    """Hold the time of log-mel at one clip length."""

    provider: str
    seconds: int
    ms: float
    p20_ms: float
    p80_ms: float


class MemoryPoint(TypedDict):
    """Hold the memory of a training step of a contrastive loss at one batch."""

    op: str
    provider: str
    batch: int
    mib: float


class CurvePoint(TypedDict):
    """Hold time and memory of one provider at one point of a curve."""

    curve: str
    along: str
    x: int
    provider: str
    ms: float
    p20_ms: float
    p80_ms: float
    peak_mib: float | None


class Start(TypedDict):
    """Hold the time of a fresh process."""

    what: str
    seconds: float


class Failure(TypedDict):
    """Name a case that failed, and why."""

    case: str
    error: str


class Skipped(TypedDict):
    """Name a case that did not fit into the time, and the command that runs it."""

    case: str
    command: str


class Rates(TypedDict):
    """Hold the better of the machine's rates at the start and at the end, on all threads."""

    copy_gb_per_s: float
    matmul_gflop_per_s: float


class BestAlternative(TypedDict):
    """Say how many times as fast as the best alternative ours is in a case."""

    case: str
    provider: str
    ours_faster: float


class LastGpuResult(Environment):
    """Name the newest committed result of a GPU, with the best alternative of each of its cases."""

    file: str
    rows: list[BestAlternative]


class Share(TypedDict):
    """Say which part of a model's time and memory modules of one kind take."""

    what: str
    modules: int
    time: float
    memory: float
    mib: float


Own = TypedDict(
    "Own",
    {
        "name": str,
        "class": str,
        "parameters": int,
        "dtype": str,
        "inputs": dict[str, list[int]],
        "notes": list[str],
        "accelerate": list[str],
        "shares": list[Share],
    },
)


class Results(TypedDict):
    """Hold a report's results."""

    environment: Annotated[
        Environment, "device, versions, date, commit, threads, `others_load`: what other programs took"
    ]
    options: Annotated[Asked, "what was asked for"]
    rows: Annotated[list[Row], "see below"]
    accelerated: Annotated[
        list[Accelerated],
        "Hugging Face models before and after `accelerate`, see below; with `equal` (tokens) "
        "or `difference` (norm over loss and gradients)",
    ]
    generation: Annotated[list[Generation], "greedy generation of the thin model in reference and fast form"]
    learning: Annotated[list[Training], "trainings and their controls, with --learning"]
    scaling: Annotated[list[ScalingPoint], "log-mel over clip length"]
    memory: Annotated[list[MemoryPoint], "contrastive losses over the batch"]
    curves: Annotated[
        list[CurvePoint], "time and memory over length, batch, threads: curve, along, x, provider, ms, peak_mib"
    ]
    starts: Annotated[list[Start], "seconds of fresh processes: what, seconds"]
    rates: Annotated[
        list[dict[str, list[float]]], "bytes and flops a second, by number of threads, at the start and at the end"
    ]
    not_measured: Annotated[list[str], "what needs a GPU"]
    missing_peers: Annotated[list[str], "what could be compared with and is not, each with the reason"]
    failures: Annotated[list[Failure], "case and error"]
    skipped: Annotated[list[Skipped], "cases that did not fit into the time, with the command that runs each"]
    seconds_by_case: Annotated[dict[str, float], "how long each took, its check included"]
    finished: Annotated[bool, "false where the run was cut off"]
    machine: NotRequired[Rates]
    last_gpu_result: NotRequired[LastGpuResult | None]
    own: NotRequired[Own]


class BaselineEnvironment(TypedDict):
    """Say where a baseline is from."""

    device: str
    device_type: str
    threads: int
    isa: str
    date: str
    commit: str | None
    packages: dict[str, str]
    load_average: float
    others_load: float | None


class BaselineRow(TypedDict):
    """Keep the ratio of an alternative."""

    case: str
    provider: str
    ours: bool
    ours_faster: float


class BaselineAccelerated(TypedDict):
    """Keep the gain of an accelerated model."""

    case: str
    shape: str
    speedup: float


class Baseline(TypedDict):
    """Keep a report's ratios, which later reports are compared with."""

    environment: BaselineEnvironment
    rows: list[BaselineRow]
    accelerated: list[BaselineAccelerated]


class CommittedRow(Row):
    """Hold a row of committed results, which may be of a commit of its own."""

    commit: NotRequired[str]


class Check(TypedDict):
    """Hold what README reads of a check of the GPU suite."""

    ok: bool


class Tests(TypedDict):
    """Count the tests that ran on a GPU."""

    passed: int
    failed: int
    skipped: int
    finished: bool


class Committed(TypedDict, total=False):
    """Hold what README reads of committed results: a report's, or the GPU suite's, whose failures are sentences."""

    environment: Environment
    rows: list[CommittedRow]
    accelerated: list[Accelerated]
    learning: list[Training]
    memory: list[MemoryPoint]
    checks: list[Check]
    tests: Tests | None
    failures: list[str]


HOLDS_MORE = (Training, Control)
TABLES: dict[str, Any] = {"The file": Results, "A row": Row, "A row of accelerated": Accelerated}


def problems(results: Any) -> list[str]:
    """List what of `results` is not as described; empty where all is."""
    return list(_problems("results", results, Results))


def _problems(where: str, value: Any, hint: Any) -> Iterator[str]:
    if type(value) not in _types(hint):
        yield f"{where} is {type(value).__name__}"
    elif isinstance(value, dict | list) and hint is not Any:
        hint = next(part for part in _parts(hint) if _types(part) == (type(value),))
        if isinstance(value, dict) and is_typeddict(hint):
            hints = get_type_hints(hint)
            yield from (f"{where} lacks {name}" for name in sorted(hint.__required_keys__ - value.keys()))
            for name, part in value.items():
                if name in hints:
                    yield from _problems(f"{where}.{name}", part, hints[name])
                elif hint not in HOLDS_MORE:
                    yield f"{where}.{name} is not described"
        elif get_args(hint):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for place, part in items:
                yield from _problems(f"{where}[{place}]", part, get_args(hint)[-1])


def _parts(hint: Any) -> tuple[Any, ...]:
    """Split a union."""
    return get_args(hint) if isinstance(hint, UnionType) else (hint,)


def _types(hint: Any) -> tuple[type, ...]:
    """Return the types that values may have once they are read from JSON."""
    types: list[type] = []
    for part in _parts(hint):
        if part is Any:
            types += [bool, int, float, str, list, dict, NoneType]
        elif part is float:
            types += [int, float]
        else:
            types.append(dict if is_typeddict(part) else get_origin(part) or part)
    return tuple(types)


def markdown() -> str:
    """Write the description as tables: of every field that all results have."""
    parts = ["# results.json", ""]
    parts += ["Written by `mmlm-fast report`; this page by `python -m mmlm_benchmarks.report.schema`.", ""]
    more = "Beside these there are `machine` (rates), `last_gpu_result`, and with --model `own`: the model, what "
    more += "accelerate did and left, and the shares of time and memory by what a module is."
    for title, described in TABLES.items():
        meanings, hints = get_type_hints(described, include_extras=True), get_type_hints(described)
        lines = []
        for name in (n for n in hints if n in described.__required_keys__):
            meaning = get_args(meanings[name])[1] if get_origin(meanings[name]) is Annotated else ""
            lines.append((f"`{name}`", " or ".join(t.__name__ for t in _types(hints[name])), meaning))
        parts += [f"## {title}", "", markdown_table(("field", "type", "meaning"), lines, alignment=[LEFT] * 3), ""]
    return "\n".join([*parts, more, ""])


if __name__ == "__main__":
    print(markdown(), end="")
