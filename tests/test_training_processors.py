"""What a processor gives for training, processors of towers from checkpoints, Auto classes, and README's snippets."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from mmlm_fast.models import (
    MMLMForClassification,
    MMLMForConditionalGeneration,
    MMLMProcessor,
    presets,
)
from mmlm_fast.models.tokenization import byte_tokenizer

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
PICTURE = Image.new("RGB", (64, 64), "red")
CLIP = np.zeros(16000, np.float32)


@pytest.fixture(autouse=True)
def _quiet():
    transformers.logging.set_verbosity_error()


@pytest.fixture(scope="module")
def vlm():
    torch.manual_seed(0)
    config, processor = presets.token_merge_vlm(image_size=28, audio_seconds=2)
    return MMLMForConditionalGeneration(config).eval(), processor


# Labels


def test_labels_are_of_the_text_alone(vlm):
    """Neither placeholders nor padding; the loss is that of the text's tokens, by hand."""
    model, processor = vlm
    batch = processor(
        text=["<image><audio>good", "a longer text"], images=[[PICTURE], None], audio=[[CLIP], None],
        sampling_rate=16000, return_labels=True,
    )  # fmt: skip
    said = [processor.tokenizer.decode(row[row != -100]) for row in batch["labels"]]
    assert said == ["good", "a longer text"]
    assert batch["labels"].shape == batch["input_ids"].shape
    out = model(**batch)
    rows = [
        torch.nn.functional.cross_entropy(logits[:-1][row[1:] != -100], row[1:][row[1:] != -100], reduction="sum")
        for logits, row in zip(out.logits, batch["labels"], strict=True)
    ]
    torch.testing.assert_close(out.loss, sum(rows) / (batch["labels"][:, 1:] != -100).sum())


@pytest.mark.parametrize("side", ["left", "right"])
def test_suffixes_follow_their_texts(side):
    tokenizer = byte_tokenizer(padding_side=side)
    _, processor = presets.clip_contrastive(tokenizer=tokenizer)
    batch = processor(text=["short", "a longer one"], suffix=["yes", "no, not so"])
    for i, (text, answer) in enumerate((("short", "yes<eos>"), ("a longer one", "no, not so<eos>"))):
        real = batch["attention_mask"][i].bool()
        assert tokenizer.decode(batch["input_ids"][i][real]) == text + answer
        assert tokenizer.decode(batch["labels"][i][batch["labels"][i] != -100]) == answer
        assert real[-1 if side == "left" else 0]
        assert (batch["input_ids"][i][~real] == tokenizer.pad_token_id).all()
        assert (batch["labels"][i][~real] == -100).all()


def test_targets_of_another_decoder():
    _, processor = presets.transformer_encoder_decoder()
    batch = processor(text=["a", "b"], text_target=["yes", "no, not so"])
    alone = processor(text=["a", "b"])
    assert torch.equal(batch["input_ids"], alone["input_ids"])
    assert batch["labels"].shape == (2, 11)
    assert [processor.tokenizer.decode(r[r != -100]) for r in batch["labels"]] == ["yes<eos>", "no, not so<eos>"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            dict(suffix="a", return_labels=True),
            "one of suffix, text_target and return_labels, got several",
        ),
        (dict(suffix=["a", "b"]), "suffix must be one a text, got 2 for 1 texts"),
        (dict(suffix="a", padding=False), "padding with suffix must be True or 'longest', got False"),
    ],
)
def test_wrong_labels(vlm, options, message):
    with pytest.raises(ValueError, match=message):
        vlm[1](text="x", **options)


SEEN = dict(text="<image>a", images=PICTURE)  # four placeholders of the picture


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (SEEN | {"suffix": "see <image>"}, r"suffix\[0\] has <image>, which .* cannot be written"),
        (SEEN | {"suffix": ["<audio>"]}, r"suffix\[0\] has <audio>"),
        ({"text": ["a", "b"], "suffix": ["a", None]}, r"suffix\[1\] must be a text, got None"),
        ({"text": ["a", "b"], "suffix": [3, "a"]}, r"suffix\[0\] must be a text, got 3"),
        ({"text": ["a", None]}, r"text\[1\] must be a text, got None"),
        ({"text": [2.5]}, r"text\[0\] must be a text, got 2.5"),
        ({"text": []}, "text must be a text or a list of one or more, got \\[\\]"),
        ({"text": 3}, "text must be a text or a list of one or more, got 3"),
        ({"text": b"x"}, "text must be a text or a list of one or more, got b'x'"),
        ({"text": "a", "suffix": []}, "suffix must be a text or a list of one or more"),
        ({"text": "a", "text_target": "b"}, "text_target is for sequence-to-sequence models"),
        (
            SEEN | {"truncation": True, "max_length": 3},
            r"text\[0\] has 4 <image>, of which 3 are left within max_length 3",
        ),
        (
            {"text": "abcdef", "suffix": "abc", "truncation": True, "max_length": 6},
            "text with its suffix must have at most max_length, 6 tokens with the end token, got 10 in place 0",
        ),
        ({"text": "<audio>", "audio": [CLIP[:0]], "sampling_rate": 16000}, "a clip is empty: say None for none"),
        ({"text": "<audio>", "audio": [[CLIP, CLIP[:0]]], "sampling_rate": 16000}, "a clip is empty"),
        ({"text": "<audio>", "audio": CLIP[:0], "sampling_rate": 16000}, "a clip is empty"),
    ],
)
def test_what_cannot_be_a_batch(vlm, options, message):
    with pytest.raises(ValueError, match=message):
        vlm[1](**options)


def test_what_another_decoder_cannot_write():
    _, processor = presets.mmlm_basic()
    limit = {"truncation": True, "max_length": 4}
    for target, options, message in (
        ("see <image>", {}, r"text_target\[0\] has <image>"),
        ([None], {}, r"text_target\[0\] must be a text, got None"),
        ([], {}, "text_target must be a text or a list of one or more"),
        (["a", "b"], {}, "text_target must be one a text, got 2 for 1 texts"),
        ("abcd", limit, "text_target must have at most max_length, 4 tokens with the end token, got 5"),
    ):
        with pytest.raises(ValueError, match=message):
            processor(text=["abcdefgh"], text_target=target, **options)
    batch = processor(text=["abcdefgh"], text_target="abc", **limit)
    assert batch["input_ids"].shape == batch["labels"].shape == (1, 4)
    batch = processor(text=["abcde"], text_target="abc", pad_to_multiple_of=8)
    assert batch["input_ids"].shape == batch["labels"].shape == (1, 8)
    assert (batch["labels"] != -100).sum() == 4


@pytest.mark.parametrize("side", ["left", "right"])
def test_suffixes_are_padded_to_a_multiple(side):
    _, processor = presets.token_merge_vlm(image_size=28, audio_seconds=2, tokenizer=byte_tokenizer(padding_side=side))
    options = dict(text=["abc", "a"], suffix=["abc", "b"])
    batch, plain = processor(**options, pad_to_multiple_of=8), processor(**options)
    assert plain["labels"].shape == (2, 7)
    kept = slice(1, None) if side == "left" else slice(None, -1)
    for name, fill in (("input_ids", processor.tokenizer.pad_token_id), ("attention_mask", 0), ("labels", -100)):
        assert batch[name].shape == (2, 8)
        assert torch.equal(batch[name][:, kept], plain[name])
        assert (batch[name][:, 0 if side == "left" else -1] == fill).all()


def test_what_is_saved_hears_as_before(vlm, tmp_path):
    """Features to the bit, by mmlm-fast's extractor, also behind transformers' Auto class."""
    processor = vlm[1]
    processor.save_pretrained(tmp_path)
    clip = np.random.default_rng(0).standard_normal(16000).astype(np.float32)
    features = processor(text="<audio>", audio=clip, sampling_rate=16000)["input_features"]
    for again in (MMLMProcessor.from_pretrained(tmp_path), transformers.AutoProcessor.from_pretrained(tmp_path)):
        assert type(again.feature_extractor) is type(processor.feature_extractor)
        assert again.feature_extractor.to_dict() == processor.feature_extractor.to_dict()
        assert torch.equal(again(text="<audio>", audio=clip, sampling_rate=16000)["input_features"], features)


def test_pictures_without_texts(vlm):
    _, processor = presets.clip_contrastive(audio=True)
    assert set(processor(images=[PICTURE])) == {"pixel_values"}
    assert set(processor(audio=[CLIP], sampling_rate=16000)) == {"input_features"}
    for wrong in (dict(), dict(images=[PICTURE], suffix="a")):
        with pytest.raises(ValueError, match="text is required"):
            processor(**wrong)
    with pytest.raises(ValueError, match="text is required"):
        vlm[1](images=[PICTURE])


# Towers from checkpoints


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """Small models of the families that README names, with their tokenizer, image processor, feature extractor."""
    folder = tmp_path_factory.mktemp("towers")
    tokenizer = byte_tokenizer()
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    clip = transformers.CLIPConfig(
        text_config=sizes | {"vocab_size": len(tokenizer)}, vision_config=sizes | {"image_size": 32, "patch_size": 8}
    )
    transformers.CLIPModel(clip).save_pretrained(folder / "clip")
    transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        folder / "clip"
    )
    whisper = transformers.WhisperConfig(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=300, max_source_positions=100, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    transformers.WhisperModel(whisper).save_pretrained(folder / "whisper")
    transformers.WhisperFeatureExtractor(chunk_length=2).save_pretrained(folder / "whisper")
    plain = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>"
    )
    heads = dict(num_key_value_heads=2, head_dim=16)
    for name, kind, more in (("bert", "bert", {}), ("qwen", "qwen3", heads)):
        config = transformers.AutoConfig.for_model(kind, vocab_size=len(tokenizer), pad_token_id=0, **sizes, **more)
        transformers.AutoModel.from_config(config).save_pretrained(folder / name)
        plain.save_pretrained(folder / name)
    return folder


def test_processor_of_towers(towers, tmp_path):
    """Through one, pictures, sound and text reach their towers; saved and loaded; with `like` for what is missing."""
    sources = dict(text=str(towers / "bert"), image=str(towers / "clip"), audio=str(towers / "whisper"))
    model = MMLMForClassification.from_towers(**sources, fusion="attention", num_labels=3)
    processor = MMLMProcessor.from_towers(model, **sources)
    assert processor.tokenizer.padding_side == "right"
    batch = processor(text=["a text"], images=[PICTURE], audio=[CLIP], sampling_rate=16000)
    assert batch["pixel_values"].shape == (1, 3, 32, 32)
    expected = model.eval()(**batch).logits
    processor.save_pretrained(tmp_path)
    again = MMLMProcessor.from_pretrained(tmp_path)
    batch = again(text=["a text"], images=[PICTURE], audio=[CLIP], sampling_rate=16000)
    assert torch.equal(model(**batch).logits, expected)
    _, preset = presets.resnet_text_classifier(audio=True)
    with pytest.raises(ValueError, match="a tower for audio: name its checkpoint, or a processor as like"):
        MMLMProcessor.from_towers(model, **(sources | {"audio": None}))
    like = MMLMProcessor.from_towers(model, **(sources | {"audio": None}), like=preset)
    assert like.feature_extractor is preset.feature_extractor
    with pytest.raises(ValueError, match="a processor needs a tokenizer"):
        MMLMProcessor.from_towers(model, image=sources["image"])
    sources.pop("audio")
    model = MMLMForClassification.from_towers(**sources, fusion="concat").eval()
    model(**MMLMProcessor.from_towers(model, **sources)(text=["a text"], images=[PICTURE]))


def test_towers_that_merge(towers):
    """Placeholders are added to the text model's tokens, and a picture is as many of them as its tower makes."""
    sources = dict(text=str(towers / "qwen"), image=str(towers / "clip"), audio=str(towers / "whisper"))
    model = MMLMForConditionalGeneration.from_towers(**sources)
    processor = MMLMProcessor.from_towers(model, **sources)
    assert processor.tokenizer.padding_side == "left"
    assert (processor.image_seq_length, processor.audio_seq_length) == (17, 100)
    assert model.config.image_token_id == processor.image_token_id
    assert model.get_input_embeddings().weight.shape[0] >= len(processor.tokenizer)
    given = dict(images=[PICTURE], audio=[CLIP], sampling_rate=16000)
    batch = processor(text=["<image><audio>x"], suffix=["yes"], **given)
    model(**batch).loss.backward()
    model.eval().generate(**processor(text=["<image><audio>x"], **given), max_new_tokens=2)


# README


def snippets(heading):
    """Python snippets of a section."""
    section = README.partition(f"\n{heading}\n")[2]
    section = re.split(r"\n#{1,3} ", section)[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


def test_readmes_thin_model_runs_as_typed(towers):
    """But for the names of checkpoints, which need a download."""
    (code,) = snippets("## The thin model")
    names = {
        "google-bert/bert-base-chinese": "bert",
        "openai/clip-vit-base-patch32": "clip",
        "openai/whisper-tiny": "whisper",
    }
    for name, ours in names.items():
        assert name in code
        code = code.replace(name, str(towers / ours))
    variables = {"picture": PICTURE, "waveform": CLIP}
    exec(code, variables)
    assert variables["loss"].isfinite()
    assert variables["tokens"].shape[0] == 1


def test_readmes_training_runs_as_typed(tmp_path, monkeypatch, capsys):
    """But for the length of the training."""
    code, lit = snippets("### Training")
    code = code.replace('"output=runs/pairs"', '"output=runs/pairs", "training.max_steps=2", "data.eval_count=16"')
    assert "max_steps" in code
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert len(re.findall(r"^-?\d\.\d\d digits/pair/eval:\d+ ", capsys.readouterr().out, re.MULTILINE)) == 5
    compile(lit, "README.md", "exec")  # run in test_training_elsewhere.py


# Auto classes


@pytest.mark.parametrize("name", presets.PRESETS)
def test_auto_model_is_what_was_saved(name, tmp_path):
    from mmlm_fast import models

    torch.manual_seed(0)
    config, _ = presets.PRESETS[name].build()
    model = getattr(models, presets.PRESETS[name].model)(config)
    model.save_pretrained(tmp_path)
    loaded, info = transformers.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    headless = isinstance(model, MMLMForConditionalGeneration)
    assert type(loaded) is (models.MMLMModel if headless else type(model))
    expected = (model.model if headless else model).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())


def test_classes_that_the_weights_cannot_make_are_refused(tmp_path):
    config, _ = presets.clip_contrastive()
    from mmlm_fast.models import MMLMForContrastive

    MMLMForContrastive(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"by MMLMForContrastive, got MMLMForConditionalGeneration, of whose"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    fine_tuned = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert type(fine_tuned) is MMLMForClassification
    fresh = transformers.AutoModel.from_config(presets.token_merge_vlm()[0])
    assert type(fresh).__name__ == "MMLMModel"


def test_auto_classes_know_the_types_after_one_import(tmp_path):
    MMLMForClassification(presets.resnet_text_classifier()[0]).save_pretrained(tmp_path)
    code = (
        "import mmlm_fast.models, transformers; "
        f"print(type(transformers.AutoModel.from_pretrained({str(tmp_path)!r})).__name__)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "MMLMForClassification"
