"""Tensors of the autograd graph whose numbers are computed when something reads them."""

import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._mode_utils import no_dispatch

# Methods that reach a tensor's memory without an operator.
_MEMORY = {
    Tensor.numpy, Tensor.__array__, Tensor.tolist, Tensor.data_ptr, Tensor.untyped_storage, Tensor.storage,
    Tensor.__dlpack__, Tensor.__reduce_ex__, Tensor.__repr__, Tensor.share_memory_, Tensor.is_shared,
    Tensor.__cuda_array_interface__.__get__, Tensor.apply_, Tensor.map_,
    *(getattr(Tensor, name) for name in ("const_data_ptr", "mutable_data_ptr") if hasattr(Tensor, name)),
}  # fmt: skip


_aten = torch.ops.aten
_FACTORIES = {
    getattr(_aten, name).default
    for name in (
        "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "new_zeros", "new_ones",
        "new_empty", "new_full", "new_empty_strided",
    )
}  # fmt: skip
_reading = threading.RLock()


class Values:
    """The numbers that a tensor and its views share: made once, when first read."""

    def __init__(self, make: Callable[[], Tensor], like: Tensor) -> None:
        self._make: Callable[[], Tensor] | None = make
        self._like = like
        self.tensor: Tensor | None = None
        self.changed = False  # in place, since they were made

    def read(self) -> Tensor:
        with _reading:
            self._read()
        assert self.tensor is not None
        return self.tensor

    def _read(self) -> None:
        if self._make is not None:
            with as_in_the_forward():
                made = self._make()
                if made.stride() != self._like.stride():
                    made = torch.empty_like(self._like, device=made.device).copy_(made)
            self.tensor, self._make = made, None

    def will_change(self) -> None:
        """Call before a change in place."""
        self.read()
        self.changed = True


@contextmanager
def as_in_the_forward() -> Iterator[None]:
    """Outside of autograd, autocast and inference mode, whatever the reader is in."""
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


class Habit:
    """How often the logits of a module were read beside its loss: then they are better computed at once."""

    def __init__(self) -> None:
        self.losses = self.reads = 0
        self.plain = False

    def is_plain(self) -> bool:
        """Decide, at the start of a forward pass; one that is repeated for a backward pass is plain anyway."""
        if not self.plain and self.reads >= 2 and 2 * self.reads > self.losses:
            self.plain = True
            where = "beside its loss" if self.losses else "by its loss"
            warnings.warn(
                f"mmlm_fast: this model's logits are read {where}, so that not computing them saves nothing: from now "
                "on it computes them at once, as the original does",
                stacklevel=4,
            )
        return self.plain


_HABITS: "weakref.WeakKeyDictionary[nn.Module, Habit]" = weakref.WeakKeyDictionary()


def habit_of(module: nn.Module) -> Habit:
    """The one record of a module."""
    return _HABITS.setdefault(module, Habit())


class OnDemand(Tensor):
    """A tensor with shape, strides, graph and views of its own, and numbers only once an operator reads them.

    Autograd stands above it: its functions, hooks and views see a tensor as any other.
    """

    _shared: Values
    _meta: Tensor  # shape and strides, as a tensor on the device "meta"

    @staticmethod
    def __new__(cls, values: Values, meta: Tensor, device: torch.device) -> "OnDemand":
        self = Tensor._make_wrapper_subclass(
            cls,
            meta.shape,
            strides=meta.stride(),
            storage_offset=meta.storage_offset(),
            dtype=meta.dtype,
            device=device,
        )
        self._shared = values
        self._meta = meta.as_strided(meta.shape, meta.stride(), meta.storage_offset())  # changes of shape in place
        return self

    def read(self) -> Tensor:
        """The numbers, as a plain tensor without a graph that shares memory with every other reader's."""
        return self._shared.read().as_strided(self._meta.shape, self._meta.stride(), self._meta.storage_offset())

    def _lazily(self, func: Any, args: tuple, kwargs: dict) -> "OnDemand | None":
        """The result of an operator on this tensor without its numbers; None where there is no such way."""
        return None

    def _view(self, func: Any, args: tuple, kwargs: dict, meta: Tensor) -> "OnDemand":
        return OnDemand(self._shared, meta, self.device)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func == Tensor.data.__set__ and isinstance(args[0], OnDemand):  # type: ignore[attr-defined]
            return _set_data(*args)
        if func in _MEMORY or (func is Tensor.__deepcopy__ and args[0].is_leaf):
            args = tuple(_plain(a) if isinstance(a, OnDemand) else a for a in args)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            out = func.decompose(*args, **kwargs)  # in inference mode these come whole
            if out is not NotImplemented:
                return out
        self = args[0] if args and isinstance(args[0], OnDemand) else None
        if self is not None and not any(isinstance(a, OnDemand) for a in args[1:]):
            if func in _FACTORIES:
                return func(self._meta, *args[1:], **kwargs | {"device": kwargs.get("device") or self.device})
            if torch.Tag.inplace_view in func.tags:
                self._shared.will_change()
                func(self._meta, *args[1:], **kwargs)
                with no_dispatch():
                    func(*args, **kwargs)
                return self
            if _is_view(func):
                with nullcontext() if not torch.is_inference_mode_enabled() else torch.inference_mode(False):
                    views = func(self._meta, *args[1:], **kwargs)  # of a normal tensor, also in inference mode
                    if all(v.dtype == self.dtype and v.dim() for v in pytree.tree_leaves(views)):
                        return pytree.tree_map_only(
                            Tensor, lambda meta: self._view(func, args[1:], kwargs, meta), views
                        )
                    self._shared.will_change()  # of single numbers, or of their bits: who holds these may write
        if self is not None and self._shared.tensor is None:
            lazy = self._lazily(func, args[1:], kwargs)
            if lazy is not None:
                return lazy
        return _read_and_call(func, args, kwargs)


def _plain(tensor: OnDemand) -> Tensor:
    """Numbers that refuse what the tensor itself would refuse."""
    tensor._shared.will_change()  # who has the memory may write to it
    read = tensor.read()
    return read.detach().requires_grad_() if tensor.requires_grad else read


def _set_data(tensor: OnDemand, data: Tensor) -> None:
    if data.shape != tensor.shape or data.dtype != tensor.dtype or data.device != tensor.device:
        raise RuntimeError(
            f"the data of these logits can only become a tensor of {tuple(tensor.shape)}, {tensor.dtype} on "
            f"{tensor.device}, got {tuple(data.shape)}, {data.dtype} on {data.device}"
        )
    tensor._shared.will_change()
    tensor.read().copy_(data.detach())


def _is_view(func: Any) -> bool:
    alias = [r.alias_info for r in func._schema.returns]
    return any(a is not None and not a.is_write for a in alias)


def _read_and_call(func: Any, args: tuple, kwargs: dict) -> Any:
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written = args[place] if place < len(args) else kwargs.get(argument.name)
            for tensor in pytree.tree_leaves(written):
                if isinstance(tensor, OnDemand):
                    tensor._shared.will_change()
    given: list[tuple[OnDemand, Tensor]] = []

    def read(tensor: OnDemand) -> Tensor:
        given.append((tensor, tensor.read()))
        return given[-1][1]

    out = func(*pytree.tree_map_only(OnDemand, read, args), **pytree.tree_map_only(OnDemand, read, kwargs))
    return pytree.tree_map_only(Tensor, lambda t: next((w for w, plain in given if plain is t), t), out)
