"""Every preset: trains a few steps, is judged, saved, loaded, and gives fast what it gives in reference form."""

import copy

import pytest
import torch
import transformers
from transformers import AutoConfig, Trainer, TrainingArguments

from mmlm_fast import models, reference
from mmlm_fast.data import load_image
from mmlm_fast.models import presets
from mmlm_fast.models.configuration import (
    CLASSIFICATION_FUSIONS,
    DECODER_BASED_FUSIONS,
    ENCODER_FUSIONS,
    SEQ2SEQ_FUSIONS,
)
from mmlm_fast.testing import difference
from support.speech import WAVEFORMS

IMAGE = load_image()[0]
MIRRORED = IMAGE.transpose(0)
TEXTS = ["What is on the picture?", "今天天气很好", "Que dit la voix ?"]
SMALL = {
    "two_encoder_seq2seq": dict(image_size=32),
    "mmlm_basic": dict(image_size=32, hidden_size=64),
    "image_tokens": dict(codebook_size=16),
}
AUTO = {
    models.MMLMForClassification: transformers.AutoModelForSequenceClassification,
    models.MMLMForConditionalGeneration: transformers.AutoModelForImageTextToText,
    models.MMLMForContrastive: transformers.AutoModelForZeroShotImageClassification,
    models.MMLMForPreTraining: transformers.AutoModelForPreTraining,
    models.MMLMForSeq2SeqLM: transformers.AutoModelForSeq2SeqLM,
}
CASES = [(name, {}) for name in presets.PRESETS]
CASES += [("clip_contrastive", dict(audio=True, contrastive_loss="siglip"))]
CASES += [("resnet_text_classifier", dict(audio=True, fusion=f)) for f in ENCODER_FUSIONS]
CASES += [("transformer_encoder_decoder", dict(fusion=f)) for f in SEQ2SEQ_FUSIONS]
CASES += [("mmlm_basic", dict(fusion=f)) for f in SEQ2SEQ_FUSIONS]


@pytest.fixture(autouse=True)
def _quiet(native):
    transformers.logging.set_verbosity_error()


def build(name, **options):
    torch.manual_seed(0)
    preset = presets.PRESETS[name]
    config, processor = preset.build(**(SMALL.get(name, {}) | {"audio_seconds": 2} | options))
    model = getattr(models, preset.model)(config)
    for key, parameter in model.named_parameters():
        if key.endswith(("gate", "fuse.weight", "decide.weight", "modality_embeddings.weight")):
            torch.nn.init.normal_(parameter, std=0.3)
    return model, processor


def make_batch(model, processor, images=(IMAGE, None, MIRRORED), audio=(None, WAVEFORMS[0][:40000], WAVEFORMS[1])):
    """Samples with modalities missing here and there, several chunks of sound; with labels where there are some."""
    given = {}
    modalities = model.config.modalities
    if "image" in modalities:
        given["images"] = list(images)
    if "audio" in modalities:
        given |= {"audio": list(audio), "sampling_rate": 16000}
    texts = list(TEXTS[: len(images)])
    for token, name in (("<image>", "images"), ("<audio>", "audio")):
        if name in given and model.config.fusion == "merge":
            texts = [(token if x is not None else "") + t for t, x in zip(texts, given[name], strict=True)]
    batch = dict(processor(text=texts, **given))
    if isinstance(model, models.MMLMForClassification):
        batch["labels"] = torch.tensor([0, 1, 0])
    elif isinstance(model, (models.MMLMForSeq2SeqLM, models.MMLMForConditionalGeneration)):
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch


def doubled(batch):
    """In float64, where what should be equal is so to torch's default tolerance."""
    return {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}


def loss_logits_and_gradients(model, batch):
    torch.manual_seed(1)  # of what is hidden
    model.zero_grad()
    out = model(**batch)
    out.loss.backward()
    values = next((out[k] for k in ("logits", "text_embeds") if k in out), out.loss)
    return (
        out.loss.detach(),
        values.detach(),
        {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None},
    )


@pytest.mark.parametrize(
    ("name", "options"), CASES, ids=lambda x: x if isinstance(x, str) else "-".join(map(str, x.values()))
)
def test_fast_is_reference(name, options):
    """Outputs, and with them all gradients together, within the accuracy rule."""
    model, processor = build(name, **options)
    model.eval()
    batch = make_batch(model, processor)
    fast = loss_logits_and_gradients(model, batch)
    with reference():
        plain = loss_logits_and_gradients(model, batch)
        exact = loss_logits_and_gradients(copy.deepcopy(model).double(), doubled(batch))
    assert fast[0].isfinite()
    assert fast[2].keys() == plain[2].keys() == exact[2].keys()
    if fast[1].numel() >= 64:  # of a loss or of six logits alone, whose rounding is smaller is luck
        assert difference(fast[1], plain[1], exact[1]).ok
    flat = [
        torch.cat([outputs[1].flatten(), *(outputs[2][n].flatten() for n in fast[2])])
        for outputs in (fast, plain, exact)
    ]
    assert difference(*flat).ok


@pytest.mark.parametrize("name", presets.PRESETS)
def test_every_trained_parameter_has_a_gradient(name):
    """DDP refuses models that have others."""
    model, processor = build(name)
    gradients = loss_logits_and_gradients(model.eval(), make_batch(model, processor))[2]
    unused = [n for n, p in model.named_parameters() if p.requires_grad and n not in gradients]
    assert not unused, unused


# Of each kind of decoder or head one; the others are in the slow set.
USUAL = ("token_merge_vlm", "two_encoder_seq2seq", "resnet_text_classifier", "joint_pretrain")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in USUAL else pytest.mark.slow) for n in presets.PRESETS]
)
def test_trains_saves_and_loads(name, tmp_path):
    """A few steps of Trainer lower the loss of the samples seen; what is loaded gives the same bits."""
    model, processor = build(name)
    batch = make_batch(model, processor)
    before = loss_logits_and_gradients(model.eval(), batch)[0]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=1, max_steps=10, learning_rate=2e-3, report_to=[],
        use_cpu=True, save_strategy="no", disable_tqdm=True, seed=0, remove_unused_columns=False,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=[0] * 10, data_collator=lambda rows: dict(batch))
    trainer.train()
    after = loss_logits_and_gradients(model.eval(), batch)[0]
    assert after < 0.9 * before, (before, after)
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    assert not list((tmp_path / "saved").glob("*.bin"))
    again = AUTO[type(model)].from_pretrained(tmp_path / "saved").eval()
    assert type(again) is type(model)
    assert type(AutoConfig.from_pretrained(tmp_path / "saved")) is models.MMLMConfig
    assert again.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(loss_logits_and_gradients(again, batch)[1], loss_logits_and_gradients(model, batch)[1])
    reloaded = models.MMLMProcessor.from_pretrained(tmp_path / "saved")
    assert make_batch(again, reloaded)["input_ids"].equal(batch["input_ids"])


GENERATING = [n for n, p in presets.PRESETS.items() if hasattr(getattr(models, p.model), "generate")]


@pytest.mark.parametrize("name", GENERATING)
def test_generate(name):
    """Greedy with and without cache, static cache, beams, sampling; a batch as its samples alone."""
    model, processor = build(name)
    model.eval()
    batch = {k: v for k, v in make_batch(model, processor).items() if k != "labels"}
    options = dict(max_new_tokens=6, do_sample=False)
    greedy = model.generate(**batch, **options)
    with reference():
        assert torch.equal(model.generate(**batch, **options), greedy)
    assert torch.equal(model.generate(**batch, **options, use_cache=False), greedy)
    assert torch.equal(model.generate(**batch, **options, cache_implementation="static"), greedy)
    beams = model.generate(**batch, max_new_tokens=6, num_beams=3, use_cache=True)
    assert torch.equal(model.generate(**batch, max_new_tokens=6, num_beams=3, use_cache=False), beams)
    assert model.generate(**batch, max_new_tokens=3, do_sample=True, num_return_sequences=2).shape[0] == 6


@pytest.mark.parametrize("name", [n for n in GENERATING if n != "image_tokens"])
def test_generate_streams(name):
    model, processor = build(name)
    model.eval()
    batch = make_batch(model, processor, images=(IMAGE,), audio=(WAVEFORMS[0],))
    batch.pop("labels")
    seen = []

    class Streamer(transformers.generation.streamers.BaseStreamer):
        def put(self, value):
            seen.append(value)

        def end(self):
            seen.append(None)

    generated = model.generate(**batch, max_new_tokens=5, do_sample=False, streamer=Streamer())
    assert seen[-1] is None
    streamed = torch.cat([x.flatten() for x in seen[:-1]])
    assert torch.equal(streamed, generated.flatten())


@pytest.mark.parametrize("fusion", CLASSIFICATION_FUSIONS)
def test_classifier_honours_what_is_missing(fusion):
    """Alone as in a batch; fillers may hold anything; every modality counts where it is there, and only there."""
    torch.manual_seed(0)
    if fusion in DECODER_BASED_FUSIONS:
        config, processor = presets.token_merge_vlm(fusion, audio_seconds=2, num_labels=5)
        model = models.MMLMForClassification(config)
        for key, parameter in model.named_parameters():
            if key.endswith("gate"):
                torch.nn.init.normal_(parameter, std=0.3)
    else:
        model, processor = build("resnet_text_classifier", audio=True, fusion=fusion, num_labels=5)
    model.eval().double()
    images, audio = (IMAGE, None, None), (None, WAVEFORMS[0][:20000], None)
    batch = doubled(make_batch(model, processor, images, audio))
    batch.pop("labels")
    with torch.no_grad():
        together = model(**batch).logits
        for i in range(3):
            texts = [
                ("<image>" if images[i] is not None and fusion == "merge" else "")
                + ("<audio>" if audio[i] is not None and fusion == "merge" else "")
                + TEXTS[i]
            ]
            given = {"images": [images[i]]} if images[i] is not None else {}
            given |= {"audio": [audio[i]], "sampling_rate": 16000} if audio[i] is not None else {}
            alone = doubled(processor(text=texts, **given))
            torch.testing.assert_close(model(**alone).logits[0], together[i])
        if fusion != "merge":
            batch["pixel_values"][1:] = torch.nan
            batch["input_features"][[0, 2]] = 9.0
            torch.testing.assert_close(model(**batch).logits, together)
        if fusion == "late_vote":
            return  # another picture may get the same vote
        other = doubled(make_batch(model, processor, (MIRRORED, None, None), audio))
        other.pop("labels")
        changed = (model(**other).logits - together).abs().amax(1) > 1e-6
        assert changed.tolist() == [True, False, False]


@pytest.mark.parametrize("fusion", ["mean", "weighted", "attention", "late_weighted"])
def test_fusion_weights_say_who_counts(fusion):
    model, processor = build("resnet_text_classifier", audio=True, fusion=fusion)
    out = model.eval()(**make_batch(model, processor))
    present = torch.tensor([[1, 1, 0], [1, 0, 1], [1, 1, 1]]).bool()
    assert (out.fusion_weights[~present] == 0).all()
    assert (out.fusion_weights[present] > 0).all()
    if fusion != "mean":
        torch.testing.assert_close(out.fusion_weights.sum(1), torch.ones(3))


def test_late_fusion_is_of_probabilities():
    model, processor = build("resnet_text_classifier", audio=True, fusion="late_mean")
    batch = make_batch(model, processor)
    out = model.eval()(**batch)
    each = out.modality_logits.softmax(-1)
    present = torch.tensor([[1, 1, 0], [1, 0, 1], [1, 1, 1]]).bool()
    mean = torch.where(present[..., None], each, 0).sum(1) / present.sum(1, keepdim=True)
    torch.testing.assert_close(out.logits.softmax(-1), mean)
    errors = torch.stack(
        [
            torch.nn.functional.cross_entropy(out.modality_logits[:, i], batch["labels"], reduction="none")
            for i in range(3)
        ],
        1,
    )
    torch.testing.assert_close(out.loss, errors[present].mean())


def test_several_labels_and_numbers():
    model, processor = build("resnet_text_classifier", num_labels=3, problem_type="multi_label_classification")
    batch = make_batch(model, processor) | {"labels": torch.tensor([[0, 1, 1], [1, 0, 0], [0, 0, 0]])}
    out = model.eval()(**batch)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(out.logits, batch["labels"].float())
    torch.testing.assert_close(out.loss, expected)
    model, processor = build("resnet_text_classifier", num_labels=1, problem_type="regression")
    batch = make_batch(model, processor) | {"labels": torch.tensor([0.5, -1.0, 2.0])}
    out = model.eval()(**batch)
    torch.testing.assert_close(out.loss, (out.logits[:, 0] - batch["labels"]).square().mean())
    with pytest.raises(ValueError, match="late fusion is for single_label"):
        build("resnet_text_classifier", fusion="late_mean", problem_type="regression")


def test_labels_out_of_range_name_the_row():
    model, processor = build("resnet_text_classifier", num_labels=2)
    batch = make_batch(model, processor) | {"labels": torch.tensor([0, 1, 2])}
    with pytest.raises(ValueError, match="labels must be from 0 to 1, got 2 in row 2"):
        model(**batch)


def test_modalities_without_text():
    model, processor = build("resnet_text_classifier", audio=True, modalities=["image", "audio"])
    assert not hasattr(model.model, "text_tower")
    batch = make_batch(model, processor)
    logits = model.eval()(**batch).logits
    batch["input_ids"] = batch["input_ids"].flip(1)
    assert torch.equal(model(**batch).logits, logits)
    with pytest.raises(ValueError, match="pass at least one of image, audio"):
        model(input_ids=batch["input_ids"])


def test_contrastive_is_the_formula_and_matches():
    model, processor = build("clip_contrastive", audio=True)
    images, audio = (
        (IMAGE, MIRRORED, IMAGE.rotate(90)),
        (WAVEFORMS[0][:20000], WAVEFORMS[1][:20000], WAVEFORMS[2][:20000]),
    )
    batch = make_batch(model, processor, images, audio)
    out = model.eval()(**batch)
    labels = torch.arange(3)
    losses = []
    for logits in (out.logits_per_image, out.logits_per_audio):
        losses.append(
            (torch.nn.functional.cross_entropy(logits, labels) + torch.nn.functional.cross_entropy(logits.T, labels))
            / 2
        )
    torch.testing.assert_close(out.loss, sum(losses) / 2)
    for embeds in (out.text_embeds, out.image_embeds, out.audio_embeds):
        torch.testing.assert_close(embeds.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(model.get_text_features(batch["input_ids"], batch["attention_mask"]), out.text_embeds)
    torch.testing.assert_close(model.get_image_features(batch["pixel_values"]), out.image_embeds)
    torch.testing.assert_close(model.get_audio_features(batch["input_features"]), out.audio_embeds)
    torch.testing.assert_close(model.match("image", out.image_embeds, out.text_embeds), out.logits_per_image.softmax(1))
    # the same caption twice: both are right
    twice = model(**batch, positive_ids=torch.tensor([0, 0, 1])).loss
    assert not torch.allclose(twice, out.loss)


def test_seq2seq_attends_to_what_is_there():
    """A memory without fillers: a sample alone gives what it gives in a batch with longer ones."""
    model, processor = build("transformer_encoder_decoder", fusion="cross_attention")
    batch = doubled(make_batch(model, processor))
    labels = batch.pop("labels")[:, :4].clamp(min=7)
    together = model.eval().double()(**batch, labels=labels).logits
    alone = doubled(processor(text=TEXTS[:1], images=[IMAGE]))
    torch.testing.assert_close(model(**alone, labels=labels[:1]).logits[0], together[0])


def test_pretrained_encoders_go_on(tmp_path):
    """Masked words, hidden patches and stretches, alignment; then a classifier takes the encoders on, bit by bit."""
    model, processor = build("joint_pretrain")
    out = model(**make_batch(model, processor))
    parts = (out.language_modeling_loss, out.contrastive_loss, out.reconstruction_loss)
    torch.testing.assert_close(out.loss, sum(parts))
    assert all(p > 0 for p in parts)
    model.save_pretrained(tmp_path)
    classifier = models.MMLMForClassification.from_pretrained(tmp_path, num_labels=4)
    theirs = dict(model.model.named_parameters())
    ours = dict(classifier.model.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(p, theirs[n]) for n, p in ours.items())
    for layer in (m for m in classifier.classifier.modules() if isinstance(m, torch.nn.Linear)):
        for parameter in (layer.weight, layer.bias):  # drawn as torch draws, not left empty
            assert 0 < parameter.abs().max() <= layer.in_features**-0.5
    assert classifier(**make_batch(classifier, processor)).logits.shape == (3, 4)


def test_masked_language_modelling_hides_what_it_asks_for(monkeypatch):
    model, processor = build("joint_pretrain", contrastive_weight=0.0, reconstruction_weight=0.0, text_mask_ratio=0.8)
    batch = make_batch(model, processor)
    batch["attention_mask"][:, -3:] = 0  # real tokens that nobody sees
    seen = {}
    monkeypatch.setattr(
        model.model,
        "encode_text",
        lambda ids, mask: seen.update(ids=ids) or type(model.model).encode_text(model.model, ids, mask),
    )
    torch.manual_seed(3)
    loss = model.eval()(**batch).loss
    hidden = seen["ids"] != batch["input_ids"]
    assert hidden.any()
    assert (seen["ids"][hidden] == model.config.mask_token_id).all()
    assert not hidden[batch["attention_mask"] == 0].any()
    states = model.model.encode_text(seen["ids"], batch["attention_mask"]).states
    expected = torch.nn.functional.cross_entropy(model.lm_head(states[hidden]), batch["input_ids"][hidden])
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("fusion", ["concat", "attention", "gated", "sequence", "late_mean"])
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_text_may_be_missing_too(fusion, pooling):
    """A row of nothing but padding is a sample without text: what it gives without any."""
    model, processor = build("resnet_text_classifier", fusion=fusion, pooling=pooling, hidden_size=64)
    model.eval().double()
    ids = doubled(processor(text=["", "a longer text"], images=[IMAGE, MIRRORED]))
    assert ids["attention_mask"].sum(1).tolist()[0] == 0
    with torch.no_grad():
        together = model(**ids).logits
        torch.testing.assert_close(model(pixel_values=ids["pixel_values"][:1]).logits[0], together[0])
