"""From 8-bit pixels to patch embeddings, against rescaling, normalising and a convolution."""

from functools import cache

import torch

from mmlm_benchmarks.harness import Case
from mmlm_benchmarks.ops import op_case
from mmlm_fast.ops import patch_embed, patchify
from mmlm_fast.ops.patch_embed import patch_embed_ref, patchify_ref

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# where the shape is from, batch, side in pixels, patch, frames of the weight, width of the tower, dtype
SIZES = {
    "cpu": [
        ("CLIP-L/14-336", 2, 336, 14, 0, 1024, torch.float32),
        ("Qwen2.5-VL vision", 1, 448, 14, 2, 1280, torch.float32),
    ],
    "tiny": [("none", 1, 28, 14, 0, 8, torch.bfloat16)],
    "cuda": [
        ("CLIP-L/14-336", 64, 336, 14, 0, 1024, torch.bfloat16),
        ("Qwen2.5-VL vision", 16, 896, 14, 2, 1280, torch.bfloat16),
    ],
}


def cases(device: str, sizes: str | None = None) -> list[Case]:
    made = []
    for source, batch, side, patch, frames, width, dtype in SIZES[sizes or device]:
        patches, values = batch * (side // patch) ** 2, batch * 3 * side**2

        def pixels(batch=batch, side=side):
            return torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8, device=device)

        def draw(dtype, pixels=pixels, patch=patch, frames=frames, width=width):
            shape = (width, 3, frames, patch, patch) if frames else (width, 3, patch, patch)
            weight = torch.randn(shape, device=device, dtype=dtype) * (3 * patch**2) ** -0.5
            return pixels(), weight, torch.randn(width, device=device, dtype=dtype)

        made += op_case(
            "patch_embed",
            f"patch_embed from uint8{', 2 frames' if frames else ''}",
            source,
            device,
            draw,
            reference=lambda p, w, b: patch_embed_ref(p, w, b, MEAN, STD, 1 / 255),
            fast=lambda p, w, b: patch_embed(p, w, b, mean=MEAN, std=STD),
            values_moved=patches * width,
            flops=2 * patches * width * 3 * patch**2,
            backward_flops=2 * patches * width * 3 * patch**2,
            dtype=dtype,
        )

        if frames:
            continue

        @cache
        def constants(dtype=dtype):
            """Made once: copied at every call they would be most of the time."""
            scale, shift = torch.ones(3, dtype=dtype, device=device), torch.zeros(3, dtype=dtype, device=device)
            return scale, shift, *(torch.tensor(t, device=device).view(3, 1, 1) for t in (MEAN, STD))

        def eager(p, patch=patch, dtype=dtype, constants=constants):
            """As an image processor and a patchify: rescale, normalise, cut."""
            scale, shift, mean, std = constants()
            x = (p.to(torch.float32) * (1 / 255) - mean) / std
            return patchify_ref(x.to(dtype), patch, scale, shift)

        def exact(p, patch=patch):
            mean, std = (torch.tensor(t, dtype=torch.float64, device=device) for t in (MEAN, STD))
            return patchify_ref(p, patch, 1 / 255 / std, -mean / std)

        made += op_case(
            "patch_embed",
            f"patchify from uint8, {side} pixels",
            source,
            device,
            lambda dtype, pixels=pixels: (pixels(),),
            reference=eager,
            fast=lambda p, patch=patch, dtype=dtype: patchify(p, patch, mean=MEAN, std=STD, dtype=dtype),
            exact=exact,
            values_moved=values,
            flops=0,
            backward_flops=0,
            dtype=dtype,
            train=False,
        )
    return made
