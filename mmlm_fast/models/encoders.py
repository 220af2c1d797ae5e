"""Encoders of all modalities side by side, and how their features become one: for classifiers, dual encoders and
sequence-to-sequence models."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmlm_fast.models.base import MMLMPreTrainedModel
from mmlm_fast.models.configuration import MMLMConfig, width_of
from mmlm_fast.models.features import add_towers, encode_items, join_tokens, last_token, make_projector, masked_mean
from mmlm_fast.models.fusion import MMLMFusion
from mmlm_fast.models.towers import make_tower, tokens_of


@dataclass
class Encoded:
    """Features of one modality.

    Attributes:
        tokens: ``[B, N, H]``, in the width in which modalities meet.
        mask: Bool ``[B, N]``, False where nothing is.
        states: The tower's own, ``[items, tokens, width]``; None where the modality was not given.
    """

    tokens: Tensor
    mask: Tensor
    states: Tensor | None = None

    @property
    def present(self) -> Tensor:
        """Which sample has the modality, bool ``[B]``."""
        return self.mask.any(1)


class MMLMEncoderModel(MMLMPreTrainedModel):
    """Towers of text, pictures and sound, each with a projector."""

    def __init__(self, config: MMLMConfig) -> None:
        super().__init__(config)
        if "text" in (config.modalities or ()):
            text_config: Any = config.text_config
            width = width_of(text_config)
            self.text_tower = make_tower(text_config)
            self.text_projector = nn.Identity() if width == config.hidden_size else make_projector(config, width)
        add_towers(self, config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.text_tower.get_input_embeddings()  # type: ignore[operator]

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_tower.set_input_embeddings(value)  # type: ignore[operator]

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Encoded:
        """Encode texts ``[B, T]``; a row whose mask is all zeros has none."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        mask = mask.bool()
        if input_ids.shape[1] == 0:
            nothing = torch.zeros(*input_ids.shape, width_of(self.config), device=input_ids.device, dtype=self.dtype)
            return Encoded(nothing, mask)
        seen = mask.clone()
        seen[:, 0] |= ~mask.any(1)  # a row that sees nothing is NaN in some attention kernels
        states = tokens_of(self.text_tower, input_ids=input_ids, attention_mask=seen.to(torch.int64))
        return Encoded(self.text_projector(states), mask, states)

    def encode_image(self, pixel_values: Tensor, image_mask: Tensor | None = None) -> Encoded:
        """Encode pictures ``[B, C, H, W]`` or, several a sample or frames of a video, ``[B, F, C, H, W]``."""
        return _encoded(self.vision_tower, self.multi_modal_projector, pixel_values, image_mask, "image")

    def encode_audio(self, input_features: Tensor, audio_mask: Tensor | None = None) -> Encoded:
        """Encode spectrograms ``[B, mel, frames]`` or, in chunks, ``[B, F, mel, frames]``."""
        return _encoded(self.audio_tower, self.audio_projector, input_features, audio_mask, "audio")

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        input_features: Tensor | None = None,
        image_mask: Tensor | None = None,
        audio_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Encoded]:
        """Encode every modality of the model, in the order of `config.modalities`.

        Raises:
            ValueError: for a modality the model lacks, batches of different sizes, or no modality at all.
        """
        given = {"text": input_ids, "image": pixel_values, "audio": input_features}
        masks = {"text": attention_mask, "image": image_mask, "audio": audio_mask}
        modalities: list[str] = self.config.modalities  # type: ignore[assignment]
        sizes = {m: x.shape[0] for m, x in given.items() if x is not None}
        if not sizes:
            raise ValueError(f"pass at least one of {', '.join(modalities)}, got none")
        if len(set(sizes.values())) > 1:
            raise ValueError(f"modalities must have one batch size, got {sizes}; mark missing ones with masks")
        for modality in sizes:
            if modality not in modalities and modality != "text":  # a processor always makes input_ids
                raise ValueError(f"{modality} given, but this model has {', '.join(modalities)}")
        encode = {"text": self.encode_text, "image": self.encode_image, "audio": self.encode_audio}
        encoded = {m: encode[m](given[m], masks[m]) for m in modalities if given[m] is not None}  # type: ignore[arg-type]
        if not encoded:
            raise ValueError(f"pass at least one of {', '.join(modalities)}, got {', '.join(sizes)}")
        like = next(iter(encoded.values())).tokens
        empty = Encoded(like[:, :0], torch.zeros(like.shape[0], 0, dtype=torch.bool, device=like.device))
        return {m: encoded.get(m, empty) for m in modalities}


def _encoded(tower: nn.Module, projector: nn.Module, values: Tensor, mask: Tensor | None, modality: str) -> Encoded:
    states, tokens, present = encode_items(tower, projector, values, mask, modality)
    return Encoded(tokens, present, states)


class MMLMJoin(nn.Module):
    """One sequence of features from those of all modalities, by the fusion of the configuration.

    ``concat``, ``mean``, ``weighted``, ``gated`` and ``attention`` make one feature a sample of pooled ones;
    ``cross_attention`` and ``sequence`` put all tokens end to end, marked by modality. `joint_config`'s encoder reads
    what comes of it: of pooled fusion, the fused feature followed by all tokens.
    """

    def __init__(self, config: MMLMConfig) -> None:
        super().__init__()
        assert config.modalities is not None
        assert config.hidden_size is not None
        self.pooling = config.pooling
        self.pooled = config.fusion_kind.is_pooled
        if self.pooled:
            self.fusion = MMLMFusion(config.fusion, config.hidden_size, len(config.modalities) - 1)
        self.encoder = None
        if config.joint_config is not None:
            self.encoder = make_tower(config.joint_config)  # type: ignore[arg-type]
            embeddings: Any = self.encoder.get_input_embeddings()  # type: ignore[operator]
            if embeddings is not None:  # it reads features, not tokens
                embeddings.requires_grad_(False)
        if self.encoder is not None or not self.pooled:
            self.modality_embeddings = nn.Embedding(len(config.modalities), config.hidden_size)

    def forward(self, encoded: dict[str, Encoded]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Join the features of all modalities.

        Returns:
            ``[B, N, H]``; which are there, bool ``[B, N]``; and the weights of the modalities, ``[B, k]``, where the
            fusion has some.
        """
        weights, parts = None, []
        if self.pooled:
            features = torch.stack([pool(m, e, self.pooling) for m, e in encoded.items()], 1)
            present = torch.stack([e.present for e in encoded.values()], 1)
            fused, weights = self.fusion(features[:, :1], features[:, 1:], present, return_weights=True)
            any_present = present.any(1, keepdim=True)
            weights = None if weights is None else weights[:, 0]
            if self.encoder is None:
                return torch.where(any_present[..., None], fused, 0), any_present, weights
            parts.append((fused, any_present))
        first = next(iter(encoded.values())).tokens
        marks = self.modality_embeddings(torch.arange(len(encoded), device=first.device))
        parts += [(e.tokens + marks[i], e.mask) for i, e in enumerate(encoded.values())]
        tokens, mask = join_tokens(parts)
        if self.encoder is not None:
            limit = getattr(self.encoder.config, "max_position_embeddings", None)
            if limit is not None and tokens.shape[1] > limit:
                raise ValueError(
                    f"text, pictures and sound together must have at most {limit} tokens, which joint_config has "
                    f"positions for, got {tokens.shape[1]}"
                )
            seen = mask.clone()
            seen[:, 0] = True
            tokens = tokens_of(self.encoder, inputs_embeds=tokens, attention_mask=seen.to(torch.int64))
            tokens = torch.where(mask[..., None], tokens, 0)
        return tokens, mask, weights


def pool(modality: str, encoded: Encoded, pooling: str | None) -> Tensor:
    """Make one feature a sample, ``[B, H]``: of text by `pooling`, of all else the mean; zeros for none."""
    if encoded.tokens.shape[1] == 0:
        return encoded.tokens.sum(1)
    of = last_token if pooling == "last" and modality == "text" else masked_mean
    return of(encoded.tokens, encoded.mask)
