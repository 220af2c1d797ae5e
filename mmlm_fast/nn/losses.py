"""Losses as layers: of language modelling without logits, and contrastive ones with their temperature."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from mmlm_fast import distributed as together
from mmlm_fast.ops.clip_loss import clip_loss
from mmlm_fast.ops.linear_cross_entropy import linear_cross_entropy
from mmlm_fast.ops.siglip_loss import siglip_loss


class LinearCrossEntropyLoss(nn.Module):
    """`linear_cross_entropy` with its options; `forward` takes hidden states, weight, target and bias.

    Args: see `mmlm_fast.ops.linear_cross_entropy`.
    """

    def __init__(
        self,
        *,
        ignore_index: int | None = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        shift: bool = False,
        chunk_mib: float | None = None,
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = {
            "ignore_index": ignore_index,
            "reduction": reduction,
            "label_smoothing": label_smoothing,
            "z_loss": z_loss,
            "softcap": softcap,
            "logit_scale": logit_scale,
            "shift": shift,
            "chunk_mib": chunk_mib,
        }

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        num_items_in_batch: int | float | Tensor | None = None,
    ) -> Tensor:
        return linear_cross_entropy(hidden, weight, target, bias, num_items_in_batch=num_items_in_batch, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class _Contrastive(nn.Module):
    """The temperature, as CLIP and SigLIP keep it: the logarithm of the scale."""

    def __init__(
        self, init_scale: float, max_scale: float | None, distributed: bool, exchange: str, group: Any, options: dict
    ) -> None:
        super().__init__()
        if not (init_scale > 0 and (max_scale is None or max_scale >= init_scale)):
            raise ValueError(f"init_scale must be positive and at most max_scale, got {init_scale} and {max_scale}")
        if exchange not in together.EXCHANGES:
            raise ValueError(f"exchange must be one of {', '.join(together.EXCHANGES)}, got {exchange!r}")
        self.logit_scale = nn.Parameter(torch.empty(()))
        self.init_scale = init_scale
        self.max_scale, self.distributed = max_scale, distributed
        self.exchange, self.group, self.options = exchange, group, options
        _Contrastive.reset_parameters(self)

    def reset_parameters(self) -> None:
        nn.init.constant_(self.logit_scale, math.log(self.init_scale))

    def scale(self) -> Tensor:
        """exp of `logit_scale`, which is clipped in place while training, as CLIP does."""
        if self.training and self.max_scale is not None:
            with torch.no_grad():
                self.logit_scale.clamp_(max=math.log(self.max_scale))
        return self.logit_scale.float().exp()

    def _keywords(self, positive_ids: Any) -> dict[str, Any]:
        if not self.distributed:
            return {"positive_ids": positive_ids}
        return {"positive_ids": positive_ids, "exchange": self.exchange, "group": self.group, **self.options}

    def extra_repr(self) -> str:
        return f"max_scale={self.max_scale}, distributed={self.distributed}, exchange={self.exchange!r}"


class ClipLoss(_Contrastive):
    """CLIP's loss with its learnable temperature, over all processes where there are several.

    Args:
        init_scale: exp of the parameter `logit_scale` at the start.
        max_scale: Its bound; None: none.
        distributed: Use torch.distributed where it runs with more than one process; for `exchange`, `group`, and the
            options `averaged_by_ddp`, `sizes`, `timeout_seconds` see `mmlm_fast.distributed.clip_loss`.
    """

    def __init__(
        self,
        *,
        init_scale: float = 1 / 0.07,
        max_scale: float | None = 100.0,
        distributed: bool = True,
        exchange: str = "gather",
        group: Any = None,
        **options: Any,
    ) -> None:
        super().__init__(init_scale, max_scale, distributed, exchange, group, options)

    def forward(self, image_features: Tensor, text_features: Tensor, positive_ids: Any = None) -> Tensor:
        """Features ``[N, D]``, normalised; see `mmlm_fast.ops.clip_loss`."""
        function = together.clip_loss if self.distributed else clip_loss
        return function(image_features, text_features, self.scale(), **self._keywords(positive_ids))


class SiglipLoss(_Contrastive):
    """SigLIP's loss with its learnable temperature and bias, over all processes where there are several.

    Args:
        init_scale: exp of the parameter `logit_scale` at the start.
        init_bias: The parameter `logit_bias` at the start.
        max_scale, distributed, exchange, group, options: As in `ClipLoss`.
    """

    def __init__(
        self,
        *,
        init_scale: float = 10.0,
        init_bias: float = -10.0,
        max_scale: float | None = None,
        distributed: bool = True,
        exchange: str = "ring",
        group: Any = None,
        **options: Any,
    ) -> None:
        super().__init__(init_scale, max_scale, distributed, exchange, group, options)
        self.init_bias = init_bias
        self.logit_bias = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.constant_(self.logit_bias, self.init_bias)

    def forward(self, image_features: Tensor, text_features: Tensor, positive_ids: Any = None) -> Tensor:
        """Features ``[N, D]``, normalised; see `mmlm_fast.ops.siglip_loss`."""
        function = together.siglip_loss if self.distributed else siglip_loss
        bias = self.logit_bias.float()
        return function(image_features, text_features, self.scale(), bias, **self._keywords(positive_ids))
