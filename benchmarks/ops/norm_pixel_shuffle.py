"""Space to depth with its norm, against transformers' views, permutations and copies."""

import torch
import torch.nn.functional as F

from mmlm_benchmarks.harness import Case
from mmlm_benchmarks.ops import op_case
from mmlm_fast.ops import norm_pixel_shuffle

# name, where the shape is from, batch, patches a side, size, factor, norm behind, dtype
SIZES = {
    "cpu": [
        ("pixel shuffle + layer norm", "InternVL3-1B", 4, 32, 1024, 2, True, torch.float32),
        ("pixel shuffle", "SmolVLM-256M", 4, 32, 768, 4, False, torch.float32),
    ],
    "tiny": [("pixel shuffle + layer norm", "none", 1, 4, 16, 2, True, torch.bfloat16)],
    "cuda": [
        ("pixel shuffle + layer norm", "InternVL3-8B", 32, 32, 1024, 2, True, torch.bfloat16),
        ("pixel shuffle", "SmolVLM-256M", 64, 32, 768, 4, False, torch.bfloat16),
    ],
}


def eager(x, *parameters, factor):
    """InternVLModel.pixel_shuffle (as Idefics3Connector's), flattened, then the projector's layer norm."""
    batch, width, height, size = x.shape
    x = x.view(batch, width, height // factor, size * factor).permute(0, 2, 1, 3).contiguous()
    x = x.view(batch, height // factor, width // factor, size * factor**2).permute(0, 2, 1, 3).contiguous()
    x = x.view(batch, -1, size * factor**2)
    return F.layer_norm(x, x.shape[-1:], *parameters, 1e-5) if parameters else x


def cases(device: str, sizes: str | None = None) -> list[Case]:
    made = []
    for name, source, batch, side, size, factor, norm, dtype in SIZES[sizes or device]:

        def draw(dtype, batch=batch, side=side, size=size, factor=factor, norm=norm):
            x = torch.randn(batch, side, side, size, device=device, dtype=dtype)
            return x, *(torch.randn(size * factor**2, device=device, dtype=dtype) for _ in range(2 if norm else 0))

        def fast(x, *parameters, factor=factor, norm=norm):
            options = dict(zip(("weight", "bias"), parameters, strict=False))
            return norm_pixel_shuffle(x, factor, norm="layer" if norm else None, norm_at="after", eps=1e-5, **options)

        made += op_case(
            "norm_pixel_shuffle",
            f"{name} {str(dtype).removeprefix('torch.')}",
            source,
            device,
            draw,
            reference=lambda *args, factor=factor: eager(*args, factor=factor),
            fast=fast,
            values_moved=2 * batch * side**2 * size,
            flops=0,
            backward_flops=0,
            dtype=dtype,
        )
    return made
