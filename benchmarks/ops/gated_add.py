"""Epilogue of gated cross-attention, against transformers' Mllama."""

import torch

from mmlm_benchmarks.harness import Case
from mmlm_benchmarks.ops import op_case
from mmlm_fast.ops import gated_add

# where the shape is from, batch, tokens, hidden size, dtype
SIZES = {
    "cpu": [("Llama-3.2-11B-Vision", 1, 512, 4096, torch.float32)],
    "tiny": [("none", 1, 3, 40, torch.bfloat16)],
    "cuda": [("Llama-3.2-11B-Vision", 2, 8192, 4096, torch.bfloat16)],
}


def eager(x, residual, gate, keep):
    """As MllamaCrossAttentionDecoderLayer: rows masked by a product, then the gate."""
    return residual + gate.tanh() * (keep[..., None].to(x.dtype) * x)


def cases(device: str, sizes: str | None = None) -> list[Case]:
    made = []
    for source, batch, tokens, size, dtype in SIZES[sizes or device]:

        def draw(dtype, batch=batch, tokens=tokens, size=size):
            x, residual = (torch.randn(batch, tokens, size, device=device, dtype=dtype) for _ in range(2))
            gate = torch.full((1,), 0.5, device=device, dtype=dtype)
            return x, residual, gate, torch.rand(batch, tokens, device=device) < 0.9

        made += op_case(
            "gated_add",
            f"gated_add {str(dtype).removeprefix('torch.')}",
            source,
            device,
            draw,
            reference=eager,
            fast=lambda x, residual, gate, keep: gated_add(x, residual, gate, keep=keep),
            values_moved=3 * batch * tokens * size,
            flops=0,
            backward_flops=0,
            dtype=dtype,
        )
    return made
