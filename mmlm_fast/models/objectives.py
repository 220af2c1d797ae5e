"""What the thin model may be trained on beside language modelling: alignment of modalities, and reconstruction."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmlm_fast.models.configuration import width_of
from mmlm_fast.models.features import ITEM_DIMS
from mmlm_fast.nn import ClipLoss, SiglipLoss

CONTRASTIVE_LOSSES = {"clip": ClipLoss, "siglip": SiglipLoss}


class MMLMAlignment(nn.Module):
    """Contrastive alignment of each modality with the text of its sample.

    Args:
        hidden_size: Of the pooled features.
        projection_dim: Of the space in which they meet.
        loss: ``clip`` or ``siglip``; over all processes of torch.distributed.
        modalities: Names of those beside the text.
    """

    def __init__(self, hidden_size: int, projection_dim: int, loss: str, modalities: list[str]) -> None:
        super().__init__()
        self.text_projection = nn.Linear(hidden_size, projection_dim, bias=False)
        self.projections = nn.ModuleDict({m: nn.Linear(hidden_size, projection_dim, bias=False) for m in modalities})
        self.losses = nn.ModuleDict({m: CONTRASTIVE_LOSSES[loss]() for m in modalities})

    def embed(self, modality: str, features: Tensor) -> Tensor:
        """Project and normalise pooled features ``[B, H]`` of ``text`` or another modality."""
        projection = self.text_projection if modality == "text" else self.projections[modality]
        return F.normalize(projection(features), dim=-1)

    def forward(self, text: Tensor, pooled: dict[str, Tensor], present: dict[str, Tensor | None]) -> Tensor:
        """Compute the loss of pooled features ``[B, H]``; see `loss`."""
        return self.loss(self.embed("text", text), {m: self.embed(m, x) for m, x in pooled.items()}, present)

    def loss(
        self,
        text: Tensor,
        others: dict[str, Tensor],
        present: dict[str, Tensor | None],
        positive_ids: Tensor | None = None,
    ) -> Tensor:
        """Compute the loss of embeddings.

        Args:
            text: Embeddings ``[B, projection_dim]``.
            others: The same of each modality given.
            present: Bool ``[B]``, or None: all; samples without a modality take no part in its loss (finding their
                number makes a GPU wait).
            positive_ids: Integers ``[B]``; see `clip_loss`.

        Returns:
            Mean of the losses of the modalities given; 0 without any.
        """
        losses = []
        for modality, embeds in others.items():
            mine, ids, mask = text, positive_ids, present[modality]
            if mask is not None:
                embeds, mine = embeds[mask], mine[mask]
                ids = None if ids is None else ids[mask]
            losses.append(self.losses[modality](embeds, mine, ids))
        return torch.stack(losses).mean() if losses else text.sum() * 0


class MMLMReconstruction(nn.Module):
    """Patches of pictures and stretches of sound, hidden from the tower, predicted from what it makes of the rest.

    Source: SimMIM (Xie et al. 2022) for pictures; the same along time for sound.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.mask_ratio = config.mask_ratio
        vision, audio = config.vision_config, config.audio_config
        if vision is not None:
            self.patch_size = vision.patch_size
            self.image_head = nn.Linear(width_of(vision), vision.num_channels * self.patch_size**2)
        if audio is not None:
            self.frames_per_token = config.audio_frames_per_token
            self.audio_head = nn.Linear(width_of(audio), audio.num_mel_bins * self.frames_per_token)

    def forward(self, given: dict[str, tuple[nn.Module, Tensor, Tensor | None]], like: Tensor) -> Tensor:
        """Compute the mean error over modalities.

        Args:
            given: Of each modality the tower, its values (see `encode_items`), and which are there.
            like: Any tensor of the graph, for the 0 of a batch without modalities.
        """
        errors = []
        for modality, (tower, values, mask) in given.items():
            dims = ITEM_DIMS[modality]
            items = values.flatten(0, values.dim() - dims - 1)
            items = items if mask is None else items[mask.flatten()]
            errors.append((self.images if modality == "image" else self.audio)(tower, items))
        return torch.stack(errors).mean() if errors else like.sum() * 0

    def images(self, tower: nn.Module, pixel_values: Tensor) -> Tensor:
        """Compute the mean squared error over the hidden patches of pictures ``[N, C, height, width]``."""
        size = self.patch_size
        if pixel_values.shape[-1] % size or pixel_values.shape[-2] % size:
            raise ValueError(
                f"pictures to reconstruct must have sides that are multiples of {size}, got "
                f"{tuple(pixel_values.shape[-2:])}"
            )
        patches = F.pixel_unshuffle(pixel_values, size)  # [N, C·size², rows, columns]
        hidden = self._draw(patches[:, 0])
        masked = pixel_values.masked_fill(_enlarged(hidden, size)[:, None], 0)
        states = tower(masked, return_dict=True).last_hidden_state[:, -hidden[0].numel() :]  # a class token comes first
        return _masked_error(self.image_head(states), patches.flatten(2).mT, hidden.flatten(1))

    def audio(self, tower: nn.Module, input_features: Tensor) -> Tensor:
        """Compute the mean squared error over the hidden stretches of spectrograms ``[N, mel, frames]``."""
        count, mel, frames = input_features.shape
        step = self.frames_per_token
        if frames % step:
            raise ValueError(
                f"input_features must have a multiple of {step} frames (audio_frames_per_token), got {frames}"
            )
        target = input_features.mT.reshape(count, frames // step, step * mel)
        hidden = self._draw(target[..., 0])
        masked = input_features.masked_fill(hidden.repeat_interleave(step, 1)[:, None], 0)
        states = tower(masked, return_dict=True).last_hidden_state
        if states.shape[1] != hidden.shape[1]:
            raise ValueError(
                f"the audio tower makes {states.shape[1]} tokens of {frames} frames: audio_frames_per_token must be "
                f"{frames // states.shape[1]}, got {step}"
            )
        return _masked_error(self.audio_head(states), target, hidden)

    def _draw(self, like: Tensor) -> Tensor:
        return torch.rand(like.shape, device=like.device) < self.mask_ratio


def _enlarged(mask: Tensor, size: int) -> Tensor:
    return mask.repeat_interleave(size, -1).repeat_interleave(size, -2)


def _masked_error(predicted: Tensor, target: Tensor, hidden: Tensor) -> Tensor:
    error = (predicted.float() - target.float()).square().mean(-1)
    return torch.where(hidden, error, 0).sum() / hidden.sum().clamp(min=1)


def pooled_by_sample(features: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Average the features of each sample's pictures or clips.

    Args:
        features: ``[num_items, tokens per item, H]``, in the order of the samples.
        tokens: Bool ``[B, T]``: the samples' placeholders.

    Returns:
        ``[B, H]``, zeros for samples without; and which have one, bool ``[B]``.
    """
    num_items, length = features.shape[:2]
    counts = tokens.sum(1) // max(1, length)
    samples = torch.arange(len(counts), device=features.device)
    owner = torch.repeat_interleave(samples, counts, output_size=num_items)
    share = (owner[None, :] == samples[:, None]).to(features.dtype) / counts.clamp(min=1)[:, None].to(features.dtype)
    return share @ features.mean(1), counts > 0
