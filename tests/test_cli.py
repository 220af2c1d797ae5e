import importlib
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
    page = importlib.import_module("mmlm_benchmarks.report.page")
    monkeypatch.setattr(measure, "_steps", lambda *args: [])

    def found(name):
        return None if name == "soundfile" else importlib.util.find_spec(name)

    for module in (mmlm_fast.cli, page):
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
