"""Samples: read from lines and files, checked, changed; bad ones named, or left out and listed."""

import json

import numpy as np
import pytest
import transformers

from mmlm_fast.training import BadSampleError, Sample, load, read_samples, train
from mmlm_fast.training.builtin import digits
from mmlm_fast.training.samples import augmented, usable
from support.speech import SPEECH
from support.training import IMAGE, collator, settings_of, write_samples


@pytest.fixture(autouse=True)
def _quiet():
    transformers.logging.set_verbosity_error()


@pytest.fixture
def folder(tmp_path):
    write_samples(tmp_path)
    return tmp_path


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
