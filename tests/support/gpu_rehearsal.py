"""Run benchmarks/gpu_suite.sh from end to end without a GPU, and break it: `make gpu-rehearsal`.

Kernels run in Triton's interpreter at tiny shapes, without network where that can be had. One op crashes, one hangs;
then the suite is killed at a random second. Facts must survive, and other ops go on.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mmlm_benchmarks.gpu.summary import tests_of

ROOT = Path(__file__).parents[2]
CRASHES, HANGS = "norm_pixel_shuffle", "gated_add"
JOB_SECONDS = 40  # of one job here, where eight of them share two cores


def without_network() -> list[str]:
    """A prefix of commands, empty where it is not allowed."""
    for prefix in (["unshare", "-n"], ["unshare", "-rn"]):
        if (
            shutil.which("unshare")
            and subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode == 0
        ):
            return prefix
    print("network namespaces are not allowed here: rehearsing with the network as it is")
    return []


def suite(out: Path, *arguments: str, **environment: str) -> subprocess.Popen:
    command = [*without_network(), "bash", "benchmarks/gpu_suite.sh", "--device", "cpu"]
    command += ["--stand-in", "tests/support/gpu_stand_in.py", "--width", "2"]
    command += ["--job-seconds", str(JOB_SECONDS), *arguments]
    surroundings = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    surroundings |= {"OUT": str(out), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(command, cwd=ROOT, env=surroundings, start_new_session=True)


def facts_of(out: Path) -> list[dict]:
    """Every line but a last one that was cut off must be a fact."""
    lines = (out / "facts.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def summary(out: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-P", "-m", "mmlm_benchmarks.gpu", str(out / "facts.jsonl"), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def whole(out: Path) -> None:
    """All stages, with an op that crashes and one that hangs."""
    broken = {"MMLM_REHEARSAL_CRASH": CRASHES, "MMLM_REHEARSAL_HANG": HANGS}
    selected = "test_kernel_masks or test_launches or empty"
    status = suite(out, "--seconds", "540", "--tests", selected, **broken).wait()
    facts = facts_of(out)
    ended = {(f["stage"], f["job"]): f["status"] for f in facts if f["kind"] == "job"}
    assert status == 1, f"something broke on purpose, yet the suite ended with status {status}"
    assert ended.pop(("check", CRASHES)) == "crashed: SIGSEGV"
    assert ended.pop(("check", HANGS)) == "hung"
    # What was known before the crash and the hang is there.
    for job in (CRASHES, HANGS):
        assert any(f["kind"] == "check" and f["job"] == job and f["ok"] for f in facts), f"no fact of {job} survived"
    others = {key: text for key, text in ended.items() if text != "done"}
    assert not others, f"these did not end well: {others}"
    stages = {stage for stage, _ in ended}
    assert {"probe", "check", "time", "tests", "candidates"} <= stages, stages
    kinds = {f["kind"] for f in facts}
    assert {"probe", "environment", "machine", "check", "time", "tests", "candidate"} <= kinds, kinds
    wrong = [f for f in facts if f["kind"] == "check" and not f["ok"]]
    assert not wrong, wrong
    tests = tests_of(facts)
    assert tests["finished"]
    assert tests["passed"] > 0, tests
    assert tests["failed"] == 0, tests
    told = summary(out, "--only-mend")
    assert told.returncode == 1, told.stderr
    assert f"DIED    check {CRASHES}: crashed: SIGSEGV" in told.stdout, told.stdout
    assert f"DIED    check {HANGS}: hung" in told.stdout, told.stdout
    refused = summary(out)
    assert refused.returncode == 2, "results of a rehearsal must be refused"
    assert "rehearsal" in refused.stderr, refused.stderr
    checks = sum(f["kind"] == "check" for f in facts)
    print(f"whole: {len(facts)} facts, {checks} checks, {len(ended)} jobs, {tests['passed']} tests")


def killed(out: Path) -> None:
    """Everything gone at once in the middle, as when the machine's limit is reached."""
    after = random.uniform(8, 25)
    process = suite(out, "--seconds", "230", "--stages", "check", "time")
    start = time.monotonic()
    while time.monotonic() - start < after and process.poll() is None:
        time.sleep(0.1)
    before = facts_of(out) if (out / "facts.jsonl").exists() else []
    kill_tree(process.pid)
    process.wait()
    facts = facts_of(out)
    assert facts[: len(before)] == before
    assert facts, f"no facts after {after:.1f} s"
    told = summary(out, "--only-mend")
    assert told.returncode in (0, 1), told.stderr
    started = {(f["stage"], f["job"]) for f in facts if f["kind"] == "start"}
    lost = started - {(f["stage"], f["job"]) for f in facts if f["kind"] == "job"}
    assert all(f"LOST    {stage} {job}" in told.stdout for stage, job in lost), told.stdout
    print(f"killed after {after:.1f} s: {len(facts)} facts, {len(lost)} jobs lost and named")


def kill_tree(pid: int) -> None:
    """SIGKILL for a process and all below it; jobs have process groups of their own."""
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    for child in children.stdout.split():
        kill_tree(int(child))
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def main() -> None:
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        whole(Path(folder, "whole"))
        killed(Path(folder, "killed"))
    print(f"the rehearsal passed after {time.monotonic() - start:.0f} s; what died above died on purpose")


if __name__ == "__main__":
    main()
