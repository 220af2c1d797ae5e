"""Gated MLPs, and activations made of several passes, known by the fingerprints of their forwards."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmlm_fast.hf import proof
from mmlm_fast.hf.changing import (
    OWN_FORWARD,
    change,
    has_own_forward,
    is_changed_by,
    is_eager,
    is_undone,
    original_class,
    subclass,
    why_unreachable,
)
from mmlm_fast.hf.fingerprint import fingerprint
from mmlm_fast.hf.kinds.norms import taken, twin
from mmlm_fast.hf.site import ALREADY, WIDEST, Site, is_small, unless_tiny
from mmlm_fast.nn.plain import is_plain
from mmlm_fast.ops.glu import ACTIVATIONS, bias_act, bias_act_ref, glu
from mmlm_fast.ops.parts import RECORDS
from mmlm_fast.ops.paths import REFERENCE

KIND, ACTIVATION_KIND = "gated MLP", "activation"
_OP = RECORDS["glu"]
_LEAST = _OP.least()
WIDTH = 256  # of the proof: the first neurons of a layer
SAME = 1e-10  # of activations in float64


@dataclass(frozen=True)
class Gated:
    """The parts of ``down(act(gate(x)) · up(x))``.

    Args:
        gate, up, down: Attributes that hold the projections; `up` empty: `gate` gives both, one behind the other.
        activation: Attribute that holds it; "" where it is silu.
        dropout: Attribute that holds what is done before `down`; "" where there is none.
    """

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    activation: str = "act_fn"
    dropout: str = ""


# By the fingerprint of the forward; one of the classes that have it.
GATED = {
    "473b8e5d60b7336f": Gated(),  # LlamaMLP
    "57808748b6b8f6cf": Gated(),  # Qwen2_5_VLMLP
    "0cf93ca12682dbde": Gated("gate_up_proj", "", activation="activation_fn"),  # Phi3MLP
    "39f4974fdaa95517": Gated("w1", "w3", "w2", activation=""),  # Lfm2MLP
    "6dc8163394772485": Gated(dropout="dropout"),  # T5GemmaMLP
    "9bb91b4bcd8f9d40": Gated(activation="activation_fn"),  # Llama4TextMLP
    "fc9d5a8cddc0fd95": Gated("input_linear", "", "output_linear", "activation"),  # GraniteMoeSharedMLP
    "94ac5b1f5f2a90bf": Gated("Wi", "", "Wo", "act", "drop"),  # ModernBertMLP
}
# Activations that are several passes in torch; the others are one there, and stay.
SLOW_ACTIVATIONS = "QuickGELUActivation", "NewGELUActivation", "FastGELUActivation"


def find(model: nn.Module) -> Iterator[Site]:
    """Gated MLPs: activation and product in one pass that keeps its inputs alone."""
    for path, module in model.named_modules():
        cls = original_class(module)
        if cls.__module__.startswith("torch."):
            continue
        layout = GATED.get(fingerprint(cls, "forward") or "")
        if layout is None:
            continue
        site = Site(KIND, path, type(module).__name__, module, op="glu")
        activation = "silu" if not layout.activation else name_of(getattr(module, layout.activation))
        if is_changed_by(module, methods):
            site.reason = ALREADY
        elif activation is None:
            act = getattr(module, layout.activation)
            plain = not isinstance(act, nn.Module) or is_plain(act, type(act))
            why = "there is no op for its activation" if plain else "hooks or a forward of its own has its activation"
            site.reason = f"{why} {type(act).__name__}"
        elif has_own_forward(module):
            site.reason = OWN_FORWARD  # of projections none: adapters and quantised layers are called, not read
        if site.reason is None and activation is not None:
            weight = _weight_of(getattr(module, layout.down))
            site.like = weight
            shape = None if weight is None else (tuple(weight.shape), weight.dtype, weight.device)
            site.alike = (cls, activation, shape)
            site.prove = functools.partial(_prove, module, layout, activation)
            site.apply = functools.partial(_apply, module, layout, activation)
        yield site


def _weight_of(projection: Any) -> Tensor | None:
    """Of a linear layer, or of one with an adapter; None of what keeps it otherwise, or quantised."""
    weight = getattr(projection, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        return None
    return weight.detach() if type(weight.detach()) is Tensor else None


def _apply(module: nn.Module, layout: Gated, activation: str) -> Any:
    return change(module, methods, layout, activation, _kind_of(module, layout))


def _kind_of(module: nn.Module, layout: Gated) -> type | None:
    return type(getattr(module, layout.activation)) if layout.activation else None


def methods(cls: Any, layout: Gated, activation: str, kind: type | None) -> dict[str, Any]:
    """The forward of a gated MLP whose activation, of class `kind`, and product are one pass where that is faster."""
    original = cls.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs or not is_eager() or cls.forward is not original or is_undone(self):
            return cls.forward(self, *args, **kwargs)
        gate = getattr(self, layout.gate)(args[0])
        up = getattr(self, layout.up)(args[0]) if layout.up else None
        act = getattr(self, layout.activation) if layout.activation else nn.functional.silu
        if is_small(_LEAST, gate) or (kind is not None and type(act) is not kind):  # somebody put another one there
            hidden = _by_formula(act, gate, up)
        else:
            hidden = _product(act, activation, gate, up)
        if layout.dropout:
            hidden = getattr(self, layout.dropout)(hidden)
        return getattr(self, layout.down)(hidden)

    return {"forward": unless_tiny(cls, _LEAST // WIDEST, forward)}


def _by_formula(act: Any, gate: Tensor, up: Tensor | None) -> Tensor:
    first, second = gate.chunk(2, dim=-1) if up is None else (gate, up)
    return act(first) * second


def _product(act: Any, activation: str, gate: Tensor, up: Tensor | None) -> Tensor:
    fits = type(gate) is Tensor and gate.dim() > 0 and gate.numel() > 0
    fits = fits and (up is None or (type(up) is Tensor and up.shape == gate.shape and up.dtype == gate.dtype))
    fits = fits and (not isinstance(act, nn.Module) or is_plain(act, type(act)))
    if not fits or _OP.path(gate) == REFERENCE:
        return _by_formula(act, gate, up)
    return glu(gate, up, activation=activation)


@functools.cache
def _grid() -> Tensor:
    with torch.inference_mode(False):
        return torch.linspace(-12, 12, 1025, dtype=torch.float64, device="cpu")


def name_of(activation: Any) -> str | None:
    """The name of the op's activation that a module computes, by what it gives; None where it is none."""
    if not isinstance(activation, nn.Module) or any(True for _ in activation.parameters()):
        return None
    module = type(activation).__module__
    if not module.startswith(("torch.nn.", "transformers.activations")) or not is_plain(activation, type(activation)):
        return None
    return _name_by_value(activation, _key(activation))


def _key(activation: nn.Module) -> tuple:
    settings = {k: v for k, v in vars(activation).items() if not k.startswith("_") and k != "training"}
    return type(activation), tuple(sorted((k, repr(getattr(v, "__name__", v))) for k, v in settings.items()))


_names: dict[tuple, str | None] = {}


def _name_by_value(activation: nn.Module, key: tuple) -> str | None:
    if key not in _names:
        x = _grid()
        found = None
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            values = activation(x.clone())
            for name in ACTIVATIONS:
                same = isinstance(values, Tensor) and values.shape == x.shape and values.dtype == x.dtype
                if same and (values - bias_act_ref(x, None, name)).abs().max() <= SAME:
                    found = name
                    break
        _names[key] = found
    return _names[key]


def _prove(module: nn.Module, layout: Gated, activation: str) -> float:
    """On the first neurons of the layer. Adapters are called by both, so that their weights are no matter here."""
    names = [layout.gate, *([layout.up] if layout.up else []), layout.down]
    found = [_weight_of(getattr(module, name)) for name in names]
    weights = [w for w in found if w is not None]
    if len(weights) < len(names):
        like = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0, dtype=torch.float32))
        shapes = [(64, 64), (64, 64), (64, 64)] if layout.up else [(128, 64), (64, 64)]
        weights = [proof.random(*shape, like=like, scale=0.1, seed=i) for i, shape in enumerate(shapes)]
    size, half = min(WIDTH, weights[-1].shape[1]), weights[0].shape[0] // 2
    packed = [torch.cat([weights[0][:size], weights[0][half : half + size]])]
    weights = [*([w[:size] for w in weights[:-1]] if layout.up else packed), weights[-1][:, :size]]
    cls = original_class(module)
    changed = subclass(cls, methods, layout, activation, _kind_of(module, layout))
    x = proof.random(proof.ROWS, weights[0].shape[1], like=weights[0])

    def made(kind: type, given: tuple) -> Any:
        linears = {n: functools.partial(nn.functional.linear, weight=w) for n, w in zip(names, given, strict=True)}
        return twin(module, kind, linears | _kept(module, layout))

    def exact(x: Tensor, *w: Tensor) -> Tensor:
        first, second = (x @ w[0].T).chunk(2, -1) if not layout.up else (x @ w[0].T, x @ w[1].T)
        return (bias_act_ref(first, None, activation) * second) @ w[-1].T

    return proof.prove(
        lambda x, *w: cls.forward(made(cls, w), x), lambda x, *w: changed.forward(made(changed, w), x), exact,
        [x, *weights],
    )  # fmt: skip


def _kept(module: nn.Module, layout: Gated) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    if layout.activation:
        kept[layout.activation] = getattr(module, layout.activation)
    if layout.dropout:
        kept[layout.dropout] = nn.Identity()
    return kept


def find_activations(model: nn.Module) -> Iterator[Site]:
    """Activations that torch computes in several passes."""
    for path, module in model.named_modules():
        cls = original_class(module)
        if cls.__name__ not in SLOW_ACTIVATIONS or not cls.__module__.startswith("transformers.activations"):
            continue
        site = Site(ACTIVATION_KIND, path, cls.__name__, module, op="glu", alike=cls)
        activation = name_of(twin(module, cls, {}))
        if is_changed_by(module, activation_methods):
            site.reason = ALREADY
        elif activation is None:
            site.reason = "it is no activation that there is an op for"
        else:
            site.reason = why_unreachable(module)
            site.prove = functools.partial(_prove_activation, module, activation)
            site.apply = functools.partial(_apply_activation, module, activation)
        yield site


def _apply_activation(module: nn.Module, activation: str) -> Any:
    return change(module, activation_methods, activation)


def activation_methods(cls: Any, activation: str) -> dict[str, Any]:
    """The forward of an activation that is one pass where that is faster."""
    original = cls.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        ours = len(args) == 1 and not kwargs and is_eager() and cls.forward is original and not is_undone(self)
        found = activated(activation, args[0]) if ours else None
        return cls.forward(self, *args, **kwargs) if found is None else found

    return {"forward": unless_tiny(cls, _LEAST, forward)}


def activated(activation: str, x: Tensor) -> Tensor | None:
    """`activation` of `x`, None where the original is to compute it."""
    fits = type(x) is Tensor and x.dim() > 0 and x.numel() > 0 and not is_small(_LEAST, x)
    if not fits or _OP.path(x) == REFERENCE:
        return None
    return bias_act(x, activation=activation)


def _prove_activation(module: nn.Module, activation: str) -> float:
    cls = original_class(module)
    x = proof.random(proof.ROWS, 64, like=torch.empty(0, dtype=torch.float32), scale=3.0)
    return proof.prove(
        lambda x: cls.forward(twin(module, cls, {}), x),
        lambda x: taken(activated(activation, x)),
        lambda x: bias_act_ref(x, None, activation),
        [x],
    )
