"""RMSNorm in the forms in which transformers has it, known by the fingerprints of their forwards."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmlm_fast.hf import proof
from mmlm_fast.hf.changing import change, is_changed_by, is_eager, is_undone, original_class, why_unreachable
from mmlm_fast.hf.fingerprint import fingerprint
from mmlm_fast.hf.site import ALREADY, Site, is_small, unless_tiny
from mmlm_fast.nn.plain import is_plain
from mmlm_fast.ops.add_norm import MAX_KERNEL_SIZE, add_norm
from mmlm_fast.ops.parts import RECORDS
from mmlm_fast.ops.paths import REFERENCE

KIND = "RMS norm"  # and layer norms that are several passes
_OP = RECORDS["add_norm"]
_LEAST = {kind: _OP.least(kind) for kind in ("rms", "layer")}
LEAST = min(_LEAST.values())  # that a sum must have before its norm
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Norm:
    """How a norm is computed.

    Args:
        eps: Attribute that holds it.
        offset: Added to the weight.
        rounds: To which dtype: "promoted" that of input and weight, "input" that of the input, "weight" that of the
            weight.
        weight: Attribute that holds it; "" where there is none.
        switch: Attribute that says whether the weight counts; "" where it always does.
        kind: Of `ops.add_norm`.
    """

    eps: str = "variance_epsilon"
    offset: float = 0.0
    rounds: str = "promoted"
    weight: str = "weight"
    switch: str = ""
    kind: str = "rms"

    def weight_of(self, module: Any) -> Tensor | None:
        if not self.weight or (self.switch and not getattr(module, self.switch)):
            return None
        return getattr(module, self.weight)


# By the fingerprint of the forward; the first of the classes that have it.
NORMS = {
    "79557c34b2f3eb20": Norm(),  # LlamaRMSNorm
    "888c31c4f1b5b72f": Norm("eps", offset=1.0, rounds="input"),  # GemmaRMSNorm
    "86e0c9ad14dfce2d": Norm(rounds="input"),  # Olmo2RMSNorm
    "b7d4041457f8a8fd": Norm(rounds="input"),  # HeliumRMSNorm
    "9a8e26cdd4711e5a": Norm(rounds="weight"),  # T5LayerNorm
    "bd4fbe60e6b679fc": Norm("eps", rounds="input", switch="with_scale"),  # Gemma4RMSNorm
    "52700834ea09ebc4": Norm("eps", rounds="input"),  # MoshiRMSNorm
    "26fe6a4eea5f7fe6": Norm("eps", rounds="input", weight=""),  # NanoChatRMSNorm
    "311c028c362b4844": Norm("eps"),  # Llama4TextRMSNorm
    "40d8f4148e8b90a7": Norm(rounds="input", kind="layer"),  # CohereLayerNorm
}
LAYER = Norm("eps", kind="layer")


def known(module: nn.Module) -> Norm | None:
    """The norm that a module computes; None where its forward is none of those known."""
    cls = original_class(module)
    if cls is nn.LayerNorm:
        plain = len(module.normalized_shape) == 1  # type: ignore[arg-type]
        return LAYER if plain else None
    return None if cls.__module__.startswith("torch.") else NORMS.get(fingerprint(cls, "forward") or "")


def find(model: nn.Module) -> Iterator[Site]:
    """RMS norms: alone in one pass. Layer norms have torch's own; with the sum before them see `rewrites`."""
    for path, module in model.named_modules():
        norm = known(module)
        if norm is None:
            if type(module).__name__.endswith("RMSNorm") and not is_changed_by(module, methods):
                yield Site(KIND, path, type(module).__name__, module, reason=_UNKNOWN)
            continue
        if norm is not LAYER:
            yield _site(path, module, norm)


_UNKNOWN = "its forward is none of those known"


def _site(path: str, module: nn.Module, norm: Norm) -> Site:
    site = Site(KIND, path, type(module).__name__, module, op="add_norm", op_kind=norm.kind)
    if is_changed_by(module, methods):
        site.reason = ALREADY
    else:
        site.reason = why_unreachable(module)
    weight = norm.weight_of(module)
    site.alike = alike(module)
    site.like = torch.empty(0, dtype=torch.float32) if weight is None else weight
    site.prove = functools.partial(_prove, module, norm)
    site.apply = functools.partial(_apply, module, norm)
    return site


def _apply(module: nn.Module, norm: Norm) -> Any:
    return change(module, methods, norm)


def methods(cls: Any, norm: Norm) -> dict[str, Any]:
    """The forward of a norm that is one pass where that is faster."""
    original, least = cls.forward, _LEAST[norm.kind]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Of nobody who patched it since, or kept this one.
        is_ours = len(args) == 1 and not kwargs and cls.forward is original and not is_undone(self)
        if is_ours and isinstance(args[0], Tensor) and not is_small(least, args[0]):
            found = normalised(self, norm, args[0])
            if found is not None:
                return found[0]
        return cls.forward(self, *args, **kwargs)

    return {"forward": unless_tiny(cls, least, forward)}


def normalised(module: Any, norm: Norm, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor] | None:
    """The norm of ``x + residual``, and the sum; None where the original is to compute them."""
    if not is_eager() or type(x) not in (Tensor, nn.Parameter) or x.dtype not in _FLOATS:
        return None
    if residual is None:
        total = x.dtype
    elif type(residual) is Tensor and residual.shape == x.shape and residual.device == x.device:
        total = torch.promote_types(x.dtype, residual.dtype)
    else:
        return None
    weight, bias = norm.weight_of(module), getattr(module, "bias", None) if norm is LAYER else None
    for parameter in (weight, bias):
        if parameter is not None and (
            type(parameter) not in (Tensor, nn.Parameter)
            or parameter.dtype not in _FLOATS
            or parameter.shape != x.shape[-1:]
            or parameter.device != x.device
        ):
            return None
    if norm is LAYER and (
        torch.is_autocast_enabled(x.device.type) or any(p.dtype != total for p in _given(weight, bias))
    ):
        return None
    fits = x.dim() > 0 and x.shape[-1] > 0 and (not x.is_cuda or x.shape[-1] <= MAX_KERNEL_SIZE)
    if _OP.path(x, kind=norm.kind, fits=fits) == REFERENCE:
        return None
    options: dict[str, Any] = {"kind": norm.kind, "eps": getattr(module, norm.eps), "offset": norm.offset}
    if weight is None or weight.dtype == total or (norm.rounds == "input" and weight.dtype == torch.float32):
        return add_norm(x, residual, weight, bias, **options)
    if norm.rounds == "input":
        return add_norm(x, residual, weight.float(), bias, **options)
    # The result is of another dtype than what is normalised.
    wide = torch.promote_types(total, weight.dtype)
    total_ = x if residual is None else x + residual
    out = add_norm(total_.to(wide), None, weight.to(wide), bias, **options)[0]
    return (out.to(weight.dtype) if norm.rounds == "weight" else out), total_


def sum_and_norm(module: Any, first: Any, second: Any) -> tuple[Any, Any]:
    """``module(first + second)`` and the sum, in one pass where `module` is a known norm and that is faster."""
    tensors = isinstance(first, Tensor) and isinstance(second, Tensor)
    if tensors and not is_small(LEAST, first) and is_plain(module, type(module)):
        norm = known(module) if type(module).__call__ is nn.Module.__call__ else None
        found = None if norm is None else normalised(module, norm, second, first)
        if found is not None:
            return found
    total = first + second
    return module(total), total


def alike(module: nn.Module) -> tuple:
    """What norms have in common that are proved at once."""
    norm = known(module)
    assert norm is not None
    weight = norm.weight_of(module)
    shape = None if weight is None else (tuple(weight.shape), weight.dtype, weight.device)
    return original_class(module), shape, getattr(module, norm.eps), norm


def prove_sums(modules: Sequence[nn.Module]) -> float:
    """Of each norm, with the sum before it."""
    return max(_prove(module, norm, True) for module in modules if (norm := known(module)) is not None)


def _given(*tensors: Tensor | None) -> list[Tensor]:
    return [t for t in tensors if t is not None]


def formula(norm: Norm, eps: float, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """What a norm computes, in the dtype of `x`."""
    if norm.kind == "layer":
        return nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)
    out = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return out if weight is None else out * (weight + norm.offset)


def twin(module: nn.Module, cls: type, attributes: Mapping[str, Any]) -> Any:
    """A module with the settings of another and these attributes, without its hooks."""
    made: Any = object.__new__(cls)
    nn.Module.__init__(made)
    own = ("_parameters", "_buffers", "_modules", "forward", "_old_forward", "_hf_hook")
    hooks = [name for name in module.__dict__ if "hook" in name or name in own]
    made.__dict__.update({k: v for k, v in module.__dict__.items() if k not in hooks})
    made.__dict__.update(attributes)
    return made


def _prove(module: nn.Module, norm: Norm, with_sum: bool = False) -> float:
    cls, eps, weight = original_class(module), getattr(module, norm.eps), norm.weight_of(module)
    like = torch.empty(0, dtype=torch.float32) if weight is None else weight
    x = proof.random(proof.ROWS, 64 if weight is None else weight.shape[0], like=like)
    given = [x, proof.random(*x.shape, like=like, seed=1)] if with_sum else [x]
    names = [n for n in (norm.weight, "bias" if norm is LAYER else "") if n and getattr(module, n, None) is not None]
    names = [] if weight is None else names
    given += [getattr(module, name).detach() for name in names]

    def made(rest: tuple[Tensor, ...]) -> Any:
        none = {"bias": None} if norm is LAYER else {}
        return twin(module, cls, none | dict(zip(names, rest[-len(names) :] if names else (), strict=True)))

    def original(x: Tensor, *rest: Tensor) -> Any:
        total = x + rest[0] if with_sum else x
        return cls.forward(made(rest), total), total

    def ours(x: Tensor, *rest: Tensor) -> Any:
        return taken(normalised(made(rest), norm, x, rest[0] if with_sum else None))

    def exact(x: Tensor, *rest: Tensor) -> Any:
        total = x + rest[0] if with_sum else x
        return formula(norm, eps, total, *rest[with_sum:]), total

    return proof.prove(original, ours, exact, given)


def taken(found: Any) -> Any:
    """`found`, unless it is None: then no path of ours takes the proof's input."""
    if found is None:
        raise proof.RefusedError("none of our paths takes it")
    return found
