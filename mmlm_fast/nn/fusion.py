from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor, nn

from mmlm_fast.nn.plain import is_plain
from mmlm_fast.ops.concat_linear import concat_linear
from mmlm_fast.ops.fuse_modalities import fuse_modalities
from mmlm_fast.ops.parts import num_tokens

DECISIONS = ("mean", "weighted", "vote")


class ConcatLinear(nn.Module):
    """A linear layer over the concatenation of its inputs, with an activation; see `ops.concat_linear`.

    Its parameters, their start and its state dict are those of the ``nn.Linear`` it replaces. It is none itself, so
    that adapters and quantisers, which take an ``nn.Linear`` to be W·x + b of one input, refuse it.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, activation: str = "none") -> None:
        super().__init__()
        self.in_features, self.out_features, self.activation = in_features, out_features, activation
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.Linear.reset_parameters(self)  # type: ignore[arg-type]

    def forward(self, *inputs: Tensor) -> Tensor:
        return concat_linear(inputs, self.weight, self.bias, activation=self.activation)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"activation={self.activation}"
        )


def linear_of_parts(linear: nn.Module, *inputs: Tensor) -> Tensor:
    """Apply `linear` to the concatenation of `inputs`, those with one token broadcast over the tokens of the others.

    The concatenation is only built where `linear` is more, or other, than a plain ``nn.Linear``.
    """
    if is_plain(linear, nn.Linear):
        return concat_linear(inputs, linear.weight, linear.bias)  # type: ignore[arg-type]
    tokens = num_tokens(inputs)
    return linear(torch.cat([x.expand(*x.shape[:-2], tokens, -1) for x in inputs], -1))


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

    @overload
    def forward(
        self, features: Sequence[Tensor], present: Tensor | None = ..., *, return_weights: Literal[False] = ...
    ) -> Tensor: ...

    @overload
    def forward(
        self, features: Sequence[Tensor], present: Tensor | None = ..., *, return_weights: Literal[True]
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def forward(
        self, features: Sequence[Tensor], present: Tensor | None = ..., *, return_weights: bool = ...
    ) -> Tensor | tuple[Tensor, Tensor]: ...

    def forward(
        self, features: Sequence[Tensor], present: Tensor | None = None, *, return_weights: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        parameters = {"weight": self.weight, "bias": self.bias}
        return fuse_modalities(features, self.mode, **parameters, present=present, return_weights=return_weights)

    def extra_repr(self) -> str:
        return f"mode={self.mode}"


class DecisionFusion(nn.Module):
    """Fuse the decisions of one classifier per modality: late fusion, at the level of class probabilities.

    ======== ==================================================================================
    mode     result
    ======== ==================================================================================
    mean     mean of the probabilities of the modalities that are there
    weighted Σ aₘ·pₘ with a = softmax(``weight``) over those that are there; ``weight`` [k] learns
    vote     share of the modalities whose most likely class it is; ties go to the larger mean
             probability (the mean counts for less than a vote); no gradient
    ======== ==================================================================================

    Raises:
        ValueError: for another mode.
    """

    def __init__(self, mode: str = "mean", num_modalities: int = 2) -> None:
        super().__init__()
        if mode not in DECISIONS:
            raise ValueError(f"mode must be one of {', '.join(DECISIONS)}, got {mode!r}")
        self.mode, self.num_modalities = mode, num_modalities
        self.weight = nn.Parameter(torch.zeros(num_modalities)) if mode == "weighted" else None

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.zeros_(self.weight)

    def forward(self, logits: Sequence[Tensor], present: Tensor | None = None) -> Tensor:
        """
        Args:
            logits: One ``[*batch, classes]`` per modality.
            present: Bool ``[*batch, k]``, False where a sample lacks that modality.

        Returns:
            ``[*batch, classes]`` in float32: probabilities, which sum to 1, or zeros where nothing is there.
        """
        if len(logits) != self.num_modalities:
            raise ValueError(f"logits must be {self.num_modalities} tensors, got {len(logits)}")
        likely = [x.float().softmax(-1)[..., None, :] for x in logits]
        there = None if present is None else present[..., None, :]
        if self.mode != "vote":
            weight = None if self.weight is None else self.weight.float()
            return self._fuse(likely, self.mode, weight, there)
        votes = [nn.functional.one_hot(p.argmax(-1), p.shape[-1]).float() for p in likely]
        mean = self._fuse(likely, "mean", None, there)
        # A vote of one modality in k is worth 1/k: half of that, over all classes together, can only break ties.
        share = self._fuse(votes, "mean", None, there) + mean / (2 * self.num_modalities)
        return (share / share.sum(-1, keepdim=True).clamp(min=torch.finfo(share.dtype).tiny)).detach()

    @staticmethod
    def _fuse(features: list[Tensor], mode: str, weight: Tensor | None, present: Tensor | None) -> Tensor:
        return fuse_modalities(features, mode, weight=weight, present=present).squeeze(-2)

    def extra_repr(self) -> str:
        return f"mode={self.mode}"
