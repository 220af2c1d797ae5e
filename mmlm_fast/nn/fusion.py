from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmlm_fast.ops import concat_linear, fuse_modalities


class ConcatLinear(nn.Linear):
    """``nn.Linear`` over the concatenation of its inputs, with an activation; see `ops.concat_linear`.

    Its state dict is that of the ``nn.Linear`` it replaces. Called with one tensor it is that linear layer.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, activation: str = "none") -> None:
        super().__init__(in_features, out_features, bias)
        self.activation = activation

    def forward(self, *inputs: Tensor) -> Tensor:  # type: ignore[override]
        return concat_linear(inputs, self.weight, self.bias, activation=self.activation)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"


class FuseModalities(nn.Module):
    """Fuse one feature per modality; see `ops.fuse_modalities` for the modes and the formulas.

    Parameters by mode: ``weighted`` has ``weight`` [k], starting equal; ``attention`` has the query ``weight`` [H];
    ``gated`` has ``weight`` [H, 2H] and ``bias`` [H]; ``mean`` has none.
    """

    def __init__(self, mode: str, hidden_size: int, num_modalities: int = 2) -> None:
        super().__init__()
        shapes = {"weighted": (num_modalities,), "attention": (hidden_size,), "gated": (hidden_size, 2 * hidden_size)}
        self.mode = mode
        self.weight = nn.Parameter(torch.empty(shapes[mode])) if mode in shapes else None
        self.bias = nn.Parameter(torch.empty(hidden_size)) if mode == "gated" else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.weight is not None and self.mode == "weighted":
            nn.init.zeros_(self.weight)
        elif self.weight is not None:
            nn.init.normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, features: Sequence[Tensor], present: Tensor | None = None) -> Tensor:
        out = fuse_modalities(features, self.mode, weight=self.weight, bias=self.bias, present=present)
        assert isinstance(out, Tensor)
        return out

    def extra_repr(self) -> str:
        return f"mode={self.mode}"
