import torch

from mmlm_benchmarks.harness import Case
from mmlm_benchmarks.ops import op_case
from mmlm_fast.ops import fuse_modalities
from mmlm_fast.ops.fuse_modalities import MODES, fuse_modalities_ref

TELLING = "fuse_modalities attention, 3 modalities, forward + backward"
# where the shape is from, batch, tokens, hidden size
SIZES = {
    "cpu": ("Qwen2.5-0.5B width", 8, 256, 896),
    "tiny": ("none", 1, 3, 24),
    "cuda": ("Qwen2.5-7B width", 8, 2048, 3584),
}


def cases(device: str, sizes: str | None = None) -> list[Case]:
    made = []
    source, batch, tokens, size = SIZES[sizes or device]
    for mode in MODES:
        num = 2 if mode == "gated" else 3
        shape = {"mean": None, "weighted": (num,), "attention": (size,), "gated": (size, 2 * size)}[mode]

        def draw(dtype, mode=mode, num=num, shape=shape):
            features = [torch.randn(batch, tokens, size, device=device, dtype=dtype) for _ in range(num)]
            weight = None if shape is None else torch.randn(shape, device=device, dtype=dtype) * shape[-1] ** -0.5
            bias = torch.randn(size, device=device, dtype=dtype) if mode == "gated" else None
            return features, weight, bias

        def fast(features, weight, bias, mode=mode):
            return fuse_modalities(features, mode, weight=weight, bias=bias)

        def reference(features, weight, bias, mode=mode):
            return fuse_modalities_ref(features, mode, weight, bias)[0]

        rows = batch * tokens
        gemm = 4 * rows * size * size if mode == "gated" else 0
        made += op_case(
            "fuse_modalities",
            f"fuse_modalities {mode}, {num} modalities",
            source,
            device,
            draw,
            reference=reference,
            fast=fast,
            values_moved=(num + 1) * rows * size + (2 * size * size if mode == "gated" else 0),
            flops=gemm,
            backward_flops=2 * gemm,
        )
    return made
