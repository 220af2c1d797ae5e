"""The heads of transformers' models: the same loss and gradients, without logits."""

import copy

import pytest
import torch
import transformers
from torch import nn

import mmlm_fast
from mmlm_fast.nn import LazyLinear, LazyLogits
from mmlm_fast.nn import lazy_logits as module
from mmlm_fast.testing import difference
from support import tiny_models

DECODERS = ("llava", "gemma3", "paligemma", "qwen2_5_vl", "qwen3_vl", "mllama", "whisper")


@pytest.fixture
def computed(monkeypatch, native):
    """How often logits were computed, and how often the loss did without."""
    counts = {"logits": 0, "loss": 0}
    original, loss = LazyLogits.logits, module.linear_cross_entropy

    def count_logits(self):
        counts["logits"] += self._computed is None
        return original(self)

    def count_losses(*args, **kwargs):
        counts["loss"] += 1
        return loss(*args, **kwargs)

    monkeypatch.setattr(LazyLogits, "logits", count_logits)
    monkeypatch.setattr(module, "linear_cross_entropy", count_losses)
    monkeypatch.setattr(module, "_is_few", lambda *_: False)
    return counts


HEAD = ["language-model head"]


def accelerate(model, counts):
    done = mmlm_fast.accelerate(model, only=HEAD)
    assert [r.name for r in done.replaced] == ["Linear"]
    counts["loss"] = 0  # those of the proof
    return done


def step(model, inputs, labels, **keywords):
    model.train()
    model.zero_grad()
    torch.manual_seed(0)
    out = model(**inputs, labels=labels, **keywords)
    out.loss.backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_errs_no_more(tiny, labels, grads, expected):
    """The accuracy rule over all gradients together, against the original in float64."""
    exact = tiny.build("sdpa", torch.float64)  # eager attention's softmax is float32 in float64 models too
    _, exact_grads = step(
        exact, {k: v.double() if v.is_floating_point() else v for k, v in tiny.inputs.items()}, labels
    )
    assert grads.keys() == expected.keys() == exact_grads.keys()
    ours, theirs, truth = (torch.cat([g[k].flatten() for k in grads]) for g in (grads, expected, exact_grads))
    found = difference(ours, theirs, truth)
    assert found.ok, found


@pytest.mark.parametrize("name", DECODERS)
def test_same_loss_and_gradients(name, computed):
    tiny = tiny_models.MODELS[name]()
    model = tiny.build("eager")
    inputs = dict(tiny.inputs)
    labels = inputs.get("input_ids", inputs.get("decoder_input_ids")).clone()
    labels[:, :3] = -100
    expected, expected_grads = step(model, inputs, labels)
    keys = list(model.state_dict())
    done = accelerate(model, computed)
    assert type(model.get_output_embeddings()) is LazyLinear
    assert list(model.state_dict()) == keys
    out, grads = step(model, inputs, labels)
    assert computed == {"logits": 0, "loss": 1}
    torch.testing.assert_close(out.loss, expected.loss)
    assert_errs_no_more(tiny, labels, grads, expected_grads)
    # asked for, logits are there, and themselves
    torch.testing.assert_close(out.logits + 0, expected.logits)
    assert out.logits.shape == expected.logits.shape
    assert out.logits.argmax(-1).equal(expected.logits.argmax(-1))
    assert computed["logits"] == 1
    # inference has plain logits
    with torch.no_grad():
        assert type(model.eval()(**inputs).logits) is torch.Tensor
    done.undo()
    again, again_grads = step(model, inputs, labels)
    assert again.loss.equal(expected.loss)
    assert all(g.equal(expected_grads[k]) for k, g in again_grads.items())


def test_soft_cap(computed):
    tiny = tiny_models.gemma3()
    tiny.config.text_config.final_logit_softcapping = 3.0
    model, labels = tiny.build("eager"), tiny.inputs["input_ids"]
    expected, grads = step(model, tiny.inputs, labels)
    accelerate(model, computed)
    out, ours = step(model, tiny.inputs, labels)
    assert computed == {"logits": 0, "loss": 1}
    torch.testing.assert_close(out.loss, expected.loss)
    assert_errs_no_more(tiny, labels, ours, grads)


def test_num_items_in_batch_and_all_ignored(computed):
    tiny = tiny_models.llava()
    model, labels = tiny.build("eager"), tiny.inputs["input_ids"].clone()
    expected, _ = step(model, tiny.inputs, labels, num_items_in_batch=torch.tensor(50))
    accelerate(model, computed)
    out, _ = step(model, tiny.inputs, labels, num_items_in_batch=torch.tensor(50))
    torch.testing.assert_close(out.loss, expected.loss)
    out, grads = step(model, tiny.inputs, torch.full_like(labels, -100))
    assert out.loss.isnan()  # the original's mean over nothing
    assert all((g == 0).all() for g in grads.values())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_in_bfloat16(checkpointing, computed, tmp_path):
    """Autocast, accumulation of gradients, checkpointing; the history is the original's."""
    tiny = tiny_models.llava()
    images = tiny.inputs["pixel_values"].shape[0] // 2
    rows = [
        {k: v[i : i + 1] if k != "pixel_values" else v[i * images : (i + 1) * images] for k, v in tiny.inputs.items()}
        for i in range(2)
    ]
    data = [row | {"labels": row["input_ids"].clone()} for row in rows * 4]

    def collate(samples):
        return {key: torch.cat([s[key] for s in samples]) for key in samples[0]}

    histories = []
    for fast in (False, True):
        model = tiny.build("eager")
        if fast:
            accelerate(model, computed)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=3,
            bf16=True, use_cpu=True, learning_rate=1e-3, logging_steps=1, report_to=[], save_strategy="no", seed=0,
            gradient_checkpointing=checkpointing, disable_tqdm=True, data_seed=0,
        )  # fmt: skip
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data, data_collator=collate)
        trainer.train()
        histories.append(torch.tensor([h["loss"] for h in trainer.state.log_history if "loss" in h]))
    assert computed["logits"] == 0
    assert computed["loss"] == 6
    torch.testing.assert_close(*histories, rtol=torch.finfo(torch.bfloat16).eps, atol=0)


@pytest.mark.slow
def test_a_real_whisper_on_real_speech(computed):
    """51,864 classes, tied to the embedding: the loss of the words it writes, and what it would learn from them."""
    from mmlm_fast.audio import WhisperFeatureExtractor
    from support import real_whisper, speech

    speech.need_recordings()

    model, _ = real_whisper.load()
    clip = speech.WAVEFORMS[0]
    features = WhisperFeatureExtractor()(clip, sampling_rate=16000, return_tensors="pt").input_features
    with torch.no_grad():
        labels = model.eval().generate(features)
    inputs = {"input_features": features}
    expected, expected_grads = step(model, inputs, labels)
    done = accelerate(model, computed)
    out, grads = step(model, inputs, labels)
    assert computed == {"logits": 0, "loss": 1}
    done.undo()
    model = model.double()
    exact, exact_grads = step(model, {"input_features": features.double()}, labels)
    assert difference(out.loss, expected.loss, exact.loss).ok
    assert grads.keys() == expected_grads.keys() == exact_grads.keys()
    ours, theirs, truth = (torch.cat([g[k].flatten() for k in grads]) for g in (grads, expected_grads, exact_grads))
    assert difference(ours, theirs, truth).ok


def test_refusals():
    model = tiny_models.llava().build("eager")

    class Own(nn.Linear):
        def forward(self, input):
            return super().forward(input) + 1

    plain = model.lm_head
    model.lm_head.__class__ = Own
    refused = mmlm_fast.accelerate(model, only=HEAD, strict=False).refused
    assert "not a plain nn.Linear" in refused[0].reason
    plain.__class__ = nn.Linear
    assert mmlm_fast.accelerate(model, exclude=["Linear"]).refused[0].reason == "left out by only or exclude"
    assert mmlm_fast.accelerate(model, only=HEAD).replaced
    assert mmlm_fast.accelerate(model, only=HEAD).refused[0].reason == "accelerated already"
    encoder = tiny_models.siglip().build("eager")
    assert not [r for r in mmlm_fast.accelerate(encoder).replaced if r.kind in HEAD]


def test_a_wrong_head_is_refused(monkeypatch):
    loss = module.linear_cross_entropy
    monkeypatch.setattr(module, "linear_cross_entropy", lambda *a, **k: loss(*a, **k) * 1.001)
    model = tiny_models.llava().build("eager")
    assert "loss errs by" in mmlm_fast.accelerate(model).refused[0].reason
    assert type(model.lm_head) is nn.Linear


def test_copies_and_half_precision(computed):
    model = tiny_models.llava().build("eager", torch.bfloat16)
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in tiny_models.llava().inputs.items()}
    expected, _ = step(model, inputs, inputs["input_ids"])
    accelerate(model, computed)
    twin = copy.deepcopy(model)
    out, _ = step(twin, inputs, inputs["input_ids"])
    assert computed["logits"] == 0
    torch.testing.assert_close(out.loss, expected.loss, rtol=torch.finfo(torch.bfloat16).eps, atol=0)
