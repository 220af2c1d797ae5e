"""Logits that are computed when something reads them; the loss of a language model does not."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlm_fast.nn.on_demand import OnDemand, Values, habit_of
from mmlm_fast.nn.plain import is_plain
from mmlm_fast.ops.linear_cross_entropy import linear_cross_entropy
from mmlm_fast.ops.parts import graph_is_kept, is_seen_through
from mmlm_fast.ops.paths import using_reference

_aten = torch.ops.aten
_SAME = (_aten.clone.default, _aten.alias.default, _aten.detach.default, _aten.add.Tensor)  # gradients pass unchanged
_SCALES = (_aten.mul.Tensor, _aten.div.Tensor)
_RESHAPES = (_aten.view.default, _aten._unsafe_view.default, _aten.reshape.default, _aten._reshape_alias.default)


class _Following(threading.local):
    loss = False
    few_rows = False


_following = _Following()


@contextmanager
def logits_on_demand(few_rows: bool = False) -> Iterator[None]:
    """Run the forward pass of a model that computes its own loss: a `LazyLinear` in it waits with its output.

    With `few_rows` also where logits are so few that they cost less than not to have them.
    """
    before = _following.loss, _following.few_rows
    _following.loss, _following.few_rows = True, few_rows
    try:
        yield
    finally:
        _following.loss, _following.few_rows = before


class _Head:
    """What logits are made of, as it is in the forward pass: hidden states, weight, bias."""

    def __init__(self, module: nn.Module, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        parts = (hidden, weight, bias)
        self.needs = [t is not None and t.requires_grad for t in parts]
        self.hidden, self.weight, self.bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
        self.versions = [t._version for t in parts if t is not None]
        self.habit = habit_of(module)
        self.lossed = False
        self.bits = _sum_of_bits(self.weight)

    def check(self) -> None:
        """Raise RuntimeError where the logits of the forward pass can't be had any more."""
        parts = [t for t in (self.hidden, self.weight, self.bias) if t is not None]
        changed = [t._version for t in parts] != self.versions or self.weight.untyped_storage().size() == 0
        if changed or not torch.equal(_sum_of_bits(self.weight), self.bits):  # optimizers may write past the counter
            raise RuntimeError(
                "these logits were not computed in the forward pass, whose loss needed none, and the weights they are "
                "made of have changed or gone since: read outputs.logits before optimizer.step(), or call the model "
                "without labels"
            )

    def logits(self) -> Tensor:
        self.habit.reads += 1
        self.check()
        return F.linear(self.hidden, self.weight, self.bias)


def _sum_of_bits(weight: Tensor) -> Tensor:
    """A number that changes with any of the weight's, at the price of reading it once."""
    if weight.is_contiguous() and weight.shape[1] * weight.element_size() % 8 == 0:
        return weight.view(torch.int64).sum()  # a tenth of the time of summing narrower integers
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    return weight.view(integers).sum(dtype=torch.int64)


class _Stage:
    """One step from the head's output to what a loss is given: an operator, its arguments, and its result."""

    def __init__(
        self, head: _Head, parent: "_Stage | None", call: tuple[Any, tuple, dict] | None, values: Values, meta: Tensor
    ) -> None:
        self.head, self.parent, self.values, self.meta = head, parent, values, meta
        nothing: tuple[Any, tuple, dict] = (None, (), {})
        self.func, self.args, self.kwargs = call or nothing
        self.is_view = parent is not None and parent.values is values

    def before(self) -> "_Stage":
        """The first stage with the same gradient."""
        stage = self
        while stage.parent is not None and stage.func in _SAME:
            stage = stage.parent
        return stage

    def numbers(self) -> Tensor:
        """This stage's result in the forward pass, whatever became of it since."""
        if not self.values.changed:
            return self.values.read().as_strided(self.meta.shape, self.meta.stride(), self.meta.storage_offset())
        if self.parent is None:
            return self.head.logits()
        return self.func(self.parent.numbers(), *self.args, **self.kwargs)

    def rows(self, hidden: Tensor) -> Tensor | None:
        """The hidden states ``[*batch, H]`` of these rows; None where they are not whole rows of logits."""
        num_classes, size = self.head.weight.shape
        *shape, last = self.meta.shape
        *strides, one = self.meta.stride() or [0]
        offset = self.meta.storage_offset()
        whole = last == num_classes and (one == 1 or last == 1)
        if not whole or offset % num_classes or any(s % num_classes for s in strides):
            return None
        origin = self
        while origin.is_view and origin.parent is not None:
            origin = origin.parent
        if origin.parent is None:
            base = hidden.reshape(-1, size)
        elif origin.meta.is_contiguous() and origin.meta.shape[-1] == num_classes:
            parent_rows = origin.parent.rows(hidden)
            if parent_rows is None:
                return None
            base = parent_rows.reshape(-1, size)
        else:
            return None
        if self.meta.is_contiguous() and offset == 0 and self.meta.numel() == base.shape[0] * num_classes:
            return base.reshape(*shape, size)
        strides = [s // num_classes * size for s in strides]
        return base.contiguous().as_strided((*shape, size), (*strides, 1), offset // num_classes * size)

    def options(self) -> dict[str, Any] | None:
        """Scale, cap and bias of the logits for `linear_cross_entropy`; None where it has no such options."""
        if self.parent is None:
            return {"scale": 1.0, "cap": None, "bias": self.head.bias}
        before = self.parent.options()
        if before is None or self.func in (_aten.clone.default, _aten._unsafe_view.default) or self.is_view:
            return before
        if self.func is _aten._to_copy.default:
            return before
        if self.func is _aten.tanh.default:
            return before | {"cap": 1.0} if before["cap"] is None else None
        if self.func is _aten.add.Tensor:
            added = self.args[0].reshape(-1)
            if before["scale"] != 1 or before["cap"] is not None or added.dtype != self.head.weight.dtype:
                return None
            return before | {"bias": added if before["bias"] is None else before["bias"] + added}
        factor = self.args[0] if self.func is _aten.mul.Tensor else 1 / self.args[0]
        which = "scale" if before["cap"] is None else "cap"
        return before | {which: before[which] * factor}

    def pull_back(self, grad: Tensor) -> Tensor:
        """The gradient of the parent's result, given that of this one's."""
        assert self.parent is not None
        if self.is_view:
            full = grad.new_zeros(self.parent.meta.shape)
            self.func(full, *self.args, **self.kwargs).copy_(grad)
            return full
        if self.func in _SAME:
            return grad
        if self.func is _aten._unsafe_view.default:
            return grad.reshape(self.parent.meta.shape)
        if self.func is _aten._to_copy.default:
            return grad.to(self.parent.meta.dtype)
        if self.func is _aten.tanh.default:
            return _aten.tanh_backward(grad, self.numbers())
        return self.func(grad, *self.args)

    def comes_back(self) -> bool:
        """Whether a gradient that waits can wait all the way back to the head: see `pulls_back_by`."""
        known = (*_RESHAPES, *_SAME, *_SCALES, _aten.slice.Tensor, _aten._to_copy.default, _aten.tanh.default)
        return self.parent is None or (self.func in known and self.parent.comes_back())

    def pulls_back_by(self, func: Any, args: tuple, kwargs: dict) -> bool:
        """Whether an operator on the gradient of this stage's result gives exactly that of the parent's."""
        parent = self.parent
        if parent is None:
            return False
        if func in _RESHAPES:
            return self.func in _RESHAPES and not kwargs and tuple(args[0]) == tuple(parent.meta.shape)
        if func is _aten.slice_backward.default:
            return self.func is _aten.slice.Tensor and self._same_slice(parent, *args)
        if func is _aten._to_copy.default:
            return self.func is func and kwargs.get("dtype") == parent.meta.dtype and not args
        if func is _aten.tanh_backward.default:
            return self.func is _aten.tanh.default
        if func in _SCALES and self.func is func and not kwargs:
            return isinstance(args[0], (int, float)) and args[0] == self.args[0]
        return False

    def _same_slice(self, parent: "_Stage", size: Any, dim: int, start: int, end: int, step: int) -> bool:
        whole = list(parent.meta.shape)
        given = [*self.args, *(0, None, None, 1)[len(self.args) :]]
        given[0] %= len(whole)
        same = list(size) == whole and dim % len(whole) == given[0]
        steps = range(whole[given[0]])
        return same and steps[slice(start, end, step)] == steps[slice(*given[1:])]


class LazyLogits(OnDemand):
    """hidden·Wᵀ + b ``[*batch, V]`` that nothing has read yet.

    It is a tensor of the graph like a linear layer's output: what reads it gets the numbers of the forward pass,
    computed once, what changes it in place is seen by all its views, and its gradient goes to hidden, W and b. Views,
    copies in float32, products with numbers, an added row and tanh of it wait as well. Of them
    `torch.nn.functional.cross_entropy` with class targets is `linear_cross_entropy`, which needs no logits.
    """

    _stage: _Stage

    @staticmethod
    def of(stage: _Stage) -> "LazyLogits":
        self = LazyLogits(stage.values, stage.meta, stage.head.hidden.device)
        self._stage = stage
        return self

    def logits(self) -> Tensor:
        """The logits themselves, without a graph."""
        return super().read()

    def read(self) -> Tensor:
        return self.logits()

    @property
    def _computed(self) -> Tensor | None:
        return self._shared.tensor

    def _view(self, func: Any, args: tuple, kwargs: dict, meta: Tensor) -> OnDemand:
        return LazyLogits.of(_Stage(self._stage.head, self._stage, (func, args, kwargs), self._shared, meta))

    def _lazily(self, func: Any, args: tuple, kwargs: dict) -> OnDemand | None:
        if not self._may_wait(func, args, kwargs):
            return None
        stage = self._stage
        args = tuple(a.detach().clone() if isinstance(a, Tensor) else a for a in args)
        meta = func(self._meta, *(a.to("meta") if isinstance(a, Tensor) else a for a in args), **kwargs)
        values = Values(lambda: func(stage.numbers(), *args, **kwargs), meta)
        return LazyLogits.of(_Stage(stage.head, stage, (func, args, kwargs), values, meta))

    def _may_wait(self, func: Any, args: tuple, kwargs: dict) -> bool:
        if func is _aten._to_copy.default:
            dtype = kwargs.get("dtype", self.dtype)
            return set(kwargs) <= {"dtype", "non_blocking"} and dtype in (torch.float32, self._stage.head.weight.dtype)
        if func is _aten.add.Tensor:
            other = args[0]
            row = isinstance(other, Tensor) and not other.requires_grad and other.shape[-1:] == self.shape[-1:]
            row = row and other.numel() == self.shape[-1] and other.dim() <= self.dim() and other.dtype == self.dtype
            return row and not kwargs and type(other) in (Tensor, nn.Parameter) and other.device == self.device
        if func in _SCALES:
            return type(args[0]) in (int, float) and args[0] != 0 and not kwargs
        return func in (_aten.clone.default, _aten._unsafe_view.default, _aten.tanh.default)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.cross_entropy:
            loss = _short_way(*args, **(kwargs or {}))
            if loss is not None:
                return loss
        return super().__torch_function__(func, types, args, kwargs)

    def _cross_entropy(
        self,
        target: Any,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> Tensor | None:
        """The loss without logits, or None where there is no such way."""
        plain = weight is None and size_average is None and reduce is None and self._shared.tensor is None
        plain = plain and 0 <= label_smoothing < 1
        if not plain or self.dim() != 2 or type(target) is not Tensor or reduction not in ("mean", "sum", "none"):
            return None
        if target.dtype != torch.int64 or target.shape != self.shape[:1] or target.device != self.device:
            return None
        options = self._stage.options()
        if options is None or (options["cap"] is not None and not options["cap"] > 0):
            return None
        if not self._stage.comes_back() or self._stage.rows(self._stage.head.hidden) is None:
            return None
        arguments = (self, target, ignore_index, reduction, label_smoothing, options)
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False), torch.no_grad():
                return _CrossEntropy.apply(*arguments)
        return _CrossEntropy.apply(*arguments)


def _short_way(input: Any, target: Any, *args: Any, **kwargs: Any) -> Tensor | None:
    return input._cross_entropy(target, *args, **kwargs) if type(input) is LazyLogits else None


class _LinearLayer(torch.autograd.Function):
    """The head as a node of the graph: a linear layer whose output waits."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: _Head) -> Tensor:
        ctx.set_materialize_grads(False)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(hidden if needs_weight else None, weight if needs_hidden else None)
        ctx.sizes = hidden.shape, weight.shape
        meta = torch.empty(*hidden.shape[:-1], weight.shape[0], dtype=hidden.dtype, device="meta")
        ctx.stage = _Stage(head, None, None, Values(head.logits, meta), meta)
        return LazyLogits.of(ctx.stage)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 4
        hidden, weight = ctx.saved_tensors
        (shape, (num_classes, size)), needs, stage = ctx.sizes, ctx.needs_input_grad[:3], ctx.stage
        if not graph_is_kept():
            ctx.stage = None  # a loss that is kept keeps no hidden states
        if type(grad) is LazyGradient and grad.is_of(stage):
            return *grad.formed(needs), None
        flat = grad.reshape(-1, num_classes)
        return (
            (flat @ weight).view(shape) if needs[0] else None,
            flat.T @ hidden.reshape(-1, size) if needs[1] else None,
            flat.sum(0) if needs[2] else None,
            None,
        )


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy of lazy logits as a node of the graph, whose gradient waits too."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: LazyLogits,
        target: Tensor,
        ignore_index: int,
        reduction: str,
        label_smoothing: float,
        options: dict[str, Any],
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        stage, head = logits._stage, logits._stage.head
        head.check()
        head.habit.losses += not head.lossed
        head.lossed = True
        ctx.save_for_backward(target)
        ctx.logits = logits
        ctx.keywords = dict(ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing)
        needs = head.needs if ctx.needs_input_grad[0] else [False] * 3
        ctx.leaves = [
            None if t is None else t.detach().requires_grad_(needed)
            for t, needed in zip((head.hidden, head.weight, options["bias"]), needs, strict=True)
        ]
        scale, cap = options["scale"], options["cap"]
        if cap is not None:  # cap·tanh(scale·z), where the op says cap·tanh(logit_scale·z / cap)
            scale *= cap
        with torch.enable_grad(), torch.autocast(target.device.type, enabled=False):
            hidden, weight, bias = ctx.leaves
            rows: Any = stage.rows(hidden)
            loss = linear_cross_entropy(rows, weight, target, bias, logit_scale=scale, softcap=cap, **ctx.keywords)
        ctx.loss = loss
        if not torch.is_autocast_enabled(target.device.type):  # which takes cross-entropies in float32
            loss = loss.to(logits.dtype)
        loss = loss.detach()
        if reduction == "mean":
            loss = torch.where((target != ignore_index).any(), loss, torch.nan)  # the original's mean over nothing
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 6
        (target,), logits, rest = ctx.saved_tensors, ctx.logits, (None,) * 5
        if is_seen_through([grad]):  # to be differentiated again, or by many at once: as the original
            twice = torch.is_grad_enabled()
            with torch._C.DisableTorchFunctionSubclass(), torch.enable_grad():
                loss = F.cross_entropy(logits, target, **ctx.keywords)
            return torch.autograd.grad(loss, logits, grad, create_graph=twice)[0], *rest
        kept = graph_is_kept()
        waiting = _Waiting(ctx.loss, ctx.leaves, grad, kept, logits._stage, target, ctx.keywords)
        if not kept:
            ctx.loss = ctx.leaves = ctx.logits = None
        return LazyGradient.of(waiting, logits._stage), *rest


class _Waiting:
    """A cross-entropy's gradient on its way back through the graph."""

    def __init__(
        self, loss: Tensor, leaves: list[Tensor | None], grad: Tensor, kept: bool, end: _Stage, target: Tensor,
        keywords: dict[str, Any],
    ) -> None:  # fmt: skip
        self.loss, self.leaves, self.grad, self.kept = loss, leaves, grad, kept
        self.end, self.target, self.keywords = end, target, keywords

    def dense(self, stage: _Stage) -> Tensor:
        """The gradient of the logits at `stage`."""
        z = self.end.numbers()
        num_classes = z.shape[-1]
        smoothing = self.keywords["label_smoothing"]
        ignored = self.target == self.keywords["ignore_index"]
        grad = z.softmax(-1, dtype=torch.float64 if z.dtype == torch.float64 else torch.float32)
        grad -= smoothing / num_classes
        index = torch.where(ignored, 0, self.target)[:, None]
        grad.scatter_add_(1, index, grad.new_full((), smoothing - 1).expand_as(index))
        factor = self.grad.to(grad.dtype)
        if self.keywords["reduction"] == "mean":
            factor = factor / (~ignored).sum().clamp(min=1)
        grad = torch.where(ignored[:, None], 0, grad * (factor[:, None] if factor.dim() else factor)).to(z.dtype)
        step: _Stage | None = self.end
        while step is not None and step is not stage:
            grad, step = step.pull_back(grad), step.parent
        return grad


class LazyGradient(OnDemand):
    """The gradient of logits that a cross-entropy left; the head has those of hidden states and weight without it."""

    _waiting: _Waiting
    _stage: _Stage | None

    @staticmethod
    def of(waiting: _Waiting, stage: _Stage) -> "LazyGradient":
        stage = stage.before()
        meta = torch.empty(stage.meta.shape, dtype=stage.meta.dtype, device="meta")
        self = LazyGradient(Values(lambda: waiting.dense(stage), meta), meta, waiting.target.device)
        self._waiting, self._stage = waiting, stage
        return self

    def is_of(self, stage: _Stage) -> bool:
        return self._stage is stage and not self._shared.changed

    def formed(self, needs: Any) -> list[Tensor | None]:
        """Gradients of hidden states, weight and bias."""
        waiting = self._waiting
        wanted = [t for t, needed in zip(waiting.leaves, needs, strict=True) if needed and t is not None]
        grads = iter(
            torch.autograd.grad(waiting.loss, wanted, waiting.grad.to(waiting.loss.dtype), retain_graph=waiting.kept)
        )
        return [next(grads) if needed else None for needed in needs]

    def _view(self, func: Any, args: tuple, kwargs: dict, meta: Tensor) -> OnDemand:
        stage = self._stage
        if stage is not None:
            stage = stage.parent if stage.pulls_back_by(func, args, kwargs) else None
        view = LazyGradient(self._shared, meta, self.device)
        view._waiting, view._stage = self._waiting, None if stage is None else stage.before()
        return view

    def _lazily(self, func: Any, args: tuple, kwargs: dict) -> OnDemand | None:
        stage = self._stage
        if stage is None or stage.parent is None or not stage.pulls_back_by(func, args, kwargs):
            return None
        return LazyGradient.of(self._waiting, stage.parent)


def logits_for_loss(head: nn.Module, hidden: Tensor) -> Tensor:
    """Call a model's head where the model's loss follows, which may need no logits: `LazyLogits` where they serve."""
    logits = _lazily(head, hidden)
    return head(hidden) if logits is None else logits


def _lazily(head: Any, hidden: Tensor) -> Tensor | None:
    """The output of a linear layer as `LazyLogits`; None where only a call of the layer gives what it gives.

    That is so in inference, without gradients, in `mmlm_fast.reference()`, under torch.compile, tracing, torch.func and
    hooks on saved tensors (activation checkpointing around the layer), for layers with hooks, parametrizations,
    adapters or a class of their own, for weights that are sharded, offloaded or another class of tensors, and where the
    logits of earlier steps were read anyway.
    """
    if not head.training or not torch.is_grad_enabled() or using_reference() or torch.compiler.is_compiling():
        return None
    if torch.jit.is_tracing() or not any(is_plain(head, cls) for cls in (nn.Linear, LazyLinear)):
        return None
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return None
    weight, bias = head.weight, head.bias
    if type(hidden) is not Tensor or any(type(t) is not nn.Parameter for t in (weight, bias) if t is not None):
        return None
    parts = [t for t in (hidden, weight, bias) if t is not None]
    if hidden.device.type not in ("cpu", "cuda") or any(t.device != hidden.device or t.is_inference() for t in parts):
        return None
    if hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1] or not any(t.requires_grad for t in parts):
        return None
    if habit_of(head).is_plain() or (weight.requires_grad and _is_few(hidden, weight)):
        return None
    dtype = hidden.dtype
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        if any(t.dtype == torch.float64 for t in parts):
            return None
    elif any(t.dtype != dtype for t in parts) or not dtype.is_floating_point:
        return None
    hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return _LinearLayer.apply(hidden, weight, bias, _Head(head, hidden, weight, bias))


def _is_few(hidden: Tensor, weight: Tensor) -> bool:
    """Whether logits cost less than what a loss without them needs: the weight's gradient in its forward pass.

    That is V·H numbers in float32, and a copy in half precision, where a loss keeps 2·N·V of logits and their softmax.
    """
    half = weight.element_size() == 2 or torch.is_autocast_enabled(hidden.device.type)
    rows = hidden.numel() // weight.shape[1]
    return not _following.few_rows and rows * (1 if half else 2) < weight.shape[1]


class LazyLinear(nn.Linear):
    """The `nn.Linear` that it was, whose output is `LazyLogits` in `logits_on_demand()`.

    `mmlm_fast.accelerate` makes one of a language model's head. In evaluation it is an `nn.Linear` by class too, as
    quantisers look for; a labelled forward pass in training makes it this one again.
    """

    def forward(self, input: Tensor) -> Tensor:
        logits = _lazily(self, input) if _following.loss else None
        return nn.Linear.forward(self, input) if logits is None else logits  # also where it is none any more

    def train(self, mode: bool = True) -> "LazyLinear":
        super().train(mode)
        if not mode and type(self) is LazyLinear:
            self.__class__ = nn.Linear  # type: ignore[assignment]
        return self
