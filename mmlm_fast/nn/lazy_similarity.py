"""Similarities of two sets of features that are computed when something reads them; a contrastive loss does not."""

from typing import Any

import torch
from torch import Tensor, nn

from mmlm_fast.nn.on_demand import Habit, OnDemand, Values, habit_of
from mmlm_fast.ops.clip_loss import clip_loss
from mmlm_fast.ops.paths import is_transformed, using_reference
from mmlm_fast.ops.siglip_loss import siglip_loss

_PLAIN = (Tensor, nn.Parameter)
_TIMES = {torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__}
_PLUS = {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__}


class _Waiting(OnDemand):
    """Whose views and copies in another dtype wait as well: what mixed precision makes of a model's outputs."""

    def _view(self, func: Any, args: tuple, kwargs: dict, meta: Tensor) -> OnDemand:
        return _Waiting(self._shared, meta, self.device)

    def _lazily(self, func: Any, args: tuple, kwargs: dict) -> OnDemand | None:
        if func is not torch.ops.aten._to_copy.default or args or not set(kwargs) <= {"dtype", "non_blocking"}:
            return None
        meta = func(self._meta, **kwargs)
        return _Waiting(Values(lambda: func(self.read(), **kwargs), meta), meta, self.device)


class LazySimilarity(_Waiting):
    """scale·a·bᵀ + bias ``[N, N]`` that nothing has read yet.

    It is a tensor of the graph: what reads it gets the numbers of the forward pass, computed once, and its gradient
    goes to features, scale and bias. The product with a tensor of one number and then the sum with another one wait as
    well; what else is done with it reads it.
    """

    _features: tuple[Tensor, Tensor]  # a and bᵀ
    _scale: Tensor | None
    _bias: Tensor | None
    _habit: Habit

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if (func in _TIMES or func in _PLUS) and len(args) == 2 and not kwargs:
            this, other = args if type(args[0]) is LazySimilarity else args[::-1]
            if type(this) is LazySimilarity and this._takes(other, func in _TIMES):
                scale, bias = (other, None) if func in _TIMES else (this._scale, other)
                return _similarity(*this._features, scale, bias, this._habit)
        return super().__torch_function__(func, types, args, kwargs)

    def _takes(self, other: Any, is_factor: bool) -> bool:
        free = self._bias is None and (self._scale is None or not is_factor)
        if not free or not self._is_unread() or type(other) not in _PLAIN or not torch.is_grad_enabled():
            return False
        one = other.numel() == 1 and other.dim() <= 2 and other.is_floating_point()
        return one and other.device == self.device and not using_reference()

    def _is_unread(self) -> bool:
        return self._shared.tensor is None

    def clip_loss(self) -> Tensor | None:
        """Half the sum of the cross-entropies of rows and of columns, to their own; None where it takes the numbers."""
        if not self._is_unread() or self._bias is not None:
            return None
        a, b_t = self._features
        scale = 1.0 if self._scale is None else self._scale.reshape(())
        self._habit.losses += 1
        loss = clip_loss(a, b_t.t(), scale)
        return loss if torch.is_autocast_enabled(self.device.type) else loss.to(self.dtype)

    def siglip_loss(self) -> Tensor | None:
        """Minus the sum of log σ(±similarity), + of pairs on the diagonal, over N; None where it takes the numbers."""
        if not self._is_unread() or self._scale is None or self._bias is None:
            return None
        a, b_t = self._features
        self._habit.losses += 1
        loss = siglip_loss(a, b_t.t(), self._scale.reshape(()), self._bias.reshape(()))
        return loss.to(torch.promote_types(self.dtype, torch.get_default_dtype()))


def similarity(module: nn.Module, a: Tensor, b_t: Tensor) -> LazySimilarity | None:
    """``a @ b_t`` where a contrastive loss of `module` follows; None where only the product itself serves.

    That is so in evaluation, without gradients, in `mmlm_fast.reference()`, under torch.compile, tracing, torch.func
    and hooks on saved tensors, for other classes of tensors, and where the logits of earlier steps were read anyway.
    """
    if not module.training or not torch.is_grad_enabled() or using_reference() or torch.compiler.is_compiling():
        return None
    if (
        torch.jit.is_tracing()
        or is_transformed()
        or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    ):
        return None
    if type(a) not in _PLAIN or type(b_t) not in _PLAIN or a.dim() != 2 or b_t.dim() != 2:
        return None
    if a.shape != b_t.shape[::-1] or a.device != b_t.device or a.device.type not in ("cpu", "cuda") or a.numel() == 0:
        return None
    if not (a.requires_grad or b_t.requires_grad) or a.is_inference() or b_t.is_inference():
        return None
    habit = habit_of(module)
    if habit.is_plain():
        return None
    if torch.is_autocast_enabled(a.device.type) and a.dtype != torch.float64 != b_t.dtype:
        dtype = torch.get_autocast_dtype(a.device.type)
        a, b_t = a.to(dtype), b_t.to(dtype)
    if a.dtype != b_t.dtype or not a.dtype.is_floating_point:
        return None
    return _similarity(a, b_t, None, None, habit)


def _similarity(a: Tensor, b_t: Tensor, scale: Tensor | None, bias: Tensor | None, habit: Habit) -> LazySimilarity:
    made = _Similarity.apply(a, b_t, scale, bias, habit)
    made._features, made._scale, made._bias, made._habit = (a, b_t), scale, bias, habit
    return made


def _formula(a: Tensor, b_t: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    logits = torch.matmul(a, b_t)
    logits = logits if scale is None else logits * scale
    return logits if bias is None else logits + bias


class _Similarity(torch.autograd.Function):
    """The product as a node of the graph whose output waits."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b_t: Tensor, scale: Tensor | None, bias: Tensor | None, habit: Habit
    ) -> LazySimilarity:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(a, b_t, scale, bias)
        parts = [None if t is None else t.detach() for t in (a, b_t, scale, bias)]
        versions = [None if t is None else t._version for t in (a, b_t, scale, bias)]

        def numbers() -> Tensor:
            habit.reads += 1
            if [None if t is None else t._version for t in parts] != versions:
                raise RuntimeError(
                    "these logits were not computed in the forward pass, whose loss needed none, and the features they "
                    "are made of were changed in place since: read them before"
                )
            return _formula(*parts)  # type: ignore[arg-type]

        meta = _formula(*(None if t is None else t.to("meta") for t in parts))  # type: ignore[arg-type]
        return LazySimilarity(Values(numbers, meta), meta, a.device)  # type: ignore[return-value]

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:4]
        if grad is None:
            return (None,) * 5
        twice = torch.is_grad_enabled()  # the gradient is to be differentiated in turn
        parts: Any = ctx.saved_tensors
        if not twice:
            parts = [t if t is None else t.detach().requires_grad_(n) for t, n in zip(parts, needs, strict=True)]
        with torch.enable_grad(), torch.autocast(grad.device.type, enabled=False):
            logits = _formula(*parts)
        wanted = [t for t, needed in zip(parts, needs, strict=True) if needed]
        grads = iter(torch.autograd.grad(logits, wanted, grad, create_graph=twice))
        return *(next(grads) if needed else None for needed in needs), None
