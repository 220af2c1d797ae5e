"""Training that goes on: from the right run, from a whole checkpoint, with the same draws, as the same settings; and
settings that are wrong, refused before anything is done."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from mmlm_fast.cli import main
from mmlm_fast.training import checkpoints, read_settings, running, train
from mmlm_fast.training.data import SampleList
from mmlm_fast.training.samples import Sample


@pytest.fixture(autouse=True)
def _quiet():
    transformers.logging.set_verbosity_error()


@pytest.fixture
def folder(tmp_path):
    """Sixteen pictures with texts and classes, and a configuration of eight steps an epoch at most."""
    rng = np.random.default_rng(0)
    rows = [{"image": f"{i}.png", "text": f"t{i}", "label": "ab"[i % 2]} for i in range(16)]
    for row in rows:
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(tmp_path / row["image"])
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "config.toml").write_text(
        f"""
task = "classification"
preset = "resnet_text_classifier"
output = "{tmp_path}/out"
[data]
train = "data.jsonl"
eval = "data.jsonl"
augment = ["crop", "flip"]
[model]
image_size = 32
[training]
num_train_epochs = 2
per_device_train_batch_size = 4
"""
    )
    return tmp_path


def run(folder, *overrides, **options):
    return train(read_settings(folder / "config.toml", overrides), progress=False, **options)


def weights(folder, name="out"):
    return (folder / name / "model.safetensors").read_bytes()


def stopped_after(steps, monkeypatch):
    """Ctrl-C as soon as a checkpoint of that step is written."""
    save = transformers.Trainer._save_checkpoint

    def interrupted(self, *args, **kwargs):
        save(self, *args, **kwargs)
        if self.state.global_step == steps:
            raise KeyboardInterrupt

    monkeypatch.setattr(transformers.Trainer, "_save_checkpoint", interrupted)


# The same draws


OPTIONS = {
    "epoch": ["training.save_strategy=epoch"],
    "middle": ["training.save_strategy=steps", "training.save_steps=3"],
    "accumulated": [
        "training.save_strategy=steps", "training.save_steps=1", "training.per_device_train_batch_size=2",
        "training.gradient_accumulation_steps=3", "training.dataloader_persistent_workers={persist}",
    ],
}  # fmt: skip
USUAL = [("epoch", 0), ("middle", 1), ("accumulated", 2)]


@pytest.mark.parametrize(
    ("name", "workers"),
    [
        pytest.param(name, workers, marks=() if (name, workers) in USUAL else pytest.mark.slow)
        for name in OPTIONS
        for workers in (0, 1, 2)
    ],
)
def test_resumed_is_uninterrupted(folder, monkeypatch, name, workers):
    """The bits of every weight, at the end of an epoch, in the middle, with accumulated gradients and any number of
    workers, who persist or not; and those of no workers."""
    options = [option.format(persist=str(workers > 0).lower()) for option in OPTIONS[name]]
    options += [f"training.dataloader_num_workers={workers}", "training.save_total_limit=20"]
    run(folder, *options)
    steps = sorted(int(p.name.split("-")[1]) for p in (folder / "out/checkpoints").glob("checkpoint-*"))
    half = f"output={folder}/half"
    with monkeypatch.context() as patch:
        stopped_after(steps[0], patch)
        with pytest.raises(KeyboardInterrupt):
            run(folder, *options, half)
    run(folder, *options, half, resume=True)
    assert weights(folder, "half") == weights(folder)
    if workers:
        run(folder, *options[:-2], "training.dataloader_persistent_workers=false", f"output={folder}/alone")
        assert weights(folder, "alone") == weights(folder)


def test_draws_depend_on_seed_epoch_and_index():
    samples = [Sample(str(i), text="x") for i in range(3)]
    drawn = SampleList(samples, ["crop"], seed=5)
    seeds = {}
    for epoch in range(2):
        drawn.epoch.fill_(epoch)
        seeds[epoch] = [drawn[i].seed for i in range(3)]
    assert len({*seeds[0], *seeds[1], *(SampleList(samples, ["crop"], seed=6)[i].seed for i in range(3))}) == 9
    assert [drawn[i].seed for i in range(3)] == seeds[1]


def test_evaluation_while_training_draws_as_evaluation_does(folder):
    """`data.augment` changes training samples alone: the loss of a model that does not learn stays the same."""
    still = ["training.learning_rate=0.0", "training.weight_decay=0.0", "training.eval_strategy=steps"]
    still += [
        "training.eval_steps=1",
        "training.max_steps=3",
        "model.classifier_dropout=0.0",
        'data.modalities=["text"]',
    ]
    history = run(folder, *still)["history"]
    losses = [row["eval_loss"] for row in history if "eval_loss" in row]
    assert len(losses) == 3
    assert len(set(losses)) == 1


# The right run


def test_overwritten_checkpoints_are_out_of_reach(folder, monkeypatch):
    """Also of a run that is stopped before its first checkpoint, or while the old ones are deleted; files of others
    stay."""
    run(folder)
    out = folder / "out"
    for place in (out, out / "checkpoints"):
        (place / "notes.txt").write_text("mine")
        (place / "more").mkdir()
        (place / "more/notes.txt").write_text("mine")
    old = {p.name for p in (out / "checkpoints").glob("checkpoint-*")}
    assert old
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "_delete", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(folder, overwrite=True)
    with pytest.raises(ValueError, match="nothing to resume"):
        run(folder, resume=True)
    with monkeypatch.context() as patch:
        patch.setattr(transformers.Trainer, "train", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(folder, overwrite=True)
    with pytest.raises(ValueError, match="nothing to resume"):
        run(folder, resume=True)
    for place in (out, out / "checkpoints"):
        assert (place / "notes.txt").read_text() == (place / "more/notes.txt").read_text() == "mine"
    assert {p.name for p in (out / "checkpoints").iterdir()} == {"notes.txt", "more", "run.json"}


def test_overwriting_deletes_what_the_run_wrote_alone(folder):
    """Not what others put among its checkpoints, into them, or beside them, whatever it is called."""
    run(folder)
    out = folder / "out"
    mine = [
        "checkpoints.replaced/a.txt", "checkpoints/checkpoint-4/mine/a.txt", "checkpoints/checkpoint-4/a.txt",
        "checkpoints/runs/a.txt", "checkpoints/mine/a.txt",
    ]  # fmt: skip
    for name in mine:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("mine")
    (out / "checkpoints/checkpoint-7").write_text("mine")
    with pytest.warns(UserWarning, match="not-of-the-run-checkpoint-4 holds what lay in checkpoint-4"):
        run(folder, overwrite=True)
    for name in [*mine, "checkpoints/checkpoint-7"]:
        name = name.replace("checkpoint-4", "not-of-the-run-checkpoint-4")
        assert (out / name).read_text() == "mine", name
    assert not (out / "checkpoints/not-of-the-run-checkpoint-4/model.safetensors").exists()
    assert checkpoints.last_whole(out / "checkpoints")[0].name == "checkpoint-8"


def test_old_checkpoints_are_deleted_but_not_what_others_have_there(folder):
    """save_total_limit is of the run's own checkpoints; the best one stays."""
    for name in ("checkpoint-best", "checkpoint-x-1"):
        (folder / "out/checkpoints" / name).mkdir(parents=True)
        (folder / "out/checkpoints" / name / "a.txt").write_text("mine")
    run(folder, "training.save_total_limit=1", "training.num_train_epochs=3", overwrite=True)
    names = lambda: {p.name for p in (folder / "out/checkpoints").glob("checkpoint-*")}
    assert names() == {"checkpoint-best", "checkpoint-x-1", "checkpoint-12"}
    for best, kept in ((None, [2, 3]), (2, [2, 3]), (0, [0, 3])):
        place = folder / f"best{best}"
        for i in range(4):
            (place / f"checkpoint-{i}").mkdir(parents=True)
        checkpoints.delete_all_but(place, 2, None if best is None else place / f"checkpoint-{best}")
        assert sorted(p.name for p in place.iterdir()) == [f"checkpoint-{i}" for i in kept]
    checkpoints.delete_all_but(place, 1, place / "checkpoint-0")
    assert sorted(p.name for p in place.iterdir()) == ["checkpoint-0", "checkpoint-3"]


def test_checkpoints_without_a_list_are_deleted_by_their_names(folder):
    """Those of earlier versions."""
    run(folder)
    for path in (folder / "out/checkpoints").glob("checkpoint-*"):
        (path / "files.json").unlink()
    (folder / "out/checkpoints/checkpoint-8").rename(folder / "out/checkpoints/checkpoint-9")
    checkpoints.put_away(folder / "out/checkpoints")
    assert {p.name for p in (folder / "out/checkpoints").iterdir()} <= {"run.json"}


def test_nothing_is_deleted_for_settings_that_do_not_work(folder):
    run(folder)
    kept = sorted(p.name for p in (folder / "out/checkpoints").iterdir())
    for wrong in ("model.fusion=none", 'data.labels=["a", "c"]', "data.train=none.jsonl"):
        with pytest.raises(ValueError, match=r"model: fusion|label must be one of|none.jsonl cannot be read"):
            run(folder, wrong, overwrite=True)
    assert sorted(p.name for p in (folder / "out/checkpoints").iterdir()) == kept


def test_a_link_to_checkpoints_elsewhere(folder, tmp_path):
    """On another disk, say: what is there is replaced, the link stays."""
    (tmp_path / "disk").mkdir()
    (folder / "out").mkdir()
    (folder / "out/checkpoints").symlink_to(tmp_path / "disk")
    run(folder, overwrite=True)
    run(folder, overwrite=True)
    assert (folder / "out/checkpoints").is_symlink()
    assert sorted(p.name for p in (tmp_path / "disk").glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-8"]


CHANGES = {
    "data.labels": 'data.labels=["b", "a"]',
    "data.modalities": 'data.modalities=["text"]',
    "data.augment": "data.augment=[]",
    "data.num_frames": "data.num_frames=4",
    "model": "model.fusion=attention",
    "preset": "preset=multimodal_lstm",
    "seed": "seed=1",
    "task": "task=sentiment",
    "tokenizer": "model.tokenizer=bpe:300",
    "training.gradient_accumulation_steps": "training.gradient_accumulation_steps=2",
    "training.optim": "training.optim=sgd",
    "training.per_device_train_batch_size": "training.per_device_train_batch_size=8",
    "training samples": "data.train_count=12",
}


def test_what_changed_is_named(folder):
    run(folder)
    before = weights(folder)
    for name, change in CHANGES.items():
        with pytest.raises(ValueError, match=rf"cannot be resumed, since these changed: .*{name}\b"):
            run(folder, change, resume=True)
    rows = (folder / "data.jsonl").read_text().splitlines()
    (folder / "data.jsonl").write_text("\n".join([*rows[1:], rows[0]]))
    with pytest.raises(ValueError, match=r"training samples \(other contents\)"):
        run(folder, resume=True)
    (folder / "data.jsonl").write_text("\n".join(rows))
    Image.new("RGB", (40, 40)).save(folder / "3.png")
    with pytest.raises(ValueError, match=r"training samples \(other contents\)"):
        run(folder, resume=True)
    assert weights(folder) == before


def test_harmless_changes_are_none_and_others_are_said(folder, recwarn):
    run(folder)
    more = ["training.num_train_epochs=3", "training.logging_steps=1", "training.save_total_limit=3"]
    run(folder, *more, "training.dataloader_num_workers=1", "evaluation.batch_size=5", resume=True)
    assert not [w for w in recwarn if "changed since" in str(w.message)]
    with pytest.warns(
        UserWarning, match=r"changed since the checkpoint: training.learning_rate \(0.001 before, 0.5 now"
    ):
        result = run(folder, *more, "training.num_train_epochs=4", "training.learning_rate=0.5", resume=True)
    rates = [row["learning_rate"] for row in result["history"] if row.get("epoch", 0) > 3 and "learning_rate" in row]
    assert rates
    assert max(rates) < 0.001  # as the warning says


def test_checkpoints_of_unknown_settings(folder):
    run(folder)
    (folder / "out/checkpoints/run.json").unlink()
    with pytest.warns(UserWarning, match=r"has no run.json: whether it is of these settings is not known"):
        run(folder, resume=True)


def test_a_record_that_is_none(folder):
    run(folder)
    for content in ("[]", "3", "null", "{", '"x"'):
        (folder / "out/checkpoints/run.json").write_text(content)
        with pytest.raises(ValueError, match=r"run.json cannot be read: "):
            run(folder, resume=True)


@pytest.mark.parametrize("whole", [2**30, 0])
def test_files_that_changed_but_not_in_size(folder, monkeypatch, whole):
    """Also in data sets of which only pieces of files are compared."""
    monkeypatch.setattr(checkpoints, "WHOLE", whole)
    for i in range(16):
        Image.effect_noise((200, 200), 90).convert("RGB").save(folder / f"{i}.bmp")
    content = (folder / "data.jsonl").read_text()
    (folder / "data.jsonl").write_text(content.replace(".png", ".bmp"))
    run(folder)
    size = (folder / "3.bmp").stat().st_size
    Image.effect_noise((200, 200), 90).convert("RGB").save(folder / "3.bmp")
    assert (folder / "3.bmp").stat().st_size == size > 3 * checkpoints.PIECE
    with pytest.raises(ValueError, match=r"training samples \(other contents\)"):
        run(folder, resume=True)


# A whole checkpoint


def cut(path, keep=0.5):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])


def zero(path):
    """Bytes in the midst of a file; its end stays."""
    content = bytearray(path.read_bytes())
    content[len(content) // 4 : len(content) // 2] = bytes(len(content) // 2 - len(content) // 4)
    path.write_bytes(content)


BREAKS = {
    "weights cut": (lambda c: cut(c / "model.safetensors"), "model.safetensors is not whole"),
    "weights empty": (lambda c: cut(c / "model.safetensors", 0), "model.safetensors is not whole"),
    "no weights": (lambda c: (c / "model.safetensors").unlink(), "no weights"),
    "no optimizer": (lambda c: (c / "optimizer.pt").unlink(), "no optimizer.pt"),
    "optimizer cut": (lambda c: cut(c / "optimizer.pt", 0.9), "optimizer.pt is not whole"),
    "scheduler cut": (lambda c: cut(c / "scheduler.pt"), "scheduler.pt is not whole"),
    "no random state": (lambda c: (c / "rng_state.pth").unlink(), "no rng_state.pth"),
    "random state empty": (lambda c: cut(c / "rng_state.pth", 0), "rng_state.pth is not whole"),
    "no state": (lambda c: (c / "trainer_state.json").unlink(), "no trainer_state.json"),
    "state empty": (lambda c: cut(c / "trainer_state.json", 0), "trainer_state.json cannot be read"),
    "state cut": (lambda c: cut(c / "trainer_state.json"), "trainer_state.json cannot be read"),
    "state of another": (lambda c: (c / "trainer_state.json").write_text("{}"), "trainer_state.json is not of step 8"),
    "configuration cut": (lambda c: cut(c / "config.json"), "config.json cannot be read"),
    "weights damaged": (lambda c: zero(c / "model.safetensors"), "model.safetensors is not whole"),
    "optimizer damaged": (lambda c: zero(c / "optimizer.pt"), "optimizer.pt is not whole"),
    "scheduler damaged": (lambda c: zero(c / "scheduler.pt"), "scheduler.pt is not whole"),
    "random state damaged": (lambda c: zero(c / "rng_state.pth"), "rng_state.pth is not whole"),
    "arguments damaged": (lambda c: zero(c / "training_args.bin"), "training_args.bin is not whole"),
    "arguments missing": (lambda c: (c / "training_args.bin").unlink(), "no training_args.bin"),
    "list damaged": (lambda c: (c / "files.json").write_text("[]"), "files.json cannot be read"),
    "optimizer of an older version damaged": (
        lambda c: ((c / "files.json").unlink(), zero(c / "optimizer.pt")),
        "optimizer.pt is not whole",
    ),
    "part missing": (
        lambda c: (c / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-2.safetensors"}}'),
        "no model-2.safetensors",
    ),
    "index cut": (lambda c: (c / "model.safetensors.index.json").write_text("{"), "index.json cannot be read"),
}


def test_the_last_whole_checkpoint(folder, tmp_path):
    run(folder)
    checkpoint = folder / "out/checkpoints/checkpoint-8"
    assert checkpoints.last_whole(checkpoint.parent) == (checkpoint, {})
    shutil.copytree(checkpoint, tmp_path / "kept")
    for breaks, said in BREAKS.values():
        breaks(checkpoint)
        last, problems = checkpoints.last_whole(checkpoint.parent)
        assert last == checkpoint.parent / "checkpoint-4"
        assert list(problems) == [checkpoint]
        assert re.search(said, problems[checkpoint]), problems
        shutil.rmtree(checkpoint)
        shutil.copytree(tmp_path / "kept", checkpoint)


def test_incomplete_checkpoints_are_passed_over_and_said(folder):
    """And do not count as the latest when old ones are deleted."""
    run(folder)
    whole = weights(folder)
    checkpoint = folder / "out/checkpoints/checkpoint-8"
    cut(checkpoint / "optimizer.pt")
    checkpoint.rename(checkpoint.with_name("checkpoint-9"))  # of another number of steps an epoch
    with pytest.warns(UserWarning, match=r"checkpoint-9 is incomplete \(trainer_state.json is not of step 9\)"):
        run(folder, resume=True)
    assert weights(folder) == whole
    names = {p.name for p in checkpoint.parent.iterdir()} - {"runs"}
    assert names == {"checkpoint-4", "checkpoint-8", "incomplete-checkpoint-9", "run.json"}
    for path in checkpoint.parent.glob("checkpoint-*"):
        cut(path / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"nothing to resume: .*; checkpoint-8 is incomplete: model.safetensors is not"
    ):
        run(folder, resume=True)


def test_pictures_from_text_go_on_in_either_stage(tmp_path, monkeypatch):
    """Stopped in the first stage, the second; each resumed run has the bits of the uninterrupted one."""
    overrides = ["data.train_count=32", "data.eval_count=4", "training.num_train_epochs=2", "model.hidden_size=64"]
    settings = lambda name: read_settings("digits_pictures", [*overrides, f"output={tmp_path / name}"])
    train(settings("whole"), progress=False)
    for name, step in (("first", 3), ("second", 1)):
        with monkeypatch.context() as patch:
            stopped_after(step, patch)
            if step == 1:  # both stages have a first step; the first one's passes
                save = transformers.Trainer._save_checkpoint

                def second(self, *args, save=save, **kwargs):
                    if type(self.model).__name__ != "MMLMImageTokenizer":
                        save(self, *args, **kwargs)

                patch.setattr(transformers.Trainer, "_save_checkpoint", second)
            with pytest.raises(KeyboardInterrupt):
                train(settings(name), progress=False)
        train(settings(name), progress=False, resume=True)
        for file in ("model.safetensors", "image_tokenizer/model.safetensors"):
            assert (tmp_path / name / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), (name, file)


def test_overwriting_puts_away_both_stages_at_once(tmp_path, monkeypatch):
    """A new run that is stopped in its first stage is not gone on with from the second stage of the old one, nor from
    the old first stage where another task writes into the folder."""
    options = ["data.train_count=32", "data.eval_count=4", "training.num_train_epochs=1", "model.hidden_size=64"]
    settings = read_settings("digits_pictures", [*options, f"output={tmp_path / 'out'}"])
    train(settings, progress=False)
    assert len(running.whole_checkpoints(settings)) == 2
    with monkeypatch.context() as patch:
        stopped_after(1, patch)
        with pytest.raises(KeyboardInterrupt):
            train(settings, progress=False, overwrite=True)
    assert not list((tmp_path / "out/checkpoints").glob("checkpoint-*"))
    assert list(running.whole_checkpoints(settings)) == [tmp_path / "out/image_tokenizer/checkpoints/checkpoint-1"]
    for stop in ("_delete_checkpoint", "write_record"):
        with monkeypatch.context() as patch:
            write, calls = checkpoints.write_record, []

            def stopped(*args, write=write, calls=calls, stop=stop):
                calls.append(args)
                if stop == "_delete_checkpoint" or len(calls) == 2:
                    raise KeyboardInterrupt
                write(*args)

            patch.setattr(checkpoints, stop, stopped)
            with pytest.raises(KeyboardInterrupt):
                train(settings, progress=False, overwrite=True)
        with pytest.raises(ValueError, match=r"nothing to resume: the run in .* was to be replaced"):
            train(settings, progress=False, resume=True)


# Settings that are wrong

WRONG = {
    "training.learning_rat=1e-3": "unknown setting training.learning_rat; did you mean training.learning_rate?",
    "training.num_train_epochs=abc": "training.num_train_epochs must be a number, got 'abc'",
    "training.num_train_epochs=nan": "training.num_train_epochs must be a number, got nan",
    "training.num_train_epochs=0": "training.num_train_epochs must be above 0, got 0",
    "training.per_device_train_batch_size=2.5": "training.per_device_train_batch_size must be a whole number, got 2.5",
    "training.per_device_train_batch_size=true": "must be a whole number, got True",
    "training.per_device_train_batch_size=0": "training.per_device_train_batch_size must be above 0, got 0",
    "training.learning_rate=-1": "training.learning_rate must be at least 0, got -1",
    "training.learning_rate=inf": "training.learning_rate must be a number, got inf",
    "training.max_steps=0": "training.max_steps must be at least 1, or -1",
    "training.bf16=1": "training.bf16 must be true or false, got 1",
    "training.seed=1": "training.seed is set by the setting seed, got 1",
    "training.output_dir=x": "training.output_dir is set by the setting output",
    "training.disable_tqdm=true": "training.disable_tqdm is set by --quiet",
    "training.remove_unused_columns=true": "training.remove_unused_columns is set by the program",
    "training.optim=adm": "training: adm is not a valid OptimizerNames",
    "training.lr_scheduler_type=lin": "training: lin is not a valid SchedulerType",
    "training.save_strategy=often": "training: often is not a valid SaveStrategy",
    "training.load_best_model_at_end=true training.save_strategy=no": "training: ",
    "training.metric_for_best_model=accuracy": "training.metric_for_best_model must be loss",
    "training.report_to=comets": "training.report_to must be among",
    "training=3": "training must be a section, got 3",
    "seed=-1": "seed must be from 0 to",
    "seed=a": "seed must be a whole number, got 'a'",
    "data.train_count=0": "data.train_count must be at least 1, got 0",
    "data.train_count=-3": "data.train_count must be at least 1, got -3",
    "data.train=5": "data.train must be text or nothing, got 5",
    "data.modalities=text": "data.modalities must be a list, got 'text'",
    "data.labels=['a']": "data.labels must be two different names of classes or more, got ['a']",
    "data.labels=['a','a']": "data.labels must be two different names",
    "data.labels=['1',1]": "data.labels must be two different names",
    "evaluation.batch_size=0": "evaluation.batch_size must be at least 1, got 0",
    "evaluation.generation.max_new_token=3": "did you mean evaluation.generation.max_new_tokens?",
    "model.fusoin=mean": "unknown setting model.fusoin; did you mean model.fusion?",
    "model.fusion=none": "model: fusion must be one of",
    "model.fusion=cross_attention": "model: ",
    "model.hidden_size=abc": "model.hidden_size must be a whole number, got 'abc'",
    "model.hidden_size=-64": "model.hidden_size must be at least 1, got -64",
    "model.num_hidden_layers=0": "model.num_hidden_layers must be at least 1, got 0",
    "model.image_size=0": "model.image_size must be at least 1, got 0",
    "model.audio_seconds=0": "model.audio_seconds must be at least 1, got 0",
    "model.num_labels=0": "model.num_labels must be at least 1, got 0",
    "model.audio=maybe": "model.audio must be true or false, got 'maybe'",
    "model.audio=3": "model.audio must be true or false, got 3",
    "model.problem_type=foo": "model.problem_type must be among single_label_classification, ",
    "model.classifier_dropout=9": "model.classifier_dropout must be at least 0 and at most 1, got 9",
    "model.frozen=image": "model.frozen must be a list or nothing, got 'image'",
    "training.lr_scheduler_kwargs=foo": "training.lr_scheduler_kwargs must be a section, got 'foo'",
    "training.use_liger_kernel=true": "training.use_liger_kernel needs a package that is missing",
    "training.push_to_hub=true": "training.push_to_hub is set by none: upload",
    "training.adam_beta1=2": "training.adam_beta1 must be below 1, got 2",
    "training.adam_beta2=1": "training.adam_beta2 must be below 1, got 1",
    "training.label_smoothing_factor=2": "training.label_smoothing_factor must be below 1, got 2",
    "training.optim_args=foo": "training.optim_args must be key=value,key=value, got 'foo'",
    "training.dataloader_persistent_workers=true": "needs training.dataloader_num_workers above 0",
    "training.train_sampling_strategy=foo": "training.train_sampling_strategy must be among random, ",
    "training.accelerator_config=foo": "training: ",
    "evaluation.generation.num_beams=-1": "evaluation.generation.num_beams must be at least 1, got -1",
    "evaluation.generation.num_return_sequences=2": "evaluation.generation.num_return_sequences must be 1, got 2",
    "evaluation.generation.max_new_tokens=abc": ".generation.max_new_tokens must be a whole number, got 'abc'",
    "evaluation.generation.temperature=hot": "evaluation.generation.temperature must be a number, got 'hot'",
    "evaluation.generation.output_scores=true": "evaluation.generation.output_scores must be false, got True",
    "data.modalities=[]": "data.modalities must be one or more of text, image, audio, got []",
    "data.modalities=['text','text']": "data.modalities must be different ones of text, image, audio",
    "data.kind=foo": "data.kind is for built-in sets, got 'foo' with data.train",
    "data=3": "data must be a section, got 3",
    "evaluation=3": "evaluation must be a section, got 3",
    "folder=x": "unknown setting folder: that of the results is output",
    "model.hidden_size=33": "model: hidden_size must be a multiple of 32, got 33",
    "model.tokenizer=bpe:many": "model: tokenizer must be bytes, bpe:<number of tokens> or a checkpoint",
    "model.tokenizer=/nowhere/at/all": "model: ",
    "towers.text=/nowhere/at/all": "towers.text: no checkpoint /nowhere/at/all",
    "towers.text=3": "towers.text must be text, got 3",
    "start_from=nowhere": "start_from: no model in ",
    "image_tokenizer=nowhere": "image_tokenizer is for task image_generation",
    "task=captioning": "task captioning needs a preset that generates, got resnet_text_classifier",
    "output=config.toml": "output: .* cannot be made a folder",
    "nonsense": "must be key=value, got 'nonsense'",
    ".=1": "unknown setting",
}


@pytest.mark.parametrize("change", WRONG)
def test_wrong_settings_end_with_2_and_one_line(folder, change, capsys, monkeypatch):
    """Before data is read and a model is built."""
    monkeypatch.setattr(running, "read_data", lambda *args: pytest.fail("data was read"))
    monkeypatch.setattr(running, "build", lambda *args: pytest.fail("a model was built"))
    monkeypatch.chdir(folder)
    try:
        code = main(["train", str(folder / "config.toml"), "--quiet", "--set", *change.split()])
    except SystemExit as error:
        code = error.code
    said = capsys.readouterr().err
    assert code == 2
    assert not (folder / "out").exists()
    assert len(said.splitlines()) == 1, said
    assert said.startswith("mmlm-fast train: ")
    assert WRONG[change] in said or re.search(WRONG[change], said), said


@pytest.mark.parametrize(
    ("change", "place", "message"),
    [
        ("training.lr_scheduler_kwargs={a=1}", None, "training: .*TypeError: .*'a'"),
        ("training.optim_args=a=1", ("create_optimizer", transformers.Trainer), "training: RuntimeError: broken"),
        ("training.train_sampling_strategy=group_by_length", None, "training: "),
        ("seed=1", ("build", running), "model: RuntimeError: broken"),
    ],
)
def test_settings_that_only_building_refuses(folder, capsys, monkeypatch, change, place, message):
    """End with 2 and one line too; nothing is made, and nothing of an earlier run is lost."""
    if place is not None:
        monkeypatch.setattr(place[1], place[0], lambda *a, **k: (_ for _ in ()).throw(RuntimeError("broken")))
    arguments = ["train", str(folder / "config.toml"), "--quiet", "--set", change, "--output"]
    assert main([*arguments, str(folder / "new/er")]) == 2
    assert re.fullmatch(f"mmlm-fast train: {message}.*\n", capsys.readouterr().err)
    assert not (folder / "new").exists()
    monkeypatch.undo()
    run(folder, "training.max_steps=1", "training.save_strategy=steps", "training.save_steps=1")
    if place is not None:
        monkeypatch.setattr(place[1], place[0], lambda *a, **k: (_ for _ in ()).throw(RuntimeError("broken")))
    assert main([*arguments, str(folder / "out"), "--overwrite"]) == 2
    assert (folder / "out/checkpoints/checkpoint-1/model.safetensors").is_file()


@pytest.mark.parametrize("error", [RuntimeError, ValueError, KeyError])
@pytest.mark.parametrize(("place", "said"), [("training_step", "step 1"), ("judge_model", "evaluation")])
def test_errors_on_the_way_are_no_wrong_settings(folder, capsys, monkeypatch, error, place, said):
    """They end with 1, a traceback and a line that says where."""
    where = running if place == "judge_model" else transformers.Trainer
    monkeypatch.setattr(where, place, lambda *a, **k: (_ for _ in ()).throw(error("broken")))
    assert main(["train", str(folder / "config.toml"), "--quiet", "--set", "training.max_steps=1"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(rf"mmlm-fast train: training failed at {said}: .*broken'?", lines[-1])
    assert "Traceback (most recent call last):" in lines


def test_numbers_that_yaml_takes_for_text(folder):
    (folder / "config.yaml").write_text(
        "task: classification\npreset: resnet_text_classifier\noutput: x\ndata: {train: data.jsonl}\n"
        "training: {learning_rate: 2e-5}\n"
    )
    assert read_settings(folder / "config.yaml").training == {"learning_rate": 2e-5}
    (folder / "config.yaml").write_text("a: [")
    with pytest.raises(ValueError, match=r"config.yaml cannot be read: while parsing"):
        read_settings(folder / "config.yaml")


def test_configurations_in_other_encodings(folder):
    content = (folder / "config.toml").read_bytes()
    (folder / "config.toml").write_bytes(b"\xef\xbb\xbf" + content)
    assert read_settings(folder / "config.toml").seed == 0
    (folder / "config.toml").write_bytes(content + b"# \xe9")
    with pytest.raises(ValueError, match=r"config.toml cannot be read: .*utf-8"):
        read_settings(folder / "config.toml")
    (folder / "config.json").write_text('{"task": "x", "task": "y"}')
    with pytest.raises(ValueError, match="'task' is given twice"):
        read_settings(folder / "config.json")


def test_the_file_behind_set(folder, capsys):
    """`--set` takes any number of settings, and leaves the configuration alone."""
    config = str(folder / "config.toml")
    assert main(["train", "--quiet", "--set", "training.max_steps=1", "evaluation.batch_size=3", config]) == 0
    assert "accuracy: " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["train", "--set", "training.max_steps=1"])
    assert "CONFIG is required" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", config, "--resume", "--overwrite"])
    assert "--resume goes on, --overwrite starts anew" in capsys.readouterr().err


@pytest.mark.parametrize(("steps", "word"), [(4, "--resume"), (0, "--overwrite")])
def test_ctrl_c_says_how_to_go_on(folder, capsys, monkeypatch, steps, word):
    """With a command that does."""
    with monkeypatch.context() as patch:
        if steps:
            stopped_after(steps, patch)
        else:
            patch.setattr(transformers.Trainer, "train", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        arguments = ["train", str(folder / "config.toml"), "--quiet", "--set", 'model.frozen=["image"]']
        assert main([*arguments, "--output", str(folder / "the out")]) == 130
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith("mmlm-fast train: interrupted; to go on: mmlm-fast train ")
    assert said[0].endswith(word)
    import shlex

    words = shlex.split(said[0].partition("to go on: mmlm-fast ")[2])
    assert main(words) == 0
    assert (folder / "the out/metrics.json").is_file()


def test_ctrl_c_before_the_old_run_is_replaced(folder, capsys, monkeypatch):
    """Going on is no matter of the run that is still there."""
    arguments = ["train", str(folder / "config.toml"), "--quiet", "--overwrite"]
    assert main(arguments[:-1]) == 0
    for name in ("read_data", "build", "record_of"):
        with monkeypatch.context() as patch:
            patch.setattr(running, name, lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
            assert main(arguments) == 130
        assert capsys.readouterr().err.endswith(" --overwrite\n")
        assert len(running.whole_checkpoints(read_settings(folder / "config.toml"))) == 1
    with monkeypatch.context() as patch:
        stopped_after(4, patch)
        assert main(arguments) == 130
    assert capsys.readouterr().err.endswith(" --resume\n")


# What is left behind


def test_evaluated_samples_that_were_trained_on_are_counted(folder, capsys):
    rows = (folder / "data.jsonl").read_text().splitlines()
    others = [json.dumps(json.loads(row) | {"text": "another"}) for row in rows[:2]]
    (folder / "dev.jsonl").write_text("\n".join([*rows[:3], *others]))
    config = str(folder / "config.toml")
    assert main(["train", config, "--quiet", "--set", "data.eval=dev.jsonl", "training.max_steps=1"]) == 0
    assert "3 of 5 evaluated samples were trained on" in capsys.readouterr().out
    card = (folder / "out/README.md").read_text()
    assert "**3 of 5 evaluated samples were trained on" in card
    assert json.loads((folder / "out/metrics.json").read_text())["eval_samples_in_train"] == 3


def test_one_sample_has_no_interval(folder, capsys):
    (folder / "dev.jsonl").write_text((folder / "data.jsonl").read_text().splitlines()[0])
    config = str(folder / "config.toml")
    assert main(["train", config, "--quiet", "--set", "data.eval=dev.jsonl", "training.max_steps=1"]) == 0
    assert "accuracy_interval: none: of fewer than two samples" in capsys.readouterr().out
    assert json.loads((folder / "out/metrics.json").read_text())["metrics"]["accuracy_interval"] is None
    with pytest.raises(ValueError, match=r"evaluation.controls shuffles samples, which needs two or more, got 1"):
        run(folder, "data.eval=dev.jsonl", 'evaluation.controls=["text"]', overwrite=True)


CARDS = [
    ("classification", "resnet_text_classifier", []),
    ("classification", "token_merge_vlm", ["model.image_size=56", "model.audio_seconds=2"]),
    ("classification", "resnet_text_classifier", ['data.modalities=["image"]']),
    ("captioning", "token_merge_vlm", ["model.image_size=56", "model.audio_seconds=2"]),
    ("captioning", "mmlm_basic", ["model.audio_seconds=2"]),
    ("retrieval", "clip_contrastive", ["model.image_size=56"]),
    ("pretraining", "joint_pretrain", ["model.image_size=56", "model.audio_seconds=2"]),
    ("image_tokenizer", "image_tokens", []),
    ("image_generation", "image_tokens", []),
]


@pytest.mark.parametrize("alone", [pytest.param(True, marks=pytest.mark.slow), False], ids=["alone", "here"])
@pytest.mark.parametrize(("task", "preset", "overrides"), CARDS)
def test_the_cards_way_to_load_runs_as_typed(folder, task, preset, overrides, alone, monkeypatch, capfd):
    """In the folder of the model; of every kind in a process of its own, too."""
    rows = [json.loads(row) | {"target": "yes"} for row in (folder / "data.jsonl").read_text().splitlines()]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    content = (folder / "config.toml").read_text().replace("image_size = 32\n", "")
    (folder / "config.toml").write_text(content)
    size = ["model.image_size=16"] if preset == "image_tokens" else []
    overrides = [*overrides, *size, f"task={task}", f"preset={preset}", "training.max_steps=1"]
    run(folder, *overrides, "evaluation.generation.max_new_tokens=2")
    card = (folder / "out/README.md").read_text()
    snippet = re.search(r"## How to load\n\n```python\n(.*?)```", card, re.DOTALL)[1]
    monkeypatch.chdir(folder / "out")
    if alone or (task, preset) == ("retrieval", "clip_contrastive"):
        environment = os.environ | {"PYTHONSAFEPATH": "1", "TQDM_DISABLE": "1"}
        command = [sys.executable, "-c", snippet]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, snippet + done.stderr[-2000:]
        stdout, stderr = done.stdout, done.stderr
    else:
        capfd.readouterr()
        exec(compile(snippet, "README.md", "exec"), {"__name__": "__main__"})
        stdout, stderr = capfd.readouterr()
    assert stdout.strip()
    assert "MISSING" not in stderr


def test_two_ranks_write_once_and_draw_apart(folder):
    """Under torchrun: each rank has samples of its own, which draw by their index."""
    script = Path(folder) / "run.py"
    script.write_text(
        f"""
import sys
from mmlm_fast.training import collator
from mmlm_fast.cli import main
seen = []
augmented = collator.augmented
def watched(loaded, kinds, rng):
    seen.append((loaded.sample.name, rng.integers(1 << 30)))
    return augmented(loaded, kinds, rng)
collator.augmented = watched
code = main(["train", "{folder}/config.toml", "--quiet", "--overwrite", "--set", "training.num_train_epochs=1",
             "training.ddp_backend=gloo", "training.use_cpu=true", "training.eval_strategy=no"])
import os
open(f"{folder}/seen" + os.environ["RANK"], "w").write(repr(seen))
sys.exit(code)
"""
    )
    command = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (eval((folder / f"seen{rank}").read_text(), {"np": np}) for rank in range(2))
    assert len(one) == len(two) == 8
    assert not {name for name, _ in one} & {name for name, _ in two}
    assert len({number for _, number in [*one, *two]}) == 16
    assert torch.isfinite(torch.tensor(json.loads((folder / "out/metrics.json").read_text())["metrics"]["accuracy"]))
    record = json.loads((folder / "out/checkpoints/run.json").read_text())
    assert record["processes"] == 2
