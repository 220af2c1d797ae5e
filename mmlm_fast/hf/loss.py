"""The way into transformers' losses: a head whose logits are computed when something reads them, which a loss does not.

Two classes change, on the instances. The head becomes a `LazyLinear`. The model's becomes a subclass of the same name
that says when a loss follows: in a training step with ``labels``. Then the head's output is `LazyLogits`, on which
``F.cross_entropy`` is `linear_cross_entropy`. Without labels nothing differs from the original, and no method of it or
function of its loss is replaced.
"""

import functools
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from mmlm_fast.hf.changing import has_own_forward
from mmlm_fast.hf.site import ALREADY
from mmlm_fast.nn import LazyLinear
from mmlm_fast.nn.lazy_logits import logits_on_demand
from mmlm_fast.nn.plain import is_plain
from mmlm_fast.testing import difference

ROWS, CLASSES = 64, 1024  # of the proof: the head's first classes


def heads_of(module: nn.Module) -> list[tuple[str, PreTrainedModel, nn.Module]]:
    """Path of each language model's head in `module`, the outermost model it is the head of, and the head."""
    found: dict[nn.Module, PreTrainedModel] = {}
    for model in module.modules():
        head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
        if isinstance(head, nn.Module):
            found.setdefault(head, model)
    return [(path, found[part], part) for path, part in module.named_modules() if part in found]


def why_not(model: PreTrainedModel, head: nn.Module) -> str | None:
    """Why a head can't be a `LazyLinear`."""
    if getattr(model, "computes_loss_without_logits", False) and type(head) in (LazyLinear, nn.Linear):
        return ALREADY
    if "labels" not in inspect.signature(type(model).forward).parameters:
        return f"{type(model).__name__}.forward takes no labels, so that it computes no loss"
    if type(head) is not nn.Linear:
        cls = type(head)
        return f"not a plain nn.Linear but {cls.__module__}.{cls.__qualname__}, whose forward would be lost"
    if type(head.weight) is not nn.Parameter or head.weight.device.type not in ("cpu", "cuda", "meta"):
        return f"its weight is {type(head.weight).__name__} on {head.weight.device}, whole only in its forward"
    if has_own_forward(model):
        return "its model has a forward of its own"
    if not is_plain(head, nn.Linear):
        return "it has hooks or a forward of its own, which want its output"
    return None


def proved(head: Any) -> tuple[str | None, float | None]:
    """Why a head is refused, or the largest error of the proof relative to exact loss and gradients."""
    found = [difference(*three) for three in zip(*_proof(head), strict=True)]
    for d, what in zip(found, ("loss", "gradient of its input", "gradient of its weight"), strict=True):
        if not d.ok:
            return f"{what} errs by {d.error:.1e}, where {d.allowed:.1e} is allowed", None
    return None, max(d.relative for d in found)


def without_logits(cls: Any) -> dict[str, Any]:
    """The methods of a model whose loss takes `LazyLogits` where its head gives them."""
    place = list(inspect.signature(cls.forward).parameters).index("labels") - 1

    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        labels = args[place] if len(args) > place else kwargs.get("labels")
        undone = not getattr(type(self), "computes_loss_without_logits", False)  # but kept by who wrapped it
        sharded = any(base.__name__ == "FSDPModule" for base in type(self).__mro__)  # weights go when it returns
        if labels is None or undone or sharded or not self.training or torch.compiler.is_compiling():
            return cls.forward(self, *args, **kwargs)
        _make_lazy(self.get_output_embeddings())
        with logits_on_demand():
            return cls.forward(self, *args, **kwargs)

    def set_output_embeddings(self: Any, new_embeddings: Any) -> None:
        cls.set_output_embeddings(self, new_embeddings)
        if self.training:
            _make_lazy(new_embeddings)

    return {"forward": forward, "set_output_embeddings": set_output_embeddings, "computes_loss_without_logits": True}


def _make_lazy(head: Any) -> None:
    if type(head) is nn.Linear:
        head.__class__ = LazyLinear


def _proof(head: nn.Linear) -> list[list[Tensor]]:
    """Loss and gradients as a causal loss has them: of the lazy head, of the original, of it in float64."""
    with torch.inference_mode(False):  # tensors made in it could not be kept for a backward pass
        weight = head.weight.detach()[:CLASSES].clone()
        bias = None if head.bias is None else head.bias.detach()[:CLASSES].clone()
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(ROWS, weight.shape[1], generator=generator, dtype=torch.float32, device="cpu").to(weight)
        labels = torch.randint(0, weight.shape[0], (ROWS,), generator=generator, device="cpu").to(weight.device)
        labels[::5] = -100

    def run(cls: type[nn.Linear], dtype: torch.dtype) -> list[Tensor]:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(weight.device.type, enabled=False):
            module = cls(1, 1, bias=bias is not None, device="meta").train()  # draws no random numbers
            module.weight = nn.Parameter(weight.to(dtype))
            if bias is not None:
                module.bias = nn.Parameter(bias.to(dtype))
            x = hidden.to(dtype).requires_grad_()
            with logits_on_demand(few_rows=True):
                logits = module(x)
            loss = F.cross_entropy(logits if dtype == torch.float64 else logits.float(), labels)
            return [loss.detach(), *torch.autograd.grad(loss, (x, module.weight))]

    return [run(LazyLinear, weight.dtype), run(nn.Linear, weight.dtype), run(nn.Linear, torch.float64)]
