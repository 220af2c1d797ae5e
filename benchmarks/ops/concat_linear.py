import torch

from mmlm_benchmarks.harness import Case
from mmlm_benchmarks.ops import op_case
from mmlm_fast.ops import concat_linear
from mmlm_fast.ops.concat_linear import concat_linear_ref

# name, where the shape is from, batch, tokens, (size, pooled) of each input, outputs
SIZES = {
    "cpu": [
        (
            "text with pooled image and audio",
            "Qwen2.5-0.5B, SigLIP-base, Whisper-base widths",
            4,
            256,
            [(896, 0), (768, 1), (512, 1)],
            896,
        ),
        ("two sequences", "Qwen2.5-0.5B width twice", 4, 128, [(896, 0), (896, 0)], 896),
    ],
    "tiny": [("text with a pooled image", "none", 1, 5, [(24, 0), (16, 1)], 20)],
    "cuda": [
        (
            "text with pooled image and audio",
            "Qwen2.5-7B, SigLIP-so400m, Whisper-large widths",
            8,
            2048,
            [(3584, 0), (1152, 1), (1280, 1)],
            3584,
        ),
        ("two sequences", "Qwen2.5-7B width twice", 8, 2048, [(3584, 0), (3584, 0)], 3584),
    ],
}


def cases(device: str, sizes: str | None = None) -> list[Case]:
    made = []
    for name, source, batch, tokens, inputs_of, num_out in SIZES[sizes or device]:
        total = sum(k for k, _ in inputs_of)
        dense = sum(k for k, pooled in inputs_of if not pooled)

        def draw(dtype, batch=batch, tokens=tokens, inputs_of=inputs_of, num_out=num_out, total=total):
            inputs = [
                torch.randn(batch, 1 if pooled else tokens, k, device=device, dtype=dtype) for k, pooled in inputs_of
            ]
            weight = torch.randn(num_out, total, device=device, dtype=dtype) * total**-0.5
            return inputs, weight, torch.randn(num_out, device=device, dtype=dtype)

        rows = batch * tokens
        made += op_case(
            "concat_linear",
            f"concat_linear, {name}",
            source,
            device,
            draw,
            reference=concat_linear_ref,
            fast=concat_linear,
            values_moved=rows * (dense + num_out) + num_out * total,
            flops=2 * rows * num_out * dense,
            backward_flops=4 * rows * num_out * dense,
        )
    return made
