from functools import partial

import torch
import torch.nn.functional as F

from mmlm_benchmarks.contrastive import MOST_CHECKED, ceiling_case, draw_features
from mmlm_benchmarks.harness import Case
from mmlm_benchmarks.ops import op_case
from mmlm_fast.ops import siglip_loss

SIZES = {"cpu": [(1024, 512), (4096, 512)], "tiny": [(9, 16)], "cuda": [(16384, 768), (32768, 768)]}


def eager(image_features, text_features, logit_scale, logit_bias):
    """As transformers' SiglipModel has it."""
    logits = text_features @ image_features.T * logit_scale + logit_bias
    eye = torch.eye(logits.size(0), device=logits.device)
    signs = -torch.ones_like(logits) + 2 * eye.to(logits)
    return -F.logsigmoid(signs * logits).sum(dim=-1).mean()


def cases(device: str, sizes: str | None = None) -> list[Case]:
    made = []
    for num, size in SIZES[sizes or device]:

        def draw(dtype, num=num, size=size):
            scalars = (torch.tensor(v, device=device) for v in (10.0, -10.0))
            return *draw_features(num, size, device, dtype), *scalars

        made += op_case(
            "siglip_loss",
            f"siglip_loss, batch of {num}",
            f"{size} features",
            device,
            draw,
            draw_check=None if num <= MOST_CHECKED else partial(draw, num=MOST_CHECKED),
            reference=eager,
            fast=siglip_loss,
            values_moved=2 * num * size,
            flops=2 * num * num * size,
            backward_flops=4 * num * num * size,
        )[1:]
    return made


def full_cases(device: str) -> list[Case]:
    num, size = (16384, 512) if device == "cpu" else (65536, 768)
    return [ceiling_case("siglip_loss", num, size, device, eager, siglip_loss, [10.0, -10.0])]
