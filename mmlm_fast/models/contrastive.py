"""Dual encoder: text, pictures and sound in one space, for matching, retrieval and search."""

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_outputs import ModelOutput
from transformers.utils import can_return_tuple

from mmlm_fast.models.base import MMLMPreTrainedModel
from mmlm_fast.models.configuration import MMLMConfig
from mmlm_fast.models.encoders import Encoded, MMLMEncoderModel
from mmlm_fast.models.features import masked_mean
from mmlm_fast.models.objectives import MMLMAlignment
from mmlm_fast.nn import SiglipLoss


@dataclass
class MMLMContrastiveOutput(ModelOutput):
    """What a dual encoder gives for B samples; embeddings are normalised, zeros where a sample lacks the modality.

    Attributes:
        loss: Mean of the losses image–text and audio–text of those given.
        text_embeds, image_embeds, audio_embeds: ``[B, projection_dim]``.
        logits_per_image, logits_per_audio: ``[B, B]``, rows the modality, columns the texts.
    """

    loss: Tensor | None = None
    text_embeds: Tensor | None = None
    image_embeds: Tensor | None = None
    audio_embeds: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_audio: Tensor | None = None


class MMLMForContrastive(MMLMPreTrainedModel):
    """CLIP-like training of text with pictures, with sound, or with both. `fusion` plays no part."""

    def __init__(self, config: MMLMConfig) -> None:
        super().__init__(config)
        assert config.hidden_size is not None
        others = [m for m in config.modalities or () if m != "text"]
        if not others or "text" not in (config.modalities or ()):
            raise ValueError(f"a dual encoder needs text and another modality, got {config.modalities}")
        self.model = MMLMEncoderModel(config)
        self.alignment = MMLMAlignment(config.hidden_size, config.projection_dim, config.contrastive_loss, others)
        self.post_init()

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Embed texts: normalised ``[B, projection_dim]``, as those of the two functions below."""
        return self._embed("text", self.model.encode_text(input_ids, attention_mask))

    def get_image_features(self, pixel_values: Tensor, image_mask: Tensor | None = None) -> Tensor:
        return self._embed("image", self.model.encode_image(pixel_values, image_mask))

    def get_audio_features(self, input_features: Tensor, audio_mask: Tensor | None = None) -> Tensor:
        return self._embed("audio", self.model.encode_audio(input_features, audio_mask))

    def _embed(self, modality: str, encoded: Encoded) -> Tensor:
        pooled = masked_mean(encoded.tokens, encoded.mask)
        return self.alignment.embed(modality, pooled) * encoded.present[:, None]

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        input_features: Tensor | None = None,
        image_mask: Tensor | None = None,
        audio_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        positive_ids: Tensor | None = None,
        return_loss: bool = True,
        **kwargs: Any,
    ) -> MMLMContrastiveOutput:
        """Embed samples and compare them. Inputs are those of `MMLMEncoderModel`.

        Args:
            positive_ids: Integers ``[B]``; samples with the same id are positives of each other (the same caption).
            return_loss: In training and wherever there is more than one sample, with or without labels.
        """
        encoded = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            input_features=input_features,
            image_mask=image_mask,
            audio_mask=audio_mask,
            attention_mask=attention_mask,
        )
        embeds = {m: self._embed(m, e) for m, e in encoded.items() if e.tokens.shape[1]}
        text, loss = embeds.get("text"), None
        logits = {}
        if text is not None:
            logits = {f"logits_per_{m}": self.similarity(m, x, text) for m, x in embeds.items() if m != "text"}
        if return_loss and text is not None:
            pooled = {m: x for m, x in embeds.items() if m != "text"}
            present = {m: encoded[m].present & encoded["text"].present for m in pooled}
            loss = self.alignment.loss(text, pooled, present, positive_ids)
        return MMLMContrastiveOutput(loss=loss, **{f"{m}_embeds": x for m, x in embeds.items()}, **logits)

    def similarity(self, modality: str, embeds: Tensor, text_embeds: Tensor) -> Tensor:
        """Compute logits of matching, ``[N, M]``: scaled (and, SigLIP, shifted) cosines."""
        criterion: Any = self.alignment.losses[modality]
        logits = criterion.scale() * (embeds.float() @ text_embeds.float().mT)
        return logits + criterion.logit_bias if isinstance(criterion, SiglipLoss) else logits

    def match(self, modality: str, embeds: Tensor, text_embeds: Tensor) -> Tensor:
        """Compute probabilities of matching, ``[N, M]``: of each text being the one (CLIP: rows sum to 1), or of each
        pair matching (SigLIP)."""
        logits = self.similarity(modality, embeds, text_embeds)
        return logits.sigmoid() if self.config.contrastive_loss == "siglip" else F.softmax(logits, -1)
