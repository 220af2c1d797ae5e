"""Gated activations and activations with a bias, against the formulas of transformers' MLPs."""

import torch
import torch.nn.functional as F

from mmlm_benchmarks.harness import Case
from mmlm_benchmarks.ops import op_case
from mmlm_fast.ops import bias_act, glu

# activation, gated, where the shape is from, batch, tokens, size, dtype
SIZES = {
    "cpu": [
        ("silu", True, "Qwen2.5-0.5B", 1, 1024, 4864, torch.float32),
        ("silu", True, "Qwen2.5-0.5B", 1, 1024, 4864, torch.bfloat16),
        ("quick_gelu", False, "CLIP-L", 4, 577, 4096, torch.float32),
        ("gelu_tanh", False, "SigLIP-so400m", 2, 729, 4304, torch.bfloat16),
    ],
    "tiny": [("silu", True, "none", 1, 3, 40, torch.bfloat16), ("quick_gelu", False, "none", 1, 3, 40, torch.bfloat16)],
    "cuda": [
        ("silu", True, "Qwen2.5-VL-7B", 2, 8192, 18944, torch.bfloat16),
        ("gelu_tanh", True, "Gemma3-4B", 2, 8192, 10240, torch.bfloat16),
        ("quick_gelu", False, "CLIP-L", 32, 577, 4096, torch.bfloat16),
    ],
}
EAGER = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),  # transformers' QuickGELUActivation
}


def cases(device: str, sizes: str | None = None) -> list[Case]:
    made = []
    for activation, gated, source, batch, tokens, size, dtype in SIZES[sizes or device]:

        def draw(dtype, gated=gated, batch=batch, tokens=tokens, size=size):
            return tuple(torch.randn(batch, tokens, size, device=device, dtype=dtype) for _ in range(2 if gated else 1))

        def reference(gate, up=None, act=EAGER[activation]):
            return act(gate) if up is None else act(gate) * up

        def fast(gate, up=None, activation=activation):
            return bias_act(gate, activation=activation) if up is None else glu(gate, up, activation=activation)

        made += op_case(
            "glu",
            f"{'glu' if gated else 'act'} {activation} {str(dtype).removeprefix('torch.')}",
            source,
            device,
            draw,
            reference=reference,
            fast=fast,
            values_moved=(3 if gated else 2) * batch * tokens * size,
            flops=0,
            backward_flops=0,
            dtype=dtype,
        )
    return made
