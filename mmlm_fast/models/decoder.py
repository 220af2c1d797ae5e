"""The thin multimodal model: towers and decoder from transformers, joined by our ops."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling
from transformers.utils import can_return_tuple

from mmlm_fast.models.base import MMLMPreTrainedModel
from mmlm_fast.models.configuration import DECODER_FUSIONS, MMLMConfig, check_fusion
from mmlm_fast.models.features import VALUES, add_towers, encode_items, join_tokens, masked_mean
from mmlm_fast.models.fusion import MMLMFusion, add_cross_attention, merge_tokens
from mmlm_fast.models.towers import tokens_of
from mmlm_fast.models.turns import CACHE, keep_context, takes_cache, turn_context


@dataclass
class MMLMModelOutput(BaseModelOutputWithPast):
    """States of the decoder, and what they were fused with.

    Attributes:
        fusion_context, fusion_present: ``[B, k, H]`` and ``[B, k]``: what later decoding steps fuse with: the pooled
            features of the modalities, or all their tokens (``gated_cross_attention``).
        modality_features: By modality that was given, its projected tokens, and which are there.
    """

    fusion_context: Tensor | None = None
    fusion_present: Tensor | None = None
    modality_features: dict[str, tuple[Tensor, Tensor]] | None = None


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
        """The modalities beside the text."""
        return [m for m in self.config.modalities or () if m != "text"]

    @can_return_tuple
    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Apply vision tower and projector; ``pooler_output`` is the projected tokens ``[num_images, tokens, H]``."""
        hidden_states = tokens_of(self.vision_tower, pixel_values)
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden_states, pooler_output=self.multi_modal_projector(hidden_states)
        )

    @can_return_tuple
    def get_audio_features(self, input_features: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Apply audio tower and projector; ``pooler_output`` is the projected tokens ``[num_clips, tokens, H]``."""
        hidden_states = tokens_of(self.audio_tower, input_features)
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden_states, pooler_output=self.audio_projector(hidden_states)
        )

    def _encode(
        self, given: dict[str, Tensor | None], masks: dict[str, Tensor | None]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Project the features of the modalities that were given, and say which are there; see `encode_items`."""
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
        """Return what the text is fused with: that of earlier turns, or of this one."""
        context = self._pooled(features, like) if features else None
        return turn_context(past_key_values, like.shape[0], context) or self._pooled({}, like)

    def _pooled(self, features: dict[str, tuple[Tensor, Tensor]], like: Tensor) -> tuple[Tensor, Tensor]:
        """Take each modality's mean, or all tokens; and say what of it is there."""
        batch_size = like.shape[0]
        for modality, (values, _) in features.items():
            if values.shape[0] != batch_size:
                raise ValueError(
                    f"fusion {self.config.fusion!r} takes one {modality} a sample: got {values.shape[0]} for a batch "
                    f"of {batch_size}; mark missing ones with {modality}_mask"
                )
        if self.config.fusion_kind.cross_attends:
            nothing = like.new_zeros(batch_size, 0, like.shape[-1]), like.new_zeros(batch_size, 0, dtype=torch.bool)
            return join_tokens([nothing, *((x.to(like.dtype), mask) for x, mask in features.values())])
        zeros, absent = torch.zeros_like(like), like.new_zeros(batch_size, dtype=torch.bool)
        pooled = {m: (masked_mean(x, mask).to(like.dtype), mask.any(1)) for m, (x, mask) in features.items()}
        pairs = [pooled.get(m, (zeros, absent)) for m in self.modalities]
        return torch.stack([x for x, _ in pairs], 1), torch.stack([present for _, present in pairs], 1)

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
        """Run towers, fusion and decoder.

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
        """Average the decoder's states, ``[B, H]``, over the text of each sample, which sees no other modality."""
        is_text = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        is_text = is_text.bool()
        for token_id in (self.config.image_token_id, self.config.audio_token_id):
            if token_id is not None:
                is_text = is_text & (input_ids != token_id)
        embeds = self.get_input_embeddings()(input_ids)
        states = self.language_model(inputs_embeds=embeds, attention_mask=is_text.to(torch.int64), use_cache=False)
        weights = is_text.to(embeds.dtype) / is_text.sum(1, keepdim=True).clamp(min=1).to(embeds.dtype)
        return (weights[:, None, :] @ torch.where(is_text[..., None], states.last_hidden_state, 0))[:, 0]
