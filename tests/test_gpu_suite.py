"""The GPU suite's own parts: facts, processes, checks that can be red, and what is made of facts. No GPU is needed."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmlm_benchmarks import readme
from mmlm_benchmarks.gpu import __main__ as command
from mmlm_benchmarks.gpu import candidates, checks, correctness, plan, summary, systems, timing
from mmlm_benchmarks.gpu.checks import Check
from mmlm_benchmarks.gpu.device import Device
from mmlm_benchmarks.gpu.facts import Facts, read
from mmlm_benchmarks.gpu.running import Job, Runner
from mmlm_benchmarks.harness import Case
from mmlm_benchmarks.ops import OPS

ROOT = Path(__file__).parents[1]
CPU = Device("cpu", is_stand_in=True)


@pytest.fixture
def facts(tmp_path):
    return Facts(tmp_path / "facts.jsonl", stage="check", job="one")


# ---- facts -----------------------------------------------------------------------------------------------------------


def test_a_line_that_a_kill_cut_off_costs_itself_only(facts):
    facts.write("check", ok=True)
    with facts.path.open("ab") as file:
        file.write(b'{"kind": "check", "ok"')
    Facts(facts.path, job="two").write("check", ok=False, error=float("nan"), where=Path("x"))
    assert [(f["job"], f["ok"]) for f in read(facts.path)] == [("one", True), ("two", False)]
    assert read(facts.path)[1]["error"] == "nan"


def test_no_facts_are_an_error(tmp_path):
    (tmp_path / "empty.jsonl").write_text("nothing\n[1]\n")
    with pytest.raises(ValueError, match="holds no fact"):
        read(tmp_path / "empty.jsonl")


def test_many_processes_append_whole_lines(tmp_path):
    path = tmp_path / "facts.jsonl"
    code = (
        "import sys; from mmlm_benchmarks.gpu.facts import Facts\n"
        "for i in range(200): Facts(sys.argv[1]).write('x', text='y' * 3000)"
    )
    processes = [subprocess.Popen([sys.executable, "-P", "-c", code, str(path)]) for _ in range(3)]
    assert [p.wait() for p in processes] == [0] * 3
    lines = [line for line in path.read_text().splitlines() if line]
    assert len(lines) == 600
    assert all(len(json.loads(line)["text"]) == 3000 for line in lines)


# ---- processes -------------------------------------------------------------------------------------------------------


def job(name: str, code: str, limit: float = 20.0, **environment: str) -> Job:
    return Job("check", name, (sys.executable, "-c", code), limit, 0, environment)


def statuses(facts: Facts) -> dict[str, str]:
    return {f["job"]: f["status"] for f in read(facts.path) if f["kind"] == "job"}


def test_a_crash_and_a_hang_cost_their_own_job(facts, tmp_path):
    hang = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)']); "
    jobs = [
        job("crashes", "import os, signal; print('so far', flush=True); os.kill(os.getpid(), signal.SIGSEGV)"),
        job("hangs", f"{hang}open(r'{tmp_path}/hung', 'w'); time.sleep(99)", limit=2.0),
        job("fails", "raise SystemExit(3)"),
        job("is poisoned", "raise SystemExit(70)"),
        job("works", "print('fine')"),
        job("is told", "import os; raise SystemExit(os.environ['SAID'] != 'so')", SAID="so"),
    ]
    Runner(facts, tmp_path / "logs", time.monotonic() + 60).run(jobs, 3)
    assert statuses(facts) == {
        "crashes": "crashed: SIGSEGV",
        "hangs": "hung",
        "fails": "failed: exit status 3",
        "is poisoned": "CUDA error",
        "works": "done",
        "is told": "done",
    }
    tail = next(f["tail"] for f in read(facts.path) if f["kind"] == "job" and f["job"] == "crashes")
    assert "so far" in tail
    assert (tmp_path / "hung").exists()
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert "import time; time.sleep(99)" not in listed, "what a hung job started lives on"


def test_the_deadline_holds(facts, tmp_path):
    runner = Runner(facts, tmp_path / "logs", time.monotonic() + 1.5)
    start = time.monotonic()
    runner.run([job("long", "import time; time.sleep(99)"), job("late", "pass")], 1)
    assert time.monotonic() - start < 6
    assert statuses(facts) == {"long": "cut off", "late": "no time"}


def test_waiting_for_the_turn_is_not_counted(facts, tmp_path):
    turn = tmp_path / "turn"
    code = (
        "import time; from mmlm_benchmarks.gpu.timing import take_turn\n"
        "take_turn(); print('begins', flush=True); time.sleep({seconds})"
    )
    environment = {"MMLM_GPU_TURN": str(turn)}
    jobs = [
        job("hangs", code.format(seconds=99), 4.0, **environment),
        job("waits", code.format(seconds=0), 2.0, **environment),
    ]
    Runner(facts, tmp_path / "logs", time.monotonic() + 60).run(jobs, 2, turn=turn)
    assert statuses(facts) == {"hangs": "hung", "waits": "done"}


def test_terminating_the_suite_ends_its_jobs_and_says_so(tmp_path):
    stand_in = tmp_path / "stand_in.py"
    stand_in.write_text("import time\ndef stand_in(stage, job):\n    time.sleep(99)\n")
    command = [sys.executable, "-P", "-m", "mmlm_benchmarks.gpu.suite", "--out", str(tmp_path / "out")]
    command += ["--device", "cpu", "--stand-in", str(stand_in), "--stages", "check", "--ops", "glu"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    path = tmp_path / "out/facts.jsonl"
    until = time.monotonic() + 30
    while time.monotonic() < until and not (path.exists() and '"start"' in path.read_text()):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 128 + signal.SIGTERM
    found = read(path)
    assert found[-1]["kind"] == "suite ended"
    assert [f["status"] for f in found if f["kind"] == "job"] == ["killed with the suite"]


# ---- the plan --------------------------------------------------------------------------------------------------------


def test_the_plan_names_what_there_is():
    assert tuple(checks.JOBS) == plan.CHECKS
    assert tuple(systems.JOBS) == plan.SYSTEMS
    assert {name.partition("_")[0] for name in plan.CANDIDATES} == set(plan.KERNELS) == set(candidates.ROWS)
    assert all(int(size) in candidates.ROWS[k] for k, _, size in (n.partition("_") for n in plan.CANDIDATES))
    assert set(plan.LIMITS) == set(plan.STAGES)
    for op in OPS:
        assert op in plan.TIMES, op
        assert op in plan.TEST_FILES, op
        assert op in plan.CHECKS or op == "interval_attention", op
    for name in plan.TEST_FILES:
        assert (ROOT / f"tests/test_{name}.py").exists(), name


def test_the_plan_fits_into_the_time_there_is():
    """Stages in turn, with half a minute for set-up; what is timed fits its stage without waiting for imports."""
    assert sum(stage for stage, _ in plan.LIMITS.values()) <= 600
    assert all(one is None or one <= stage for stage, one in plan.LIMITS.values())


@pytest.mark.parametrize("name", plan.TIMES)
def test_cases_for_a_gpu_can_be_made_without_one(name):
    """Names and providers, that is; inputs are drawn later."""
    import importlib

    module = importlib.import_module(f"mmlm_benchmarks.{plan.TIMES[name][0]}")
    found = module.cases("cuda")
    assert found
    assert len({case.name for case in found}) == len(found)
    assert all(case.ours in case.providers and len(case.providers) > 1 for case in found)


def test_every_goal_is_about_a_case():
    """A goal whose words fit nothing would never be missed."""
    import importlib
    import re

    modules = [importlib.import_module(f"mmlm_benchmarks.{path}") for path, _, _ in plan.TIMES.values()]
    cases = [case for module in modules for case in module.cases("cuda")]
    for words, provider, _ in summary.GOALS:
        assert any(re.search(words, c.name) and provider in c.providers for c in cases), (words, provider)
    for words, _, _ in summary.CEILINGS:
        assert any(words in c.name for c in cases), words


# ---- checks that can be red ------------------------------------------------------------------------------------------


def check_of(fast, reference=torch.sin, **options) -> Check:
    return Check("sine", lambda dtype: (torch.randn(64, 64, dtype=dtype),), fast, reference, **options)


def unwritten(x):
    out = torch.empty_like(x)
    out[1:] = x[1:].sin()
    return out


@pytest.mark.parametrize(
    ("fast", "good"),
    [
        (torch.sin, True),
        (lambda x: torch.sin(x) * 1.01, False),
        (unwritten, False),
        (lambda x: torch.sin(x.detach()) + 0 * x, False),
        (lambda x: torch.sin(x).double(), False),
        (lambda x: 1 / 0, False),
    ],
    ids=["right", "1 % off", "not all written", "wrong gradient", "another dtype", "raises"],
)
def test_a_wrong_result_is_a_fact(facts, fast, good):
    assert correctness.forward_and_backward(check_of(fast), torch.float32, facts) is good
    found = [f for f in read(facts.path) if f["kind"] == "check"]
    assert [f["mode"] for f in found] == ["forward", "backward"]
    assert all(f["ok"] for f in found) is good


def test_float32_may_err_as_much_as_is_stated(facts):
    """A check that says so may err more than the accuracy rule allows, in float32 alone, and no more than it says."""
    exact = torch.sin(check_of(torch.sin).draw(torch.float32)[0].double())
    eps = torch.finfo(torch.float32).eps * exact.norm() / exact.numel() ** 0.5

    def noisy(x, size):
        return torch.sin(x) + size * eps.to(x.dtype) * torch.ones_like(x)

    for size, factor, good in ((3, 1.0, False), (3, 2.0, True), (5, 2.0, False)):
        check = replace(check_of(lambda x, size=size: noisy(x, size)), float32_factor=factor)
        assert correctness.forward_and_backward(check, torch.float32, facts) is good, (size, factor)
        found = [f for f in read(facts.path) if f["kind"] == "check" and f["mode"] == "forward"][-1]
        assert found["of_allowed"] > 1


def test_a_result_without_its_kernel_is_no_proof(facts, monkeypatch):
    monkeypatch.setitem(correctness.JOBS, "sine", lambda device, tiny: [check_of(torch.sin, dtypes=(torch.float32,))])
    assert not correctness.run("sine", CPU, facts)
    (found,) = [f for f in read(facts.path) if f.get("mode") == "launched kernels" and f["kind"] == "check"]
    assert not found["ok"]


@pytest.mark.parametrize("mode", ["autocast", "compile"])
def test_modes_can_be_red(facts, mode):
    call = correctness.MODES[mode]
    assert call(check_of(torch.sin), CPU)["ok"]
    assert not call(check_of(lambda x: torch.sin(x) * 1.1), CPU)["ok"]


def test_a_lost_context_ends_the_job(facts):
    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(correctness.ContextLostError):
        correctness.guarded(facts, "x", torch.float32, "forward", lost)
    assert read(facts.path)[-1]["ok"] is False


# ---- timing ----------------------------------------------------------------------------------------------------------


def test_a_case_that_fails_does_not_cost_the_next(facts, monkeypatch):
    calls = []

    def fails_later(x):
        calls.append(x)
        if len(calls) > 2:
            raise RuntimeError("out of memory")
        return torch.sin(x)

    def case(name, **providers):
        providers["mmlm_fast"] = torch.sin
        return Case("glu", name, "here", lambda: [(torch.randn(100),)], providers, lambda *_: {})

    monkeypatch.setattr(timing, "cases_of", lambda *_: [case("bad", peer=fails_later), case("good", eager=torch.sin)])
    assert not timing.run("glu", CPU, facts, lambda: 99.0)
    assert {f["case"] for f in read(facts.path) if f["kind"] == "time"} == {"good"}


def test_a_stage_beside_takes_no_place(facts, tmp_path):
    """As many jobs beside as there are, and slow: what is checked runs all the same."""
    slow = [job(f"warm {i}", "import time; time.sleep(5)") for i in range(6)]
    quick = [job(f"check {i}", "pass") for i in range(6)]
    Runner(facts, tmp_path / "logs", time.monotonic() + 60).run(quick, 2, 4.0, beside=slow, beside_width=2)
    found = statuses(facts)
    assert {name: found[name] for name in found if name.startswith("check")} == {f"check {i}": "done" for i in range(6)}
    assert "no time" in found.values()


def test_a_peer_that_fails_does_not_cost_ours_its_row(facts):
    def fails(x):
        raise RuntimeError("out of memory")

    providers = {"eager": torch.sin, "peer": fails, "mmlm_fast": lambda x: torch.sin(x) * 1.5}
    case = Case("glu", "sine", "here", lambda: [(torch.randn(100),)], providers, lambda *_: {})
    assert not timing.time_case(case, True, facts)
    rows = {f["provider"]: f for f in read(facts.path) if f["kind"] == "time"}
    assert set(rows) == {"eager", "mmlm_fast"}
    assert rows["mmlm_fast"]["median_ms"] > 0
    assert rows["eager"]["differs"] == pytest.approx(1 / 3, abs=1e-3)
    assert [f["provider"] for f in read(facts.path) if f["kind"] == "failed"] == ["peer"]


@pytest.mark.parametrize("kernel", plan.KERNELS)
def test_a_candidate_is_what_the_launcher_takes(kernel):
    """On every architecture, and the shipped row comes back."""
    from mmlm_kernels import interval_attention_tiles as tiles

    shipped = tiles.blocks(kernel, 90, torch.bfloat16, 128)
    with candidates.chosen(kernel, (16, 16, 4, 7)):
        assert tiles.blocks(kernel, 90, torch.bfloat16, 128) == (16, 16, 4, 7)
        assert {row[-1] for key, rows in tiles.TILES.items() if key[:2] == (kernel, 2) for row in rows} == {7}
    with candidates.chosen(kernel, None):
        assert tiles.blocks(kernel, 90, torch.bfloat16, 128) == shipped


# ---- what is made of facts -------------------------------------------------------------------------------------------


def row(case: str, provider: str, milliseconds: float, group: str, ours_faster: float | None = None, **more) -> dict:
    ours = provider == "mmlm_fast"
    return {
        "kind": "time", "second": 1.0, "stage": "time", "job": group, "group": group, "case": case, "shape_from": "x",
        "provider": provider, "ours": ours, "median_ms": milliseconds, "p20_ms": milliseconds, "p80_ms": milliseconds,
        "speedup": 1.0, "speedup_p20": None, "speedup_p80": None, "ours_faster": ours_faster,
        "ours_faster_p20": ours_faster, "ours_faster_p80": ours_faster, "peak_mib": 10.0, "relative_error": None,
        "allowed_error": None, "threads": 4, "bytes_moved": 3_000_000_000, "flops": 0, "host_us": 40.0, "differs": 0.0,
        **more,
    }  # fmt: skip


def gpu_facts() -> list[dict]:
    shared = {"second": 1.0, "stage": "probe", "job": "machine"}
    return [
        {"kind": "probe", **shared, "stand_in": False},
        {"kind": "environment", **shared, "device": "NVIDIA H100 80GB HBM3", "device_type": "cuda", "cores": 16,
         "threads": 4, "isa": "avx512", "load_average": 1.0, "date": "2031-02-03", "commit": "abc1234",
         "packages": {"torch": "2.11.0"}},
        {"kind": "machine", **shared, "copy_gb_per_s": 3000.0, "matmul_gflop_per_s": 800_000.0},
        {"kind": "check", "second": 1.0, "stage": "check", "job": "add_norm", "check": "c", "dtype": "float32",
         "mode": "forward", "ok": True, "of_allowed": 0.5},
        row("add_norm rms bfloat16, forward", "eager", 8.0, "add_norm", 4.0),
        row("add_norm rms bfloat16, forward", "mmlm_fast", 2.0, "add_norm"),
    ]  # fmt: skip


def told(*more: dict) -> list[str]:
    return summary.what_to_mend([*gpu_facts(), *more])[0]


def test_nothing_to_mend():
    lines, good = summary.what_to_mend(gpu_facts())
    assert good
    assert "nothing to mend" in lines


def test_what_breaks_comes_before_what_is_slow_and_by_users():
    base = {"second": 2.0, "stage": "check"}
    check = {
        "kind": "check",
        **base,
        "check": "c",
        "dtype": "bfloat16",
        "mode": "forward",
        "ok": False,
        "of_allowed": 3.0,
    }
    lines = told(
        row("gated_add bfloat16, forward", "eager", 1.0, "gated_add", 0.9),
        row("gated_add bfloat16, forward", "mmlm_fast", 1.1, "gated_add"),
        row("attention, causal, forward", "FlexAttention", 1.0, "interval_attention", 1.1),
        row("attention, causal, forward", "mmlm_fast", 0.9, "interval_attention"),
        {**check, "job": "gated_add"},
        {**check, "job": "attention_128"},
        {"kind": "test failed", "second": 3.0, "stage": "tests", "job": "pytest", "test": "tests/test_glu.py::test_x",
         "when": "call", "text": "E  assert 1 == 2"},
        {"kind": "start", **base, "job": "glu"},
        {"kind": "try", **base, "job": "clip_loss", "check": "diagonal", "dtype": "float16", "mode": "backward"},
        {"kind": "start", **base, "job": "clip_loss"},
        {"kind": "job", **base, "job": "clip_loss", "status": "crashed: SIGSEGV", "seconds": 1.0, "tail": ""},
        {"kind": "job", **base, "job": "siglip_loss", "status": "no time"},
        {"kind": "job", **base, "job": "gated_add", "status": "failed: exit status 1", "seconds": 1.0, "tail": "x"},
        {"kind": "failed", "second": 2.0, "stage": "time", "job": "glu", "group": "glu", "case": "glu silu",
         "provider": "mmlm_fast", "ours": True, "message": "OutOfMemoryError: no"},
        {"kind": "failed", "second": 2.0, "stage": "time", "job": "glu", "group": "glu", "case": "glu silu",
         "provider": "Liger", "ours": False, "message": "ImportError: no"},
    )  # fmt: skip
    heads = [line.split()[0] for line in lines if line and line.split()[0].isupper()]
    assert heads == ["DIED", "LOST", "NOT", "WRONG", "WRONG", "FAILED", "TEST", "SLOW", "SLOW"]
    text = "\n".join(lines)
    assert "DIED    check clip_loss: crashed: SIGSEGV, during diagonal, float16, backward" in text
    assert text.index("attention_128: c") < text.index("gated_add: c")
    assert text.index("FlexAttention") < text.index("gated_add bfloat16")
    assert "1.10x FlexAttention (1 ms), goal 1.2x" in text


def test_a_job_that_fails_without_a_word_is_told():
    """A good check of its own, and a bad one of another stage, do not speak for it."""
    base = {"second": 2.0, "stage": "check", "job": "glu"}
    check = {"kind": "check", "check": "c", "dtype": "bfloat16", "mode": "forward"}
    lines = told(
        {**check, **base, "ok": True},
        {**check, **base, "stage": "time", "ok": False},
        {"kind": "job", **base, "status": "failed: exit status 1", "seconds": 1.0, "tail": "ImportError: nothing"},
    )
    assert "FAILED  check glu: failed: exit status 1: ImportError: nothing" in lines


def test_a_second_call_replaces_the_jobs_it_ran_again(tmp_path, monkeypatch):
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    case = "glu silu bfloat16, forward"
    glu = row(case, "eager", 8.0, "glu", 4.0), row(case, "mmlm_fast", 2.0, "glu")
    again = [{**f, "median_ms": f["median_ms"] / 2} for f in glu]
    first.write_text("\n".join(map(json.dumps, [*gpu_facts(), *glu])) + "\n")
    second.write_text("\n".join(map(json.dumps, [*gpu_facts()[:3], *again])) + "\n")
    page = tmp_path / "README.md"
    page.write_text("<!-- cuda results -->\nold\n<!-- end -->\n<!-- cpu results -->\nold\n<!-- end -->\n")
    assert command.main([str(first), str(second), "--out", str(tmp_path), "--readme", str(page)]) == 0
    rows = json.loads((tmp_path / "h100-2031-02-03.json").read_text())["rows"]
    assert [r["median_ms"] for r in rows] == [8.0, 2.0, 4.0, 1.0]


def counts_fact(**files: list[int]) -> dict:
    names = ("passed", "failed", "skipped")
    counts = {f"tests/{name}.py": dict(zip(names, n, strict=True)) for name, n in files.items()}
    return {"kind": "tests", "second": 9.0, "stage": "tests", "job": "pytest", "files": counts, "finished": True}


def test_a_second_call_forgets_nothing_that_it_did_not_run():
    failure = {"kind": "test failed", "second": 9.0, "stage": "tests", "job": "pytest", "when": "call", "text": "E  no"}
    first = [
        *gpu_facts(),
        {**failure, "test": "tests/test_glu.py::test_x"},
        {**failure, "test": "tests/test_clip_loss.py::test_x"},
        counts_fact(test_glu=[3, 1, 0], test_clip_loss=[5, 1, 2]),
    ]
    job = {"second": 9.0, "stage": "time", "job": "add_norm"}
    second = [
        {"kind": "start", **job},
        {"kind": "job", **job, "status": "no time"},
        counts_fact(test_clip_loss=[6, 0, 2]),
    ]
    facts = summary.merged([first, second])
    lines, good = summary.what_to_mend(facts)
    assert not good
    assert "tests: 9 passed, 1 failed, 2 skipped" in lines
    assert [line[:33] for line in lines if line.startswith(("TEST", "NOT RUN"))] == [
        "TEST    tests/test_glu.py::test_x"
    ]
    assert len(summary.results_of(facts)["rows"]) == 2


def test_a_call_of_some_cases_keeps_the_others():
    def timed(case: str, ms: float) -> list[dict]:
        return [row(case, "eager", 2 * ms, "glu", 2.0), row(case, "mmlm_fast", ms, "glu")]

    none = {"kind": "not timed", "second": 9.0, "stage": "time", "job": "glu", "reason": "no time left"}
    first = [
        *gpu_facts(),
        *timed("glu a, forward", 1.0),
        *timed("glu b, forward", 2.0),
        {**none, "case": "glu c, forward"},
    ]
    second = [*timed("glu c, forward", 3.0), *timed("glu b, forward", 4.0), {**none, "case": "glu a, forward"}]
    results = summary.results_of(summary.merged([first, second]))
    ours = {r["case"]: r["median_ms"] for r in results["rows"] if r["ours"]}
    assert [ours[f"glu {name}, forward"] for name in "abc"] == [1.0, 4.0, 3.0]
    assert results["not_measured"] == []


def test_results_of_another_day_stay_where_nothing_is_newer(tmp_path):
    def results(case: str, ms: float, job: str) -> dict:
        check = {"kind": "check", "second": 9.0, "stage": "check", "job": job, "check": "x", "dtype": "y", "mode": "z"}
        facts = [f for f in gpu_facts() if f["kind"] not in ("time", "check", "not timed")]
        facts += [row(case, "eager", 2 * ms, "glu", 2.0), row(case, "mmlm_fast", ms, "glu"), {**check, "ok": True}]
        return summary.results_of(facts)

    earlier, later = results("glu a, forward", 1.0, "glu"), results("glu b, forward", 2.0, "add_norm")
    earlier["not_measured"] = ["glu b, forward"]
    later["not_measured"] = ["glu a, forward", "glu c, forward"]
    both = summary.onto(earlier, later)
    assert [r["case"] for r in both["rows"] if r["ours"]] == ["glu b, forward", "glu a, forward"]
    assert [c["job"] for c in both["checks"]] == ["glu", "add_norm"]
    assert both["not_measured"] == ["glu c, forward"]
    again = summary.onto(both, results("glu a, forward", 3.0, "glu"))
    assert {r["case"]: r["median_ms"] for r in again["rows"] if r["ours"]} == {
        "glu a, forward": 3.0,
        "glu b, forward": 2.0,
    }
    assert len(again["checks"]) == 2
    later["environment"]["device"] = "another card"
    with pytest.raises(ValueError, match=r"results of one card go together: got .* and another card"):
        summary.onto(earlier, later)


def test_facts_without_checks_prove_nothing():
    lines, good = summary.what_to_mend([f for f in gpu_facts() if f["kind"] != "check"])
    assert not good
    assert "nothing was checked" in lines


def test_what_broke_and_every_commit_stand_above_the_table(tmp_path):
    died = {"kind": "job", "second": 2.0, "stage": "check", "job": "glu", "status": "hung", "seconds": 60.0, "tail": ""}
    other = row("glu silu bfloat16, forward", "mmlm_fast", 1.0, "glu", commit="def5678")
    summary.write_results(summary.results_of_a_gpu([*gpu_facts(), other, died]), tmp_path)
    text = readme.table("cuda", tmp_path)
    assert "commit abc1234, def5678" in text
    assert "- DIED    check glu: hung" in text


def test_numbers_that_are_none_are_no_rows():
    bad = {**row("glu silu bfloat16, forward", "mmlm_fast", 1.0, "glu"), "median_ms": "nan"}
    assert told(bad, row("glu silu bfloat16, forward", "eager", 1.0, "glu", 2.0))
    assert "glu" not in {r["group"] for r in summary.results_of([*gpu_facts(), bad])["rows"]}


def test_an_absolute_goal():
    case = "linear_cross_entropy, 152k classes, forward + backward"
    lines = told(row(case, "mmlm_fast", 80.0, "linear_cross_entropy", peak_mib=7000.0))
    assert any("80 ms, 7000 MiB, goal 65 ms, 6 GiB" in line for line in lines)


def test_facts_become_results_and_the_readmes_table(tmp_path, capsys, monkeypatch):
    path, page = tmp_path / "facts.jsonl", tmp_path / "README.md"
    path.write_text("\n".join(map(json.dumps, gpu_facts())) + "\n")
    marker = "<!-- cuda results -->\nold\n<!-- end -->"
    page.write_text(f"{marker}\n<!-- cpu results -->\nold\n<!-- end -->\n")
    assert command.main([str(path), "--out", str(tmp_path), "--readme", str(page)]) == 0
    results = json.loads((tmp_path / "h100-2031-02-03.json").read_text())
    assert results["environment"]["device_type"] == "cuda"
    assert [r["provider"] for r in results["rows"]] == ["eager", "mmlm_fast"]
    assert results["rows"][1]["fraction_of_limit"] == 0.5  # 3 GB at 3 TB/s are 1 ms of 2
    assert "| 4.00× | 4.00 – 4.00 | 10.0 / 10.0 | 50% | 40 / 40 |" in page.read_text()
    assert "h100-2031-02-03.json" in capsys.readouterr().out


def test_a_rehearsal_is_no_result(tmp_path, capsys):
    found = gpu_facts()
    found[0]["stand_in"] = True
    path = tmp_path / "facts.jsonl"
    path.write_text("\n".join(map(json.dumps, found)) + "\n")
    assert command.main([str(path), "--out", str(tmp_path)]) == 2
    assert "rehearsal" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.json"))


def test_without_the_probe_there_are_no_results(tmp_path, capsys):
    path = tmp_path / "facts.jsonl"
    path.write_text(json.dumps(gpu_facts()[4]) + "\n")
    assert command.main([str(path), "--out", str(tmp_path)]) == 2
    assert "no probe and no environment" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H200", "h200-2031-02-03.json"),
        ("NVIDIA A100-SXM4-80GB", "a100-2031-02-03.json"),
        ("NVIDIA GeForce RTX 5090", "rtx-5090-2031-02-03.json"),
        ("NVIDIA L40S", "l40s-2031-02-03.json"),
        ("Something Else", "something-else-2031-02-03.json"),
    ],
)
def test_file_names(device, name):
    assert summary.file_name({"environment": {"device": device, "date": "2031-02-03"}}) == name


def test_the_launcher_knows_its_options():
    suite = ["bash", str(ROOT / "benchmarks/gpu_suite.sh")]
    digest = [subprocess.run([*suite, "digest"], capture_output=True, text=True, check=True).stdout for _ in range(2)]
    assert [len(line) for line in digest[0].split()] == [64, 64]
    assert digest[0] == digest[1]
    bad = [sys.executable, "-P", "-m", "mmlm_benchmarks.gpu.suite", "--device", "cpu"]
    done = subprocess.run(bad, capture_output=True, text=True, check=False, env={**os.environ, "OUT": "unused"})
    assert done.returncode == 2
    assert "nothing to bring home" in done.stderr
