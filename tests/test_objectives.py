"""The joint loss of the thin model."""

import pytest
import torch
import torch.nn.functional as F
from test_models import IMAGE, SPEECH, make_batch
from transformers import Trainer, TrainingArguments

from mmlm_fast import reference
from mmlm_fast.models import MMLMForConditionalGeneration, presets
from mmlm_fast.models.objectives import pooled_by_sample
from mmlm_fast.testing import difference

JOINT = dict(language_modeling_weight=0.7, contrastive_weight=0.5, reconstruction_weight=0.25, projection_dim=32)


def build(fusion="merge", **options):
    torch.manual_seed(0)
    config, processor = presets.token_merge_vlm(fusion, **options)
    return MMLMForConditionalGeneration(config).train(), processor


@pytest.mark.parametrize("fusion", ["merge", "concat", "gated"])
@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_weighted_sum_of_parts(fusion, loss):
    model, processor = build(fusion, contrastive_loss=loss, **JOINT)
    batch = make_batch(processor)
    out = model(**batch, labels=batch["input_ids"])
    parts = (out.language_modeling_loss, out.contrastive_loss, out.reconstruction_loss)
    assert all(p.isfinite() and p > 0 for p in parts)
    torch.testing.assert_close(out.loss, 0.7 * parts[0] + 0.5 * parts[1] + 0.25 * parts[2])
    out.loss.backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    never = ("position", "k_proj.bias", "embed_positions", "vision_tower.head", "logit", "pooler", "post_layernorm")
    assert not [n for n in missing if not any(part in n for part in never)], missing


def test_without_weights_nothing_is_built_or_computed():
    model, processor = build()
    assert not [n for n, _ in model.named_parameters() if "alignment" in n or "reconstruction" in n]
    batch = make_batch(processor)
    out = model(**batch, labels=batch["input_ids"])
    assert out.loss.equal(out.language_modeling_loss)
    assert out.contrastive_loss is None
    assert out.reconstruction_loss is None
    assert model(**batch).loss is None


def test_alignment_is_the_formula():
    model, processor = build(contrastive_weight=1.0, projection_dim=16)
    batch = make_batch(processor)
    out = model.eval()(**batch, labels=batch["input_ids"])
    head = model.alignment
    text = F.normalize(
        head.text_projection(model.model.text_features(batch["input_ids"], batch["attention_mask"])), dim=1
    )
    expected = []
    features = {
        "image": model.get_image_features(batch["pixel_values"]).pooler_output,
        "audio": model.get_audio_features(batch["input_features"]).pooler_output,
    }
    for modality, tokens in features.items():
        other = F.normalize(head.projections[modality](tokens.mean(1)), dim=1)
        logits = other @ text.T / 0.07
        labels = torch.arange(2)
        expected.append((F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2)
    torch.testing.assert_close(out.contrastive_loss, sum(expected) / 2)


def test_text_features_see_only_text():
    """Whatever stands for pictures and sound changes nothing; a token of text does."""
    model, processor = build(contrastive_weight=1.0)
    batch = make_batch(processor)
    ids, table = batch["input_ids"], model.eval().get_input_embeddings().weight
    before = model.model.text_features(ids, batch["attention_mask"])
    with torch.no_grad():
        table[[model.config.image_token_id, model.config.audio_token_id]] += 5
    assert model.model.text_features(ids, batch["attention_mask"]).equal(before)
    with torch.no_grad():
        table[ids[0, -1]] += 5
    assert not model.model.text_features(ids, batch["attention_mask"])[0].equal(before[0])


def test_pooled_by_sample():
    tokens = torch.tensor([[1, 1, 0, 1, 1], [0, 0, 0, 0, 0], [0, 1, 1, 0, 0]]).bool()
    features = torch.arange(12.0).view(3, 2, 2)
    pooled, present = pooled_by_sample(features, tokens)
    means = features.mean(1)
    assert pooled.equal(torch.stack([means[:2].mean(0), torch.zeros(2), means[2]]))
    assert present.tolist() == [True, False, True]


def test_what_is_hidden_is_not_seen(monkeypatch):
    model, processor = build(reconstruction_weight=1.0, language_modeling_weight=0.0)
    head, batch = model.reconstruction, make_batch(processor)
    masks = {}

    def draw(like):
        masks[like.dim()] = torch.rand(like.shape, generator=torch.Generator().manual_seed(1)) < 0.5
        return masks[like.dim()]

    monkeypatch.setattr(head, "_draw", draw)
    seen = {}
    model.model.vision_tower.register_forward_pre_hook(lambda m, args: seen.update(image=args[0]))
    model.model.audio_tower.register_forward_pre_hook(lambda m, args: seen.update(audio=args[0]))
    image_error = head.images(model.model.vision_tower, batch["pixel_values"])
    audio_error = head.audio(model.model.audio_tower, batch["input_features"])
    patches = F.unfold(seen["image"], 14, stride=14).mT  # [N, patches, C·size²]
    hidden = masks[3].flatten(1)
    assert (patches[hidden] == 0).all()
    assert (patches[~hidden] != 0).any(-1).all()
    stretches = seen["audio"].mT.unflatten(1, (-1, 4)).flatten(2)
    assert (stretches[masks[2]] == 0).all()
    assert stretches[~masks[2]].equal(batch["input_features"].mT.unflatten(1, (-1, 4)).flatten(2)[~masks[2]])
    # the error is over the hidden ones alone: with a head that says nothing, their mean square
    for layer in (head.image_head, head.audio_head):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    image_error = head.images(model.model.vision_tower, batch["pixel_values"])
    audio_error = head.audio(model.model.audio_tower, batch["input_features"])
    original = F.unfold(batch["pixel_values"], 14, stride=14).mT
    torch.testing.assert_close(image_error, original[hidden].square().mean())
    clips = batch["input_features"].mT.unflatten(1, (-1, 4)).flatten(2)
    torch.testing.assert_close(audio_error, clips[masks[2]].square().mean())


@pytest.mark.parametrize("fusion", ["merge", "mean"])
def test_missing_modalities(fusion):
    model, processor = build(fusion, **JOINT)
    batch = make_batch(processor, images=(IMAGE, None), audio=(None, SPEECH[1]))
    out = model(**batch, labels=batch["input_ids"])
    assert out.loss.isfinite()
    assert out.contrastive_loss == 0  # one pair of each kind: nothing to tell apart
    only_text = dict(make_batch(processor, images=(None, None), audio=(None, None)).items())
    out = model(**only_text, labels=only_text["input_ids"])
    assert out.contrastive_loss == 0
    assert out.reconstruction_loss == 0
    out.loss.backward()


def test_without_language_modelling_no_labels_are_needed():
    model, processor = build(contrastive_weight=1.0, reconstruction_weight=1.0, language_modeling_weight=0.0)
    batch = make_batch(processor)
    out = model(**batch)
    torch.testing.assert_close(out.loss, out.contrastive_loss + out.reconstruction_loss)
    assert out.language_modeling_loss is None
    assert model.eval()(**batch).loss is None
    assert not model.accepts_loss_kwargs


def test_fast_is_reference(native):
    model, processor = build(**JOINT)
    batch = make_batch(processor)

    def run():
        torch.manual_seed(1)  # of the masks
        model.zero_grad()
        out = model(**batch, labels=batch["input_ids"])
        out.loss.backward()
        return out.loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    fast = run()
    with reference():
        expected = run()
    model.double()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    exact = run()
    assert difference(fast[0], expected[0], exact[0]).ok
    ours, theirs, truth = (
        torch.cat([outputs[1][n].flatten() for n in exact[1]]) for outputs in (fast, expected, exact)
    )
    assert difference(ours, theirs, truth).ok


def test_trainer_learns_all_parts_and_saves(tmp_path):
    model, processor = build(**JOINT)
    batch = make_batch(processor)
    rows = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(2)]
    data = [row | {"labels": row["input_ids"]} for row in rows] * 8

    def collate(samples):
        return {k: torch.cat([s[k] for s in samples]) for k in samples[0]}

    def parts():
        torch.manual_seed(2)
        with torch.no_grad():
            out = model.eval()(**batch, labels=batch["input_ids"])
        return torch.stack([out.language_modeling_loss, out.contrastive_loss, out.reconstruction_loss])

    before = parts()
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=2, max_steps=16, learning_rate=2e-3, use_cpu=True,
        report_to=[], save_strategy="no", disable_tqdm=True, seed=0,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=data, data_collator=collate).train()
    after = parts()
    assert (after < 0.9 * before).all(), (before, after)
    model.save_pretrained(tmp_path)
    loaded = MMLMForConditionalGeneration.from_pretrained(tmp_path).eval()
    torch.manual_seed(2)
    with torch.no_grad():
        again = loaded(**batch, labels=batch["input_ids"]).loss
        torch.manual_seed(2)
        assert again.equal(model(**batch, labels=batch["input_ids"]).loss)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(contrastive_weight=-1.0), "weights of the loss must be at least 0 and not all 0, got"),
        (dict(language_modeling_weight=0.0), "not all 0"),
        (dict(contrastive_loss="triplet"), "contrastive_loss must be clip or siglip, got 'triplet'"),
        (dict(mask_ratio=1.0), "mask_ratio must be between 0 and 1, got 1.0"),
        (dict(projection_dim=0), "must be at least 1, got 0 and 4"),
    ],
)
def test_config_errors(options, message):
    with pytest.raises(ValueError, match=message):
        presets.token_merge_vlm(**options)


def test_model_errors():
    model, processor = build(audio_frames_per_token=2, **JOINT)
    batch = make_batch(processor)
    with pytest.raises(ValueError, match="audio_frames_per_token must be 4, got 2"):
        model(**batch, labels=batch["input_ids"])
    model, _ = build("mean", contrastive_weight=1.0)
    embeds = model.get_input_embeddings()(batch["input_ids"])
    with pytest.raises(ValueError, match="the contrastive loss needs input_ids"):
        model(inputs_embeds=embeds, labels=batch["input_ids"])
