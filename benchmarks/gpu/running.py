"""Processes of the suite: side by side or in turn, each with a limit; a crash or a hang costs its own job."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from mmlm_benchmarks.gpu.facts import Facts

TAIL_CHARACTERS = 3000
POLL_SECONDS = 0.05
POISONED = 70  # exit status of a job whose CUDA context died: what it had left to do it could not do


@dataclass(frozen=True)
class Job:
    """One process."""

    stage: str
    name: str
    command: tuple[str, ...]
    limit_seconds: float
    nice: int = 0
    environment: Mapping[str, str] = field(default_factory=dict, hash=False)


class _Running:
    def __init__(self, job: Job, folder: Path, turn: Path | None) -> None:
        self.job, self.turn = job, turn
        self.log = folder / f"{job.stage}-{job.name}.log"
        self.start = time.monotonic()
        self._end = None if turn else self.start + job.limit_seconds
        prefix = ("nice", "-n", str(job.nice)) if job.nice else ()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*prefix, *job.command],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **job.environment},
                start_new_session=True,  # a group of its own, so that what it started dies with it
            )

    def is_over_limit(self) -> bool:
        if self._end is None and self.turn and Path(f"{self.turn}.{self.process.pid}").exists():
            self._end = time.monotonic() + self.job.limit_seconds
        return self._end is not None and time.monotonic() >= self._end

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        # A process inside a driver call may not die at once; it is not waited for, its job is over.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=2)

    def tail(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")[-TAIL_CHARACTERS:]

    def facts(self, status: str) -> dict[str, object]:
        seconds = round(time.monotonic() - self.start, 1)
        told = {"stage": self.job.stage, "job": self.job.name, "status": status, "seconds": seconds}
        return told if status == "done" else {**told, "tail": self.tail()}


class Runner:
    """Runs jobs until a deadline and writes a fact when each starts and ends."""

    def __init__(self, facts: Facts, folder: Path, deadline: float) -> None:
        self.facts, self.folder, self.deadline = facts, folder, deadline
        self.folder.mkdir(parents=True, exist_ok=True)
        self.stopped_by: signal.Signals | None = None
        self._live: list[_Running] = []

    def stop(self, number: int, frame: FrameType | None = None) -> None:
        """Handle a signal: what is running is killed at the next look, not in the middle of starting a job."""
        self.stopped_by = signal.Signals(number)

    def run(
        self,
        jobs: Sequence[Job],
        width: int,
        limit_seconds: float = float("inf"),
        turn: Path | None = None,
        beside: Sequence[Job] = (),
        beside_width: int = 0,
    ) -> None:
        """Run `jobs` in their order, at most `width` at a time, all within `limit_seconds`.

        `beside` is a queue with places of its own, which takes none from `jobs`. What does not get its turn, or is
        running when the time is over, is a fact as well. With `turn` a job's own
        limit begins when it makes the file ``{turn}.{its process}``: what it waits for others is not its fault.
        """
        stop = min(self.deadline, time.monotonic() + limit_seconds)
        queues = [(list(jobs), width, set(jobs)), (list(beside), beside_width, set(beside))]
        try:
            while (self._live or any(queue for queue, _, _ in queues)) and self.stopped_by is None:
                for queue, most, members in queues:
                    while queue and len(members & self._jobs()) < most and time.monotonic() < stop:
                        job = queue.pop(0)
                        self.facts.write("start", stage=job.stage, job=job.name)
                        self._live.append(_Running(job, self.folder, turn))
                    if time.monotonic() >= stop:
                        for job in queue:
                            self.facts.write("job", stage=job.stage, job=job.name, status="no time")
                        queue.clear()
                self._collect(stop)
                time.sleep(POLL_SECONDS)
        finally:
            self.kill()

    def _jobs(self) -> set[Job]:
        return {running.job for running in self._live}

    def _collect(self, stop: float) -> None:
        for running in list(self._live):
            code = running.process.poll()
            over = running.is_over_limit()
            if code is None and not over and time.monotonic() < stop:
                continue
            if code is None:
                running.kill()
                status = "hung" if over else "cut off"
            elif code < 0:
                status = f"crashed: {signal.Signals(-code).name}"
            else:
                status = {0: "done", POISONED: "CUDA error"}.get(code, f"failed: exit status {code}")
            running.kill()  # what it left running, too
            self._live.remove(running)
            self.facts.write("job", **running.facts(status))

    def kill(self) -> None:
        for running in self._live:
            running.kill()
            self.facts.write("job", **running.facts("killed with the suite"))
        self._live = []
