from functools import partial

import torch
import torch.nn.functional as F

from mmlm_benchmarks.harness import Case
from mmlm_benchmarks.ops import op_case
from mmlm_fast.ops import linear_cross_entropy

MOST_CHECKED = 1024  # tokens whose logits of 152k classes, several times in float64, fit beside everything else
# name, where the shape is from, tokens, hidden size, vocabulary, share of tokens that count, options
SIZES = {
    "cpu": [
        ("49k classes, 256 tokens", "SmolLM2-135M", 256, 576, 49_152, 1.0, {}),
        ("50k classes", "a 768-wide decoder, GPT-2's vocabulary", 2048, 768, 50_000, 1.0, {}),
    ],
    "tiny": [("50 classes", "none", 9, 24, 50, 0.5, {})],
    "cuda": [
        ("152k classes", "Qwen2.5-7B width 4096", 8192, 4096, 152_064, 1.0, {"ignore_index": None}),
        ("152k classes, ignore_index", "the same, rows compacted", 8192, 4096, 152_064, 1.0, {}),
        ("152k classes, 30 % of the tokens count", "the same, instruction tuning", 8192, 4096, 152_064, 0.3, {}),
    ],
}


def eager(hidden, weight, target):
    """As transformers' ForCausalLMLoss has it."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return F.cross_entropy(F.linear(hidden, weight).to(wide), target)


def peers(device: str) -> dict:
    found = {}
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        options = torch.nn.LinearCrossEntropyOptions()

        def chunked(hidden, weight, target):
            return F.linear_cross_entropy(hidden, weight, target, options=options)

        found["torch linear_cross_entropy"] = chunked
    if device == "cuda":
        try:
            from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
        except ImportError:
            return found
        found["Liger"] = lambda hidden, weight, target: liger_fused_linear_cross_entropy(hidden, weight, target)
    return found


FULL = {
    "cpu": [
        ("50k classes, 1,024 tokens", "half of it", 1024, 768, 50_000, 1.0, {}),
        ("50k classes, 30 % of the tokens count", "the same, instruction tuning", 2048, 768, 50_000, 0.3, {}),
    ],
    "cuda": [],
}


def cases(device: str, sizes: str | None = None) -> list[Case]:
    """The training step alone: without gradients nobody asks for a loss often."""
    return made_of(SIZES[sizes or device], device, peers(device) if device == "cuda" else {})


def full_cases(device: str) -> list[Case]:
    return made_of(FULL[device], device, peers(device))


def made_of(sizes: list[tuple], device: str, others: dict) -> list[Case]:
    made = []
    for name, source, tokens, size, vocab, share, options in sizes:

        def draw(dtype, tokens=tokens, size=size, vocab=vocab, share=share):
            hidden = torch.randn(tokens, size, device=device, dtype=dtype)
            weight = torch.randn(vocab, size, device=device, dtype=dtype) * size**-0.5
            target = torch.randint(0, vocab, (tokens,), device=device)
            return hidden, weight, torch.where(torch.rand(tokens, device=device) < share, target, -100)

        def fast(hidden, weight, target, options=options):
            return linear_cross_entropy(hidden, weight, target, **options)

        flops = int(2 * share * tokens * size * vocab)
        made += op_case(
            "linear_cross_entropy",
            f"linear_cross_entropy, {name}",
            source,
            device,
            draw,
            draw_check=None if tokens <= MOST_CHECKED or device == "cpu" else partial(draw, tokens=MOST_CHECKED),
            reference=eager,
            fast=fast,
            peers=others if share == 1 else None,
            values_moved=tokens * size + vocab * size,
            flops=flops,
            backward_flops=2 * flops,
        )[1:]
    return made
