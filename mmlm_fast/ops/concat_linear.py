"""Linear layer over the concatenation of several inputs, without the concatenation."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mmlm_fast.ops._activations import activate
from mmlm_fast.ops._derivatives import differentiable, recorded, unseen
from mmlm_fast.ops._op import REFERENCE, Op
from mmlm_fast.ops._registry import autocast, check_like, check_tokens, num_tokens, register_op
from mmlm_fast.ops.paths import TORCH

OP = Op(
    "concat_linear",
    native=(),
    kernel_where="where an input of one token is broadcast and the product is small",
    otherwise=TORCH,
)
# Derivative times incoming gradient of each.
_DERIVATIVES: dict[str, Callable] = {
    "none": lambda grad, z: grad,
    "relu": lambda grad, z: torch.ops.aten.threshold_backward(grad, z, 0),
    "gelu": lambda grad, z: torch.ops.aten.gelu_backward(grad, z, approximate="none"),
    "gelu_tanh": lambda grad, z: torch.ops.aten.gelu_backward(grad, z, approximate="tanh"),
    "silu": lambda grad, z: torch.ops.aten.silu_backward(grad, z),
}
ACTIVATIONS = tuple(_DERIVATIVES)


def concat_linear_ref(
    inputs: Sequence[Tensor], weight: Tensor, bias: Tensor | None = None, activation: str = "none"
) -> Tensor:
    tokens = num_tokens(inputs)
    joined = torch.cat([x.expand(*x.shape[:-2], tokens, x.shape[-1]) for x in inputs], dim=-1)
    return activate(F.linear(joined, weight, bias), activation)


def concat_linear(
    inputs: Sequence[Tensor], weight: Tensor, bias: Tensor | None = None, *, activation: str = "none"
) -> Tensor:
    """Apply ``activation([x_1 … x_k] Wᵀ + b)`` without building the concatenation where that costs more than it gains.

    An input with one token is broadcast over the tokens of the others (a pooled modality beside a sequence) and is
    multiplied once per sample, not once per token. Several inputs with all tokens are concatenated.

    Args:
        inputs: k ≥ 1 tensors ``[*batch, T or 1, K_i]``, float32 / float16 / bfloat16 (float64 on CPU).
        weight: ``[N, ΣK_i]``, as in ``nn.Linear``, columns in the order of `inputs`.
        bias: ``[N]`` or None.
        activation: One of ``none``, ``relu``, ``gelu`` (erf), ``gelu_tanh``, ``silu``.

    Returns:
        ``[*batch, T, N]`` in the dtype of the inputs. The kernel, which CUDA takes for small products beside broadcast
        inputs, accumulates in float32 and rounds once. Under autocast everything is cast first, as torch's linear does.

    Raises:
        ValueError: for shapes, dtypes or devices that do not go together, or an unknown activation.

    Source: the feature-level fusion ``Linear(concat(features))`` of multimodal models.
    """
    if activation not in _DERIVATIVES:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if isinstance(inputs, Tensor):
        raise ValueError("inputs must be a sequence of tensors, got one tensor: use [x]")
    weight, bias, *inputs = autocast(weight, bias, *inputs)  # type: ignore[assignment]
    check_tokens("inputs", list(inputs))
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise ValueError(f"weight must be [N, sum of input sizes], got {getattr(weight, 'shape', type(weight))}")
    num_out = weight.shape[0]
    if num_out == 0:
        raise ValueError(f"weight must have at least one row, got shape {tuple(weight.shape)}")
    check_like("weight", weight, inputs[0], (num_out, sum(x.shape[-1] for x in inputs)))
    if bias is not None:
        check_like("bias", bias, inputs[0], (num_out,))
    if OP.path(inputs[0]) == REFERENCE:
        return concat_linear_ref(inputs, weight, bias, activation)
    # Not asked of the context in forward: Dynamo gives it none where nothing needs a gradient.
    keeps = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (weight, bias, *inputs))
    return recorded(_ConcatLinear, activation, keeps, weight, bias, *inputs)


def _segments(inputs: Sequence[Tensor], tokens: int) -> tuple[list[tuple[Tensor, int]], list[tuple[Tensor, int]]]:
    """(input, first weight column) of the inputs with all tokens, and of those that broadcast."""
    full: list[tuple[Tensor, int]] = []
    pooled: list[tuple[Tensor, int]] = []
    offset = 0
    for x in inputs:
        (pooled if x.shape[-2] != tokens else full).append((x, offset))
        offset += x.shape[-1]
    return full, pooled


def _columns(weight: Tensor, segments: list[tuple[Tensor, int]]) -> Tensor:
    """The weight columns of some segments: a view where they are neighbours."""
    runs: list[list[int]] = []
    for x, offset in segments:
        if runs and runs[-1][1] == offset:
            runs[-1][1] += x.shape[-1]
        else:
            runs.append([offset, offset + x.shape[-1]])
    parts = [weight[:, first:last] for first, last in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _preactivation(inputs: list[Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
    full, pooled = _segments(inputs, num_tokens(inputs))
    # One GEMM over the inputs that have all tokens: on a CPU a chain of accumulating GEMMs reads and writes the
    # output once more for each input, which costs what the concatenation costs, and rounds once more.
    joined = full[0][0] if len(full) == 1 else torch.cat([x for x, _ in full], dim=-1)
    columns = _columns(weight, full)
    if not pooled:
        return F.linear(joined, columns, bias)
    # The few rows of broadcast inputs in float32, rounded once, then the starting value of the GEMM's sums.
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    joined_pooled = torch.cat([x for x, _ in pooled], dim=-1)
    addend = F.linear(
        joined_pooled.to(wide), _columns(weight, pooled).to(wide), None if bias is None else bias.to(wide)
    )
    shape = (*joined.shape[:-1], weight.shape[0])
    rows = addend.to(weight.dtype).expand(shape).reshape(-1, weight.shape[0])
    return torch.addmm(rows, joined.reshape(-1, joined.shape[-1]), columns.T).view(shape)


def _portable_fwd(
    inputs: list[Tensor], weight: Tensor, bias: Tensor | None, activation: str, save_preactivation: bool
) -> tuple[Tensor, Tensor]:
    z = _preactivation(inputs, weight, bias)
    if activation == "none":
        return z, z.new_empty(0)
    return activate(z, activation), z if save_preactivation else z.new_empty(0)


def _portable_bwd(
    grad: Tensor, inputs: list[Tensor], weight: Tensor, preactivation: Tensor, activation: str, needed: list[bool]
) -> list[Tensor]:
    dz = grad if activation == "none" else _DERIVATIVES[activation](grad, preactivation)
    rows = dz.reshape(-1, weight.shape[0])
    tokens = num_tokens(inputs)
    per_sample = dz.sum(-2, keepdim=True) if any(x.shape[-2] != tokens for x in inputs) else dz

    needs_weight, needs_bias, *needs_inputs = needed
    nothing = grad.new_empty(0)
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format) if needs_weight else nothing
    dinputs, offset = [], 0
    for x, needs in zip(inputs, needs_inputs, strict=True):
        columns = slice(offset, offset + x.shape[-1])
        offset += x.shape[-1]
        dz_x = dz if x.shape[-2] == tokens else per_sample
        dinputs.append(dz_x @ weight[:, columns] if needs else nothing)
        if needs_weight:
            dz_rows, x_rows = dz_x.reshape(-1, weight.shape[0]), x.reshape(-1, x.shape[-1])
            torch.mm(dz_rows.T, x_rows, out=dweight[:, columns])
    dbias = rows.sum(0) if needs_bias else nothing
    return [dweight, dbias, *dinputs]


def _fake_fwd(inputs, weight, bias, activation, save_preactivation):
    out = inputs[0].new_empty((*inputs[0].shape[:-2], num_tokens(inputs), weight.shape[0]))
    keeps = save_preactivation and activation != "none"
    return out, torch.empty_like(out) if keeps else out.new_empty(0)


def _fake_bwd(grad, inputs, weight, preactivation, activation, needed):
    like = [weight, weight.new_empty(weight.shape[0]), *inputs]
    return [t.new_empty(t.shape) if needs else t.new_empty(0) for t, needs in zip(like, needed, strict=True)]


# Multiply-adds of the inputs with all tokens, from which on cuBLAS gains more than the kernel saves in launches and
# passes over the output (measured on an H100, see CONTRIBUTING).
LARGE_PRODUCT = 2**35


def _kernel_takes(
    inputs: list[Tensor], weight: Tensor, bias: Tensor | None, activation: str, save_preactivation: bool
) -> bool:
    """Where an input broadcasts, and the product is small; a concatenation costs less than cuBLAS gains."""
    full, pooled = _segments(inputs, num_tokens(inputs))
    return bool(pooled) and sum(x.numel() for x, _ in full) * weight.shape[0] < LARGE_PRODUCT


_fwd = register_op("concat_linear_fwd", portable=_portable_fwd, kernel_takes=_kernel_takes, fake=_fake_fwd)
# `needed` and the result are in the order weight, bias, inputs; what is not needed comes back empty.
_bwd = register_op("concat_linear_bwd", portable=_portable_bwd, kernel=None, fake=_fake_bwd)


def _again(ctx, grads, weight, preactivation, bias, *inputs):
    bias = unseen(weight.shape[:1], weight) if bias is None else bias
    z = concat_linear_ref(inputs, weight, bias)
    if ctx.activation != "none":  # with the value that was kept: a frozen bias was not
        z = activate(preactivation + (z - z.detach()), ctx.activation)
    return (z,), (None, None, weight, bias, *inputs)


class _ConcatLinear(torch.autograd.Function):
    @staticmethod
    # `*args` for all: without gradients Dynamo takes a call with as many arguments as forward has names, `ctx` among
    # them, for one of the form without a context.
    def forward(ctx, *args):
        ctx.set_materialize_grads(False)
        activation, keeps, weight, bias, *inputs = args
        out, preactivation = _fwd(list(inputs), weight, bias, activation, keeps)
        ctx.activation = activation
        # Second derivatives alone depend on the bias, and only behind an activation.
        bends = bias is not None and bias.requires_grad and activation != "none"
        ctx.save_for_backward(weight, preactivation, bias if bends else None, *inputs)
        return out

    @staticmethod
    @differentiable(_again)
    def backward(ctx, grad):
        weight, preactivation, _, *inputs = ctx.saved_tensors
        needed = list(ctx.needs_input_grad[2:])
        grads = _bwd(grad, inputs, weight, preactivation, ctx.activation, needed)
        return None, None, *(g if needs else None for g, needs in zip(grads, needed, strict=True))
