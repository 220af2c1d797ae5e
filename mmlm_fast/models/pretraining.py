"""Self-supervised pre-training of the encoders, before they are fine-tuned on a task."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import ModelOutput
from transformers.utils import can_return_tuple

from mmlm_fast.models.base import MMLMPreTrainedModel
from mmlm_fast.models.configuration import MMLMConfig, width_of
from mmlm_fast.models.encoders import MMLMEncoderModel
from mmlm_fast.models.features import masked_mean
from mmlm_fast.models.objectives import MMLMAlignment, MMLMReconstruction
from mmlm_fast.nn.plain import is_plain
from mmlm_fast.ops import linear_cross_entropy


@dataclass
class MMLMForPreTrainingOutput(ModelOutput):
    """The parts of the loss: `loss` is their weighted sum; a part without weight, or without its modality, is None."""

    loss: Tensor | None = None
    language_modeling_loss: Tensor | None = None
    contrastive_loss: Tensor | None = None
    reconstruction_loss: Tensor | None = None


class MMLMForPreTraining(MMLMPreTrainedModel):
    """Masked language modelling, reconstruction of hidden patches and stretches of sound, contrastive alignment.

    The weights are the configuration's. `save_pretrained`, then ``MMLMForClassification.from_pretrained`` or
    ``MMLMForContrastive.from_pretrained`` take the encoders on.

    Source: BERT's masking (Devlin et al. 2019), without its random replacements; see `MMLMReconstruction` and
    `MMLMAlignment`.
    """

    accepts_loss_kwargs = False

    def __init__(self, config: MMLMConfig) -> None:
        super().__init__(config)
        text_config: Any = config.text_config
        self.model = MMLMEncoderModel(config)
        modalities = config.modalities or []
        if config.language_modeling_weight:
            if config.mask_token_id is None:
                raise ValueError("masked language modelling needs mask_token_id, got None")
            self.lm_head = nn.Linear(width_of(text_config), text_config.vocab_size)
        if config.contrastive_weight:
            assert config.hidden_size is not None
            others = [m for m in modalities if m != "text"]
            self.alignment = MMLMAlignment(config.hidden_size, config.projection_dim, config.contrastive_loss, others)
        if config.reconstruction_weight:
            self.reconstruction = MMLMReconstruction(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        input_features: Tensor | None = None,
        image_mask: Tensor | None = None,
        audio_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_loss: bool = True,
        **kwargs: Any,
    ) -> MMLMForPreTrainingOutput:
        """Compute the loss. Inputs are those of `MMLMEncoderModel`; what is hidden is drawn at each call from torch's
        generator.

        `return_loss` only tells Trainer that there is one without labels.
        """
        config, parts = self.config, {}
        towers = {
            "image": (pixel_values, "vision_tower", image_mask),
            "audio": (input_features, "audio_tower", audio_mask),
        }
        if config.language_modeling_weight and input_ids is not None:
            parts["language_modeling"] = self._masked_language_modeling(input_ids, attention_mask)
        if config.contrastive_weight and input_ids is not None:
            encoded = self.model(input_ids, pixel_values, input_features, image_mask, audio_mask, attention_mask)
            pooled = {m: masked_mean(e.tokens, e.mask) for m, e in encoded.items() if e.tokens.shape[1]}
            text = pooled.pop("text")
            present: Any = {m: encoded[m].present & encoded["text"].present for m in pooled}
            parts["contrastive"] = self.alignment(text, pooled, present)
        if config.reconstruction_weight:
            given = {m: (getattr(self.model, name), x, mask) for m, (x, name, mask) in towers.items() if x is not None}
            if given:
                parts["reconstruction"] = self.reconstruction(given, next(iter(given.values()))[1])
        if not parts:
            raise ValueError("nothing to pre-train on: no part of the loss has both a weight and its modality")
        weighted = [getattr(config, f"{name}_weight") * part.float() for name, part in parts.items()]
        return MMLMForPreTrainingOutput(
            loss=torch.stack(weighted).sum(), **{f"{name}_loss": part for name, part in parts.items()}
        )

    def _masked_language_modeling(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        text_config: Any = self.config.text_config
        hidden = torch.rand(input_ids.shape, device=input_ids.device) < self.config.text_mask_ratio
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            token = getattr(text_config, name, None)
            if token is not None:
                hidden &= input_ids != token
        if attention_mask is not None:
            hidden &= attention_mask.bool()
        masked = torch.where(hidden, self.config.mask_token_id, input_ids)  # type: ignore[arg-type]
        states = self.model.encode_text(masked, attention_mask).states
        labels = input_ids.masked_fill(~hidden, -100)
        head, states, target = self.lm_head, states.flatten(0, 1), labels.flatten()  # type: ignore[union-attr]
        if is_plain(head, nn.Linear):
            return linear_cross_entropy(states, head.weight, target, bias=head.bias)
        return F.cross_entropy(head(states).float(), target, reduction="sum") / hidden.sum().clamp(min=1)
