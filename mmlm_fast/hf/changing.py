"""Modules that change their class on the instance: to one of the same name whose forward is another, and back."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn

Make = Callable[..., dict[str, Any]]  # of a class and options: the methods that its subclass has instead


def subclass(cls: Any, make: Make, *options: Any) -> Any:
    """A subclass of `cls`, of the same name, with the methods of ``make(cls, *options)``.

    Its instances are copied and pickled as such: `make` is a function of a module, and `options` can be pickled.
    """
    return _subclass(cls, make, options)


@cache
def _subclass(cls: Any, make: Make, options: tuple) -> Any:
    layers = (*getattr(cls, "_mmlm_fast_layers", ()), (make, options))
    original = getattr(cls, "_mmlm_fast_original", cls)

    def __reduce_ex__(self: Any, protocol: Any) -> tuple:
        return _rebuild, (original, layers), *cls.__reduce_ex__(self, protocol)[2:]

    names = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    marks = {"_mmlm_fast_layers": layers, "_mmlm_fast_original": original, "__reduce_ex__": __reduce_ex__}
    return type(cls)(cls.__name__, (cls,), make(cls, *options) | names | marks)


def _rebuild(original: Any, layers: tuple) -> Any:
    cls = original
    for make, options in layers:
        cls = subclass(cls, make, *options)
    return cls.__new__(cls)


def original_class(module: Any) -> Any:
    """The class of a module before any change of ours."""
    return getattr(type(module), "_mmlm_fast_original", type(module))


def is_changed_by(module: Any, make: Make) -> bool:
    """Whether `subclass` changed the class of a module by `make`, and nobody took that back."""
    return any(made is make for made, _ in getattr(type(module), "_mmlm_fast_layers", ()))


def change(target: Any, cls: Any) -> Callable[[], None]:
    """Give `target` the class `cls`, a subclass of its own; returns what gives the original back."""
    original: Any = type(target)
    forward: Any = getattr(cls, "forward", None)
    target.__class__ = cls
    # Hooks of the package accelerate replace a module's forward on the instance, and call this one.
    if getattr(target.__dict__.get("_old_forward"), "__self__", None) is target:
        setattr(target, "_old_forward", forward.__get__(target))  # noqa: B010

    def undo() -> None:
        target.__class__ = instead(type(target), cls, original)
        for name in ("_old_forward", "forward"):
            bound = target.__dict__.get(name)
            if bound is not None and getattr(bound, "__func__", None) is forward:
                setattr(target, name, original.forward.__get__(target))

    return undo


def instead(cls: type, ours: type, original: type) -> type:
    """`cls` with `original` where it has `ours`: itself, or below what parametrizations or FSDP made of it since."""
    if cls is ours:
        return original
    if ours not in cls.__mro__:
        return cls
    layers: Any = vars(cls).get("_mmlm_fast_layers")
    if layers is not None:  # of another change, made later
        make, options = layers[-1]
        return subclass(instead(cls.__bases__[0], ours, original), make, *options)
    names = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
    return type(cls)(cls.__name__, tuple(instead(base, ours, original) for base in cls.__bases__), names)


def why_unreachable(module: nn.Module) -> str | None:
    """Why a class cannot change what calling a module does."""
    forward = module.__dict__.get("forward")
    if forward is not None and getattr(module.__dict__.get("_old_forward"), "__self__", None) is not module:
        return "it has a forward of its own"
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
