from functools import partial

import torch
import torch.nn.functional as F

from mmlm_benchmarks.contrastive import MOST_CHECKED, ceiling_case, draw_features
from mmlm_benchmarks.harness import Case
from mmlm_benchmarks.ops import op_case
from mmlm_fast.ops import clip_loss

SIZES = {"cpu": [(1024, 512), (4096, 512)], "tiny": [(9, 16)], "cuda": [(16384, 768), (32768, 768)]}


def eager(image_features, text_features, logit_scale):
    """As open_clip's ClipLoss and transformers' CLIPModel have it."""
    logits = logit_scale * image_features @ text_features.T
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def cases(device: str, sizes: str | None = None) -> list[Case]:
    made = []
    for num, size in SIZES[sizes or device]:

        def draw(dtype, num=num, size=size):
            return *draw_features(num, size, device, dtype), torch.tensor(14.3, device=device)

        made += op_case(
            "clip_loss",
            f"clip_loss, batch of {num}",
            f"{size} features",
            device,
            draw,
            draw_check=None if num <= MOST_CHECKED else partial(draw, num=MOST_CHECKED),
            reference=eager,
            fast=clip_loss,
            values_moved=2 * num * size,
            flops=2 * num * num * size,
            backward_flops=4 * num * num * size,
        )[1:]
    return made


def full_cases(device: str) -> list[Case]:
    num, size = (16384, 512) if device == "cpu" else (65536, 768)
    return [ceiling_case("clip_loss", num, size, device, eager, clip_loss, [14.3])]
