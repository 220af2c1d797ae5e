"""The stages, in the order of their value: probe, check, time, tests, candidates, inspect.

    python -m mmlm_benchmarks.gpu.suite --out FOLDER            all of them, within --seconds
    python -m mmlm_benchmarks.gpu.suite --stages check --ops glu add_norm

Every job is a process of its own. Facts are in FOLDER/facts.jsonl the moment they are known.
"""

import argparse
import os
import shutil
import signal
import sys
import time
from pathlib import Path

from mmlm_benchmarks.gpu import job as one_job
from mmlm_benchmarks.gpu import summary
from mmlm_benchmarks.gpu.facts import START, Facts, read
from mmlm_benchmarks.gpu.plan import CANDIDATES, CHECKS, KERNELS, LIMITS, STAGES, SYSTEMS, TEST_FILES, TIMES
from mmlm_benchmarks.gpu.running import Job, Runner

WARM_WIDTH = 4  # processes that compile beside those that check


class Suite:
    """Plans and runs the jobs."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.out = options.out
        self.out.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault(START, str(time.time()))
        self.path = self.out / "facts.jsonl"
        self.facts = Facts(self.path, stage="suite")
        self.logs = self.out / "logs"
        left = options.seconds - (time.time() - float(os.environ[START]))
        self.runner = Runner(self.facts, self.logs, time.monotonic() + left)
        self.environment = {
            one_job.FACTS: str(self.path),
            one_job.DEVICE: options.device,
            one_job.STAND_IN: str(options.stand_in.resolve()) if options.stand_in else "",
            one_job.DEADLINE: str(time.time() + left),
        }

    def run(self) -> int:
        """Run the chosen stages; returns 1 if a check, a test or a job failed."""
        self.facts.write("suite", stages=self.options.stages, seconds=self.options.seconds, argv=sys.argv[1:])
        signal.signal(signal.SIGTERM, self.runner.stop)
        signal.signal(signal.SIGINT, self.runner.stop)
        for stage in STAGES:
            if stage in self.options.stages and self.runner.stopped_by is None:
                getattr(self, stage)()
        stopped = self.runner.stopped_by
        self.facts.write("suite ended", reason=stopped.name if stopped else "done")
        status = summarise(self.path)
        return 128 + stopped if stopped else status

    def wanted(self, names: list[str]) -> list[str]:
        ops = self.options.ops
        return [n for n in names if not ops or any(n == op or n.startswith(f"{op}_") for op in ops)]

    def limit(self, seconds: float) -> float:
        """Of a stage; a rehearsal on few cores is bound by --seconds alone."""
        return float("inf") if self.options.stand_in else seconds

    def jobs(self, stage: str, names: list[str], limit: float, nice: int = 0, **environment: str) -> list[Job]:
        command = (sys.executable, "-P", "-m", "mmlm_benchmarks.gpu.job", stage)
        surroundings = self.environment | environment
        limit = self.options.job_seconds or limit
        return [Job(stage, name, (*command, name), limit, nice, surroundings) for name in names]

    def probe(self) -> None:
        stage, limit = LIMITS["probe"]
        self.runner.run(self.jobs("probe", ["machine"], limit), 1, self.limit(stage))

    def check(self) -> None:
        """All ops side by side; beside them, behind in priority, what the timing compares with is compiled."""
        stage, limit = LIMITS["check"]
        jobs = self.jobs("check", self.wanted([*CHECKS, *SYSTEMS]), limit)
        warm: list[Job] = []
        if "time" in self.options.stages and not self.options.stand_in:
            names = [name for name, (_, compiled, _) in TIMES.items() if compiled]
            warm = self.jobs("warm", self.wanted(names), limit, nice=10, OMP_NUM_THREADS="2")
        # Warming up never delays a check: it has processes of its own.
        width = self.options.width
        self.runner.run([*jobs[:width], *warm, *jobs[width:]], width + (WARM_WIDTH if warm else 0), self.limit(stage))

    def time(self) -> None:
        """One job after the other; the next one imports what it needs meanwhile and waits for its turn."""
        stage, limit = LIMITS["time"]
        turn = (self.logs / "turn").resolve()
        jobs = self.jobs("time", self.wanted(list(TIMES)), limit, **{one_job.TURN: str(turn)})
        self.runner.run(jobs, 2, self.limit(stage), turn=turn)

    def tests(self) -> None:
        """The kernel tests that use the device; meanwhile the candidates of tile tables are compiled."""
        stage, limit = LIMITS["tests"]
        files = [f"tests/test_{name}.py" for name in self.wanted(list(TEST_FILES))]
        command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "mmlm_benchmarks.gpu.pytest_facts", "--gpu-only"]
        command += ["-m", "not slow and not aot", "--tb=short", "--maxfail=60", "-p", "no:cacheprovider"]
        command += ["--continue-on-collection-errors", f"--junitxml={self.out / 'tests.xml'}", *files]
        command += ["-n", str(self.options.width)] if has_xdist() and not self.options.stand_in else []
        command += ["-k", self.options.tests] if self.options.tests else []
        job = Job("tests", "pytest", tuple(command), limit, 0, self.environment)
        prepared = [] if self.options.stand_in else self._candidates("compile", nice=10)
        self.runner.run([job, *prepared], 1 + len(prepared), self.limit(stage))

    def candidates(self) -> None:
        stage, _ = LIMITS["candidates"]
        turn = (self.logs / "candidates-turn").resolve()
        jobs = self._candidates("time", **{one_job.TURN: str(turn)})
        self.runner.run(jobs, 2, self.limit(stage), turn=turn)

    def _candidates(self, what: str, nice: int = 0, **environment: str) -> list[Job]:
        some = CANDIDATES[: len(KERNELS)] if self.options.stand_in else CANDIDATES
        names = [f"{name}:{what}" for name in self.wanted(list(some))]
        return self.jobs("candidates", names, LIMITS["candidates"][1], nice, **environment)

    def inspect(self) -> None:
        """A job that died, again under the sanitizer; else one kernel under the profiler."""
        stage, limit = LIMITS["inspect"]
        bad = ("crashed", "CUDA error")
        died = [f["job"] for f in read(self.path) if f["kind"] == "job" and f["stage"] == "check"
                and str(f["status"]).startswith(bad)]  # fmt: skip
        if died and shutil.which("compute-sanitizer"):
            tool = ("compute-sanitizer", "--tool", "memcheck", "--print-limit", "20")
            (job,) = self.jobs("check", died[:1], limit)
        elif shutil.which("ncu"):
            # The clocks stay as they are; one launch of one kernel, or a profile takes longer than there is.
            name = (self.options.ops or ["interval_attention"])[0]
            kernels = "regex:_fwd_kernel|_dkv_kernel" if name == "interval_attention" else "regex:_kernel"
            tool = ("ncu", "--clock-control", "none", "--set", "full", "-k", kernels, "--launch-count", "2",
                    "--target-processes", "all", "-f", "-o", str(self.out / f"ncu-{name}"))  # fmt: skip
            (job,) = self.jobs("time", [name], limit)
        else:
            self.facts.write("not inspected", reason="neither compute-sanitizer nor ncu is here")
            return
        self.runner.run(
            [Job("inspect", job.name, (*tool, *job.command), limit, 0, job.environment)], 1, self.limit(stage)
        )


def has_xdist() -> bool:
    from importlib.util import find_spec

    return find_spec("xdist") is not None


def summarise(path: Path) -> int:
    lines, good = summary.what_to_mend(read(path))
    print("\n".join(lines))
    return 0 if good else 1


def main(argv: list[str] | None = None) -> int:
    """Run the suite from a shell; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m mmlm_benchmarks.gpu.suite", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument(
        "--out", type=Path, default=Path("gpu_out"), help="folder of facts.jsonl (default: %(default)s)"
    )
    parser.add_argument("--seconds", type=float, default=470, help="for everything (default: %(default)s)")
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, default=list(STAGES), metavar="STAGE", help=f"of {STAGES}"
    )
    parser.add_argument("--ops", nargs="+", help="only jobs of these names, or that begin with one and an underscore")
    parser.add_argument("--width", type=int, default=8, help="processes side by side while nothing is timed")
    parser.add_argument("--job-seconds", type=float, help="for each job, in place of its stage's own limit")
    parser.add_argument("--tests", help="pytest's -k for the stage tests")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument(
        "--stand-in", type=Path, help="rehearsal: Python file that each job runs first, in place of a GPU"
    )
    options = parser.parse_args(argv)
    if options.device == "cpu" and options.stand_in is None:
        parser.error("--device cpu goes with --stand-in: without a GPU there is nothing to bring home")
    return Suite(options).run()


if __name__ == "__main__":
    sys.exit(main())
