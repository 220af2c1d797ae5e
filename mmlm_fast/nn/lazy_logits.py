"""Logits that are not computed until something needs them; a cross-entropy does not."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mmlm_fast.ops._registry import using_reference
from mmlm_fast.ops.linear_cross_entropy import linear_cross_entropy

_ABOUT = ("dim", "size", "numel", "is_floating_point", "ndimension", "__len__", "stride", "is_contiguous", "get_device")
_TIMES = ("mul", "__mul__", "__rmul__", "multiply")
_OVER = ("div", "__truediv__", "true_divide", "divide")


class LazyLogits(Tensor):
    """hidden·Wᵀ + b, scaled and capped, as a tensor ``[*batch, V]`` that holds `hidden` and W.

    What losses of language models do to logits before a cross-entropy stays lazy: to float32, views and slices of rows,
    products with numbers, tanh (a soft cap). `torch.nn.functional.cross_entropy` with class targets is then
    `linear_cross_entropy`. Everything else computes the logits first, once, and goes on with these.
    """

    _hidden: Tensor
    _weight: Tensor
    _bias: Tensor | None
    _scale: float  # of the linear layer's output; inside the tanh where there is one
    _cap: float | None  # of the tanh
    _computed: Tensor | None

    @staticmethod
    def __new__(
        cls,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        scale: float = 1.0,
        cap: float | None = None,
    ) -> "LazyLogits":
        self = Tensor._make_wrapper_subclass(
            cls, (*hidden.shape[:-1], weight.shape[0]), dtype=dtype, device=hidden.device
        )
        self._hidden, self._weight, self._bias = hidden, weight, bias
        self._scale, self._cap, self._computed = scale, cap, None
        return self

    def logits(self) -> Tensor:
        """The logits themselves."""
        if self._computed is None:
            z = F.linear(self._hidden, self._weight, self._bias).to(self.dtype)
            z = z if self._scale == 1 else z * self._scale
            self._computed = z if self._cap is None else self._cap * torch.tanh(z)
        return self._computed

    def _with(self, **changed: Any) -> "LazyLogits":
        same: dict[str, Any] = dict(hidden=self._hidden, weight=self._weight, bias=self._bias, dtype=self.dtype)
        return LazyLogits(**(same | {"scale": self._scale, "cap": self._cap} | changed))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        self = args[0] if args and isinstance(args[0], LazyLogits) else None
        if self is not None:
            if func is Tensor.requires_grad.__get__:  # type: ignore[attr-defined]
                return self._hidden.requires_grad or self._weight.requires_grad
            if name == "__get__" or name in _ABOUT:
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **kwargs)
            if self._computed is None:
                lazy = self._lazily(func, name, args[1:], kwargs)
                if lazy is not None:
                    return lazy

        def compute(tree: Any) -> Any:
            return pytree.tree_map_only(LazyLogits, lambda t: t.logits(), tree)

        return func(*compute(args), **compute(kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        def compute(tree: Any) -> Any:
            return pytree.tree_map_only(LazyLogits, lambda t: t.logits(), tree)

        return func(*compute(args), **compute(kwargs or {}))

    def _lazily(self, func: Any, name: str, args: tuple, kwargs: dict) -> Any:
        """The result without logits, or None where there is no such way."""
        if func is F.cross_entropy:
            return self._cross_entropy(*args, **kwargs)
        if name == "to" and not args and set(kwargs) == {"dtype"}:
            args, kwargs = (kwargs["dtype"],), {}
        if kwargs:
            return None
        number = args[0] if len(args) == 1 and type(args[0]) in (int, float) else None
        if name == "float" and not args:
            return self._with(dtype=torch.float32)
        if name == "to" and len(args) == 1:
            if args[0] == torch.float32:
                return self._with(dtype=torch.float32)
            return self if args[0] in (self.device, self.dtype) else None
        if name == "contiguous" and not args:
            return self
        if name in ("view", "reshape"):
            return self._reshaped(args)
        if name == "flatten" and args == (0, 1) and self.dim() > 2:
            return self._with(hidden=self._hidden.flatten(0, 1))
        if name == "__getitem__":
            return self._rows(args[0])
        if name in _TIMES and number is not None:
            return self._scaled(number)
        if name in _OVER and number:
            return self._scaled(1 / number)
        if name == "tanh" and not args and self._cap is None:
            return self._with(cap=1.0)
        return None

    def _scaled(self, number: float) -> "LazyLogits":
        return self._with(scale=self._scale * number) if self._cap is None else self._with(cap=self._cap * number)

    def _reshaped(self, args: tuple) -> "LazyLogits | None":
        shape = tuple(args[0]) if len(args) == 1 and isinstance(args[0], (tuple, list)) else args
        vocab, size = self.shape[-1], self._hidden.shape[-1]
        if shape and shape[-1] == vocab:
            return self._with(hidden=self._hidden.reshape(*shape[:-1], size))
        if len(shape) == 2 and shape[-1] == -1 and shape[0] * vocab == self.numel():
            return self._with(hidden=self._hidden.reshape(shape[0], size))
        return None

    def _rows(self, index: Any) -> "LazyLogits | None":
        """Slices of leading dimensions, whole rows of logits."""
        parts = index if isinstance(index, tuple) else (index,)
        if parts and parts[0] is Ellipsis:
            if len(parts) > self.dim() + 1 or any(p is Ellipsis for p in parts[1:]):
                return None
            parts = (slice(None),) * (self.dim() + 1 - len(parts)) + parts[1:]
        if len(parts) == 1 and isinstance(parts[0], Tensor) and parts[0].dim() < self.dim():
            rows = parts[0]
            if rows.dtype in (torch.bool, torch.int64) and not isinstance(rows, LazyLogits):
                return self._with(hidden=self._hidden[rows])
            return None
        if len(parts) > self.dim() or not all(isinstance(p, slice) for p in parts):
            return None
        if len(parts) == self.dim() and parts[-1] != slice(None):
            return None
        return self._with(hidden=self._hidden[parts[: self.dim() - 1]])

    def _cross_entropy(
        self,
        target: Tensor,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> Tensor | None:
        plain = weight is None and size_average is None and reduce is None and (self._cap is None or self._cap > 0)
        if not plain or self.dim() != 2 or target.dtype != torch.int64 or target.dim() != 1:
            return None
        options: dict[str, Any] = {"logit_scale": self._scale}
        if self._cap is not None:  # cap·tanh(scale·z), where the op says cap·tanh(logit_scale·z / cap)
            options = {"logit_scale": self._scale * self._cap, "softcap": self._cap}
        with torch.autocast(self.device.type, enabled=False):
            loss = linear_cross_entropy(
                self._hidden,
                self._weight,
                target,
                self._bias,
                ignore_index=ignore_index,
                reduction=reduction,
                label_smoothing=label_smoothing,
                **options,
            )
        return loss.to(self.dtype)


class LazyLinear(nn.Linear):
    """A language model's head whose output, in training, is `LazyLogits`; otherwise the `nn.Linear` it is.

    Logits are computed at once in inference, without gradients, under torch.compile, in `mmlm_fast.reference()`, and
    for sharded weights, which are whole only inside a layer's forward.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or not torch.is_grad_enabled() or using_reference() or torch.compiler.is_compiling():
            return super().forward(input)
        parts = [t for t in (input, self.weight, self.bias) if t is not None]
        if any(type(t) not in (Tensor, nn.Parameter) or t.device.type not in ("cpu", "cuda") for t in parts):
            return super().forward(input)
        dtype = input.dtype
        if torch.is_autocast_enabled(input.device.type):
            dtype = torch.get_autocast_dtype(input.device.type)
        hidden, weight = input.to(dtype), self.weight.to(dtype)
        if weight.dtype != hidden.dtype or not hidden.is_floating_point():
            return super().forward(input)
        return LazyLogits(hidden, weight, None if self.bias is None else self.bias.to(dtype), dtype)
