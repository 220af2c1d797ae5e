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
from typing import Any

from mmlm_benchmarks.gpu import job as one_job
from mmlm_benchmarks.gpu import summary
from mmlm_benchmarks.gpu.facts import START, Facts, read
from mmlm_benchmarks.gpu.plan import CANDIDATES, CHECKS, KERNELS, LIMITS, STAGES, SYSTEMS, TEST_FILES, TIMES
from mmlm_benchmarks.gpu.running import Job, Runner

WARM_WIDTH = 4  # processes that compile beside those that check, at least


class Suite:
    """Plans and runs the jobs."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.out = options.out
        self.out.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault(START, str(time.time()))
        self.path = self.out / "facts.jsonl"
        self.facts = Facts(self.path, stage="suite")
        self.logs = options.logs or self.out / "logs"
        left = options.seconds - (time.time() - float(os.environ[START]))
        self.runner = Runner(self.facts, self.logs, time.monotonic() + left)
        self.environment = {
            one_job.FACTS: str(self.path),
            one_job.DEVICE: options.device,
            one_job.STAND_IN: str(options.stand_in.resolve()) if options.stand_in else "",
            one_job.DEADLINE: str(time.time() + left),
            one_job.CASES: options.cases or "",
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

    def wanted(self, names: list[str], ops: list[str] | None = None) -> list[str]:
        ops = ops or self.options.ops
        return [n for n in names if not ops or any(n == op or n.startswith(f"{op}_") for op in ops)]

    def jobs(self, stage: str, names: list[str], nice: int = 0, **environment: str) -> list[Job]:
        command = (sys.executable, "-P", "-m", "mmlm_benchmarks.gpu.job", stage)
        surroundings = self.environment | environment
        limit = self.options.job_seconds or LIMITS.get(stage, (0, None))[1] or float("inf")
        return [Job(stage, name, (*command, name), limit, nice, surroundings) for name in names]

    def run_stage(self, stage: str, jobs: list[Job], width: int, **more: Any) -> None:
        # A rehearsal on few cores is bound by --seconds alone.
        limit = float("inf") if self.options.stand_in else LIMITS[stage][0]
        self.runner.run(jobs, width, limit, **more)

    def probe(self) -> None:
        self.run_stage("probe", self.jobs("probe", ["machine"]), 1)

    def check(self) -> None:
        """All ops side by side; beside them, behind in priority, what later stages time is compiled."""
        warm: list[Job] = []
        if "time" in self.options.stages and not self.options.stand_in:
            names = [name for name, (_, compiled, _) in TIMES.items() if compiled]
            warm = self.jobs(
                "warm", self.wanted(names), nice=10, OMP_NUM_THREADS="2", TORCHINDUCTOR_COMPILE_THREADS="2"
            )
        if "tests" not in self.options.stages:
            warm += self.prepared_candidates()
        # Else every job's Inductor would start as many processes as there are cores.
        names = self.wanted([*CHECKS, *SYSTEMS], self.options.checks)
        jobs = self.jobs("check", names, TORCHINDUCTOR_COMPILE_THREADS="1")
        spare = (os.cpu_count() or 1) - min(len(jobs), self.options.width)
        self.run_stage("check", jobs, self.options.width, beside=warm, beside_width=max(WARM_WIDTH, spare))

    def time(self) -> None:
        """One job after the other; the next one imports what it needs meanwhile and waits for its turn."""
        turn = (self.logs / "turn").resolve()
        jobs = self.jobs("time", self.wanted(list(TIMES)), **{one_job.TURN: str(turn)})
        self.run_stage("time", jobs, 2, turn=turn)

    def tests(self) -> None:
        """The kernel tests that use the device; meanwhile the candidates of tile tables are compiled."""
        files = [f"tests/test_{name}.py" for name in self.wanted(list(TEST_FILES))]
        command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "mmlm_benchmarks.gpu.pytest_facts", "--gpu-only"]
        command += ["-m", "not slow and not aot", "--tb=short", "--maxfail=60", "-p", "no:cacheprovider"]
        command += ["--continue-on-collection-errors", f"--junitxml={self.out / 'tests.xml'}", *files]
        command += ["-n", str(self.options.width)] if has_xdist() and not self.options.stand_in else []
        command += ["-k", self.options.tests] if self.options.tests else []
        job = Job("tests", "pytest", tuple(command), float("inf"), 0, self.environment)
        self.run_stage("tests", [job], 1, beside=self.prepared_candidates(), beside_width=WARM_WIDTH)

    def candidates(self) -> None:
        turn = (self.logs / "candidates-turn").resolve()
        self.run_stage("candidates", self.candidate_jobs("time", **{one_job.TURN: str(turn)}), 2, turn=turn)

    def prepared_candidates(self) -> list[Job]:
        """What fills Triton's cache for the stage `candidates`."""
        is_wanted = "candidates" in self.options.stages and not self.options.stand_in
        return self.candidate_jobs("compile", nice=10) if is_wanted else []

    def candidate_jobs(self, what: str, nice: int = 0, **environment: str) -> list[Job]:
        some = CANDIDATES[: len(KERNELS)] if self.options.stand_in else CANDIDATES
        names = [f"{name}:{what}" for name in self.wanted(list(some))]
        return self.jobs("candidates" if what == "time" else "warm", names, nice, **environment)

    def inspect(self) -> None:
        """A job that died, again under the sanitizer; else one op's kernels under the profiler.

        What these processes find is distorted by the tools: their facts are not the suite's.
        """
        elsewhere = {one_job.FACTS: str(self.logs / "inspected.jsonl")}
        died = [f["job"] for f in read(self.path) if f["kind"] == "job" and f["stage"] == "check"
                and str(f["status"]).startswith(("crashed", "CUDA error"))]  # fmt: skip
        if died and shutil.which("compute-sanitizer"):
            tool = ("compute-sanitizer", "--tool", "memcheck", "--print-limit", "20")
            (job,) = self.jobs("check", died[:1], **elsewhere)
        elif shutil.which("ncu"):
            # The clocks stay as they are; a few launches of our kernels, or a profile takes longer than there is.
            name = (self.options.ops or ["attention_128"])[0]
            name = "attention_128" if name == "interval_attention" else name
            tool = ("ncu", "--clock-control", "none", "--set", "full", "-k", "regex:^_.*_kernel$",
                    "--launch-count", "4", "-f", "-o", str(self.out / f"ncu-{name}"))  # fmt: skip
            (job,) = self.jobs("profile", [name], **elsewhere)
        else:
            self.facts.write("not inspected", reason="neither compute-sanitizer nor ncu is here")
            return
        inspected = Job("inspect", job.name, (*tool, *job.command), float("inf"), 0, job.environment)
        self.run_stage("inspect", [inspected], 1)


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
    parser.add_argument("--logs", type=Path, help="folder of the jobs' output (default: logs in --out)")
    parser.add_argument("--seconds", type=float, default=470, help="for everything (default: %(default)s)")
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, default=list(STAGES), metavar="STAGE", help=f"of {STAGES}"
    )
    parser.add_argument("--ops", nargs="+", help="only jobs of these names, or that begin with one and an underscore")
    parser.add_argument("--checks", nargs="+", help="for the stage check, in place of --ops")
    parser.add_argument("--cases", help="regular expression: for the stage time, of its cases those it is found in")
    parser.add_argument("--width", type=int, default=12, help="processes that check side by side")
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
