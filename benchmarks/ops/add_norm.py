"""Residual add and norm, against the formulas of transformers' Llama and torch's layer norm."""

import torch
import torch.nn.functional as F

from mmlm_benchmarks.harness import Case
from mmlm_benchmarks.ops import op_case
from mmlm_fast.ops import add_norm
from mmlm_fast.ops.add_norm import add_norm_ref

EPS = 1e-6
# kind, where the shape is from, batch, tokens, hidden size, dtype
SIZES = {
    "cpu": [
        ("rms", "Qwen2.5-VL-3B", 1, 2048, 2048, torch.float32),
        ("rms", "Qwen2.5-VL-3B", 1, 2048, 2048, torch.bfloat16),
        ("layer", "SigLIP-so400m", 4, 729, 1152, torch.float32),
        ("layer", "SigLIP-so400m", 4, 729, 1152, torch.bfloat16),
    ],
    "tiny": [("rms", "none", 1, 3, 40, torch.bfloat16), ("layer", "none", 1, 3, 40, torch.bfloat16)],
    "cuda": [
        ("rms", "Qwen2.5-VL-7B", 2, 8192, 3584, torch.bfloat16),
        ("layer", "SigLIP-so400m", 32, 729, 1152, torch.bfloat16),
    ],
}


def eager_rms(x, residual, weight):
    """As LlamaDecoderLayer and LlamaRMSNorm."""
    total = residual + x
    wide = total.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * wide.to(total.dtype), total


def eager_layer(x, residual, weight, bias):
    total = residual + x
    return F.layer_norm(total, total.shape[-1:], weight, bias, EPS), total


def torch_rms(x, residual, weight):
    total = residual + x
    return F.rms_norm(total, total.shape[-1:], weight, EPS), total


def cases(device: str, sizes: str | None = None) -> list[Case]:
    made = []
    for kind, source, batch, tokens, size, dtype in SIZES[sizes or device]:

        def draw(dtype, kind=kind, batch=batch, tokens=tokens, size=size):
            x, residual = (torch.randn(batch, tokens, size, device=device, dtype=dtype) for _ in range(2))
            parameters = [torch.randn(size, device=device, dtype=dtype) for _ in range(1 if kind == "rms" else 2)]
            return x, residual, *parameters

        def fast(*args, kind=kind):
            return add_norm(*args, kind=kind, eps=EPS)

        def exact(x, residual, weight, bias=None, kind=kind):
            return add_norm_ref(x, residual, weight, bias, kind, EPS)

        made += op_case(
            "add_norm",
            f"add_norm {kind} {str(dtype).removeprefix('torch.')}",
            source,
            device,
            draw,
            reference=eager_rms if kind == "rms" else eager_layer,
            fast=fast,
            exact=exact,
            peers={"torch rms_norm": torch_rms} if kind == "rms" else None,
            values_moved=4 * batch * tokens * size,
            flops=0,
            backward_flops=0,
            dtype=dtype,
        )
    return made
