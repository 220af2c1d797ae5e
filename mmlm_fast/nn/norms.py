from typing import overload

import torch
from torch import Tensor, nn

from mmlm_fast.ops.add_norm import add_norm


class RMSNorm(nn.Module):
    """RMSNorm of transformers' models, alone or fused with the residual addition before it.

    Its state dict is that of LlamaRMSNorm, Qwen2RMSNorm, MllamaTextRMSNorm …, and with ``offset=1`` of Gemma3RMSNorm.

    Args:
        hidden_size: H.
        eps: Under the root.
        offset: Added to the weight: 1 in Gemma, whose weight starts at 0.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-6, *, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((hidden_size,), 1.0 - offset))
        self.eps, self.offset = eps, offset

    @overload
    def forward(self, x: Tensor, residual: None = ...) -> Tensor: ...

    @overload
    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]: ...

    @overload
    def forward(self, x: Tensor, residual: Tensor | None = ...) -> Tensor | tuple[Tensor, Tensor]: ...

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """``[..., H]`` to its norm; with `residual` to the norm of the sum, and the sum."""
        dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
        if self.weight.dtype in (dtype, torch.float32) and (self.offset or self.weight.dtype == dtype):
            out, total = add_norm(x, residual, self.weight, eps=self.eps, offset=self.offset)
        else:  # Llama's promotes where the weight is wider, Gemma's does not
            wide = torch.promote_types(dtype, self.weight.dtype)
            total = x if residual is None else x + residual
            out = add_norm(total.to(wide), None, self.weight.to(wide), eps=self.eps, offset=self.offset)[0]
            out = out.to(dtype) if self.offset else out
        return out if residual is None else (out, total)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}" + (f", offset={self.offset}" if self.offset else "")


class LayerNorm(nn.LayerNorm):
    """``torch.nn.LayerNorm`` over the last dimension, alone or fused with the residual addition before it."""

    @overload
    def forward(self, x: Tensor, residual: None = ...) -> Tensor: ...

    @overload
    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]: ...

    @overload
    def forward(self, x: Tensor, residual: Tensor | None = ...) -> Tensor | tuple[Tensor, Tensor]: ...

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """``[..., H]`` to its norm; with `residual` to the norm of the sum, and the sum."""
        dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
        plain = len(self.normalized_shape) == 1 and (self.weight is None or self.weight.dtype == dtype)
        if plain and tuple(x.shape[-1:]) == self.normalized_shape and not torch.is_autocast_enabled(x.device.type):
            out, total = add_norm(x, residual, self.weight, self.bias, kind="layer", eps=self.eps)
        else:
            total = x if residual is None else x + residual
            out = super().forward(total)
        return out if residual is None else (out, total)
