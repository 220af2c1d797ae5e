"""What joins towers and decoder: projectors, token merge, and fusion with pooled features."""

import torch
from torch import Tensor, nn

from mmlm_fast.nn import ConcatLinear, FuseModalities
from mmlm_fast.ops import scatter_features


class MMLMProjector(nn.Module):
    """Two linear layers from a tower's width to the decoder's, as in LLaVA 1.5."""

    def __init__(self, tower_size: int, hidden_size: int, activation: str) -> None:
        super().__init__()
        self.linear_1 = ConcatLinear(tower_size, hidden_size, activation=activation)
        self.linear_2 = ConcatLinear(hidden_size, hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.linear_2(self.linear_1(hidden_states))


class MMLMFusion(nn.Module):
    """Fuse each token embedding with the pooled features of the other modalities."""

    def __init__(self, fusion: str, hidden_size: int, num_modalities: int) -> None:
        super().__init__()
        self.fusion = fusion
        if fusion == "concat":
            self.linear = ConcatLinear((1 + num_modalities) * hidden_size, hidden_size)
        else:
            self.fuse = FuseModalities(fusion, hidden_size, 1 + num_modalities)
            if fusion == "gated":
                self.pool = FuseModalities("mean", hidden_size)

    def forward(self, inputs_embeds: Tensor, context: Tensor, present: Tensor) -> Tensor:
        """
        Args:
            inputs_embeds: ``[B, T, H]``.
            context: Pooled features, ``[B, num_modalities, H]``.
            present: Bool ``[B, num_modalities]``.

        Returns:
            ``[B, T, H]``.
        """
        modalities = list(context.split(1, dim=1))  # [B, 1, H] each: broadcast over the tokens
        if self.fusion == "concat":
            modalities = [torch.where(present[:, i, None, None], x, 0) for i, x in enumerate(modalities)]
            return self.linear(inputs_embeds, *modalities)
        text = torch.ones_like(present[:, :1])
        if self.fusion == "gated":
            modalities = [self.pool(modalities, present[:, None, :])]
            present = present.any(-1, keepdim=True)
        return self.fuse([inputs_embeds, *modalities], torch.cat([text, present], dim=1)[:, None, :])


def merge_tokens(inputs_embeds: Tensor, input_ids: Tensor, token_id: int, features: Tensor, modality: str) -> Tensor:
    """Replace the embeddings of placeholder tokens by features, in order.

    Args:
        inputs_embeds: ``[B, T, H]``.
        input_ids: ``[B, T]``.
        token_id: The placeholder.
        features: ``[num_items, tokens per item, H]``.
        modality: For messages.

    Raises:
        ValueError: on a CPU, if placeholders and feature tokens differ in number. On CUDA looking would stall the
            device: there a device-side assertion fails instead.
    """
    rows = features.reshape(-1, features.shape[-1]).to(inputs_embeds.dtype)
    try:
        return scatter_features(inputs_embeds, input_ids, {token_id: rows})
    except ValueError as error:
        raise ValueError(f"{modality} ({features.shape[0]} items of {features.shape[1]} tokens): {error}") from error
