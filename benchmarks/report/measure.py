"""Run the cases and gather what the report shows."""

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

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
from mmlm_fast.audio import WhisperFeatureExtractor

JOBS = (*OPS, *AUDIO, "model", "accelerated", "curves", "learning")
RESULTS = Path(__file__).parents[1] / "results"
SCALING_SECONDS = (1, 3, 10, 30, 120, 600)
BUDGET = 155.0  # seconds, of the report of three minutes: imports, the last case and the page come on top
SAVED_EVERY = 10.0  # seconds
BUSY = 0.4  # of a core, by other programs
DRIFT = 1.25  # of the machine's rates, between the start and the end
Results = dict[str, Any]


class Step(NamedTuple):
    """One thing that is measured.

    Args:
        name: Of it, in the report.
        job: What ``--ops`` calls it; "" for what belongs to none.
        run: Adds to the results.
    """

    name: str
    job: str
    run: Callable[[], None]


class Options(NamedTuple):
    """What is to be measured, and for how long.

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
        """Whether a job is part of it."""
        if job == "learning":
            return self.full or self.learning or job in self.jobs
        return self.full or not self.jobs or job in self.jobs

    @property
    def is_short(self) -> bool:
        """Whether one case stands for each op."""
        return not self.jobs and not self.full


def audio_cases(family: str, device: str) -> list[harness.Case]:
    return import_module(f"mmlm_benchmarks.audio.{family}").cases(device)


def op_cases(op: str, device: str, full: bool = False) -> list[harness.Case]:
    module = import_module(f"mmlm_benchmarks.ops.{op}")
    return module.cases(device) + (module.full_cases(device) if full and hasattr(module, "full_cases") else [])


def telling(module: str, cases: list[harness.Case]) -> list[harness.Case]:
    """The case that says most: the one that the module names, else the first training step, else the first."""
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
    """Measure and return what results.json holds; `SCHEMA` of `mmlm_benchmarks.report.schema` describes it.

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
    """The same of a user's own model alone: see `mmlm_benchmarks.models.own.measure`, which takes `more`."""
    transformers.logging.set_verbosity_error()
    results = _started(options) | {"not_measured": []}
    with tqdm(total=6, disable=not progress, unit="step", dynamic_ncols=True) as bar:

        def step(what: str) -> None:
            bar.set_description(what)
            bar.update()

        found = own.measure(name, seconds=10 * options.seconds, device=options.device, step=step, **more)
    results["accelerated"] = found.pop("rows")
    return results | {"own": found, "finished": True}


def _started(options: Options) -> Results:
    results: Results = {"environment": harness.environment(options.device), "options": _as_json(options)}
    load = harness.others_load()
    results["environment"]["others_load"] = None if load is None else round(load, 2)
    results |= {"rows": [], "accelerated": [], "generation": [], "learning": [], "scaling": [], "memory": []}
    results |= {"curves": [], "starts": []}
    results |= {
        "rates": [],
        "not_measured": [],
        "failures": [],
        "skipped": [],
        "seconds_by_case": {},
        "finished": False,
    }
    results["missing_peers"] = harness.missing_peers(options.device)
    if options.device == "cpu":
        results["not_measured"] = _gpu_rows(options)
        results["last_gpu_result"] = last_gpu_result()
    return results


def _as_json(options: Options) -> dict[str, Any]:
    return options._asdict() | {"jobs": list(options.jobs)}


def _gone_on(options: Options, resume: Results) -> Results:
    now = harness.environment(options.device)
    for what in ("device", "device_type", "commit", "packages"):
        if resume["environment"][what] != now[what]:
            raise ValueError(
                f"{what} was {resume['environment'][what]} and is {now[what]}: start anew, without --resume"
            )
    if resume["options"] != json.loads(json.dumps(_as_json(options))):
        raise ValueError(f"the report was begun with {resume['options']}, now it is {_as_json(options)}")
    failed = {f["case"] for f in resume["failures"]}
    times = {name: t for name, t in resume["seconds_by_case"].items() if name not in failed}
    return resume | {"failures": [], "skipped": [], "seconds_by_case": times, "finished": False}


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
        found = {}
        for count in sorted({one, every}):
            with harness.threads(count):
                rate = harness.measure_machine(device)
            found[str(count)] = [rate.bytes_per_second, rate.flops_per_second]
        results["rates"].append(found)

    def limits() -> None:
        rates()  # before and after, the better of both: neighbours only ever slow a machine
        machines = {}
        for count in results["rates"][0]:
            given = [harness.Machine(*found[count]) for found in results["rates"] if count in found]
            machines[int(count)] = given[0].best_of(given[-1])
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
                rows = harness.rows_as_json(harness.run(case, budget))
            results["rows"] += [row | {"fraction_of_limit": None, "job": job} for row in rows]

        return Step(case.name, job, run)

    yield Step("machine rates", "", rates)
    if options.has("accelerated"):
        for name in accelerated.SHORT if options.is_short else accelerated.JOBS:
            yield Step(
                f"accelerated: {name}",
                "accelerated",
                lambda name=name: results["accelerated"].extend(list(accelerated.measure(name, 10 * seconds, full))),
            )
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
            yield Step(
                f"generation, fusion {fusion}",
                "model",
                lambda fusion=fusion: results["generation"].append(thin.generation_agrees(fusion, device)),
            )
    for op in OPS:
        if options.has(op):
            cases = op_cases(op, device, full)
            for case in telling(f"mmlm_benchmarks.ops.{op}", cases) if options.is_short else cases:
                yield timed(case, op, every)
    if options.has("log_mel") and device == "cpu" and not options.is_short:
        yield Step("log-mel, scaling", "log_mel", lambda: results["scaling"].extend(_scaling()))
    for op, num_scalars in (("clip_loss", 1), ("siglip_loss", 2)):
        if full and options.has(op):
            yield Step(
                f"{op}, memory over the batch",
                op,
                lambda op=op, n=num_scalars: results["memory"].extend(_memory(op, n)),
            )
    if options.has("curves") and device == "cpu" and not options.is_short:
        for curve in curves.curves(every):
            yield Step(curve.name, "curves", lambda c=curve: results["curves"].extend(list(curves.measure(c, seconds))))
        yield Step("cold starts", "curves", lambda: results["starts"].extend(curves.cold_starts()))
    yield Step("machine rates again", "", limits)
    if options.has("learning"):  # after what is timed, as it would heat the machine
        for experiment in learning.experiments(full):
            yield Step(
                f"training: {experiment.name}",
                "learning",
                lambda e=experiment: results["learning"].append(learning.run(e, folder)),
            )


def _memory(op: str, num_scalars: int) -> list[dict[str, Any]]:
    """Of a contrastive loss, over the batch; on the CPU, where it is counted in pages."""
    module = import_module(f"mmlm_benchmarks.ops.{op}")
    return contrastive.memory_curve(op, "cpu", module.eager, getattr(mmlm_fast.ops, op), num_scalars)


def _scaling() -> list[dict[str, Any]]:
    """Time over clip length: ours on one thread and on two, transformers on one."""
    options = {"padding": "longest", "truncation": False}
    calls = {
        "transformers": log_mel.extractor(transformers.WhisperFeatureExtractor, **options),
        "mmlm_fast": log_mel.extractor(WhisperFeatureExtractor, **options),
    }
    points = []

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


def last_gpu_result() -> dict[str, Any] | None:
    """Environment of the newest committed GPU result, if there is one, and each of its cases' best alternative."""
    found = []
    for path in RESULTS.glob("*.json"):
        results = json.loads(path.read_text(encoding="utf-8"))
        if results["environment"]["device_type"] == "cuda":
            best: dict[str, dict[str, Any]] = {}
            for row in results["rows"]:
                known = best.get(row["case"])
                if not row["ours"] and (known is None or row["ours_faster"] < known["ours_faster"]):
                    best[row["case"]] = {name: row[name] for name in ("case", "provider", "ours_faster")}
            rows = sorted(best.values(), key=lambda r: r["ours_faster"])
            found.append(results["environment"] | {"file": path.name, "rows": rows})
    return max(found, key=lambda e: e["date"], default=None)


def sample_features() -> dict[str, np.ndarray]:
    """Features of the English sample, and their error against float64, for the picture in the report."""
    from mmlm_fast.audio import log_mel as ours
    from mmlm_fast.audio import log_mel_ref
    from mmlm_fast.data import load_speech

    waveform = torch.from_numpy(load_speech()[0].waveform)
    features = ours(waveform)
    return {"features": features.numpy(), "error": (features - log_mel_ref(waveform.double())).abs().numpy()}
