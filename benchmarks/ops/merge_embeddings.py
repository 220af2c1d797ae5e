"""Embedding with pictures' features in place, against embedding and masked_scatter as in transformers."""

import torch

from mmlm_benchmarks.harness import Case
from mmlm_benchmarks.ops import op_case
from mmlm_fast.ops import merge_embeddings, scatter_features
from mmlm_fast.ops.merge_embeddings import scatter_features_ref

# where the shape is from, vocabulary, batch, tokens, hidden size, feature rows a sample, dtype
SIZES = {
    "cpu": [("LLaVA-1.5 over Qwen2.5-0.5B", 32000, 4, 1024, 896, 576, torch.float32)],
    "tiny": [("none", 50, 2, 24, 16, 4, torch.bfloat16)],
    "cuda": [("Qwen2.5-VL-7B", 152064, 2, 8192, 3584, 5120, torch.bfloat16)],
}
IMAGE = 7


def cases(device: str, sizes: str | None = None) -> list[Case]:
    made = []
    for source, vocabulary, batch, tokens, size, rows, dtype in SIZES[sizes or device]:

        def ids(vocabulary=vocabulary, batch=batch, tokens=tokens, rows=rows):
            ids = torch.randint(8, vocabulary, (batch, tokens), device=device)
            ids[:, 16 : 16 + rows] = IMAGE
            return ids

        # A frozen table, as in most fine-tuning: its dense gradient would be most of the time on both sides.
        held: dict[str, torch.Tensor] = {}

        def draw(dtype, ids=ids, vocabulary=vocabulary, batch=batch, size=size, rows=rows, held=held):
            if not held:
                held["table"] = torch.randn(vocabulary, size, device=device, dtype=dtype)
            return ids(), torch.randn(batch, rows, size, device=device, dtype=dtype)

        def eager(ids, features, held=held):
            """As the forward pass of transformers' LLaVA."""
            embeds = torch.nn.functional.embedding(ids, held["table"].to(features.dtype))
            mask = (ids == IMAGE).unsqueeze(-1).expand_as(embeds)
            return embeds.masked_scatter(mask, features)

        shared = {
            "values_moved": 2 * batch * tokens * size,
            "flops": 0,
            "backward_flops": 0,
            "dtype": dtype,
        }
        label = str(dtype).removeprefix("torch.")
        made += op_case(
            "merge_embeddings",
            f"merge_embeddings {label}",
            source,
            device,
            draw,
            reference=eager,
            fast=lambda ids, features, held=held: merge_embeddings(ids, held["table"], {IMAGE: features}),
            **shared,
        )

        def draw_embeds(dtype, ids=ids, batch=batch, tokens=tokens, size=size, rows=rows):
            embeds = torch.randn(batch, tokens, size, device=device, dtype=dtype)
            return ids(), embeds, torch.randn(batch, rows, size, device=device, dtype=dtype)

        made += op_case(
            "merge_embeddings",
            f"deepstack add {label}",
            source,
            device,
            draw_embeds,
            reference=lambda ids, embeds, features: scatter_features_ref(embeds, ids, {IMAGE: features}, True),
            fast=lambda ids, embeds, features: scatter_features(embeds, ids, {IMAGE: features}, add=True),
            **shared,
        )
    return made
