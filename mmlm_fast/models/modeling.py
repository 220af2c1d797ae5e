"""The thin multimodal model: towers and decoder from transformers, joined by our ops."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from mmlm_fast.models.configuration import MMLMConfig, width_of
from mmlm_fast.models.fusion import MMLMFusion, MMLMProjector, merge_tokens
from mmlm_fast.models.objectives import MMLMAlignment, MMLMReconstruction, pooled_by_sample
from mmlm_fast.nn import FuseModalities, LazyLinear

MODALITIES = ("image", "audio")


@dataclass
class MMLMModelOutput(BaseModelOutputWithPast):
    """`fusion_context` [B, modalities, H] and `fusion_present` [B, modalities]: what later decoding steps fuse with."""

    fusion_context: Tensor | None = None
    fusion_present: Tensor | None = None
    modality_features: dict[str, Tensor] | None = None  # projected tokens [items, tokens, H] of what was given


@dataclass
class MMLMCausalLMOutput(CausalLMOutputWithPast):
    """`loss` is the weighted sum of the parts; a part without weight is None."""

    fusion_context: Tensor | None = None
    fusion_present: Tensor | None = None
    language_modeling_loss: Tensor | None = None
    contrastive_loss: Tensor | None = None
    reconstruction_loss: Tensor | None = None


class MMLMPreTrainedModel(PreTrainedModel):
    config: MMLMConfig
    config_class = MMLMConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "audio", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, FuseModalities):
            module.reset_parameters()


class MMLMModel(MMLMPreTrainedModel):
    """Towers, projectors, fusion and decoder, without the language-model head."""

    def __init__(self, config: MMLMConfig) -> None:
        super().__init__(config)
        text_config: Any = config.text_config
        hidden_size, activation = text_config.hidden_size, config.projector_hidden_act
        self.language_model = AutoModel.from_config(text_config)
        num_modalities = 0
        if config.vision_config is not None:
            self.vision_tower = AutoModel.from_config(config.vision_config)
            self.multi_modal_projector = MMLMProjector(width_of(config.vision_config), hidden_size, activation)
            num_modalities += 1
        if config.audio_config is not None:
            self.audio_tower = AutoModel.from_config(config.audio_config)
            self.audio_projector = MMLMProjector(width_of(config.audio_config), hidden_size, activation)
            num_modalities += 1
        if config.fusion != "merge" and num_modalities:
            self.fusion = MMLMFusion(config.fusion, hidden_size, num_modalities)
        self.post_init()

    @property
    def _modalities(self) -> list[str]:
        towers = {"image": self.config.vision_config, "audio": self.config.audio_config}
        return [m for m in MODALITIES if towers[m] is not None]

    @can_return_tuple
    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Vision tower and projector; ``pooler_output`` holds the projected tokens ``[num_images, tokens, H]``."""
        out = self.vision_tower(pixel_values, return_dict=True)
        return BaseModelOutputWithPooling(
            last_hidden_state=out.last_hidden_state,
            pooler_output=self.multi_modal_projector(out.last_hidden_state),
        )

    @can_return_tuple
    def get_audio_features(self, input_features: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Audio tower and projector; ``pooler_output`` holds the projected tokens ``[num_clips, tokens, H]``."""
        hidden_states = self.audio_tower(input_features, return_dict=True).last_hidden_state
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden_states, pooler_output=self.audio_projector(hidden_states)
        )

    def _encode(self, pixel_values: Tensor | None, input_features: Tensor | None) -> dict[str, Tensor]:
        """Projected features of the modalities that were given."""
        given = {"image": ("pixel_values", pixel_values), "audio": ("input_features", input_features)}
        features = {}
        for modality, (name, values) in given.items():
            if values is None:
                continue
            if modality not in self._modalities:
                raise ValueError(f"{name} given, but this model has no {modality} tower")
            encode = self.get_image_features if modality == "image" else self.get_audio_features
            features[modality] = encode(values, return_dict=True).pooler_output
        return features

    def _pooled_context(
        self, features: dict[str, Tensor], masks: dict[str, Tensor | None], like: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mean over each modality's tokens, and which sample has which modality."""
        batch_size = like.shape[0]
        context, present = [], []
        for modality in self._modalities:
            values, mask = features.get(modality), masks[modality]
            if values is None:
                context.append(like.new_zeros(batch_size, like.shape[-1]))
                present.append(torch.zeros(batch_size, dtype=torch.bool, device=like.device))
                continue
            if values.shape[0] != batch_size:
                raise ValueError(
                    f"fusion {self.config.fusion!r} takes one {modality} a sample: got {values.shape[0]} for a batch "
                    f"of {batch_size}; mark missing ones with {modality}_mask"
                )
            context.append(values.mean(1).to(like.dtype))
            present.append(_as_mask(mask, batch_size, like.device, modality))
        return torch.stack(context, 1), torch.stack(present, 1)

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
            pixel_values: ``[num_images, C, H, W]``, in order of appearance (``merge``) or one a sample.
            input_features: ``[num_clips, mel, frames]``, likewise.
            image_mask, audio_mask: Bool ``[B]``, False where a sample lacks the modality and its row of
                `pixel_values` or `input_features` is a filler. With ``merge``, leave fillers and masks out.
            fusion_context, fusion_present: From an earlier step, in place of the inputs they were pooled from.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        features = self._encode(pixel_values, input_features)
        masks = {"image": image_mask, "audio": audio_mask}
        if self.config.fusion == "merge":
            for modality, values in features.items():
                if input_ids is None:
                    raise ValueError(f"fusion 'merge' of {modality} features needs input_ids, got inputs_embeds")
                if masks[modality] is not None:
                    raise ValueError(f"fusion 'merge' takes no {modality}_mask: leave missing ones out")
                token_id = getattr(self.config, f"{modality}_token_id")
                inputs_embeds = merge_tokens(inputs_embeds, input_ids, token_id, values, modality)
        elif self._modalities:
            if fusion_context is None or fusion_present is None:
                fusion_context, fusion_present = self._pooled_context(features, masks, inputs_embeds[:, 0])
            inputs_embeds = self.fusion(inputs_embeds, fusion_context, fusion_present)
        out = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        return MMLMModelOutput(
            last_hidden_state=out.last_hidden_state,
            past_key_values=out.past_key_values,
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


def _as_mask(mask: Tensor | None, batch_size: int, device: torch.device, modality: str) -> Tensor:
    if mask is None:
        return torch.ones(batch_size, dtype=torch.bool, device=device)
    if mask.shape != (batch_size,) or mask.dtype != torch.bool:
        raise ValueError(f"{modality}_mask must be bool of shape ({batch_size},), got {mask.dtype} {tuple(mask.shape)}")
    return mask


class MMLMForConditionalGeneration(MMLMPreTrainedModel, GenerationMixin):
    """Text from text, pictures and sound: `forward` with labels, `generate`, and all of transformers' machinery."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: MMLMConfig) -> None:
        super().__init__(config)
        text_config: Any = config.text_config
        self.model = MMLMModel(config)
        # In training the loss takes no logits; asked for, they are there.
        self.lm_head = LazyLinear(text_config.hidden_size, text_config.vocab_size, bias=False)
        if config.contrastive_weight:
            self.alignment = MMLMAlignment(
                text_config.hidden_size, config.projection_dim, config.contrastive_loss, self.model._modalities
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
        logits = self.lm_head(out.last_hidden_state[:, keep])
        parts: dict[str, Tensor] = {}
        if labels is not None and self.config.language_modeling_weight:
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
            past_key_values=out.past_key_values,
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
            pooled, present = {}, dict(masks)
            for modality, values in features.items():
                pooled[modality] = values.mean(1)
                if self.config.fusion == "merge":
                    token_id = getattr(self.config, f"{modality}_token_id")
                    pooled[modality], present[modality] = pooled_by_sample(values, input_ids == token_id)
            text = model.text_features(input_ids, attention_mask)
            parts["contrastive"] = self.alignment(text, pooled, present)
        if self.config.reconstruction_weight:
            errors = []
            if pixel_values is not None:
                errors.append(self.reconstruction.images(model.vision_tower, pixel_values))
            if input_features is not None:
                errors.append(self.reconstruction.audio(model.audio_tower, input_features))
            parts["reconstruction"] = torch.stack(errors).mean() if errors else out.last_hidden_state.sum() * 0
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
        if self.config.fusion == "merge" and expand_size > 1 and input_ids is not None:
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
