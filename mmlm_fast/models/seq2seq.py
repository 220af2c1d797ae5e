"""Sequence to sequence: encoders of all modalities, one memory, a decoder that attends to it."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, GenerationMixin
from transformers.cache_utils import Cache
from transformers.modeling_outputs import ModelOutput, Seq2SeqLMOutput
from transformers.utils import can_return_tuple

from mmlm_fast.models.base import MMLMPreTrainedModel
from mmlm_fast.models.configuration import SEQ2SEQ_FUSIONS, MMLMConfig, check_fusion, width_of
from mmlm_fast.models.encoders import MMLMEncoderModel, MMLMJoin
from mmlm_fast.models.turns import CACHE, keep_context, kept_context, takes_cache, turn_context
from mmlm_fast.nn.lazy_logits import logits_for_loss


@dataclass
class MMLMMemory(ModelOutput):
    """What the decoder attends to: ``last_hidden_state [B, N, H]``, which of it is there (bool ``[B, N]``), and the
    weights of the modalities where the fusion has some."""

    last_hidden_state: Tensor | None = None
    memory_mask: Tensor | None = None
    fusion_weights: Tensor | None = None


class MMLMSeq2SeqEncoder(nn.Module):
    """Towers and fusion: what `generate` calls once."""

    main_input_name = "input_ids"

    def __init__(self, config: MMLMConfig) -> None:
        super().__init__()
        self.towers = MMLMEncoderModel(config)
        self.join = MMLMJoin(config)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        input_features: Tensor | None = None,
        image_mask: Tensor | None = None,
        audio_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> MMLMMemory:
        """Encode and join. Inputs are those of `MMLMEncoderModel`."""
        encoded = self.towers(input_ids, pixel_values, input_features, image_mask, audio_mask, attention_mask)
        tokens, mask, weights = self.join(encoded)
        return MMLMMemory(last_hidden_state=tokens, memory_mask=mask, fusion_weights=weights)


class MMLMForSeq2SeqLM(MMLMPreTrainedModel, GenerationMixin):
    """Text from text, pictures and sound through an encoder and a decoder: captioning, translation, recognition, …

    ``cross_attention`` lets the decoder attend to the tokens of all modalities; the fusions of pooled features give it
    one fused feature a sample. A sample with no modality at all gives its decoder a memory of zeros.
    """

    accepts_loss_kwargs = True
    computes_loss_without_logits = True  # see mmlm_fast.hf.loss

    def __init__(self, config: MMLMConfig) -> None:
        super().__init__(config)
        check_fusion(config, SEQ2SEQ_FUSIONS, "a sequence-to-sequence model")
        decoder_config: Any = config.decoder_config
        if decoder_config is None or not getattr(decoder_config, "add_cross_attention", False):
            got = None if decoder_config is None else f"a {decoder_config.model_type} without"
            raise ValueError(f"decoder_config must be of a decoder with add_cross_attention=True, got {got}")
        width = width_of(decoder_config)
        memory = config.hidden_size if config.joint_config is None else width_of(config.joint_config)
        if width != memory:
            raise ValueError(f"the decoder must be as wide as what it attends to, {memory}, got {width}")
        self.encoder = MMLMSeq2SeqEncoder(config)
        self.decoder = AutoModel.from_config(decoder_config)
        self.lm_head = nn.Linear(width, decoder_config.vocab_size, bias=False)
        self.post_init()

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        return self.encoder if modality is None else super().get_encoder(modality)

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

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
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput:
        """Compute logits ``[B, T, vocabulary]`` of `decoder_input_ids`, which are `labels` shifted right by default;
        with `labels` (``[B, T]``, -100 ignored) the loss. A cache holds the memory its tokens attended to: later turns
        need no inputs of the encoder, and may bring no other ones."""
        kept, given = kept_context(past_key_values), (input_ids, pixel_values, input_features)
        if encoder_outputs is None and kept is not None and all(x is None for x in given):
            encoder_outputs = MMLMMemory(last_hidden_state=kept[0], memory_mask=kept[1])
        if encoder_outputs is None:
            encoder_outputs = self.encoder(*given, image_mask, audio_mask, attention_mask)
            encoder_outputs = _memory_of_turn(past_key_values, encoder_outputs)
        if decoder_input_ids is None:
            if labels is None:
                raise ValueError("pass labels or decoder_input_ids, got neither")
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        memory, mask = encoder_outputs.last_hidden_state, encoder_outputs.memory_mask
        seen = mask.clone()
        seen[:, 0] = True  # an empty memory is one zero: attention needs something to look at
        out = self.decoder(
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            encoder_hidden_states=memory,
            encoder_attention_mask=seen.to(torch.int64),
            use_cache=use_cache,
            **{CACHE: past_key_values},
        )
        keep_context(getattr(out, CACHE), (memory, mask))
        states = out.last_hidden_state
        logits = self.lm_head(states) if labels is None else logits_for_loss(self.lm_head, states)
        loss = None
        if labels is not None:
            count = kwargs.get("num_items_in_batch")
            flat = logits.float().view(-1, logits.shape[-1])
            loss = F.cross_entropy(flat, labels.flatten(), reduction="mean" if count is None else "sum")
            loss = loss if count is None else loss / count
        return Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            **{CACHE: getattr(out, CACHE)},
            encoder_last_hidden_state=memory,
        )

    def _expand_inputs_for_generation(self, *args: Any, **model_kwargs: Any) -> tuple[Any, dict]:
        # generate() encodes before it comes here, and hands the memory to every step.
        input_ids, model_kwargs = super()._expand_inputs_for_generation(*args, **model_kwargs)
        if model_kwargs.get("encoder_outputs") is not None:
            encoder_outputs = _memory_of_turn(model_kwargs.get(CACHE), model_kwargs["encoder_outputs"])
            model_kwargs["encoder_outputs"] = encoder_outputs
        return input_ids, model_kwargs

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """Shift labels right behind the start token; -100 becomes padding."""
        start = self.config.decoder_start_token_id
        pad = self.config.pad_token_id
        if start is None or pad is None:
            raise ValueError(f"the decoder needs a start token and a padding token, got {start} and {pad}")
        shifted = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], 1)
        return shifted.masked_fill(shifted == -100, pad)


def _memory_of_turn(past_key_values: Any, memory: Any) -> MMLMMemory:
    states = memory.last_hidden_state
    context = turn_context(past_key_values, states.shape[0], (states, memory.memory_mask))
    assert context is not None  # for one was given
    return MMLMMemory(*context, getattr(memory, "fusion_weights", None))
