"""Configuration files, and the command that runs them."""

import json
import subprocess
import sys

import pytest
import transformers

from mmlm_fast.cli import main
from mmlm_fast.training import read_settings, shipped
from support.training import settings_of, write_samples


@pytest.fixture(autouse=True)
def _quiet():
    transformers.logging.set_verbosity_error()


@pytest.fixture
def folder(tmp_path):
    write_samples(tmp_path)
    return tmp_path


def test_every_shipped_configuration_can_be_read():
    assert {"digits_pairs", "digits_question", "digits_caption"} <= set(shipped())
    for name in shipped():
        assert read_settings(name).task


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task=cooking"], "task must be among captioning"),
        (["preset=none"], "preset must be among multimodal_lstm"),
        (["data.sources=x"], "unknown setting data.sources; known are name, kind"),
        (["speed=9"], "unknown setting speed; known are task"),
        (["data.augment=['blur']"], "data.augment must be among crop"),
        (["data.bad_samples=ignore"], "data.bad_samples must be among raise, skip"),
        (["data.train=x.jsonl"], "data needs either name"),
        (["nonsense"], "must be key=value"),
        (["seed.x=1"], "seed is no section"),
    ],
)
def test_wrong_settings(overrides, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["train", "digits_pairs", "--set", *overrides])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_settings_of_other_formats(tmp_path):
    expected = read_settings("digits_pairs")
    values = {"task": "retrieval", "preset": "clip_contrastive", "output": "runs/x", "data": {"name": "digits"}}
    (tmp_path / "a.json").write_text(json.dumps(values))
    (tmp_path / "a.yaml").write_text(
        "task: retrieval\npreset: clip_contrastive\noutput: runs/x\ndata: {name: digits}\n"
    )
    assert read_settings(tmp_path / "a.json") == read_settings(tmp_path / "a.yaml")
    assert read_settings(tmp_path / "a.json").task == expected.task
    (tmp_path / "a.ini").write_text("x")
    with pytest.raises(ValueError, match=r"must end in .toml, .yaml or .json"):
        read_settings(tmp_path / "a.ini")
    (tmp_path / "b.toml").write_text("task = ")
    with pytest.raises(ValueError, match=r"b.toml cannot be read"):
        read_settings(tmp_path / "b.toml")
    with pytest.raises(ValueError, match=r"no configuration .*c.toml"):
        read_settings(tmp_path / "c.toml")
    with pytest.raises(ValueError, match=r"no configuration digit: .* or one of digits_caption"):
        read_settings("digit")


def test_command_trains_lists_and_fails_well(folder, capsys):
    settings_of(folder)
    assert main(["train", "--list"]) == 0
    assert "digits_question" in capsys.readouterr().out
    config = str(folder / "config.toml")
    assert main(["train", config, "--quiet", "--set", "data.eval=data.jsonl", "training.max_steps=1"]) == 0
    out = capsys.readouterr().out
    assert "accuracy: " in out
    assert "metrics.json" in out
    assert main(["train", config, "--quiet"]) == 2
    assert "is not empty" in capsys.readouterr().err
    (folder / "a.png").write_bytes(b"no picture")
    assert main(["train", config, "--quiet", "--overwrite", "--set", "data.eval=data.jsonl"]) == 1
    assert 'data.bad_samples = "skip" leaves such out' in capsys.readouterr().err
    done = subprocess.run(
        [sys.executable, "-P", "-m", "mmlm_fast.cli", "train", "--help"], capture_output=True, text=True, check=True
    )
    assert "exit codes" in done.stdout
