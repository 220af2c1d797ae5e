"""Embeddings of trained models, and search among them."""

import pytest
import torch
import transformers

from mmlm_fast.models import MMLMForContrastive, presets
from mmlm_fast.training import Collator, EmbeddingIndex, embed
from mmlm_fast.training.builtin import digits


@pytest.fixture(autouse=True)
def _quiet():
    transformers.logging.set_verbosity_error()


@pytest.mark.parametrize("engine", ["exact", "faiss"])
def test_search(engine):
    if engine == "faiss":
        pytest.importorskip("faiss", reason="faiss is not installed")
    generator = torch.Generator().manual_seed(0)
    table = torch.nn.functional.normalize(torch.randn(50, 8, generator=generator), dim=1)
    index = EmbeddingIndex(table, [f"item {i}" for i in range(50)], engine=engine)
    results = index.search(table[[7, 3]], k=3)
    assert [rows[0][0] for rows in results] == ["item 7", "item 3"]
    assert results[0][0][1] == pytest.approx(1)
    expected = (table[7] @ table.T).topk(3)
    assert [int(name.split()[1]) for name, _ in results[0]] == expected.indices.tolist()
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
    collate = Collator("retrieval", model, processor)
    samples = digits("pair", "eval", count=10)
    batches = [collate(samples[:6]), collate(samples[6:])]
    for modality in ("text", "image", "audio"):
        expected = torch.cat([model(**batch)[f"{modality}_embeds"] for batch in batches])
        assert torch.equal(embed(model, batches, modality), expected)
    with pytest.raises(ValueError, match="modality must be text, image or audio, got 'smell'"):
        embed(model, batches, "smell")
