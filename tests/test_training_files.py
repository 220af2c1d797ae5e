"""Samples from files: every line, picture, clip, film and text that cannot be used is named, or left out and listed."""

import json
import struct
import zlib

import numpy as np
import pytest
import transformers
from PIL import Image

from mmlm_fast.models import MMLMForClassification, MMLMForContrastive, MMLMForSeq2SeqLM, presets
from mmlm_fast.training import BadSampleError, Collator, Sample, load, read_samples, read_settings, train
from mmlm_fast.training.samples import strict_json, usable

LABELS = ["a", "b"]


@pytest.fixture(autouse=True)
def _quiet():
    transformers.logging.set_verbosity_error()


@pytest.fixture
def folder(tmp_path):
    """A configuration of a classifier of text, pictures and sound, four good lines, and their files."""
    import soundfile

    Image.new("RGB", (48, 48), "red").save(tmp_path / "good.png")
    soundfile.write(tmp_path / "good.wav", np.zeros(16000), 16000)
    rows = [{"image": "good.png", "audio": "good.wav", "text": f"t{i}", "label": "ab"[i % 2]} for i in range(4)]
    (tmp_path / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "config.toml").write_text(
        f"""
task = "classification"
preset = "resnet_text_classifier"
output = "{tmp_path}/out"
[data]
train = "train.jsonl"
eval = "dev.jsonl"
labels = ["a", "b"]
[model]
audio = true
audio_seconds = 2
image_size = 32
[training]
max_steps = 1
save_strategy = "no"
"""
    )
    return tmp_path


def line(**fields):
    return json.dumps({"text": "x", "label": "a"} | fields).encode()


def huge_png(side=20000):
    """A valid picture of one colour, few bytes and many pixels."""
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(side // 8 + 1) * side)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


BAD_LINES = {
    "cut off": (b'{"text": "x', "not JSON: Unterminated string starting at at column 10"),
    "a list": (b"[1]", "must be an object, got list"),
    "unknown field": (line(id=3), "fields must be among image, .*, got id"),
    "twice": (b'{"text": "x", "text": "y", "label": "a"}', "the key 'text' is given twice"),
    "NaN": (b'{"text": "x", "label": NaN}', "NaN is no finite number"),
    "-Infinity": (b'{"text": "x", "label": -Infinity}', "-Infinity is no finite number"),
    "1e999": (b'{"text": "x", "label": 1e999}', "1e999 is no finite number"),
    "nested": (b"[" * 100000, "recursion"),
    "digits": (b'{"text": "x", "label": ' + b"1" * 5000 + b"}", "4300 digits"),
    "not UTF-8": (b'{"text": "\xe9", "label": "a"}', "not UTF-8: invalid continuation byte at byte 11"),
    "half a pair": (b'{"text": "\\ud800", "label": "a"}', r"half of a surrogate pair, '\\ud800'"),
    "number as text": (line(text=3), "text must be text, got 3"),
    "false as text": (line(text=False), "text must be text, got False"),
    "empty text": (line(text=""), "text is empty"),
    "space as text": (line(text=" \u3000\n"), "text is empty"),
    "long text": (line(text="é" * 300), "text must have at most 512 tokens, .* got 600"),
    "no label": (b'{"text": "x"}', "label must be one of a, b, got None"),
    "null label": (line(label=None), "label must be one of a, b, got None"),
    "other label": (line(label="c"), "label must be one of a, b, got 'c'"),
    "number of a class": (line(label=0), "label must be one of a, b, got 0"),
    "true": (line(label=True), "label must be one of a, b, got True"),
    "float": (line(label=1.0), "label must be one of a, b, got 1.0"),
    "list of labels": (line(label=["a"]), r"label must be one of a, b, got \['a'\]"),
    "object as label": (line(label={"a": 1}), "label must be a class"),
    "messages": (line(messages=3), "messages must be a list, got 3"),
    "a message": (line(messages=[{"role": "user"}]), "a message must have role and content"),
    "part with a file": (
        line(messages=[{"role": "user", "content": [{"type": "image", "url": "x.png"}]}]),
        "whose files are in the sample's image and audio",
    ),
    "no such file": (line(image="none.png"), "no file .*none.png"),
    "a folder": (line(image="."), "no file"),
    "long name": (line(audio="x" * 5000), "File name too long"),
    "numbers as paths": (line(image=[3]), r"image must be a path or a list of paths, got \[3\]"),
    "nothing": (b'{"label": "a"}', "text is empty"),
}


def bad_files(folder):
    """Files that cannot be used, by name, with what is said of them."""
    import soundfile

    (folder / "empty.png").write_bytes(b"")
    (folder / "drawing.svg").write_text("<svg/>")
    Image.new("RGB", (64, 64), "green").save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:400])
    Image.fromarray(np.zeros((8, 8), np.float32)).save(folder / "float.tiff")
    Image.fromarray(np.zeros((8, 8), np.int32)).save(folder / "deep.tiff")
    (folder / "huge.png").write_bytes(huge_png())
    soundfile.write(folder / "empty.wav", np.zeros(0), 16000)
    soundfile.write(folder / "nan.wav", np.full(1600, np.nan), 16000, subtype="FLOAT")
    (folder / "no.mp4").write_bytes(b"no film")
    return {
        "empty.png": "cannot identify image file '.*empty.png'",
        "drawing.svg": "cannot identify image file '.*drawing.svg'",
        "cut.jpg": "cut.jpg: ",
        "float.tiff": "float.tiff: pictures must have 8 or 16 bits",
        "deep.tiff": "deep.tiff: pictures must have 8 or 16 bits",
        "huge.png": "huge.png: .*400000000 pixels",
        "empty.wav": "empty.wav",
        "nan.wav": "nan.wav",
        "no.mp4": "no.mp4 cannot be read as a film",
    }


def test_every_bad_sample_is_left_out_and_listed(folder):
    """All in one file, by file and line, and nothing but them; with the first as an error where none may be bad."""
    wanted = list(BAD_LINES.values())
    for name, said in bad_files(folder).items():
        field = "audio" if name.endswith("wav") else "video" if name.endswith("mp4") else "image"
        wanted.append((line(**{field: name}), said))
    good = (folder / "dev.jsonl").read_bytes()
    (folder / "train.jsonl").write_bytes(good + b"\n".join(bad for bad, _ in wanted))
    settings = read_settings(folder / "config.toml", ["data.bad_samples=skip"])
    result = train(settings, progress=False)
    assert result["num_samples"] == {"train": 4, "eval": 4}
    problems = {int(text.split(":")[1]): text for text in result["bad_samples"]}
    assert sorted(problems) == list(range(5, 5 + len(wanted)))
    for number, (_, said) in enumerate(wanted, 5):
        with pytest.raises(BadSampleError, match=rf"^train.jsonl:{number}: .*{said}"):
            raise BadSampleError(problems[number])


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_an_error(folder, name):
    bad, said = BAD_LINES[name]
    (folder / "train.jsonl").write_bytes((folder / "dev.jsonl").read_bytes() + bad + b"\n")
    with pytest.raises(BadSampleError, match=f"^train.jsonl:5: .*{said}"):
        train(read_settings(folder / "config.toml"), progress=False)


def test_a_bad_sample_is_named_from_a_worker(folder):
    bad_files(folder)
    (folder / "train.jsonl").write_bytes(line(image="cut.jpg") + b"\n" + line(label="b"))
    more = ["training.dataloader_num_workers=1", "training.per_device_train_batch_size=2"]
    with pytest.raises(BadSampleError, match=r"^train.jsonl:1: ") as error:
        train(read_settings(folder / "config.toml", more), progress=False)
    assert "\n" not in str(error.value)


def test_errors_name_the_file_as_the_settings_do(folder):
    """Of two files of the same name."""
    (folder / "other").mkdir()
    (folder / "train.jsonl").write_bytes(line() + b"\n" + line(label="b"))
    (folder / "other/train.jsonl").write_bytes(line(label="c"))
    with pytest.raises(BadSampleError, match=r"^other/train.jsonl:1: label must be one of a, b, got 'c'"):
        train(read_settings(folder / "config.toml", ["data.eval=other/train.jsonl"]), progress=False)


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_lines_end_at_line_feeds_alone(tmp_path, separator):
    text = f"a{separator}b"
    rows = [json.dumps({"text": text}, ensure_ascii=False), json.dumps({"text": "c"})]
    (tmp_path / "data.jsonl").write_bytes("\r\n".join(rows).encode() + b"\n \t\r\n")
    assert [sample.text for sample in read_samples(tmp_path / "data.jsonl")] == [text, "c"]


def test_byte_order_marks(tmp_path):
    """Also inside, where files were put together; UTF-16 is refused by name."""
    (tmp_path / "data.jsonl").write_bytes(2 * (b"\xef\xbb\xbf" + line() + b"\n") + b"\xef\xbb\xbf\n\xef\xbb\xbf \r\n")
    assert [sample.name for sample in read_samples(tmp_path / "data.jsonl")] == ["data.jsonl:1", "data.jsonl:2"]
    (tmp_path / "data.jsonl").write_bytes(line().decode().encode("utf-16"))
    with pytest.raises(ValueError, match=r"data.jsonl must be UTF-8, got UTF-16"):
        read_samples(tmp_path / "data.jsonl")


def test_null_is_nothing(tmp_path):
    fields = dict.fromkeys(("image", "video", "audio", "text", "target", "label", "messages"))
    (tmp_path / "data.jsonl").write_text(json.dumps(fields))
    assert read_samples(tmp_path / "data.jsonl") == [Sample("data.jsonl:1")]


def test_files_without_samples(tmp_path):
    (tmp_path / "data.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match=r"data.jsonl has no samples$"):
        read_samples(tmp_path / "data.jsonl")
    (tmp_path / "data.jsonl").write_text("{\n[]")
    problems = ["of another file"]
    with pytest.raises(ValueError, match=r"data.jsonl has no samples but 2 bad lines; the first: data.jsonl:1"):
        read_samples(tmp_path / "data.jsonl", problems)
    assert len(problems) == 3
    with pytest.raises(ValueError, match=r"none.jsonl cannot be read: No such file"):
        read_samples(tmp_path / "none.jsonl")


def test_strict_json_reads_what_is_json():
    text = '{"a": [1, -2.5e3, true, null, "\\ud83d\\ude00"], "b": {"a": 1}}'
    assert strict_json(text) == json.loads(text)


# Labels


def collator_of(config, processor, **options):
    return Collator("classification", MMLMForClassification(config), processor, **({"labels": LABELS} | options))


@pytest.fixture(scope="module")
def small():
    return presets.resnet_text_classifier(image_size=32, resnet_width=8)


def test_numbers_and_names_of_classes(small):
    collate = collator_of(*small, labels=["1", "2", "3"])
    for label, wanted in ((1, 0), ("1", 0), (3, 2), (np.int64(2), 1)):
        assert collate.label_of(Sample("s", text="x", label=label)) == wanted
    for label in (0, "0", 4, -1, 1.0, True, None, [1], "1 "):
        with pytest.raises(BadSampleError, match="s: label must be one of 1, 2, 3, got"):
            collate.label_of(Sample("s", text="x", label=label))


def test_several_labels_at_once(small):
    config, processor = small
    config = type(config)(**config.to_dict() | {"problem_type": "multi_label_classification"})
    collate = collator_of(config, processor, labels=["cat", "dog", "c"])
    for label, wanted in ((["dog"], [0, 1, 0]), ([], [0, 0, 0]), (["c", "cat"], [1, 0, 1]), ("cat", [1, 0, 0])):
        assert collate.label_of(Sample("s", text="x", label=label)) == wanted
    for label in (None, ["cow"], [0], [1.0], [["cat"]]):
        with pytest.raises(BadSampleError, match="s: label must be"):
            collate.label_of(Sample("s", text="x", label=label))


def test_numbers_to_be_found(small):
    config, processor = small
    config = type(config)(**config.to_dict() | {"problem_type": "regression", "num_labels": 1})
    collate = collator_of(config, processor, labels=[])
    assert collate.label_of(Sample("s", text="x", label=2)) == 2.0
    for label in (True, "2", None, float("nan"), float("inf")):
        with pytest.raises(BadSampleError, match="s: label must be a number, got"):
            collate.label_of(Sample("s", text="x", label=label))


# Texts


def test_what_is_not_used_does_not_stand_for_a_text(small):
    """A picture that the model does not see is no input."""
    collate = collator_of(*small, modalities=["text"])
    with pytest.raises(BadSampleError, match="s: text is empty"):
        collate.check(Sample("s", images=(Image.new("RGB", (8, 8)),), label="a"))
    collate = collator_of(*small, modalities=["image"])
    with pytest.raises(BadSampleError, match="s: has no image"):
        collate.check(Sample("s", text="x", label="a"))
    collator_of(*small).check(Sample("s", images=(Image.new("RGB", (8, 8)),), label="a"))


@pytest.mark.parametrize(
    ("name", "cls", "task"),
    [
        ("clip_contrastive", MMLMForContrastive, "retrieval"),
        ("transformer_encoder_decoder", MMLMForSeq2SeqLM, "translation"),
    ],
)
def test_texts_longer_than_positions(name, cls, task):
    """The longest that there are positions for passes, one more does not; of what is written, too."""
    config, processor = presets.PRESETS[name].build(image_size=56)
    collate = Collator(task, cls(config), processor)
    picture = (Image.new("RGB", (8, 8)),)
    collate.read(Sample("s", text="x" * 512, images=picture, target="y"))
    with pytest.raises(BadSampleError, match=r"s: text must have at most 512 tokens, .* got 513"):
        collate.read(Sample("s", text="x" * 513, images=picture, target="y"))
    if task == "translation":
        collate.read(Sample("s", text="x", images=picture, target="y" * 1023))  # and the end
        with pytest.raises(BadSampleError, match=r"s: target must have at most 1024 tokens, .* got 1025"):
            collate.read(Sample("s", text="x", images=picture, target="y" * 1024))


def test_all_modalities_together_longer_than_positions():
    """Of the encoder that reads them end to end."""
    config, processor = presets.transformer_encoder_decoder()
    batch = processor(text=["x" * 511], images=[Image.new("RGB", (8, 8))], text_target=["y"])
    with pytest.raises(ValueError, match=r"together must have at most 512 tokens, .* got 516"):
        MMLMForSeq2SeqLM(config)(**batch)


# Pictures and films


def pixels_of(path):
    return np.asarray(load(Sample("s", images=(path,))).images[0])


def test_pictures_of_16_bits_are_scaled(tmp_path):
    values = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    Image.fromarray(values).save(tmp_path / "deep.png")
    pixels = pixels_of(tmp_path / "deep.png")
    np.testing.assert_array_equal(pixels, np.rint(values / 257)[..., None].repeat(3, 2))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_they_are_to_be_shown(tmp_path, orientation):
    """Against the definition: where the first row and column of the file lie."""
    picture = np.zeros((16, 32, 3), np.uint8)
    picture[:8, :8] = 255  # the file's upper left corner
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(picture).save(tmp_path / "turned.png", exif=exif)
    pixels = pixels_of(tmp_path / "turned.png")
    row, column = {
        1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)
    }[orientation]  # fmt: skip
    assert pixels.shape == ((16, 32, 3) if orientation < 5 else (32, 16, 3))
    assert (pixels[row, column] == 255).all()
    assert pixels.sum() == picture.sum()


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK"])
def test_pictures_of_every_mode(tmp_path, mode):
    ending = "tiff" if mode == "CMYK" else "png"
    Image.new("RGBA", (4, 2), "white").convert("RGB" if mode == "CMYK" else "RGBA").convert(mode).save(
        tmp_path / f"x.{ending}"
    )
    np.testing.assert_array_equal(pixels_of(tmp_path / f"x.{ending}"), np.full((2, 4, 3), 255))


def test_a_colour_that_stands_for_nothing_is_white(tmp_path):
    for mode, colour in (("L", 7), ("RGB", (7, 8, 9)), ("I;16", 7)):
        Image.new(mode, (4, 4), colour).save(tmp_path / "x.png", transparency=colour)
        assert (pixels_of(tmp_path / "x.png") == 255).all(), mode


def test_moving_pictures_give_their_first(tmp_path):
    first, second = (Image.new("RGB", (8, 8), colour) for colour in ("white", "black"))
    first.save(tmp_path / "x.gif", save_all=True, append_images=[second])
    assert (pixels_of(tmp_path / "x.gif") == 255).all()


def test_warnings_turned_into_errors_name_the_sample(tmp_path):
    """As `python -W error` does; a picture that PIL only warns of is used otherwise."""
    import warnings

    (tmp_path / "large.png").write_bytes(huge_png(10000))
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with pytest.raises(BadSampleError, match=r"^s: .*large.png: .*100000000 pixels"):
            pixels_of(tmp_path / "large.png")


@pytest.mark.parametrize("size", [(1, 1), (50, 1), (40, 3), (3, 40), (1, 50)])
def test_thin_pictures_keep_their_colours(small, size):
    """transformers takes the rows of a picture 1 or 3 pixels high for its channels."""
    _, processor = small
    pixels = processor(images=[Image.new("RGB", size, (255, 0, 0))])["pixel_values"][0]
    assert pixels.shape == (3, 32, 32)
    assert (pixels[0] > 0.9).all()
    assert (pixels[1:] < -0.9).all()


def test_films_are_turned_as_they_are_to_be_shown(tmp_path):
    import av

    with av.open(str(tmp_path / "film.mp4"), "w") as film:
        stream = film.add_stream("mpeg4", rate=10)
        stream.width, stream.height = 64, 32
        pixels = np.zeros((32, 64, 3), np.uint8)
        pixels[:, :16] = 255  # the left edge
        for _ in range(3):
            film.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        film.mux(stream.encode())
    upright = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    clockwise = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)  # as of a telephone held upright
    content = (tmp_path / "film.mp4").read_bytes()
    at = content.index(upright, content.index(b"tkhd"))
    (tmp_path / "film.mp4").write_bytes(content[:at] + clockwise + content[at + 36 :])
    frame = np.asarray(load(Sample("s", video=tmp_path / "film.mp4")).images[0])
    assert frame.shape == (64, 32, 3)
    assert frame[:8].mean() > 200  # what was left is above
    assert frame[24:].mean() < 50


def test_left_out_in_python_too(small, tmp_path):
    """`usable` with what a collator reads, without a configuration."""
    collate = collator_of(*small)
    samples = [Sample(str(n), text="x" * n, label="a") for n in (5, 600, 7)]
    kept, problems = usable(samples, collate.check, skip=True, read=collate.read)
    assert [sample.name for sample in kept] == ["5", "7"]
    assert len(problems) == 1
    assert problems[0].startswith("600: text must have at most 512 tokens")
