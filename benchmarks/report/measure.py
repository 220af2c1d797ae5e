"""Run the cases and gather what the report shows."""

import json
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tqdm import tqdm

import mmlm_fast.ops
from mmlm_benchmarks import contrastive, harness, learning
from mmlm_benchmarks.audio import AUDIO, log_mel
from mmlm_benchmarks.audio.speech import RATE, speech
from mmlm_benchmarks.models import thin
from mmlm_benchmarks.ops import OPS
from mmlm_fast.audio import WhisperFeatureExtractor

JOBS = (*OPS, *AUDIO, "model", "learning")
RESULTS = Path(__file__).parents[1] / "results"
SCALING_SECONDS = (1, 3, 10, 30, 120, 600)


def audio_cases(family: str, device: str) -> list[harness.Case]:
    return import_module(f"mmlm_benchmarks.audio.{family}").cases(device)


def op_cases(op: str, device: str, full: bool = False) -> list[harness.Case]:
    module = import_module(f"mmlm_benchmarks.ops.{op}")
    return module.cases(device) + (module.full_cases(device) if full and hasattr(module, "full_cases") else [])


def collect(
    device: str, jobs: Sequence[str] | None = None, *, full: bool = False, seconds: float = 0.6, progress: bool = True
) -> dict[str, Any]:
    """Measure and return what results.json holds.

    Args:
        device: ``cpu`` or ``cuda``.
        jobs: Some of ``JOBS``; all by default.
        full: Also what takes minutes: compilations, contrastive losses of large batches.
        seconds: Timed per case.
        progress: Show a progress bar on stderr.

    Returns:
        A JSON-serialisable dict: environment, machine, rows, generation, learning, scaling, memory, not_measured,
        failures.
    """
    jobs = tuple(jobs) if jobs else JOBS
    transformers.logging.set_verbosity_error()
    results: dict[str, Any] = {"environment": harness.environment(device), "rows": [], "generation": []}
    results |= {"learning": [], "scaling": [], "memory": [], "not_measured": [], "failures": [], "seconds_by_case": {}}
    with tempfile.TemporaryDirectory() as folder:
        _run_steps(list(_steps(device, jobs, full, seconds, results, Path(folder))), results, progress)
    if device == "cpu":
        results["not_measured"] = _gpu_rows(jobs)
        results["last_gpu_result"] = last_gpu_result()
    return results


def _run_steps(steps: list[tuple[str, Callable[[], None]]], results: dict[str, Any], progress: bool) -> None:
    with tqdm(total=len(steps), disable=not progress, unit="case", dynamic_ncols=True) as bar:
        for name, step in steps:
            bar.set_description(name[:48])
            start = time.perf_counter()
            try:
                step()
            except Exception as exception:  # one failing case must not lose the others: reported, exit code 1
                results["failures"].append({"case": name, "error": f"{type(exception).__name__}: {exception}"})
            results["seconds_by_case"][name] = round(time.perf_counter() - start, 1)
            bar.update()


def _steps(
    device: str, jobs: Sequence[str], full: bool, seconds: float, results: dict[str, Any], folder: Path
) -> Iterable[tuple[str, Callable[[], None]]]:
    every, one = torch.get_num_threads(), 1
    machines: dict[int, harness.Machine] = {}

    def rates() -> None:  # before and after, the better of both: neighbours only ever slow a machine
        for count in sorted({one, every}):
            with harness.threads(count):
                found = harness.measure_machine(device)
            machines[count] = found.best_of(machines[count]) if count in machines else found

    def limits() -> None:
        rates()
        for row in results["rows"]:
            fraction = machines[row["threads"]].fraction_of_limit(row)
            row["fraction_of_limit"] = None if fraction is None else round(fraction, 4)
        results["machine"] = {
            "copy_gb_per_s": round(machines[every].bytes_per_second / 1e9, 1),
            "matmul_gflop_per_s": round(machines[every].flops_per_second / 1e9, 1),
        }

    def run(case: harness.Case, num_threads: int, budget: float = seconds) -> None:
        with harness.threads(num_threads):
            results["rows"] += harness.rows_as_json(harness.run(case, budget))

    yield "machine rates", rates
    for family in AUDIO:
        if family in jobs:
            for case in audio_cases(family, device):
                yield case.name, lambda case=case: run(case, one)
    if "log_mel" in jobs and device == "cpu":
        yield "log-mel, scaling", lambda: results["scaling"].extend(_scaling())
    for op in OPS:
        if op in jobs:
            for case in op_cases(op, device, full):
                yield case.name, lambda case=case: run(case, every)
    for op, num_scalars in (("clip_loss", 1), ("siglip_loss", 2)):
        if op in jobs and full:
            yield f"{op}, memory over the batch", lambda op=op, n=num_scalars: results["memory"].extend(_memory(op, n))
    if "model" in jobs:
        for case in thin.cases(device, full):  # long calls: fewer samples in the same time
            yield case.name, lambda case=case: run(case, every, 3 * seconds)
        for fusion in ("merge", "concat", "attention"):
            yield (
                f"generation, fusion {fusion}",
                lambda fusion=fusion: results["generation"].append(thin.generation_agrees(fusion, device)),
            )
    yield "machine rates again", limits
    if "learning" in jobs:  # after what is timed, as it would heat the machine
        for experiment in learning.experiments(full):
            yield (
                f"training: {experiment.name}",
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
        median, low, high = (round(1e3 * t, 5) for t in harness.spread(times))
        points.append({"provider": label, "seconds": length, "ms": median, "p20_ms": low, "p80_ms": high})

    for length in SCALING_SECONDS:
        clips = [(c,) for c in speech(length * RATE, 4)]
        for num_threads in (1, 2):  # each beside transformers, so that caches are equally cold
            with harness.threads(num_threads):
                pairs = harness.time_pairs(calls, "mmlm_fast", clips, 0.2)["transformers"]
            add("mmlm_fast", num_threads, length, [ours for _, ours in pairs])
            if num_threads == 1:
                add("transformers", num_threads, length, [theirs for theirs, _ in pairs])
    return sorted(points, key=lambda p: p["provider"])


def _gpu_rows(jobs: Sequence[str]) -> list[str]:
    rows = [f"{case.name}: {case.shape_from}" for op in OPS if op in jobs for case in op_cases(op, "cuda")]
    if "log_mel" in jobs:
        rows.append(
            "spectral features on CUDA: the fused kernel of csrc, 64 clips of 30 s, against the torch.stft chain"
        )
    if "model" in jobs:
        rows.append("thin model on CUDA with the Triton kernels")
    return rows


def last_gpu_result() -> dict[str, Any] | None:
    """Environment of the newest committed GPU result, if there is one."""
    found = []
    for path in RESULTS.glob("*.json"):
        environment = json.loads(path.read_text(encoding="utf-8"))["environment"]
        if environment["device_type"] == "cuda":
            found.append(environment | {"file": path.name})
    return max(found, key=lambda e: e["date"], default=None)


def sample_features() -> dict[str, np.ndarray]:
    """Features of the English sample, and their error against float64, for the picture in the report."""
    from mmlm_fast.audio import log_mel as ours
    from mmlm_fast.audio import log_mel_ref
    from mmlm_fast.data import load_speech

    waveform = torch.from_numpy(load_speech()[0].waveform)
    features = ours(waveform)
    return {"features": features.numpy(), "error": (features - log_mel_ref(waveform.double())).abs().numpy()}
