"""The thin multimodal model: towers and decoder from transformers, joined by our ops."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, GenerationMixin
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from mmlm_fast.models.base import VALUES, MMLMPreTrainedModel, add_towers, encode_items, join_tokens, masked_mean
from mmlm_fast.models.configuration import DECODER_FUSIONS, MMLMConfig, check_fusion
from mmlm_fast.models.fusion import MMLMFusion, add_cross_attention, merge_tokens
from mmlm_fast.models.objectives import MMLMAlignment, MMLMReconstruction, pooled_by_sample
from mmlm_fast.models.towers import tokens_of
from mmlm_fast.models.turns import CACHE, keep_context, takes_cache, turn_context
from mmlm_fast.nn.lazy_logits import logits_for_loss


@dataclass
class MMLMModelOutput(BaseModelOutputWithPast):
    """`fusion_context` [B, k, H] and `fusion_present` [B, k]: what later decoding steps fuse with: the pooled features
    of the modalities, or all their tokens (`gated_cross_attention`)."""

    fusion_context: Tensor | None = None
    fusion_present: Tensor | None = None
    modality_features: dict[str, tuple[Tensor, Tensor]] | None = (
        None  # projected tokens of what was given; which are there
    )


@dataclass
class MMLMCausalLMOutput(CausalLMOutputWithPast):
    """`loss` is the weighted sum of the parts; a part without weight is None."""

    fusion_context: Tensor | None = None
    fusion_present: Tensor | None = None
    language_modeling_loss: Tensor | None = None
    contrastive_loss: Tensor | None = None
    reconstruction_loss: Tensor | None = None


class MMLMModel(MMLMPreTrainedModel):
    """Towers, projectors, fusion and decoder, without the language-model head."""

    def __init__(self, config: MMLMConfig) -> None:
        super().__init__(config)
        check_fusion(config, DECODER_FUSIONS, "a decoder")
        text_config: Any = config.text_config
        self.language_model = AutoModel.from_config(text_config)
        if config.hidden_size != text_config.hidden_size:
            raise ValueError(f"hidden_size must be the decoder's, {text_config.hidden_size}, got {config.hidden_size}")
        add_towers(self, config)
        if self.modalities and config.fusion_kind.is_pooled:
            self.fusion = MMLMFusion(config.fusion, text_config.hidden_size, len(self.modalities))
        elif self.modalities and config.fusion_kind.cross_attends:
            self.cross_attention_layers = add_cross_attention(self.language_model, config.cross_attention_interval)
        self.post_init()

    @property
    def modalities(self) -> list[str]:
        """Those beside the text."""
        return [m for m in self.config.modalities or () if m != "text"]

    @can_return_tuple
    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Vision tower and projector; ``pooler_output`` holds the projected tokens ``[num_images, tokens, H]``."""
        hidden_states = tokens_of(self.vision_tower, pixel_values)
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden_states, pooler_output=self.multi_modal_projector(hidden_states)
        )

    @can_return_tuple
    def get_audio_features(self, input_features: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Audio tower and projector; ``pooler_output`` holds the projected tokens ``[num_clips, tokens, H]``."""
        hidden_states = tokens_of(self.audio_tower, input_features)
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden_states, pooler_output=self.audio_projector(hidden_states)
        )

    def _encode(
        self, given: dict[str, Tensor | None], masks: dict[str, Tensor | None]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Projected features of the modalities that were given, and which are there; see `encode_items`."""
        projectors = {"image": "multi_modal_projector", "audio": "audio_projector"}
        towers = {"image": "vision_tower", "audio": "audio_tower"}
        features = {}
        for modality, values in given.items():
            if values is None:
                continue
            if modality not in self.modalities:
                raise ValueError(f"{VALUES[modality]} given, but this model has no {modality} tower")
            if self.config.fusion_kind.places_tokens and masks[modality] is not None:
                raise ValueError(f"fusion 'merge' takes no {modality}_mask: leave missing ones out")
            tower, projector = (getattr(self, names[modality]) for names in (towers, projectors))
            features[modality] = encode_items(tower, projector, values, masks[modality], modality)[1:]
        return features

    def _context(
        self, features: dict[str, tuple[Tensor, Tensor]], like: Tensor, past_key_values: Cache | None
    ) -> tuple[Tensor, Tensor]:
        """What the text is fused with: that of earlier turns, or of this one."""
        found = self._pooled(features, like) if features else None
        return turn_context(past_key_values, like.shape[0], found) or self._pooled({}, like)

    def _pooled(self, features: dict[str, tuple[Tensor, Tensor]], like: Tensor) -> tuple[Tensor, Tensor]:
        """Each modality's mean, or all tokens; and what of it is there."""
        batch_size = like.shape[0]
        for modality, (values, _) in features.items():
            if values.shape[0] != batch_size:
                raise ValueError(
                    f"fusion {self.config.fusion!r} takes one {modality} a sample: got {values.shape[0]} for a batch "
                    f"of {batch_size}; mark missing ones with {modality}_mask"
                )
        if self.config.fusion_kind.cross_attends:
            nothing = like.new_zeros(batch_size, 0, like.shape[-1]), like.new_zeros(batch_size, 0, dtype=torch.bool)
            return join_tokens([nothing, *((x.to(like.dtype), there) for x, there in features.values())])
        zeros, absent = torch.zeros_like(like), like.new_zeros(batch_size, dtype=torch.bool)
        pooled = {m: (masked_mean(x, there).to(like.dtype), there.any(1)) for m, (x, there) in features.items()}
        found = [pooled.get(m, (zeros, absent)) for m in self.modalities]
        return torch.stack([x for x, _ in found], 1), torch.stack([there for _, there in found], 1)

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
        use_cache: bool | None = None,
        fusion_context: Tensor | None = None,
        fusion_present: Tensor | None = None,
        **kwargs: Any,
    ) -> MMLMModelOutput:
        """
        Args:
            input_ids: ``[B, T]``; with fusion ``merge`` it holds one placeholder per feature token.
            pixel_values: ``[num_images, C, H, W]`` in order of appearance (``merge``); else ``[B, C, H, W]`` or,
                several pictures or frames a sample, ``[B, F, C, H, W]``.
            input_features: ``[num_clips, mel, frames]``, or ``[B, mel, frames]`` or ``[B, F, mel, frames]``, likewise.
            image_mask, audio_mask: Bool ``[B]`` or ``[B, F]``, False where `pixel_values` or `input_features` hold a
                filler. With ``merge``, leave fillers and masks out.
            past_key_values: Of earlier steps and turns. What their tokens were fused with lives with the cache: later
                turns need no pictures and sound, and may bring no other ones.
            fusion_context, fusion_present: From an earlier step, in place of the inputs they were pooled from.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        given = {"image": pixel_values, "audio": input_features}
        features = self._encode(given, {"image": image_mask, "audio": audio_mask})
        if self.config.fusion_kind.places_tokens:
            for modality, (values, _) in features.items():
                if input_ids is None:
                    raise ValueError(f"fusion 'merge' of {modality} features needs input_ids, got inputs_embeds")
                token_id = getattr(self.config, f"{modality}_token_id")
                inputs_embeds = merge_tokens(inputs_embeds, input_ids, token_id, values, modality)
        elif self.modalities:
            if fusion_context is None or fusion_present is None:
                fusion_context, fusion_present = self._context(features, inputs_embeds[:, 0], past_key_values)
            if self.config.fusion_kind.cross_attends:
                if fusion_context.shape[1]:
                    kwargs["cross_attention_context"] = (fusion_context, fusion_present)
            else:
                present = torch.cat([torch.ones_like(fusion_present[:, :1]), fusion_present], 1)
                inputs_embeds = self.fusion(inputs_embeds, fusion_context, present)
        out = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **{CACHE: past_key_values},
            **kwargs,
        )
        if fusion_context is not None and fusion_present is not None:
            keep_context(getattr(out, CACHE), (fusion_context, fusion_present))
        return MMLMModelOutput(
            last_hidden_state=out.last_hidden_state,
            **{CACHE: getattr(out, CACHE)},
            hidden_states=out.hidden_states,
            attentions=out.attentions,
            fusion_context=fusion_context,
            fusion_present=fusion_present,
            modality_features=features or None,
        )

    def text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Mean of the decoder's states ``[B, H]`` over the text of each sample, which sees no other modality."""
        there = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        there = there.bool()
        for token_id in (self.config.image_token_id, self.config.audio_token_id):
            if token_id is not None:
                there = there & (input_ids != token_id)
        embeds = self.get_input_embeddings()(input_ids)
        states = self.language_model(inputs_embeds=embeds, attention_mask=there.to(torch.int64), use_cache=False)
        weights = there.to(embeds.dtype) / there.sum(1, keepdim=True).clamp(min=1).to(embeds.dtype)
        return (weights[:, None, :] @ torch.where(there[..., None], states.last_hidden_state, 0))[:, 0]


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
        """Logits, and with `labels` ([B, T], -100 ignored, shifted inside) the loss; see `MMLMModel.forward`.

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
            for modality, (values, there) in features.items():
                pooled[modality], present[modality] = masked_mean(values, there), there.any(1)
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
    """Rows of `values`, as many a sample as its share of tokens says, each sample's rows repeated as a group."""
    total = int(tokens_per_sample.sum())
    if total == 0 or values.shape[0] == 0:
        return values
    counts = (tokens_per_sample * values.shape[0] // total).tolist()
    return torch.cat([group for rows in values.split(counts) for group in [rows] * times])
