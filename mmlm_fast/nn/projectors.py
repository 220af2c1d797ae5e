"""From the patches of a vision tower to the tokens of a decoder."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from mmlm_fast.nn.loading import rename
from mmlm_fast.nn.mlp import activation_of
from mmlm_fast.nn.norms import LayerNorm, RMSNorm
from mmlm_fast.nn.plain import is_plain
from mmlm_fast.ops import bias_act, norm_pixel_shuffle, patch_merge


class LlavaProjector(nn.Module):
    """``linear_2(act(linear_1(x)))``, with the state dict of LlavaMultiModalProjector.

    Args:
        vision_size: Width of the tower (of all layers taken).
        text_size: Width of the decoder.
        activation: transformers' name.
        bias: Of both.
    """

    def __init__(self, vision_size: int, text_size: int, activation: str = "gelu", *, bias: bool = True) -> None:
        super().__init__()
        self.activation = activation_of(activation)
        self.linear_1 = nn.Linear(vision_size, text_size, bias=bias)
        self.linear_2 = nn.Linear(text_size, text_size, bias=bias)

    def forward(self, image_features: Tensor) -> Tensor:
        """``[..., vision_size]`` to ``[..., text_size]``."""
        return self.linear_2(bias_act(self.linear_1(image_features), activation=self.activation))


class IdeficsProjector(nn.Module):
    """Pixel shuffle and one matrix, with the state dict of Idefics3Connector and SmolVLMConnector.

    Args:
        vision_size, text_size: Widths.
        scale_factor: Patches joined along each side.
    """

    def __init__(self, vision_size: int, text_size: int, scale_factor: int) -> None:
        super().__init__()
        self.scale_factor = scale_factor
        self.modality_projection = nn.ModuleDict(
            {"proj": nn.Linear(vision_size * scale_factor**2, text_size, bias=False)}
        )

    def forward(self, image_hidden_states: Tensor) -> Tensor:
        """A square of patches ``[B, N, vision_size]`` to ``[B, N/scale_factor², text_size]``."""
        x = norm_pixel_shuffle(_square(image_hidden_states), self.scale_factor)
        return self.modality_projection["proj"](x)


class InternVLProjector(nn.Module):
    """Pixel shuffle, layer norm and MLP: InternVLModel's pixel_shuffle and its multi_modal_projector, whose state dict.

    Args:
        vision_size, text_size: Widths.
        factor: Patches joined along each side: 1/downsample_ratio.
        activation: transformers' name.
        eps: Of the layer norm.
    """

    def __init__(
        self, vision_size: int, text_size: int, factor: int = 2, activation: str = "gelu", *, eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.factor, self.activation = factor, activation_of(activation)
        self.layer_norm = nn.LayerNorm(vision_size * factor**2, eps=eps)
        self.linear_1 = nn.Linear(vision_size * factor**2, text_size)
        self.linear_2 = nn.Linear(text_size, text_size)

    def forward(self, image_features: Tensor) -> Tensor:
        """A square of patches ``[B, N, vision_size]``, or a grid ``[B, height, width, vision_size]``, to tokens."""
        x = image_features if image_features.dim() == 4 else _square(image_features)
        norm = self.layer_norm
        if is_plain(norm, nn.LayerNorm):
            x = norm_pixel_shuffle(
                x, self.factor, weight=norm.weight, bias=norm.bias, norm="layer", norm_at="after", eps=norm.eps
            )
        else:
            x = norm(norm_pixel_shuffle(x, self.factor))
        return self.linear_2(bias_act(self.linear_1(x), activation=self.activation))


class PatchMerger(nn.Module):
    """Qwen-VL's merger: norm, the patches of a square joined, MLP.

    Its own names are Qwen3-VL's; the state dicts of Qwen2-VL's and Qwen2.5-VL's PatchMerger (``ln_q``, ``mlp.0``,
    ``mlp.2``) load too.

    Args:
        hidden_size: Width of the tower.
        out_size: Width of the decoder.
        spatial_merge_size: Patches joined along each side.
        norm: ``layer`` (Qwen2-VL, Qwen3-VL) or ``rms`` (Qwen2.5-VL).
        norm_at: ``before``, or ``after`` (Qwen3-VL's deepstack).
        eps: Of the norm.
    """

    def __init__(
        self,
        hidden_size: int,
        out_size: int,
        spatial_merge_size: int = 2,
        *,
        norm: str = "layer",
        norm_at: str = "before",
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        joined = hidden_size * spatial_merge_size**2
        if norm not in ("layer", "rms") or norm_at not in ("before", "after"):
            raise ValueError(f"norm must be layer or rms, before or after, got {norm!r}, {norm_at!r}")
        self.kind, self.norm_at, self.factor = norm, norm_at, spatial_merge_size
        width = joined if norm_at == "after" else hidden_size
        self.norm = LayerNorm(width, eps=eps) if norm == "layer" else RMSNorm(width, eps)
        self.linear_fc1 = nn.Linear(joined, joined)
        self.linear_fc2 = nn.Linear(joined, out_size)

    def forward(self, x: Tensor, sizes: Sequence[tuple[int, int]] | None = None) -> Tensor:
        """Packed patches ``[N, hidden_size]`` to ``[N/merge², out_size]``.

        `sizes`: (height, width) of each picture where patches are row by row; None: those of a square are neighbours.
        """
        norm = self.norm
        if is_plain(norm, LayerNorm if self.kind == "layer" else RMSNorm):
            x = patch_merge(
                x, self.factor, sizes, weight=norm.weight, bias=getattr(norm, "bias", None), norm=self.kind,
                norm_at=self.norm_at, eps=norm.eps,
            )  # fmt: skip
        elif self.norm_at == "before":
            x = patch_merge(norm(x), self.factor, sizes)
        else:
            x = norm(patch_merge(x, self.factor, sizes))
        return self.linear_fc2(bias_act(self.linear_fc1(x), activation="gelu"))

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        for old, new in (("ln_q", "norm"), ("mlp.0", "linear_fc1"), ("mlp.2", "linear_fc2")):
            rename(state_dict, prefix, old, new)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"factor={self.factor}, norm={self.kind} {self.norm_at}"


def _square(x: Tensor) -> Tensor:
    side = round(x.shape[1] ** 0.5) if x.dim() == 3 else 0
    if x.dim() != 3 or side * side != x.shape[1]:
        raise ValueError(f"features must be a square of patches [B, side², size], got {tuple(x.shape)}")
    return x.unflatten(1, (side, side))
