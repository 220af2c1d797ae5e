"""Convolutions that cut their input into patches: one matrix product."""

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlm_fast.hf import proof
from mmlm_fast.hf.changing import change, is_changed_by, is_eager, is_undone, original_class, why_unreachable
from mmlm_fast.hf.kinds.norms import taken, twin
from mmlm_fast.hf.site import ALREADY, Site
from mmlm_fast.ops.paths import using_reference

KIND = "patch convolution"


def find(model: nn.Module) -> Iterator[Site]:
    """Convolutions whose windows touch and cover each number once, with no padding."""
    for path, module in model.named_modules():
        cls = original_class(module)
        if cls not in (nn.Conv2d, nn.Conv3d) or not _cuts(module):
            continue
        site = Site(
            KIND, path, cls.__name__, module, note="on CUDA the original where there is more than one patch an input"
        )
        site.reason = ALREADY if is_changed_by(module, methods) else why_unreachable(module)
        weight: Any = module.weight
        site.alike = (cls, tuple(weight.shape), weight.dtype, weight.device)
        site.prove = functools.partial(_prove, module)
        site.apply = functools.partial(_apply, module)
        yield site


def _cuts(conv: Any) -> bool:
    ones, none = (1,) * len(conv.kernel_size), (0,) * len(conv.kernel_size)
    plain = conv.padding in (none, "valid") and conv.dilation == ones and conv.groups == 1
    return plain and conv.kernel_size == conv.stride != ones


def _apply(module: nn.Module) -> Any:
    return change(module, methods)


def methods(cls: Any) -> dict[str, Any]:
    """The forward of such a convolution as a matrix product."""
    original = cls.forward

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        takes = len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and is_eager()
        takes = takes and cls.forward is original and not is_undone(self) and _cuts(self)
        found = convolved(self, args[0]) if takes else None
        return cls.forward(self, *args, **kwargs) if found is None else found

    return {"forward": forward}


def convolved(conv: Any, x: Tensor) -> Tensor | None:
    """The convolution of ``[N, C, *sizes]``; None where the original is to compute it.

    A copy of the input by patches and a product: on a CPU 1 to 110 times as fast as the convolutions of torch, which
    fall far behind where each input is one patch and in bfloat16 (CONTRIBUTING). On CUDA nobody measured the copy.
    """
    kernel, weight, bias = conv.kernel_size, conv.weight, conv.bias
    if x.requires_grad and torch.is_grad_enabled():
        return None  # a product sums the gradient of pictures over all channels at once, which errs more
    if using_reference() or type(x) not in (Tensor, nn.Parameter) or type(weight) not in (Tensor, nn.Parameter):
        return None
    if x.dim() != len(kernel) + 2 or x.shape[1] != conv.in_channels or x.numel() == 0 or x.device != weight.device:
        return None
    one = x.shape[2:] == kernel
    if x.device.type not in ("cpu", "cuda") or (x.is_cuda and not one):
        return None
    if any(size % k for size, k in zip(x.shape[2:], kernel, strict=True)):
        return None  # the original leaves numbers out
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        return None  # the original says so
    if one:
        out = F.linear(x.flatten(1), weight.flatten(1), bias)
        return out.view(*out.shape, *(1 for _ in kernel))
    n = len(kernel)
    sizes = [part for size, k in zip(x.shape[2:], kernel, strict=True) for part in (size // k, k)]
    cut = x.reshape(x.shape[0], x.shape[1], *sizes)
    cut = cut.permute(0, *range(2, 2 + 2 * n, 2), 1, *range(3, 3 + 2 * n, 2)).flatten(1 + n)
    return F.linear(cut, weight.flatten(1), bias).movedim(-1, 1).contiguous()


def _prove(module: Any) -> float:
    cls, weight = original_class(module), module.weight.detach()
    x = proof.random(8, module.in_channels, *module.kernel_size, like=weight)
    rest = [] if module.bias is None else [module.bias.detach()]

    def made(weight: Tensor, bias: tuple[Tensor, ...]) -> Any:
        return twin(module, cls, {"weight": weight, "bias": bias[0] if bias else None})  # type: ignore[dict-item]

    return proof.prove(
        lambda x, w, *b: cls.forward(made(w, b), x),
        lambda x, w, *b: taken(convolved(made(w, b), x)),
        lambda x, w, *b: F.linear(x.flatten(1), w.flatten(1), *b)[(...,) + (None,) * len(module.kernel_size)],
        [x, weight, *rest],
        fixed=1,
    )
