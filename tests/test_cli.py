import importlib
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import mmlm_fast
from mmlm_fast import ops
from mmlm_fast.cli import main

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A real report of two jobs, timed briefly."""
    out = tmp_path_factory.mktemp("report")
    torch.compiler.reset()  # the slow full report in this process would use up Dynamo's recompile limit
    code = main(["report", "--ops", "fuse_modalities", "--seconds", "0.01", "--out", str(out), "--quiet"])
    assert code == 0, json.loads((out / "results.json").read_text())["failures"]
    return out


@pytest.mark.slow
def test_full_report(tmp_path):
    assert main(["report", "--out", str(tmp_path), "--quiet"]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert all(g["equal"] for g in results["generation"])
    assert {r["group"] for r in json.loads((tmp_path / "results.json").read_text())["rows"]} == {
        "audio",
        "concat_linear",
        "fuse_modalities",
        "model",
    }


def test_report_is_complete_and_self_contained(report):
    results = json.loads((report / "results.json").read_text())
    assert results["failures"] == []
    assert {r["provider"] for r in results["rows"]} == {"eager", "torch.compile", "mmlm_fast"}
    assert all(r["median_ms"] > 0 and r["speedup"] > 0 for r in results["rows"])
    assert all(r["ours"] or r["ours_faster"] > 0 for r in results["rows"])
    assert all(r["peak_mib"] is not None for r in results["rows"])
    html = (report / "index.html").read_text(encoding="utf-8")
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', html)
    assert sources
    assert all(s.startswith("data:image/png;base64,iVBOR") for s in sources)
    assert not re.search(r"https?://", html)
    assert not re.search(r"<h2>[^<]*</h2>\s*(?:<h2>|$)", html), "an empty section"
    assert "今天天气很好" in html
    assert "No GPU result is committed yet" in html or "The last committed GPU result" in html
    markdown = (report / "report.md").read_text(encoding="utf-8")
    for row in results["rows"]:
        assert row["case"] in html
        assert row["case"] in markdown


def test_a_failing_case_is_reported_and_the_rest_go_on(tmp_path, monkeypatch, capsys):
    from mmlm_benchmarks.report import measure

    def steps(device, jobs, full, seconds, results, folder):
        yield "broken", lambda: 1 / 0
        yield "fine", lambda: results["generation"].append({"fusion": "merge", "tokens": 1, "equal": True})

    monkeypatch.setattr(measure, "_steps", steps)
    assert main(["report", "--ops", "glu", "--out", str(tmp_path), "--quiet"]) == 1
    assert "FAILED broken: ZeroDivisionError" in capsys.readouterr().err
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["generation"]
    assert "ZeroDivisionError" in (tmp_path / "index.html").read_text()


def test_wrong_result_is_not_timed():
    from mmlm_benchmarks import harness
    from mmlm_fast.testing import difference

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


def test_peak_memory_sees_a_buffer():
    from mmlm_benchmarks.harness import peak_memory_mib

    measured = peak_memory_mib(lambda: torch.ones(64 * 2**18).sum(), ())
    assert measured is None or 60 < measured < 80


def test_doctor_names_every_op(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert text.strip() == mmlm_fast.doctor()
    for name in set(ops.__all__) - {"rope_tables"}:
        assert f"    {name}: " in text
    assert "ops on CPU tensors, by path:\n  the native core:\n    add_norm: float32, bfloat16 from " in text
    assert f"torch {torch.__version__.split('+')[0]}" in text
    assert "instruction set" in text


def test_doctor_knows_all_ops_in_a_fresh_process():
    command = [sys.executable, "-P", "-m", "mmlm_fast.cli", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for name in {*ops.__all__, "audio.log_mel", "audio.resample"} - {"rope_tables"}:
        assert f"    {name}: " in done.stdout


def test_doctor_explains_an_op(capsys):
    assert main(["doctor", "glu", "--dtype", "float16", "--size", "7"]) == 0
    assert capsys.readouterr().out == (
        "glu, float16 on CPU, 7 numbers: the PyTorch formula: the native core takes float32, bfloat16\n"
    )
    with pytest.raises(SystemExit):
        main(["doctor", "gul"])
    assert "op must be one of add_norm" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["report"], ["doctor"]])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([*command, "--help"])
    assert exit_.value.code == 0
    assert len(capsys.readouterr().out) > 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "--ops", "nonsense"], "--ops must be among add_norm"),
        (["report", "--threads", "0"], "--threads must be at least 1, got 0"),
        (["frobnicate"], "invalid choice"),
        ([], "required: COMMAND"),
    ],
)
def test_usage_errors(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_report_needs_soundfile_only_for_sound(monkeypatch, tmp_path, capsys):
    audio = importlib.import_module("mmlm_benchmarks.audio").AUDIO
    assert set(audio) < mmlm_fast.cli.HEARS
    measure = importlib.import_module("mmlm_benchmarks.report.measure")
    render = importlib.import_module("mmlm_benchmarks.report.render")
    monkeypatch.setattr(measure, "_steps", lambda *args: [])

    def found(name):
        return None if name == "soundfile" else importlib.util.find_spec(name)

    for module in (mmlm_fast.cli, render):
        monkeypatch.setattr(module, "find_spec", found)
    for jobs in (["--ops", "glu", "kaldi"], ["--ops", "model"], []):
        if all(map(importlib.util.find_spec, mmlm_fast.cli.TRAIN_NEEDS)) or jobs:
            assert main(["report", *jobs, "--out", str(tmp_path), "--quiet"]) == 2
            assert "mmlm-fast report needs soundfile: pip install" in capsys.readouterr().err
    assert main(["report", "--ops", "glu", "--out", str(tmp_path), "--quiet"]) == 0
    assert "今天天气很好" in (tmp_path / "index.html").read_text(encoding="utf-8")


def test_commit_without_git(monkeypatch):
    from mmlm_benchmarks import harness

    monkeypatch.setenv("MMLM_COMMIT", "0123abc")
    assert harness.commit() == "0123abc"
    monkeypatch.delenv("MMLM_COMMIT")
    monkeypatch.setenv("PATH", "")
    assert harness.commit() is None


def test_installed_command():
    command = Path(sys.executable).with_name("mmlm-fast")
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"mmlm-fast {mmlm_fast.__version__}"


def test_version_is_one():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "mmlm_fast._version.__version__"}
    assert mmlm_fast.__version__ == mmlm_fast._version.__version__
    assert f"## {mmlm_fast.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_readme_tables_come_from_committed_results():
    from mmlm_benchmarks.readme import with_tables

    text = (ROOT / "README.md").read_text(encoding="utf-8")  # not the module's, which is beside an installed wheel
    assert with_tables(text) == text, "run: python -m mmlm_benchmarks.readme"


def test_samples_are_small_and_licensed():
    folder = ROOT / "mmlm_fast/data"
    assert sum(p.stat().st_size for p in folder.iterdir() if p.is_file()) < 2**20
    licence = (folder / "LICENSE.md").read_text()
    for path in folder.iterdir():
        if path.suffix in (".flac", ".jpg", ".json"):
            assert path.name in licence
