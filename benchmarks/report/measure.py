"""Run the cases and gather what the report shows."""

import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, cast

import numpy as np
import torch
import transformers
from tqdm import tqdm

import mmlm_fast.ops
from mmlm_benchmarks import contrastive, curves, harness, learning
from mmlm_benchmarks.audio import AUDIO, log_mel
from mmlm_benchmarks.audio.speech import RATE, speech
from mmlm_benchmarks.models import accelerated, own, thin
from mmlm_benchmarks.ops import OPS
from mmlm_benchmarks.report import findings, schema
from mmlm_benchmarks.report.schema import Results
from mmlm_fast.audio import WhisperFeatureExtractor

JOBS = (*OPS, *AUDIO, "model", "accelerated", "curves", "learning")
RESULTS = Path(__file__).parents[1] / "results"
SCALING_SECONDS = (1, 3, 10, 30, 120, 600)
BUDGET = 155.0  # seconds, of the report of three minutes: imports, the last case and the page come on top
SAVED_EVERY = 10.0  # seconds
T = TypeVar("T")


class Step(NamedTuple):
    """Name one thing that is measured, and how.

    Args:
        name: What the report calls it.
        job: What ``--ops`` calls it; "" for what belongs to none.
        run: Adds to the results.
    """

    name: str
    job: str
    run: Callable[[], None]


class Options(NamedTuple):
    """Choose what is measured, and for how long.

    Args:
        device: ``cpu`` or ``cuda``.
        jobs: Some of ``JOBS``, with all their cases; none: of every op and audio family the case that says most, a thin
            model and an accelerated model of Hugging Face.
        full: All of it, with what takes minutes: compilations, contrastive losses of large batches, all trainings.
        learning: The trainings, too.
        seconds: Timed per case.
        budget: Seconds after which no case is begun any more; None: there is no end.
    """

    device: str
    jobs: tuple[str, ...] = ()
    full: bool = False
    learning: bool = False
    seconds: float = 0.4
    budget: float | None = None

    def has(self, job: str) -> bool:
        """Say whether a job is to be measured."""
        if job == "learning":
            return self.full or self.learning or job in self.jobs
        return self.full or not self.jobs or job in self.jobs

    @property
    def is_short(self) -> bool:
        """Say whether one case stands for each op."""
        return not self.jobs and not self.full


def audio_cases(family: str, device: str) -> list[harness.Case]:
    """Return the cases of a family of audio features."""
    return import_module(f"mmlm_benchmarks.audio.{family}").cases(device)


def op_cases(op: str, device: str, full: bool = False) -> list[harness.Case]:
    """Return the cases of an op, with those that take minutes if `full`."""
    module = import_module(f"mmlm_benchmarks.ops.{op}")
    return module.cases(device) + (module.full_cases(device) if full and hasattr(module, "full_cases") else [])


def telling(module: str, cases: list[harness.Case]) -> list[harness.Case]:
    """Choose the case that says most: the one that the module names, else the first training step, else the first."""
    named = getattr(import_module(module), "TELLING", None)
    chosen = [c for c in cases if c.name == named] or [c for c in cases if c.name.endswith("forward + backward")]
    return (chosen or cases)[:1]


def collect(
    options: Options,
    *,
    progress: bool = True,
    resume: Results | None = None,
    save: Callable[[Results], None] | None = None,
) -> Results:
    """Measure and return what results.json holds; `mmlm_benchmarks.report.schema` describes it.

    Args:
        options: What, and for how long.
        progress: Show a progress bar on stderr.
        resume: Results of a run that was cut off, which goes on.
        save: Called with the results so far, every few seconds, at the end, and when it is interrupted.

    Raises:
        ValueError: where the results to go on with are of another device, commit or other options.
    """
    transformers.logging.set_verbosity_error()
    results = _started(options) if resume is None else _gone_on(options, resume)
    save = save or (lambda results: None)
    with tempfile.TemporaryDirectory() as folder:
        try:
            _run_steps(list(_steps(options, results, Path(folder))), options, results, progress, save)
        finally:
            save(results)
    return results


def collect_own(name: str, options: Options, *, progress: bool = True, **more: Any) -> Results:
    """Measure a user's own model alone: see `mmlm_benchmarks.models.own.measure`, which takes `more`."""
    transformers.logging.set_verbosity_error()
    results = _started(options)
    with tqdm(total=6, disable=not progress, unit="step", dynamic_ncols=True) as bar:

        def step(what: str) -> None:
            bar.set_description(what)
            bar.update()

        measured = own.measure(name, seconds=10 * options.seconds, device=options.device, step=step, **more)
    results["not_measured"] = []
    results["accelerated"] = measured.rows
    results["own"] = measured.about
    results["finished"] = True
    return results


def _started(options: Options) -> Results:
    environment = harness.environment(options.device)
    load = harness.others_load()
    environment["others_load"] = None if load is None else round(load, 2)
    results: Results = {
        "environment": environment,
        "options": _as_json(options),
        "rows": [],
        "accelerated": [],
        "generation": [],
        "learning": [],
        "scaling": [],
        "memory": [],
        "curves": [],
        "starts": [],
        "rates": [],
        "not_measured": _gpu_rows(options) if options.device == "cpu" else [],
        "failures": [],
        "skipped": [],
        "seconds_by_case": {},
        "finished": False,
        "missing_peers": harness.missing_peers(options.device),
    }
    if options.device == "cpu":
        results["last_gpu_result"] = last_gpu_result()
    return results


def _as_json(options: Options) -> schema.Asked:
    return {
        "device": options.device,
        "jobs": list(options.jobs),
        "full": options.full,
        "learning": options.learning,
        "seconds": options.seconds,
        "budget": options.budget,
    }


def _gone_on(options: Options, resume: Results) -> Results:
    before, now = resume["environment"], harness.environment(options.device)
    same: tuple[Literal["device", "device_type", "commit", "packages"], ...]
    same = ("device", "device_type", "commit", "packages")
    for what in same:
        if before[what] != now[what]:
            raise ValueError(f"{what} was {before[what]} and is {now[what]}: start anew, without --resume")
    if resume["options"] != json.loads(json.dumps(_as_json(options))):
        raise ValueError(f"the report was begun with {resume['options']}, now it is {_as_json(options)}")
    failed = {f["case"] for f in resume["failures"]}
    times = {name: t for name, t in resume["seconds_by_case"].items() if name not in failed}
    return {**resume, "failures": [], "skipped": [], "seconds_by_case": times, "finished": False}


def _run_steps(
    steps: list[Step], options: Options, results: Results, progress: bool, save: Callable[[Results], None]
) -> None:
    start = saved = time.perf_counter()
    done = set(results["seconds_by_case"])
    with tqdm(total=len(steps), disable=not progress, unit="case", dynamic_ncols=True) as bar:
        for step in steps:
            bar.set_description(step.name[:48])
            began = time.perf_counter()
            if step.job and options.budget is not None and began - start > options.budget:
                results["skipped"].append({"case": step.name, "command": f"mmlm-fast report --ops {step.job}"})
            elif not step.job or step.name not in done:
                try:
                    step.run()
                except Exception as exception:  # one failing case must not lose the others: reported, exit code 1
                    results["failures"].append({"case": step.name, "error": f"{type(exception).__name__}: {exception}"})
                results["seconds_by_case"][step.name] = round(time.perf_counter() - began, 1)
            if time.perf_counter() - saved > SAVED_EVERY:
                save(results)
                saved = time.perf_counter()
            bar.update()
    results["finished"] = True


def _steps(options: Options, results: Results, folder: Path) -> Iterator[Step]:
    device, full, seconds = options.device, options.full, options.seconds
    every, one = torch.get_num_threads(), 1

    def rates() -> None:
        rate_by_threads = {}
        for count in sorted({one, every}):
            with harness.threads(count):
                machine = harness.measure_machine(device)
            rate_by_threads[str(count)] = [machine.bytes_per_second, machine.flops_per_second]
        results["rates"].append(rate_by_threads)

    def limits() -> None:
        rates()  # before and after, the better of both: neighbours only ever slow a machine
        machines = {}
        for count in results["rates"][0]:
            measured = [
                harness.Machine(bytes_per_second=rate[count][0], flops_per_second=rate[count][1])
                for rate in results["rates"]
                if count in rate
            ]
            machines[int(count)] = measured[0].best_of(measured[-1])
        for row in results["rows"]:
            fraction = machines[row["threads"]].fraction_of_limit(row)
            row["fraction_of_limit"] = None if fraction is None else round(fraction, 4)
        results["machine"] = {
            "copy_gb_per_s": round(machines[every].bytes_per_second / 1e9, 1),
            "matmul_gflop_per_s": round(machines[every].flops_per_second / 1e9, 1),
        }

    def timed(case: harness.Case, job: str, num_threads: int, budget: float = seconds) -> Step:
        def run() -> None:
            with harness.threads(num_threads):
                results["rows"] += harness.rows_as_json(harness.run(case, budget), job)

        return Step(case.name, job, run)

    yield Step("machine rates", "", rates)
    if options.has("accelerated"):
        for name in accelerated.SHORT if options.is_short else accelerated.JOBS:
            measured = partial(accelerated.measure, name, 10 * seconds, full)
            yield Step(f"accelerated: {name}", "accelerated", partial(_add, results["accelerated"], measured))
    for family in AUDIO:
        if options.has(family):
            cases = audio_cases(family, device)
            for case in telling(f"mmlm_benchmarks.audio.{family}", cases) if options.is_short else cases:
                yield timed(case, family, one)
    if options.has("model"):
        fusions = ("merge",) if options.is_short else thin.FUSIONS
        for case in thin.cases(device, full, fusions):  # long calls: fewer samples in the same time
            yield timed(case, "model", every, 3 * seconds)
        for fusion in fusions:
            agrees = partial(_generation, fusion, device)
            yield Step(f"generation, fusion {fusion}", "model", partial(_add, results["generation"], agrees))
    for op in OPS:
        if options.has(op):
            cases = op_cases(op, device, full)
            for case in telling(f"mmlm_benchmarks.ops.{op}", cases) if options.is_short else cases:
                yield timed(case, op, every)
    if options.has("log_mel") and device == "cpu" and not options.is_short:
        yield Step("log-mel, scaling", "log_mel", partial(_add, results["scaling"], _scaling))
    for op, num_scalars in (("clip_loss", 1), ("siglip_loss", 2)):
        if full and options.has(op):
            memory = partial(_memory, op, num_scalars)
            yield Step(f"{op}, memory over the batch", op, partial(_add, results["memory"], memory))
    if options.has("curves") and device == "cpu" and not options.is_short:
        for curve in curves.curves(every):
            points = partial(curves.measure, curve, seconds)
            yield Step(curve.name, "curves", partial(_add, results["curves"], points))
        yield Step("cold starts", "curves", partial(_add, results["starts"], curves.cold_starts))
    yield Step("machine rates again", "", limits)
    if options.has("learning"):  # after what is timed, as it would heat the machine
        for experiment in learning.experiments(full):
            training = partial(_training, experiment, folder)
            yield Step(f"training: {experiment.name}", "learning", partial(_add, results["learning"], training))


def _add(rows: list[T], measure: Callable[[], Iterable[T]]) -> None:
    """Add what is measured to rows, all of it or, where that fails, nothing."""
    rows.extend(list(measure()))


def _generation(fusion: str, device: str) -> list[schema.Generation]:
    return [cast(schema.Generation, thin.generation_agrees(fusion, device))]


def _training(experiment: learning.Experiment, folder: Path) -> list[schema.Training]:
    return [cast(schema.Training, learning.run(experiment, folder))]


def _memory(op: str, num_scalars: int) -> list[schema.MemoryPoint]:
    """Measure the memory of a contrastive loss over the batch; on the CPU, where it is counted in pages."""
    module = import_module(f"mmlm_benchmarks.ops.{op}")
    points = contrastive.memory_curve(op, "cpu", module.eager, getattr(mmlm_fast.ops, op), num_scalars)
    return cast(list[schema.MemoryPoint], points)


def _scaling() -> list[schema.ScalingPoint]:
    """Time log-mel over clip length: ours on one thread and on two, transformers on one."""
    options = {"padding": "longest", "truncation": False}
    calls = {
        "transformers": log_mel.extractor(transformers.WhisperFeatureExtractor, **options),
        "mmlm_fast": log_mel.extractor(WhisperFeatureExtractor, **options),
    }
    points: list[schema.ScalingPoint] = []

    def add(provider: str, num_threads: int, length: int, times: list[float]) -> None:
        label = f"{provider}, {num_threads} thread{'s' if num_threads > 1 else ''}"
        passed = harness.spread(times)
        points.append(
            {
                "provider": label,
                "seconds": length,
                "ms": round(1e3 * passed.median, 5),
                "p20_ms": round(1e3 * passed.p20, 5),
                "p80_ms": round(1e3 * passed.p80, 5),
            }
        )

    for length in SCALING_SECONDS:
        clips = [(c,) for c in speech(length * RATE, 4)]
        for num_threads in (1, 2):  # each beside transformers, so that caches are equally cold
            with harness.threads(num_threads):
                pairs = harness.time_pairs(calls, "mmlm_fast", clips, 0.2)["transformers"]
            add("mmlm_fast", num_threads, length, [ours for _, ours in pairs])
            if num_threads == 1:
                add("transformers", num_threads, length, [theirs for theirs, _ in pairs])
    return sorted(points, key=lambda p: p["provider"])


def _gpu_rows(options: Options) -> list[str]:
    rows = [f"{case.name}: {case.shape_from}" for op in OPS if options.has(op) for case in op_cases(op, "cuda")]
    if options.has("log_mel"):
        rows.append(
            "spectral features on CUDA: the fused kernel of csrc, 64 clips of 30 s, against the torch.stft chain"
        )
    if options.has("model"):
        rows.append("thin model on CUDA with the Triton kernels")
    return rows


def last_gpu_result() -> schema.LastGpuResult | None:
    """Return the newest committed GPU result, if there is one: its environment, and each case's best alternative."""
    of_gpus: list[schema.LastGpuResult] = []
    for path in RESULTS.glob("*.json"):
        results: schema.Committed = json.loads(path.read_text(encoding="utf-8"))
        if results["environment"]["device_type"] == "cuda":
            best: dict[str, schema.BestAlternative] = {}
            for row in (r for r in results["rows"] if not r["ours"]):
                known, gain = best.get(row["case"]), findings.gain(row)
                if known is None or gain < known["ours_faster"]:
                    best[row["case"]] = {"case": row["case"], "provider": row["provider"], "ours_faster": gain}
            rows = sorted(best.values(), key=lambda r: r["ours_faster"])
            of_gpus.append({**results["environment"], "file": path.name, "rows": rows})
    return max(of_gpus, key=lambda e: e["date"], default=None)


def sample_features() -> dict[str, np.ndarray]:
    """Compute features of the English sample, and their error against float64, for the picture in the report."""
    from mmlm_fast.audio import log_mel as ours
    from mmlm_fast.audio import log_mel_ref
    from mmlm_fast.data import load_speech

    waveform = torch.from_numpy(load_speech()[0].waveform)
    features = ours(waveform)
    return {"features": features.numpy(), "error": (features - log_mel_ref(waveform.double())).abs().numpy()}
