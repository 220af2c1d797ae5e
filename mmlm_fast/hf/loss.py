"""The way into transformers' losses: a head whose logits are computed only when something needs them.

A model's ``loss_function(logits=…)`` gets logits, not hidden states. So the head alone changes its class, on the
instance: in training its output is `LazyLogits`, which pass through what the loss does to them and become
`linear_cross_entropy` in ``F.cross_entropy``. No forward and no loss function is replaced.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlm_fast.nn import LazyLinear
from mmlm_fast.testing import difference

ROWS, CLASSES = 64, 1024  # of the proof: the head's first classes


def heads_of(model: Any) -> list[tuple[str, nn.Module]]:
    """Path and module of a model's language-model head; none, where it has none."""
    head = model.get_output_embeddings()
    return [(path, module) for path, module in model.named_modules() if module is head]


def replace_head(head: nn.Module, verify: bool) -> tuple[str | None, float | None, type | None]:
    """Why not, the largest error of the proof relative to the exact loss and gradients, and the new class."""
    if type(head) is LazyLinear:
        return "accelerated already", None, None
    if type(head) is not nn.Linear:
        cls = type(head)
        return f"not a plain nn.Linear but {cls.__module__}.{cls.__qualname__}, whose forward would be lost", None, None
    if type(head.weight) is not nn.Parameter or head.weight.device.type not in ("cpu", "cuda"):
        reason = f"its weight is {type(head.weight).__name__} on {head.weight.device}, whole only in its forward"
        return reason, None, None
    if not verify:
        return None, None, LazyLinear
    found = [difference(*three) for three in zip(*_proof(head), strict=True)]
    for d, what in zip(found, ("loss", "gradient of its input", "gradient of its weight"), strict=True):
        if not d.ok:
            return f"{what} errs by {d.error:.1e}, where {d.allowed:.1e} is allowed", None, None
    return None, max(d.relative for d in found), LazyLinear


def _proof(head: nn.Linear) -> list[list[Tensor]]:
    """Loss and gradients as a causal loss has them: of the lazy head, of the original, of it in float64."""
    weight = head.weight.detach()[:CLASSES]
    bias = None if head.bias is None else head.bias.detach()[:CLASSES]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, weight.shape[1], generator=generator).to(weight)
    labels = torch.randint(0, weight.shape[0], (ROWS,), generator=generator).to(weight.device)
    labels[::5] = -100

    def run(cls: type[nn.Linear], dtype: torch.dtype) -> list[Tensor]:
        module = cls(1, 1, bias=bias is not None).train()
        module.weight = nn.Parameter(weight.to(dtype))
        if bias is not None:
            module.bias = nn.Parameter(bias.to(dtype))
        x = hidden.to(dtype).requires_grad_()
        with torch.enable_grad(), torch.autocast(weight.device.type, enabled=False):
            logits = module(x)
            loss = F.cross_entropy(logits if dtype == torch.float64 else logits.float(), labels)
            return [loss.detach(), *torch.autograd.grad(loss, (x, module.weight))]

    return [run(LazyLinear, weight.dtype), run(nn.Linear, weight.dtype), run(nn.Linear, torch.float64)]
