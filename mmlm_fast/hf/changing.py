"""Modules that change their class on the instance: to one of the same name whose forward is another, and back."""

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import nn

Make = Callable[..., dict[str, Any]]  # of a class and options: the methods that its subclass has instead
Layer = tuple[Make, tuple]


def subclass(cls: Any, make: Make, *options: Any) -> Any:
    """A subclass of `cls`, of the same name, with the methods of ``make(cls, *options)``.

    Its instances are copied and pickled as such: `make` is a function of a module, and `options` can be pickled.
    """
    return _subclass(cls, make, options, getattr(cls, "forward", None))


@cache
def _subclass(cls: Any, make: Make, options: tuple, forward: Any) -> Any:
    """`forward` is that of the class now: patched since, or patched back, it makes another class."""
    layers = (*layers_of(cls), (make, options))
    original = getattr(cls, "_mmlm_fast_original", cls)

    def __reduce_ex__(self: Any, protocol: Any) -> tuple:
        return _rebuild, (original, layers), *cls.__reduce_ex__(self, protocol)[2:]

    names = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    marks = {"_mmlm_fast_layers": layers, "_mmlm_fast_original": original, "__reduce_ex__": __reduce_ex__}
    if (original.__reduce_ex__, original.__reduce__) != (object.__reduce_ex__, object.__reduce__):
        del marks["__reduce_ex__"]  # a class that says how it is copied makes a plain one
    return type(cls)(cls.__name__, (cls,), make(cls, *options) | names | marks)


def _layered(original: Any, layers: Iterable[Layer]) -> Any:
    cls = original
    for make, options in sorted(layers, key=lambda layer: not getattr(layer[0], "is_innermost", False)):
        cls = subclass(cls, make, *options)
    return cls


def _rebuild(original: Any, layers: tuple[Layer, ...]) -> Any:
    cls = _layered(original, layers)
    return cls.__new__(cls)


def innermost(make: Make) -> Make:
    """Mark what changes a forward itself, below what wraps it, whichever came first."""
    make.is_innermost = True  # type: ignore[attr-defined]
    return make


def layers_of(cls: Any) -> tuple[Layer, ...]:
    """The changes of ours that a class is made of."""
    return getattr(cls, "_mmlm_fast_layers", ())


def original_class(module: Any) -> Any:
    """The class of a module before any change of ours, and below what FSDP2 or parametrizations made of it."""
    cls = getattr(type(module), "_mmlm_fast_original", type(module))
    while cls.__module__.startswith("torch.") and cls.__name__.startswith(("FSDP", "Parametrized")):
        bases = [base for base in cls.__bases__ if base.__name__ not in ("FSDPModule", "object")]
        if len(bases) != 1 or bases[0] is nn.Module:
            break
        cls = bases[0]
    return cls


def is_undone(module: Any) -> bool:
    """Whether a module has no change of ours any more, though somebody kept a forward of it."""
    return not layers_of(type(module))


def is_changed_by(module: Any, make: Make) -> bool:
    """Whether `change` changed a module by `make`, and nobody took that back."""
    return any(made is make for made, _ in layers_of(type(module)))


def change(target: Any, make: Make, *options: Any) -> Callable[[], None]:
    """Give `target` a class with the methods of ``make(cls, *options)``; returns what takes that back."""
    layer = make, options
    _set_class(target, _with(type(target), layer))
    return lambda: _set_class(target, _without(type(target), layer))


def _set_class(target: Any, cls: Any) -> None:
    before = getattr(type(target), "forward", None)
    target.__class__ = cls
    # Hooks of the package accelerate replace a module's forward on the instance, and call the one that it had.
    for name in ("_old_forward", "forward"):
        bound = target.__dict__.get(name)
        if bound is not None and getattr(bound, "__func__", None) is before:
            setattr(target, name, cls.forward.__get__(target))


def _with(cls: Any, layer: Layer) -> Any:
    """`cls` with one change more: itself, or below what parametrizations or FSDP made of it since the last."""
    if "_mmlm_fast_layers" in vars(cls):
        return _layered(cls._mmlm_fast_original, [*cls._mmlm_fast_layers, layer])
    if not layers_of(cls):
        return _layered(cls, [layer])
    return _with_bases(cls, lambda base: _with(base, layer) if layers_of(base) else base)


def _without(cls: Any, layer: Layer) -> Any:
    """`cls` without a change of ours: itself, or below what parametrizations or FSDP made of it since."""
    if "_mmlm_fast_layers" in vars(cls):
        return _layered(cls._mmlm_fast_original, [other for other in cls._mmlm_fast_layers if other != layer])
    return _with_bases(cls, lambda base: _without(base, layer)) if layer in layers_of(cls) else cls


def instead(cls: type, ours: type, original: type) -> type:
    """`cls` with `original` where it has `ours`: itself, or below what parametrizations or FSDP made of it since."""
    if cls is ours:
        return original
    return _with_bases(cls, lambda base: instead(base, ours, original)) if ours in cls.__mro__ else cls


def _with_bases(cls: Any, change: Callable[[Any], Any]) -> Any:
    names = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
    return type(cls)(cls.__name__, tuple(change(base) for base in cls.__bases__), names)


OWN_FORWARD = "it has a forward of its own"


def has_own_forward(module: nn.Module) -> bool:
    """Whether the class of a module does not say what calling it does. Hooks of the package accelerate keep the forward
    that they replaced, and call it: `change` reaches that one."""
    kept = getattr(module.__dict__.get("_old_forward"), "__self__", None)
    return "forward" in module.__dict__ and kept is not module


def why_unreachable(module: nn.Module) -> str | None:
    """Why a class cannot change what calling a module does."""
    if has_own_forward(module):
        return OWN_FORWARD
    for name, parameter in module.named_parameters():
        if type(parameter) is not nn.Parameter:
            return f"its {name} is {type(parameter).__name__}, whole only in its forward"
    return None


def why_unproved(module: nn.Module) -> str | None:
    """Why nothing can be proved of a module now."""
    for name, parameter in module.named_parameters():
        if parameter.device.type == "meta":
            return f"its {name} is on the meta device: call accelerate when the weights are loaded"
    return None


def is_eager() -> bool:
    """Whether the call in progress is neither compiled nor traced: compilers fuse what an original does."""
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing())
