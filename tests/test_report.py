"""`mmlm-fast report`: what it measures, how it ends, what it says, and that the page stands alone."""

import copy
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mmlm_benchmarks import harness
from mmlm_benchmarks.audio import AUDIO
from mmlm_benchmarks.ops import OPS, TrainingStep, gated_add
from mmlm_benchmarks.report import baseline, findings, measure, render, schema
from mmlm_benchmarks.report.measure import Options, Step
from mmlm_fast.cli import main
from mmlm_fast.testing import difference

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A real report of one op, timed briefly."""
    out = tmp_path_factory.mktemp("report")
    torch.compiler.reset()  # the slow full report in this process would use up Dynamo's recompile limit
    code = main(["report", "--ops", "gated_add", "--seconds", "0.01", "--out", str(out), "--quiet"])
    assert code == 0, json.loads((out / "results.json").read_text())["failures"]
    return out


@pytest.fixture
def results(report):
    return json.loads((report / "results.json").read_text())


def test_report_is_complete_and_self_contained(report, results):
    assert results["failures"] == []
    assert {r["provider"] for r in results["rows"]} == {"eager", "torch.compile", "mmlm_fast"}
    assert all(r["median_ms"] > 0 and r["speedup"] > 0 for r in results["rows"])
    assert all(r["ours"] or r["ours_faster_low"] <= r["ours_faster"] <= r["ours_faster_high"] for r in results["rows"])
    assert all(r["peak_mib"] is not None for r in results["rows"])
    html = (report / "index.html").read_text(encoding="utf-8")
    sources = re.findall(r'src="([^"]{0,30})', html)
    assert sources
    assert all(s.startswith(("data:image/png;base64,iVBOR", "data:image/svg+xml;base64,")) for s in sources)
    assert all(s.startswith("#") for s in re.findall(r'href="([^"]*)', html))
    assert not re.search(r"https?://", html)
    assert not re.search(r"<h2[^>]*>[^<]*</h2>\s*(?:<h2|$)", html), "an empty section"
    assert all(f'id="{anchor}"' in html for anchor in re.findall(r'href="#([^"]*)', html))
    assert "今天天气很好" in html
    assert "No GPU result is committed yet" in html or "The last committed GPU result" in html
    markdown = (report / "report.md").read_text(encoding="utf-8")
    for row in results["rows"]:
        assert row["case"] in html
        assert row["case"] in markdown


def test_results_are_as_described(results):
    assert schema.problems(results) == []
    assert schema.problems({**results, "more": 1}) == ["results.more is not described"]
    assert schema.problems({k: v for k, v in results.items() if k != "rows"}) == ["results lacks rows"]
    rows = [{k: v for k, v in row.items() if k != "job"} | {"threads": 1.0} for row in results["rows"][:1]]
    lacking = ["results.rows[0] lacks job", "results.rows[0].threads is float"]
    assert schema.problems({**results, "rows": rows}) == lacking
    assert schema.problems({**results, "own": None}) == ["results.own is NoneType"]
    assert schema.problems({**results, "last_gpu_result": None}) == []
    assert (ROOT / "docs" / "results.md").read_text(encoding="utf-8") == schema.markdown()


def test_a_case_stands_for_each_op_and_audio_family():
    """In the order that a reader wants: what comes last is what falls out first."""
    results = measure._started(Options("cpu"))
    steps = list(measure._steps(Options("cpu"), results, Path()))
    jobs = [step.job for step in steps]
    assert set(jobs) == {"", *OPS, *AUDIO, "model", "accelerated"}
    assert all(jobs.count(job) == 1 for job in (*OPS, *AUDIO))
    assert jobs.index("accelerated") < jobs.index("log_mel") < jobs.index("add_norm")
    every = [step.name for step in measure._steps(Options("cpu", full=True), results, Path())]
    assert len(every) > 90
    assert set(every) >= {step.name for step in steps if step.job != "accelerated"}
    some = [step.job for step in measure._steps(Options("cpu", ("glu",)), results, Path())]
    assert set(some) == {"", "glu"}


@pytest.fixture
def steps(monkeypatch):
    """In place of the report's steps: a list of names; what each does is kept."""
    ran = []

    def put(**actions):
        def named(options, results, folder):
            for name, action in actions.items():
                yield Step(name, name, lambda name=name, action=action: (ran.append(name), action(results)))

        monkeypatch.setattr(measure, "_steps", named)
        return ran

    return put


def said(results):
    results["generation"].append({"fusion": "merge", "tokens": 1, "equal": True})


def test_a_failing_case_is_reported_and_the_rest_go_on(tmp_path, steps, capsys):
    steps(broken=lambda results: 1 / 0, fine=said)
    assert main(["report", "--ops", "glu", "--out", str(tmp_path), "--quiet"]) == 1
    assert "FAILED broken: ZeroDivisionError" in capsys.readouterr().err
    assert json.loads((tmp_path / "results.json").read_text())["generation"]
    assert "ZeroDivisionError" in (tmp_path / "index.html").read_text()


def test_what_does_not_fit_into_the_time_is_listed(tmp_path, steps, capsys):
    ran = steps(glu=lambda results: time.sleep(0.3), rope=said, add_norm=said)
    assert main(["report", "--budget", "0.2", "--out", str(tmp_path), "--quiet"]) == 0
    assert ran == ["glu"]
    assert "did not fit into the time: mmlm-fast report --ops rope" in capsys.readouterr().out
    page = (tmp_path / "index.html").read_text()
    assert "mmlm-fast report --ops add_norm: add_norm" in page
    assert "2 cases did not fit" in page


def test_interrupted_and_resumed(tmp_path, steps, capsys):
    def interrupted(results):
        raise KeyboardInterrupt

    command = ["report", "--ops", "glu", "--out", str(tmp_path), "--quiet"]
    steps(first=said, second=interrupted, third=said)
    assert main(command) == 130
    assert f"to go on: mmlm-fast report --ops glu --quiet --out {tmp_path} --resume" in capsys.readouterr().err
    page = (tmp_path / "index.html").read_text()
    assert "This run was cut off" in page
    assert "1 of 1 identical" in page
    ran = steps(first=said, second=said, third=said)
    ran.clear()
    assert main([*command, "--resume"]) == 0
    assert ran == ["second", "third"]
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["generation"]) == 3
    assert results["finished"]
    assert main([*command, "--seconds", "9", "--resume"]) == 2
    assert "the report was begun with" in capsys.readouterr().err
    assert main(["report", "--out", str(tmp_path / "none"), "--resume"]) == 2


def test_a_case_that_fails_halfway_leaves_no_rows(tmp_path, monkeypatch):
    """They would be there twice when it goes on."""

    def halfway(*args):
        yield {"case": "half"}
        raise RuntimeError("stopped")

    monkeypatch.setattr(measure.accelerated, "measure", halfway)
    monkeypatch.setattr(measure.curves, "measure", halfway)
    options = Options("cpu", ("accelerated", "curves"))
    results = measure._started(options)
    for step in measure._steps(options, results, tmp_path):
        if step.job and step.name != "cold starts":
            with pytest.raises(RuntimeError, match="stopped"):
                step.run()
    assert results["accelerated"] == results["curves"] == []


def test_a_killed_report_leaves_what_was_done(tmp_path):
    """By SIGKILL, which nothing can catch: the files are whole, at most some seconds old."""
    code = """
import sys, time
from mmlm_benchmarks.report import measure
measure.SAVED_EVERY = 0.0
def steps(options, results, folder):
    yield measure.Step("first", "x", lambda: results["generation"].append(dict(fusion="merge", tokens=1, equal=True)))
    yield measure.Step("second", "x", lambda: (print("there", flush=True), time.sleep(60)))
measure._steps = steps
from mmlm_fast.cli import main
main(["report", "--ops", "glu", "--out", sys.argv[1], "--quiet"])
"""
    with subprocess.Popen([sys.executable, "-P", "-c", code, tmp_path], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "there\n"
        os.kill(process.pid, signal.SIGKILL)
    assert not json.loads((tmp_path / "results.json").read_text())["finished"]
    assert "This run was cut off" in (tmp_path / "index.html").read_text()


@pytest.mark.parametrize(
    "arguments", [["--seconds", "-1"], ["--budget", "0"], ["--threads", "0"], ["--ops", "gul"]], ids=lambda a: a[0]
)
def test_wrong_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["report", *arguments])
    assert stopped.value.code == 2
    assert "got" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written(capsys):
    assert main(["report", "--ops", "glu", "--out", "/proc/none", "--quiet"]) == 2
    assert "mmlm-fast report: " in capsys.readouterr().err


# ---- what it says ----------------------------------------------------------------------------------------------------


def with_ratios(results, **ratios):
    """Of the first case alone, its alternatives as many times as slow as ours."""
    results = copy.deepcopy(results)
    case = results["rows"][0]["case"]
    results["rows"] = [r for r in results["rows"] if r["case"] == case]
    for row in results["rows"]:
        if not row["ours"]:
            value = ratios[row["provider"].replace(".", "_")]
            row |= {"ours_faster": value, "ours_faster_low": 0.99 * value, "ours_faster_high": 1.01 * value}
    return results, case


def test_counts_against_the_best_alternative(results):
    """Not against the first: a loss to torch.compile is a loss, by name."""
    lost, case = with_ratios(results, eager=3.0, torch_compile=0.9)
    lines = findings.sentences(lost)
    assert "Faster in 0, slower in 1, within noise in 0." in lines
    assert f"Slower: {case}, 0.90× as fast as torch.compile." in lines
    won, _ = with_ratios(results, eager=3.0, torch_compile=1.2)
    assert "Faster in 1, slower in 0, within noise in 0." in findings.sentences(won)
    even, _ = with_ratios(results, eager=3.0, torch_compile=0.999)
    assert "Faster in 0, slower in 0, within noise in 1." in findings.sentences(even)


def test_headlines_are_withheld_on_a_busy_machine(results):
    results["environment"]["others_load"], results["rates"] = 0.0, [{"1": [1e10, 1e11]}] * 2
    assert not findings.busy(results)
    assert "<div class=tile>" in render.page(results)
    loaded = {**results, "environment": results["environment"] | {"others_load": 0.7}}
    drifted = {**results, "rates": [{"1": [1e10, 1e11]}, {"1": [1e10, 0.7e11]}]}
    for busy, why in ((loaded, "took 70% of the cores"), (drifted, "matrix products changed by 43%")):
        for text in (render.page(busy), render.markdown(busy)):
            assert "This machine was busy" in text
            assert why in text
            assert "<div class=tile>" not in text


def test_no_headline_counts_our_own_formula(results):
    mine, case = with_ratios(results, eager=30.0, torch_compile=20.0)
    for row in mine["rows"]:
        if not row["ours"]:
            row["provider"] = harness.OWN_FORMULA
    assert findings.compared(mine) == []
    assert findings.tiles(mine) == []
    assert f"Compared with our own formula alone, so in no headline: {case}." in findings.sentences(mine)


def test_missing_peers_are_listed(results, monkeypatch):
    monkeypatch.setitem(harness.PEERS, "no_such_module", "no-such-package")
    assert "no-such-package (not installed)" in harness.missing_peers("cpu")
    assert "Liger (on a GPU alone)" in results["missing_peers"]
    lines = findings.sentences({**results, "missing_peers": ["librosa (not installed)", "soxr (not installed)"]})
    assert "Not compared: librosa (not installed), soxr (not installed)." in lines


def test_an_interval_holds_the_median():
    assert harness.interval([1.0]) == (1.0, 1.0)
    assert harness.interval([3.0, 1.0, 2.0]) == (1.0, 3.0)
    low, high = harness.interval(list(range(1, 101)))
    assert (low, high) == (41, 60)  # of 100: the 41st and the 60th, by the normal approximation
    torch.manual_seed(0)
    held = [a <= 0 <= b for a, b in (harness.interval(torch.randn(30).tolist()) for _ in range(400))]
    assert 0.92 < sum(held) / len(held) < 0.99


def test_other_programs_are_seen(monkeypatch):
    ticks = iter([["cpu  100 0 0 900 0 0 0 0 0 0"], ["cpu  150 0 0 940 0 0 0 10 0 0"]])
    monkeypatch.setattr(harness, "_lines", lambda path: next(ticks))
    assert harness.others_load(0) == 0.6  # 50 busy and 10 stolen of 100
    monkeypatch.setattr(harness, "_lines", lambda path: [])
    assert harness.others_load(0) is None


@pytest.fixture
def toy(monkeypatch):
    """Rows of a case in which theirs takes 4 ms, and ours as long as is asked: calls say themselves how long."""
    monkeypatch.setattr(harness, "timed", lambda call, args, lead=0.0: call(*args))

    def rows(milliseconds):
        providers = {"eager": lambda x: 4e-3, "mmlm_fast": lambda x: milliseconds / 1e3}
        case = harness.Case("glu", "toy", "", lambda: [(torch.ones(3),)], providers, lambda calls, args: {})
        return harness.rows_as_json(harness.run(case, 0.01), "glu")

    return rows


def test_a_planted_slowdown_is_seen(results, toy):
    before = {**results, "rows": toy(2.0), "accelerated": []}
    assert findings.slower_than({**before, "rows": toy(2.0)}, before) == []
    assert findings.slower_than({**before, "rows": toy(1.6)}, before) == []
    slower = findings.slower_than({**before, "rows": toy(2.4)}, before)
    assert slower == ["toy: 1.67× over eager, 2.00× before"]


def test_a_provider_that_became_faster_is_no_slowdown(results):
    before, case = with_ratios(results, eager=3.0, torch_compile=2.0)
    after, _ = with_ratios(results, eager=3.0, torch_compile=1.5)
    assert findings.slower_than(after, before) == []
    after, _ = with_ratios(results, eager=2.4, torch_compile=1.6)
    assert findings.slower_than(after, before) == [
        f"{case}: 2.40× over eager, 3.00× before, 1.60× over torch.compile, 2.00× before"
    ]
    other = {**before, "environment": before["environment"] | {"device": "another"}}
    with pytest.raises(ValueError, match="ratios of another machine say nothing"):
        findings.slower_than(after, other)


def test_against_earlier_results(tmp_path, steps, results, capsys):
    earlier, _ = with_ratios(results, eager=3.0, torch_compile=2.0)
    now, _ = with_ratios(results, eager=2.0, torch_compile=1.0)
    (tmp_path / "before.json").write_text(json.dumps(earlier))
    command = ["report", "--ops", "glu", "--out", str(tmp_path / "out"), "--quiet", "--against"]
    steps(again=lambda results: results["rows"].extend(now["rows"]))
    assert main([*command, str(tmp_path / "before.json")]) == 1
    assert "SLOWER than in " in capsys.readouterr().err
    steps(again=lambda results: results["rows"].extend(earlier["rows"]))
    assert main([*command, str(tmp_path / "before.json")]) == 0
    assert main([*command, str(tmp_path / "none.json")]) == 2


def test_the_committed_baseline(tmp_path, results):
    """What a report is compared with where no file is named: ratios of the same kind of machine, and no other's."""
    kept = baseline.ratios(results)
    assert findings.slower_than(results, kept) == []
    (tmp_path / "a.json").write_text(json.dumps(kept))
    assert baseline.committed(results["environment"], tmp_path) == tmp_path / "a.json"
    with pytest.raises(ValueError, match=r"no committed baseline is of another with .* threads \(.*\): give --against"):
        baseline.committed(results["environment"] | {"device": "another"}, tmp_path)
    with pytest.raises(ValueError, match="no baseline"):
        baseline.ratios({**results, "failures": [{"case": "x"}]})
    for path in baseline.FOLDER.glob("*.json"):
        shipped = json.loads(path.read_text(encoding="utf-8"))
        assert len(shipped["rows"]) > 50
        assert {r["case"] for r in shipped["accelerated"]}


# ---- how it measures -------------------------------------------------------------------------------------------------


def test_wrong_result_is_not_timed():
    def check(providers, args):
        exact = args[0].double() * 2
        return {p: [difference(call(*args), args[0] * 2, exact)] for p, call in providers.items()}

    case = harness.Case(
        "op",
        "doubled",
        "",
        lambda: [(torch.ones(3),)],
        {"eager": lambda x: x * 2, "mmlm_fast": lambda x: x * 2.1},
        check,
    )
    with pytest.raises(AssertionError, match="doubled: error"):
        harness.run(case, 0.01)


def test_a_case_checks_the_providers_it_is_given():
    forward, step = gated_add.cases("cpu", "tiny")
    function = step.providers["mmlm_fast"].function

    def twice(*args):
        return 2 * function(*args)

    for case, wrong in ((forward, twice), (step, TrainingStep(twice))):
        providers = {"right": case.providers["mmlm_fast"], "wrong": wrong}
        differences = case.check(providers, case.inputs()[0])
        assert list(differences) == ["right", "wrong"]
        assert all(d.ok for d in differences["right"])
        assert not any(d.ok for d in differences["wrong"][:1])


def test_peak_memory_sees_a_buffer():
    measured = harness.peak_memory_mib(lambda: torch.ones(64 * 2**18).sum(), ())
    assert measured is None or 60 < measured < 80


@pytest.mark.slow
def test_the_whole_report(tmp_path):
    start = time.perf_counter()
    assert main(["report", "--out", str(tmp_path), "--quiet"]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert time.perf_counter() - start < 360
    assert schema.problems(results) == []
    assert all(g["equal"] for g in results["generation"])
    if not results["skipped"]:
        assert {r["group"] for r in results["rows"]} == {"audio", "model", *OPS}
