"""What a trained model is worth: metrics, intervals, controls, retrieval."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers

from mmlm_fast.models import MMLMForClassification, MMLMForContrastive, presets
from mmlm_fast.training import Collator, controls, evaluate, metrics, shuffled
from mmlm_fast.training.builtin import digits
from support.training import LABELS


@pytest.fixture(autouse=True)
def _quiet():
    transformers.logging.set_verbosity_error()


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
    values, hits = metrics.retrieval(similarity, np.eye(3, dtype=bool))
    assert hits.tolist() == [1, 0, 0]  # the last is a tie, which counts against
    assert values["recall_at_1"] == pytest.approx(1 / 3)
    assert values["recall_at_5"] == 1
    assert values["chance_at_1"] == pytest.approx(1 / 3)
    pairs = [(p, n) for p in np.diag(similarity) for n in similarity[~np.eye(3, dtype=bool)]]
    assert values["matching_auc"] == pytest.approx(np.mean([(p > n) + 0.5 * (p == n) for p, n in pairs]))
    with pytest.raises(ValueError, match="every query needs a right candidate"):
        metrics.retrieval(similarity, np.zeros((3, 3), bool))


def test_classification_metrics():
    values = metrics.classification([0, 0, 1, 1], [0, 1, 1, 1], ["cat", "dog"])
    assert values["accuracy"] == 0.75
    assert values["macro_f1"] == pytest.approx((2 / 3 + 0.8) / 2)
    assert "cat" in values["classification_report"]


def test_interval_covers_as_often_as_it_says():
    """Of 200 draws of 100 coin tosses, about 95 % of the intervals hold the truth."""
    rng = np.random.default_rng(0)
    held = [low <= 0.3 <= high for low, high in (metrics.interval(rng.random(100) < 0.3) for _ in range(200))]
    assert 0.9 <= np.mean(held) <= 0.99
    assert metrics.interval(np.ones(5)) == (1.0, 1.0)


def test_shuffled_keeps_all_but_one_modality():
    samples = digits("question", "eval", count=20)
    for modality, field in (("text", "text"), ("image", "images"), ("audio", "audio")):
        changed = shuffled(samples, modality)
        for one, other in zip(samples, changed, strict=True):
            for name in ("text", "images", "audio", "label"):
                assert (getattr(one, name) is getattr(other, name)) == (name != field) or name == "text" == field
        values = [getattr(s, field) for s in samples]
        assert sorted(map(id, values)) == sorted(id(getattr(s, field)) for s in changed)
        assert all(id(values[i]) != id(getattr(s, field)) or field == "text" for i, s in enumerate(changed))
    with pytest.raises(ValueError, match="modality must be text, image or audio"):
        shuffled(samples, "smell")


def test_evaluation_is_reproducible_and_leaves_the_model_alone():
    config, processor = presets.resnet_text_classifier(image_size=32, audio=True, audio_seconds=2)
    model = MMLMForClassification(config).train()
    collate = Collator("classification", model, processor, labels=LABELS, augment=["noise", "speed"])
    samples = digits("question", "eval", count=24)
    one, two = (evaluate(model, collate, samples, seed=3, batch_size=8, progress=False) for _ in range(2))
    assert one.metrics == two.metrics
    assert model.training
    plain = Collator("classification", model, processor, labels=LABELS)
    said = evaluate(model, plain, samples, batch_size=24, progress=False).predictions
    with torch.no_grad():  # without dropout, and with the averages of batch norm
        expected = model.eval()(**plain(samples)).logits.argmax(-1).tolist()
    assert said == [LABELS[i] for i in expected]


def test_retrieval_of_samples_that_lack_modalities():
    """Also in the control, where another sample may lack it."""
    torch.manual_seed(0)
    config, processor = presets.clip_contrastive(image_size=28, audio=True, audio_seconds=2)
    collate = Collator("retrieval", model := MMLMForContrastive(config), processor)
    samples = digits("pair", "eval", count=12)
    samples = [
        replace(s, images=() if i % 3 == 0 else s.images, audio=() if i % 2 else s.audio) for i, s in enumerate(samples)
    ]
    samples[9] = replace(samples[9], audio=())  # neither
    intact = evaluate(model, collate, samples, batch_size=5, progress=False)
    assert np.isnan(intact.scores).tolist() == [i in (3, 9) for i in range(12)]
    shuffled_ones = controls(model, collate, samples, intact, ["image", "audio"], batch_size=5, progress=False)
    assert all(np.isfinite(c["loss_interval"]).all() for c in shuffled_ones.values())


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
    evaluation = evaluate(model, Collator("retrieval", model, processor), list(one_each.values()), progress=False)
    assert evaluation.metrics["image_to_text"]["recall_at_1"] == 1
    assert evaluation.metrics["text_to_image"]["matching_auc"] == 1
    assert evaluation.metrics["audio_to_text"]["recall_at_1"] == 0
    assert evaluation.metrics["recall_at_1"] == 0.5
    assert evaluation.metrics["chance_at_1"] == pytest.approx(0.1)
    assert evaluation.scores.tolist() == [0.5] * 10
