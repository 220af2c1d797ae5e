"""Text from text, pictures and sound: the thin model with a head of words."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from mmlm_fast.models.base import MMLMPreTrainedModel
from mmlm_fast.models.configuration import MMLMConfig
from mmlm_fast.models.decoder import MMLMModel, MMLMModelOutput
from mmlm_fast.models.features import masked_mean
from mmlm_fast.models.objectives import MMLMAlignment, MMLMReconstruction, pooled_by_sample
from mmlm_fast.models.turns import CACHE, takes_cache
from mmlm_fast.nn.lazy_logits import logits_for_loss


@dataclass
class MMLMCausalLMOutput(CausalLMOutputWithPast):
    """Logits, and the parts of the loss: `loss` is their weighted sum; a part without weight is None."""

    fusion_context: Tensor | None = None
    fusion_present: Tensor | None = None
    language_modeling_loss: Tensor | None = None
    contrastive_loss: Tensor | None = None
    reconstruction_loss: Tensor | None = None


class MMLMForConditionalGeneration(MMLMPreTrainedModel, GenerationMixin):
    """Text from text, pictures and sound: `forward` with labels, `generate`, and all of transformers' machinery."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    computes_loss_without_logits = True  # see mmlm_fast.hf.loss

    def __init__(self, config: MMLMConfig) -> None:
        super().__init__(config)
        text_config: Any = config.text_config
        self.model = MMLMModel(config)
        self.lm_head = nn.Linear(text_config.hidden_size, text_config.vocab_size, bias=False)
        placeholders = [t for t in (config.image_token_id, config.audio_token_id) if t is not None]
        if config.fusion_kind.places_tokens and placeholders:
            self.generation_config.suppress_tokens = placeholders  # the model writes none: no feature would go there
        if config.contrastive_weight:
            self.alignment = MMLMAlignment(
                text_config.hidden_size, config.projection_dim, config.contrastive_loss, self.model.modalities
            )
        if config.reconstruction_weight:
            self.reconstruction = MMLMReconstruction(config)
        if config.contrastive_weight or config.reconstruction_weight:
            self.accepts_loss_kwargs = False  # Trainer's count of tokens divides no other part of the loss
        self.post_init()

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        return self.model.get_image_features(pixel_values, **kwargs)

    def get_audio_features(self, input_features: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        return self.model.get_audio_features(input_features, **kwargs)

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        input_features: Tensor | None = None,
        image_mask: Tensor | None = None,
        audio_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        fusion_context: Tensor | None = None,
        fusion_present: Tensor | None = None,
        **kwargs: Any,
    ) -> MMLMCausalLMOutput:
        """Compute logits, and with `labels` ([B, T], -100 ignored, shifted inside) the loss; see `MMLMModel.forward`.

        The parts of the loss and their weights are the configuration's. Where language modelling has no weight, the
        others need no labels in training.
        """
        out = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            input_features=input_features,
            image_mask=image_mask,
            audio_mask=audio_mask,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            fusion_context=fusion_context,
            fusion_present=fusion_present,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        keep = slice(None) if isinstance(keep, int) else keep
        states = out.last_hidden_state[:, keep]
        has_loss = labels is not None and bool(self.config.language_modeling_weight)
        logits = logits_for_loss(self.lm_head, states) if has_loss else self.lm_head(states)
        parts: dict[str, Tensor] = {}
        if has_loss:
            parts["language_modeling"] = self.loss_function(
                logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs
            )
        if labels is not None or (self.training and not self.config.language_modeling_weight):
            parts |= self._other_losses(
                input_ids, attention_mask, out, pixel_values, input_features, {"image": image_mask, "audio": audio_mask}
            )
        weighted = [getattr(self.config, f"{name}_weight") * part for name, part in parts.items()]
        return MMLMCausalLMOutput(
            loss=torch.stack([w.float() for w in weighted]).sum() if weighted else None,
            **{f"{name}_loss": part for name, part in parts.items()},
            logits=logits,
            **{CACHE: getattr(out, CACHE)},
            hidden_states=out.hidden_states,
            attentions=out.attentions,
            fusion_context=out.fusion_context,
            fusion_present=out.fusion_present,
        )

    def _other_losses(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        out: MMLMModelOutput,
        pixel_values: Tensor | None,
        input_features: Tensor | None,
        masks: dict[str, Tensor | None],
    ) -> dict[str, Tensor]:
        parts, model = {}, self.model
        features = out.modality_features or {}
        if self.config.contrastive_weight:
            if input_ids is None:
                raise ValueError("the contrastive loss needs input_ids, got inputs_embeds")
            pooled, present = {}, {}
            for modality, (values, mask) in features.items():
                pooled[modality], present[modality] = masked_mean(values, mask), mask.any(1)
                if self.config.fusion_kind.places_tokens:
                    token_id = getattr(self.config, f"{modality}_token_id")
                    pooled[modality], present[modality] = pooled_by_sample(values, input_ids == token_id)
            text = model.text_features(input_ids, attention_mask)
            parts["contrastive"] = self.alignment(text, pooled, present)
        if self.config.reconstruction_weight:
            towers = {"image": (pixel_values, "vision_tower"), "audio": (input_features, "audio_tower")}
            given = {m: (getattr(model, name), x, masks[m]) for m, (x, name) in towers.items() if x is not None}
            parts["reconstruction"] = self.reconstruction(given, out.last_hidden_state)
        return parts

    def _update_model_kwargs_for_generation(self, outputs: Any, model_kwargs: dict, **kwargs: Any) -> dict:
        # generate() drops pictures and sound after the first step: later ones fuse with what it pooled from them.
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)
        if outputs.get("fusion_context") is not None:
            model_kwargs["fusion_context"] = outputs.fusion_context
            model_kwargs["fusion_present"] = outputs.fusion_present
        return model_kwargs

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **model_kwargs: Any
    ) -> tuple[Any, dict]:
        # With `merge` a sample may have any number of pictures: repeat each sample's group, not each picture.
        items = {}
        if self.config.fusion_kind.places_tokens and expand_size > 1 and input_ids is not None:
            for modality, name in (("image", "pixel_values"), ("audio", "input_features")):
                values = model_kwargs.pop(name, None)
                if values is not None:
                    token_id = getattr(self.config, f"{modality}_token_id")
                    items[name] = _repeat_groups(values, (input_ids == token_id).sum(1), expand_size)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        return input_ids, model_kwargs | items


def _repeat_groups(values: Tensor, tokens_per_sample: Tensor, times: int) -> Tensor:
    """Repeat each sample's rows of `values` as a group; a sample has as many as its share of tokens says."""
    total = int(tokens_per_sample.sum())
    if total == 0 or values.shape[0] == 0:
        return values
    counts = (tokens_per_sample * values.shape[0] // total).tolist()
    return torch.cat([group for rows in values.split(counts) for group in [rows] * times])
