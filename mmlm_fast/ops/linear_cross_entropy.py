"""Cross-entropy of a linear layer's output, without the output: logits exist for a few rows at a time."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmlm_fast.ops._derivatives import differentiable, recorded
from mmlm_fast.ops._formed import formed_dtype, wide, with_formed_gradients
from mmlm_fast.ops._native import core, rows
from mmlm_fast.ops._op import LOSS_TYPES, REFERENCE, Op
from mmlm_fast.ops._registry import autocast, check_floating, check_like, looked_at, register_op

OP = Op("linear_cross_entropy", native=LOSS_TYPES, smallest=2**15, counts="logits")
REDUCTIONS = ("mean", "sum", "none")
# Of the logits at hand at once. On a CPU larger is no faster; on a GPU matrix products need some hundred rows.
CHUNK_MIB = {"cpu": 96, "cuda": 0}  # 0: as many rows as cost no memory beside the weight's gradient
COLUMNS = 512  # of one product with a part of the vocabulary: MKL is up to 1.4 times faster than over all of it


def linear_cross_entropy_ref(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    num_items_in_batch: Any = None,
) -> Tensor:
    """`hidden` ``[N, H]``, `target` ``[N]``, shifted already."""
    logits = F.linear(hidden, weight, bias).to(wide(hidden)) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    ignored = torch.zeros_like(target, dtype=torch.bool) if ignore_index is None else target == ignore_index
    log_probs = logits.log_softmax(-1)
    nll = -log_probs.gather(-1, torch.where(ignored, 0, target)[:, None])[:, 0]
    loss = nll
    if label_smoothing:  # else 0 times the infinity of a class that is ruled out
        loss = (1 - label_smoothing) * nll - label_smoothing * log_probs.mean(-1)
    if z_loss:
        loss = loss + z_loss * logits.logsumexp(-1).square()
    loss = torch.where(ignored, 0, loss)
    if reduction == "none":
        return loss
    return loss.sum() / _denominator(ignored, reduction, num_items_in_batch)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    shift: bool = False,
    num_items_in_batch: int | float | Tensor | None = None,
    chunk_mib: float | None = None,
) -> Tensor:
    """Compute the cross-entropy of softcap(logit_scale·(hidden·Wᵀ + b)) with `target`, chunk by chunk.

    The gradients are formed in the same pass, so nothing of the size of the logits is kept or computed twice (except
    with reduction ``none``, whose backward pass computes them again).

    Args:
        hidden: ``[*batch, H]``, float32 / float16 / bfloat16 / float64.
        weight: ``[V, H]``, as in ``nn.Linear``; same dtype. Under autocast everything is cast first.
        target: int64 ``[*batch]``: classes in [0, V), or `ignore_index`.
        bias: ``[V]`` or None.
        ignore_index: Rows with this target count nowhere, whatever `hidden` holds there, and are not computed. None:
            there are none; on CUDA the products then go to cuBLAS.
        reduction: ``mean`` over the rows that count, ``sum``, or ``none`` (``[*batch]``, 0 where ignored).
        label_smoothing: In [0, 1); as in ``F.cross_entropy``.
        z_loss: Weight of logsumexp², added to each row's loss (PaLM, Chowdhery et al. 2022).
        softcap: cap·tanh(logits / cap), as in Gemma 2; None: no cap.
        logit_scale: Factor of the logits, before the cap (Cohere; 1 / ``logits_scaling`` of Granite).
        shift: Token t predicts target t + 1, along the last dimension of `target`, as causal language models do.
        num_items_in_batch: Divides the sum, in place of the count of ``mean`` (gradient accumulation in transformers).
        chunk_mib: Memory for logits at hand, MiB; default 96 on CPU. On CUDA all at once where
            they take no more memory than a sum of the weight's gradients in float32 over several chunks would, plus
            512 MiB; else half of that sum, at least 512.

    Returns:
        Loss in float32 (float64 for float64): a scalar, or ``[*batch]``. Arithmetic on logits is in float32. With no
        row that counts the loss is 0 and so are the gradients. A half-precision weight's gradient is summed in float32.

    Raises:
        ValueError: for shapes, dtypes or devices that do not go together, options out of range, and, on a CPU, for
            targets out of range. On CUDA looking would stall the device: there a device-side assertion fails.

    Source: Wijmans et al. 2024 (Cut your losses); Hsu et al. 2024 (Liger kernel: gradients in the forward pass).
    """
    hidden, weight, bias = autocast(hidden, weight, bias)  # type: ignore[assignment]
    _check(hidden, weight, target, bias)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive or None, got {softcap}")
    if num_items_in_batch is not None and reduction == "none":
        raise ValueError("num_items_in_batch divides a sum: got reduction 'none'")
    if chunk_mib is not None and not chunk_mib > 0:
        raise ValueError(f"chunk_mib must be positive, got {chunk_mib}")
    shape = target.shape
    if shift:
        if target.dim() < 1:
            raise ValueError("shift needs a dimension of tokens, got a scalar target")
        if ignore_index is None:
            raise ValueError("shift leaves the last token without a target: ignore_index must be an int, got None")
        target = F.pad(target[..., 1:], (0, 1), value=ignore_index)[..., : shape[-1]]
    x, target = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1)
    ignored, target = _checked_target(target, weight.shape[0], ignore_index)
    skip = None if ignore_index is None else ignored
    options: dict[str, Any] = dict(
        label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap, logit_scale=logit_scale
    )
    if OP.path(x, x.shape[0] * weight.shape[0], fits=x.numel() > 0) == REFERENCE:
        loss = _plain(
            x, weight, target, bias, skip, reduction=reduction, num_items_in_batch=num_items_in_batch, **options
        )
        return loss.view(shape) if reduction == "none" else loss
    numbers = [float(v) for v in (logit_scale, softcap or 0.0, label_smoothing, z_loss)]
    mib = chunk_mib if chunk_mib is not None else CHUNK_MIB.get(x.device.type, 96)
    budget = max(1, int(mib * 2**20)) if mib else 0
    if reduction == "none":
        return recorded(_Rows, x, weight, bias, target, skip, numbers, budget).view(shape)
    factor = _denominator(ignored, reduction, num_items_in_batch).reciprocal()

    def forward(inputs: tuple, needed: list[bool]) -> tuple[Tensor, list[Tensor]]:
        losses, *formed = _fwd(*inputs, target, skip, None, factor, numbers, needed, budget)
        return losses.sum() * factor, formed

    return with_formed_gradients("linear_cross_entropy", forward, x, weight, bias)


def _plain(
    x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, skip: Tensor | None, **options: Any
) -> Tensor:
    """The reference; of the rows to skip it sees nothing."""
    if skip is not None:
        x, target = torch.where(skip[:, None], 0, x), torch.where(skip, -1, target)
    return linear_cross_entropy_ref(x, weight, target, bias, ignore_index=-1, **options)


def _check(hidden: Any, weight: Any, target: Any, bias: Tensor | None) -> None:
    check_floating("hidden", hidden)
    if hidden.dim() < 1 or hidden.shape[-1] == 0:
        raise ValueError(f"hidden must be [*batch, H] with H of at least 1, got shape {tuple(hidden.shape)}")
    if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.shape[0] == 0:
        raise ValueError(
            f"weight must be [V, H] with V of at least 1, got {tuple(getattr(weight, 'shape', ())) or type(weight)}"
        )
    check_like("weight", weight, hidden, (weight.shape[0], hidden.shape[-1]))
    if bias is not None:
        check_like("bias", bias, hidden, (weight.shape[0],))
    if not isinstance(target, Tensor) or target.dtype != torch.int64:
        raise ValueError(f"target must be an int64 tensor, got {getattr(target, 'dtype', type(target).__name__)}")
    if target.shape != hidden.shape[:-1] or target.device != hidden.device:
        raise ValueError(
            f"target must be {tuple(hidden.shape[:-1])} on {hidden.device}, got {tuple(target.shape)} on "
            f"{target.device}"
        )


def _checked_target(target: Tensor, num_classes: int, ignore_index: int | None) -> tuple[Tensor, Tensor]:
    """Which rows are ignored, and targets that can be read at: 0 where ignored."""
    ignored = torch.zeros_like(target, dtype=torch.bool) if ignore_index is None else target == ignore_index
    bad = ~ignored & ((target < 0) | (target >= num_classes))
    wanted = f"target must be in [0, {num_classes})" + ("" if ignore_index is None else f" or {ignore_index}")
    if target.device.type == "cpu" and not torch.compiler.is_compiling():
        found = looked_at(bad)
        if found.any():
            raise ValueError(f"{wanted}, got {int(looked_at(target)[found][0])} ({int(found.sum())} out of range)")
    else:
        torch._assert_async(~bad.any(), f"mmlm_fast.linear_cross_entropy: {wanted}")
    return ignored, torch.where(ignored | bad, 0, target)


def _denominator(ignored: Tensor, reduction: str, num_items: Any) -> Tensor:
    if num_items is not None:
        if isinstance(num_items, Tensor):
            given = num_items.to(device=ignored.device, dtype=torch.float32).reshape(())
        else:
            given = torch.full((), num_items, dtype=torch.float32, device=ignored.device)
        return torch.where(ignored.all(), 1, given)  # of no rows at all transformers counts none
    if reduction == "sum":
        return torch.ones((), dtype=torch.float32, device=ignored.device)
    return (~ignored).sum().clamp(min=1).float()


def chunks_of(num_rows: int, bytes_per_row: int, budget: int) -> int:
    """Rows of a chunk: about equal chunks within the budget, a multiple of 16."""
    most = max(16, budget // bytes_per_row // 16 * 16)
    count = max(1, -(-num_rows // most))
    return max(16, min(most, (-(-num_rows // count) + 15) // 16 * 16))


def _native_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignored: Tensor | None,
    row_factor: Tensor | None,
    factor: Tensor,
    numbers: list[float],
    needed: list[bool],
    budget: int,
) -> list[Tensor]:
    """Losses ``[N]`` and gradients of x, weight and bias; `row_factor` ``[N]`` and `factor` multiply the gradients."""
    num_rows, vocab = x.shape[0], weight.shape[0]
    needs_x, needs_weight, needs_bias = needed
    losses = x.new_zeros(num_rows, dtype=torch.float32)
    dx = x.new_zeros(x.shape if needs_x else 0, dtype=formed_dtype(x))
    dweight = x.new_zeros(weight.shape if needs_weight else 0, dtype=torch.float32)
    dbias = x.new_zeros(vocab if needs_bias else 0, dtype=torch.float32)
    kept = None if ignored is None else (~ignored).nonzero()[:, 0]
    if kept is not None and len(kept) == num_rows:
        kept = None
    count = num_rows if kept is None else len(kept)
    step = chunks_of(count, 4 * vocab, budget)
    buffer = x.new_empty(min(step, count), vocab, dtype=torch.float32)
    bias = None if bias is None else bias.float()
    parts = [(v, min(vocab, v + COLUMNS)) for v in range(0, vocab, COLUMNS)]
    for first in range(0, count, step):
        where = slice(first, first + step) if kept is None else kept[first : first + step]
        rows_x, y = x[where].float(), target[where].contiguous()
        logits = buffer[: len(rows_x)]
        for v, end in parts:
            columns, out = weight[v:end].float().T, logits[:, v:end]
            if bias is None:
                torch.mm(rows_x, columns, out=out)
            else:
                torch.addmm(bias[v:end], rows_x, columns, out=out)
        loss = torch.empty_like(y, dtype=torch.float32)
        ones = None
        if any(needed):
            ones = torch.ones_like(loss) if row_factor is None else row_factor[where].float().contiguous()
        scale, softcap, label_smoothing, z_loss = numbers
        core().linear_cross_entropy_rows(
            len(y), vocab, rows(logits), y.data_ptr(), (scale, softcap, label_smoothing, z_loss),
            0 if ones is None else ones.data_ptr(), loss.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        losses[where] = loss
        if needs_x:
            dx[where] = _times(logits, weight).mul_(factor).to(dx.dtype)
        if needs_weight:
            dweight.addmm_(logits.T, rows_x)
        if needs_bias:
            dbias += logits.sum(0)
    return [losses, dx, *(g.mul_(factor).to(formed_dtype(weight)) for g in (dweight, dbias))]


def _times(a: Tensor, b: Tensor) -> Tensor:
    """a·b in float32; a half-precision b is converted a part at a time."""
    if b.dtype == torch.float32:
        return a @ b
    out = a.new_zeros(a.shape[0], b.shape[1])
    for v in range(0, b.shape[0], 8 * COLUMNS):
        out.addmm_(a[:, v : v + 8 * COLUMNS], b[v : v + 8 * COLUMNS].float())
    return out


def _fake_fwd(x, weight, bias, target, ignored, row_factor, factor, numbers, needed, budget):
    likes = [x, weight, weight.new_empty(weight.shape[0])]
    formed = [
        t.new_empty(t.shape if needs else 0, dtype=formed_dtype(t)) for t, needs in zip(likes, needed, strict=True)
    ]
    return [x.new_empty(x.shape[0], dtype=torch.float32), *formed]


_fwd = register_op("linear_cross_entropy_fwd", native=_native_fwd, fake=_fake_fwd)


def _again(ctx, grads, x, weight, bias, target, skip):
    scale, softcap, label_smoothing, z_loss = ctx.numbers
    loss = _plain(
        x, weight, target, bias, skip, reduction="none", logit_scale=scale, softcap=softcap or None,
        label_smoothing=label_smoothing, z_loss=z_loss,
    )  # fmt: skip
    return (loss,), (x, weight, bias)


class _Rows(torch.autograd.Function):
    """One loss a row: what each row's gradient is multiplied by is known in the backward pass only."""

    @staticmethod
    def forward(ctx, x, weight, bias, target, ignored, numbers, budget):
        ctx.set_materialize_grads(False)
        ctx.numbers, ctx.budget = numbers, budget
        ctx.save_for_backward(x, weight, bias, target, ignored)
        one = torch.ones((), dtype=torch.float32, device=x.device)
        return _fwd(x, weight, bias, target, ignored, None, one, numbers, [False] * 3, budget)[0]

    @staticmethod
    @differentiable(_again)
    def backward(ctx, grad):
        x, weight, bias, target, ignored = ctx.saved_tensors
        needed = list(ctx.needs_input_grad[:3])
        one = torch.ones((), dtype=torch.float32, device=x.device)
        _, *grads = _fwd(x, weight, bias, target, ignored, grad.contiguous(), one, ctx.numbers, needed, ctx.budget)
        likes = (x, weight, bias)
        return *(g.to(t.dtype) if n else None for g, t, n in zip(grads, likes, needed, strict=True)), *[None] * 4
