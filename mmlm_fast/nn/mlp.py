from typing import Any

from torch import Tensor, nn

from mmlm_fast.nn.loading import join, rename, split
from mmlm_fast.ops import bias_act, glu

# transformers' names (`hidden_act`) for the activations of `ops.glu`.
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
}


def activation_of(name: str) -> str:
    """The op's name of an activation by transformers' name.

    Raises:
        ValueError: if there is no such op.
    """
    if name not in _ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(_ACTIVATIONS)}, got {name!r}")
    return _ACTIVATIONS[name]


class GatedMLP(nn.Module):
    """``down_proj(act(gate_proj(x)) · up_proj(x))``: SwiGLU (silu) and GEGLU (gelu_pytorch_tanh, gelu).

    Its state dict is that of LlamaMLP, Qwen2MLP, Gemma3MLP …; one with a joined ``gate_up_proj`` (Phi3MLP) loads too,
    into either layout.

    Args:
        hidden_size, intermediate_size: Widths.
        activation: transformers' name.
        bias: Of all projections.
        packed: Keep ``gate_up_proj`` in one matrix: one product in place of two.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        activation: str = "silu",
        *,
        bias: bool = False,
        packed: bool = False,
    ) -> None:
        super().__init__()
        self.activation, self.packed = activation_of(activation), packed
        if packed:
            self.gate_up_proj = nn.Linear(hidden_size, 2 * intermediate_size, bias=bias)
        else:
            self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
            self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., hidden_size]`` to the same."""
        if self.packed:
            return self.down_proj(glu(self.gate_up_proj(x), activation=self.activation))
        return self.down_proj(glu(self.gate_proj(x), self.up_proj(x), activation=self.activation))

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        parts = ("gate_proj", "up_proj")
        if self.packed:
            join(state_dict, prefix, tuple(f"{p}." for p in parts), "gate_up_proj.")
        else:
            split(state_dict, prefix, "gate_up_proj.", tuple(f"{p}." for p in parts))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"activation={self.activation}"


class MLP(nn.Module):
    """``fc2(act(fc1(x)))``: the MLP of CLIP (quick_gelu), SigLIP (gelu_pytorch_tanh), Qwen2-VL and Qwen3-VL's tower.

    Its state dict is that of CLIPMLP; ``linear_fc1`` and ``linear_fc2`` load too.

    Args:
        hidden_size, intermediate_size: Widths.
        activation: transformers' name.
        bias: Of both.
    """

    def __init__(
        self, hidden_size: int, intermediate_size: int, activation: str = "gelu", *, bias: bool = True
    ) -> None:
        super().__init__()
        self.activation = activation_of(activation)
        self.fc1 = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.fc2 = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., hidden_size]`` to the same."""
        return self.fc2(bias_act(self.fc1(x), activation=self.activation))

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        rename(state_dict, prefix, "linear_fc1", "fc1")
        rename(state_dict, prefix, "linear_fc2", "fc2")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"activation={self.activation}"
