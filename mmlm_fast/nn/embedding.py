from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from mmlm_fast.ops.merge_embeddings import merge_embeddings
from mmlm_fast.ops.patch_embed import patch_embed


class MergedEmbedding(nn.Module):
    """An embedding that puts features in the place of placeholder tokens; see `ops.merge_embeddings`.

    Its weight, the weight's start and its state dict are those of the ``nn.Embedding`` it replaces. It is none itself,
    so that adapters, which add to the embedding of every token, refuse it.

    Args:
        num_embeddings, embedding_dim, padding_idx: As in ``nn.Embedding``.
        scale: Of the text embeddings (√H in Gemma).
    """

    def __init__(
        self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None, *, scale: float = 1.0
    ) -> None:
        super().__init__()
        embedding = nn.Embedding(num_embeddings, embedding_dim, padding_idx)
        self.weight = embedding.weight
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx, self.scale = embedding.padding_idx, scale

    def forward(self, input_ids: Tensor, features: Mapping[int, Tensor] | None = None) -> Tensor:
        """``[*batch, S]`` and rows by placeholder token, cast to the weight's dtype, to ``[*batch, S, H]``."""
        features = {token: rows.to(self.weight.dtype) for token, rows in (features or {}).items()}
        return merge_embeddings(input_ids, self.weight, features, scale=self.scale, padding_idx=self.padding_idx)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, padding_idx={self.padding_idx}, scale={self.scale}"


class PatchEmbedding(nn.Module):
    """Patches of 8-bit pictures through the convolution of a vision tower; see `ops.patch_embed`.

    Its state dict is that of the ``Conv2d``, or of the ``Conv3d`` over two equal frames (Qwen-VL), it replaces.

    Args:
        in_channels, out_channels, patch_size: Of the convolution, whose stride is its size.
        mean, std, rescale: Of the image processor.
        temporal_patch_size: Frames of a ``Conv3d``'s weight; None: a ``Conv2d``.
        bias: Whether it has one.
        channels_last: Pictures are ``[B, height, width, C]``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        patch_size: int,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        rescale: float = 1 / 255,
        temporal_patch_size: int | None = None,
        bias: bool = True,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        if temporal_patch_size is None:
            conv: nn.Module = nn.Conv2d(in_channels, out_channels, patch_size, patch_size, bias=bias)
        else:
            size = (temporal_patch_size, patch_size, patch_size)
            conv = nn.Conv3d(in_channels, out_channels, size, size, bias=bias)
        self.weight: nn.Parameter = conv.weight  # type: ignore[assignment]
        self.bias: nn.Parameter | None = conv.bias if bias else None  # type: ignore[assignment]
        self.mean, self.std, self.rescale = tuple(mean), tuple(std), rescale
        self.channels_last = channels_last

    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 ``[B, C, height, width]`` to ``[B, patches, out_channels]``, row by row."""
        return patch_embed(
            pixels, self.weight, self.bias, mean=self.mean, std=self.std, rescale=self.rescale,
            channels_last=self.channels_last,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"weight={tuple(self.weight.shape)}"
