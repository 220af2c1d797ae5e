"""Gated activations act(gate + bias)·up, and the activation alone, in one pass that keeps only its inputs."""

import torch
from torch import Tensor

from mmlm_fast.ops._activations import activate
from mmlm_fast.ops._derivatives import differentiable, recorded
from mmlm_fast.ops._native import address, as_rows, core, floats, num_rows, number_type, rows
from mmlm_fast.ops._op import REFERENCE, Op
from mmlm_fast.ops._registry import check_floating, register_op
from mmlm_fast.ops.add_norm import check_parameters

OP = Op("glu", smallest=2**18, functions=("glu", "bias_act"))
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "quick_gelu", "relu")  # in the order of the native core


def glu_ref(gate: Tensor, up: Tensor | None = None, activation: str = "silu", bias: Tensor | None = None) -> Tensor:
    """See `glu`; without `bias` and with `up` None the halves of `gate`."""
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
    return bias_act_ref(gate, bias, activation) * up


def bias_act_ref(x: Tensor, bias: Tensor | None = None, activation: str = "gelu") -> Tensor:
    return activate(x if bias is None else x + bias.to(x.dtype), activation)


def glu(gate: Tensor, up: Tensor | None = None, *, activation: str = "silu") -> Tensor:
    """Compute act(gate)·up.

    Args:
        gate: ``[..., H]``; or, where `up` is None, ``[..., 2H]`` with the gate in front and `up` behind it.
        up: Like `gate`, or None.
        activation: ``silu`` (SwiGLU), ``gelu`` (erf), ``gelu_tanh`` (GEGLU), ``quick_gelu`` (x·σ(1.702x)), ``relu``.

    Returns:
        ``[..., H]`` in the dtype of the inputs, computed in float32 and rounded once. Kept for the backward pass: the
        inputs; the activation is computed again.

    Raises:
        ValueError: for shapes, dtypes or devices that do not go together, or an unknown activation.

    Source: Shazeer 2020, "GLU Variants Improve Transformer"; transformers' LlamaMLP, Gemma3MLP, Phi3MLP (packed).
    """
    _check(gate, activation, "gate")
    if up is None:
        if gate.shape[-1] % 2:
            raise ValueError(f"gate without up must be [..., 2H], got shape {tuple(gate.shape)}")
    else:
        check_floating("up", up)
        if up.shape != gate.shape or up.dtype != gate.dtype or up.device != gate.device:
            raise ValueError(
                f"up must be {tuple(gate.shape)}, {gate.dtype} on {gate.device}, got {tuple(up.shape)}, {up.dtype} on "
                f"{up.device}"
            )
    if OP.path(gate) == REFERENCE:
        return glu_ref(gate, up, activation)
    return recorded(_Glu, gate, up, None, activation, up is None)


def bias_act(x: Tensor, bias: Tensor | None = None, *, activation: str = "gelu") -> Tensor:
    """Compute act(x + bias).

    Args:
        x: ``[..., H]``.
        bias: ``[H]`` in the dtype of `x` or float32, or None.
        activation: As in `glu`.

    Returns:
        Like `x`, computed in float32 and rounded once. Kept for the backward pass: `x` and `bias`.

    Raises:
        ValueError: as `glu`.

    Source: the MLP of CLIP (quick_gelu), SigLIP (gelu_tanh), Whisper and BERT (gelu).
    """
    _check(x, activation, "x")
    check_parameters(x, x.shape[-1], bias=bias)
    if OP.path(x) == REFERENCE:
        return bias_act_ref(x, bias, activation)
    return recorded(_Glu, x, None, bias, activation, False)


def _check(x: Tensor, activation: str, name: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    check_floating(name, x)
    if x.dim() < 1 or x.shape[-1] == 0:
        raise ValueError(f"{name} must be [..., H] with H of at least 1, got shape {tuple(x.shape)}")


def _native_fwd(gate: Tensor, up: Tensor | None, bias: Tensor | None, activation: str) -> Tensor:
    g, u, out = as_rows(gate), None if up is None else as_rows(up), gate.new_empty(gate.shape)
    bias = floats(bias)
    core().glu_fwd(
        number_type(gate), ACTIVATIONS.index(activation), num_rows(gate), gate.shape[-1], rows(g), rows(u),
        address(bias), rows(out), torch.get_num_threads(),
    )  # fmt: skip
    return out


def _native_bwd(
    grad: Tensor, gate: Tensor, up: Tensor | None, bias: Tensor | None, activation: str, packed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dgate, dup, views = empty_gradients(gate, up, packed)
    g, u, d = as_rows(gate), None if up is None else as_rows(up), as_rows(grad)
    wide = floats(bias)
    dbias = None if bias is None else gate.new_zeros(bias.shape, dtype=torch.float32)
    core().glu_bwd(
        number_type(gate), ACTIVATIONS.index(activation), num_rows(gate), gate.shape[-1], rows(g), rows(u),
        address(wide), rows(d), rows(views[0]), rows(views[1]), address(dbias), torch.get_num_threads(),
    )  # fmt: skip
    return dgate, dup, gate.new_empty(0) if dbias is None or bias is None else dbias.to(bias.dtype)


def empty_gradients(
    gate: Tensor, up: Tensor | None, packed: bool
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor | None]]:
    """What `glu_bwd` returns, and the rows of both in it: one tensor holds both where they came packed."""
    size = gate.shape[-1]
    dgate = gate.new_empty((*gate.shape[:-1], 2 * size if packed else size))
    dup = gate.new_empty(0) if up is None or packed else torch.empty_like(dgate)
    if packed:
        return dgate, dup, (dgate[..., :size], dgate[..., size:])
    return dgate, dup, (dgate, None if up is None else dup)


def _fake_bwd(grad, gate, up, bias, activation, packed):
    dgate, dup, _ = empty_gradients(gate, up, packed)
    return dgate, dup, gate.new_empty(0) if bias is None else bias.new_empty(bias.shape)


_fwd = register_op("glu_fwd", native=_native_fwd, fake=lambda gate, up, bias, activation: gate.new_empty(gate.shape))
# Result: gradient of gate (of both where they are packed), of up, of bias; empty where there is none.
_bwd = register_op("glu_bwd", native=_native_bwd, fake=_fake_bwd)


def _again(ctx, grads, gate, up, bias):
    alone = up is None and not ctx.packed
    out = bias_act_ref(gate, bias, ctx.activation) if alone else glu_ref(gate, up, ctx.activation)
    return (out,), (gate, up, bias)


class _Glu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, bias, activation, packed):
        ctx.set_materialize_grads(False)
        ctx.activation, ctx.packed = activation, packed
        ctx.save_for_backward(gate, up, bias)
        if packed:
            gate, up = gate.chunk(2, dim=-1)
        return _fwd(gate, up, bias, activation)

    @staticmethod
    @differentiable(_again)
    def backward(ctx, grad):
        gate, up, bias = ctx.saved_tensors
        has_up = up is not None
        if ctx.packed:
            gate, up = gate.chunk(2, dim=-1)
        dgate, dup, dbias = _bwd(grad, gate, up, bias, ctx.activation, ctx.packed)
        return dgate, dup if has_up else None, None if bias is None else dbias, None, None
