"""More tiny random models, like those of tiny_models: several images a sample, audio, hybrids, encoders, text."""

from typing import Any

import torch
import transformers as t
from torch import Tensor

from support.tiny_models import IMAGE, QWEN_TOKENS, VOCABULARY, Tiny, encoder_text, prompt, text, vision

AUDIO = 110


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def decoder(cls: type, config: Any, inputs: dict[str, Tensor]) -> Tiny:
    return Tiny(cls, config, inputs, valid=inputs["attention_mask"].bool())


def audio_prompt(
    length: int, audios: dict[int, list[tuple[int, int]]], left_padding: dict[int, int]
) -> dict[str, Tensor]:
    inputs = prompt(length, audios, left_padding)
    return inputs | {"input_ids": inputs["input_ids"].where(inputs["input_ids"] != IMAGE, AUDIO)}


def frames(length: int, *lengths: int) -> Tensor:
    """A mask over frames: the first of each sample are real, the rest is padding."""
    return (torch.arange(length) < torch.tensor(lengths)[:, None]).long()


def llama() -> Tiny:
    return decoder(t.LlamaForCausalLM, t.LlamaConfig(**text()), prompt(20, {}, {1: 4}))


def qwen3() -> Tiny:
    return decoder(t.Qwen3ForCausalLM, t.Qwen3Config(**text(head_dim=8)), prompt(20, {}, {1: 4}))


def llava_next() -> Tiny:
    config = t.LlavaNextConfig(
        vision_config=dict(model_type="clip_vision_model", **vision()),
        text_config=dict(model_type="mistral", **text(sliding_window=None)),
        image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]],
        image_token_index=IMAGE,
    )
    inputs = prompt(40, {0: [(3, 17), (20, 34)], 1: [(8, 24)]}, {1: 4})
    inputs |= {"pixel_values": random(3, 5, 3, 28, 28), "image_sizes": torch.tensor([[28, 56], [40, 56], [56, 28]])}
    return decoder(t.LlavaNextForConditionalGeneration, config, inputs)


def llava_onevision() -> Tiny:
    config = t.LlavaOnevisionConfig(
        vision_config=dict(model_type="siglip_vision_model", vision_use_head=False, **vision()),
        text_config=dict(model_type="qwen2", **text()),
        image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]],
        image_token_index=IMAGE,
        video_token_index=101,
    )
    inputs = prompt(28, {0: [(3, 8), (11, 16)], 1: [(6, 20)]}, {1: 4})  # tiles only where a sample has one image
    inputs |= {"pixel_values": random(3, 3, 3, 28, 28), "image_sizes": torch.tensor([[28, 28], [56, 28], [28, 56]])}
    inputs |= {"batch_num_images": torch.tensor([2, 1])}
    return decoder(t.LlavaOnevisionForConditionalGeneration, config, inputs)


def qwen_inputs(length: int = 26) -> dict[str, Tensor]:
    inputs = prompt(length, {0: [(3, 7), (10, 18)], 1: [(6, 22)]}, {1: 4})
    grids = torch.tensor([[1, 4, 4], [1, 4, 8], [1, 8, 8]])
    inputs |= {"pixel_values": random(112, 3 * 2 * 4 * 4), "image_grid_thw": grids}
    return inputs | {"mm_token_type_ids": (inputs["input_ids"] == IMAGE).int()}


TOWER = dict(depth=2, num_heads=4, patch_size=4, temporal_patch_size=2, spatial_merge_size=2, in_channels=3)


def qwen2_vl() -> Tiny:
    config = t.Qwen2VLConfig(
        text_config=text(rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 1, 1])),
        vision_config=dict(embed_dim=32, hidden_size=32, mlp_ratio=2, **TOWER),
        **QWEN_TOKENS,
    )
    return decoder(t.Qwen2VLForConditionalGeneration, config, qwen_inputs())


def qwen3_5() -> Tiny:
    rope = dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 1, 1], mrope_interleaved=True)
    linear = dict(linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4)
    layers = dict(layer_types=["linear_attention", "full_attention"])
    config = t.Qwen3_5Config(
        text_config=text(head_dim=16, rope_parameters=rope | dict(partial_rotary_factor=0.5), **linear, **layers),
        vision_config=dict(
            hidden_size=32, intermediate_size=48, out_hidden_size=32, num_position_embeddings=64, **TOWER
        ),
        **QWEN_TOKENS,
    )
    return decoder(t.Qwen3_5ForConditionalGeneration, config, qwen_inputs())


def gemma4() -> Tiny:  # 5.17 generates other tokens with a static cache than with a dynamic one
    """The last two layers take the keys and values of the first two; the tokens of an image see each other."""
    layers = dict(num_hidden_layers=4, num_kv_shared_layers=2, layer_types=["sliding_attention", "full_attention"] * 2)
    heads = dict(head_dim=8, global_head_dim=16, sliding_window=8, use_bidirectional_attention="vision")
    embeddings = dict(vocab_size_per_layer_input=VOCABULARY, hidden_size_per_layer_input=8)
    tower = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=4, head_dim=8, patch_size=4, pooling_kernel_size=2,
                 position_embedding_size=16)  # fmt: skip
    config = t.Gemma4Config(
        text_config=text(**layers, **heads, **embeddings), vision_config=tower, audio_config=None,
        image_token_id=IMAGE, video_token_id=101, boi_token_id=102, eoi_token_id=103, audio_token_id=AUDIO,
        boa_token_id=111, eoa_token_index=112,
    )  # fmt: skip
    inputs = prompt(26, {0: [(3, 7), (10, 12)], 1: [(8, 12)]}, {1: 4})
    places = torch.full((3, 16, 2), -1)  # of patches, (x, y); the second image has two rows of four, the others four
    for image, rows in enumerate((4, 2, 4)):
        places[image, : rows * 4] = torch.cartesian_prod(torch.arange(rows), torch.arange(4)).flip(1)
    inputs |= {"pixel_values": random(3, 16, 3 * 4 * 4).sigmoid(), "image_position_ids": places}
    inputs |= {"mm_token_type_ids": (inputs["input_ids"] == IMAGE).int()}
    return decoder(t.Gemma4ForConditionalGeneration, config, inputs)


def internvl() -> Tiny:
    config = t.InternVLConfig(
        vision_config=vision(image_size=56),
        text_config=dict(model_type="qwen2", **text()),
        image_token_id=IMAGE,
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    inputs = prompt(24, {0: [(3, 7), (10, 14)], 1: [(6, 10)]}, {1: 3}) | {"pixel_values": random(3, 3, 56, 56)}
    return decoder(t.InternVLForConditionalGeneration, config, inputs)


def idefics(config_class: type, cls: type) -> Tiny:
    config = config_class(
        vision_config=vision(image_size=56),
        text_config=dict(model_type="llama", **text()),
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=0,  # generation of 5.17 reads it here
    )
    inputs = prompt(24, {0: [(3, 7), (10, 14)], 1: [(6, 10)]}, {1: 3})
    pixels, mask = random(2, 2, 3, 56, 56), torch.ones(2, 2, 56, 56, dtype=torch.long)
    pixels[1, 1], mask[1, 1] = 0, 0  # the second sample has one image only
    mask[0, 1, :, 28:] = 0  # a narrow image, padded
    return decoder(cls, config, inputs | {"pixel_values": pixels, "pixel_attention_mask": mask})


def idefics3() -> Tiny:
    return idefics(t.Idefics3Config, t.Idefics3ForConditionalGeneration)


def smolvlm() -> Tiny:
    return idefics(t.SmolVLMConfig, t.SmolVLMForConditionalGeneration)


def llama4() -> Tiny:  # 5.17 fails to make its chunked mask for a static cache
    experts = dict(num_local_experts=4, num_experts_per_tok=1, moe_layers=[1], intermediate_size_mlp=48)
    positions = dict(no_rope_layers=[1, 0], attention_chunk_size=8, floor_scale=8, head_dim=8)
    config = t.Llama4Config(
        text_config=text(**experts, **positions),
        vision_config=dict(
            hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=56,
            patch_size=14, vision_output_dim=32, projector_input_dim=32, projector_output_dim=32,
        ),
        image_token_index=IMAGE, boi_token_index=102, eoi_token_index=103,
    )  # fmt: skip
    inputs = prompt(24, {0: [(3, 7), (10, 14)], 1: [(6, 10)]}, {1: 3}) | {"pixel_values": random(3, 3, 56, 56)}
    return decoder(t.Llama4ForConditionalGeneration, config, inputs)


def pixtral_mistral3() -> Tiny:
    config = t.Mistral3Config(
        vision_config=dict(model_type="pixtral", **vision(image_size=56)),
        text_config=dict(model_type="mistral", head_dim=8, **text(sliding_window=None)),
        image_token_index=IMAGE,
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )
    inputs = prompt(22, {0: [(3, 7), (10, 12)], 1: [(6, 8)]}, {1: 3})
    inputs |= {"pixel_values": random(3, 3, 56, 56), "image_sizes": torch.tensor([[56, 56], [28, 56], [56, 28]])}
    return decoder(t.Mistral3ForConditionalGeneration, config, inputs)


NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


class TinyBlip2(Tiny):
    def build(self, implementation: str, dtype: torch.dtype = torch.float32) -> Any:
        model = super().build(implementation)
        torch.nn.init.normal_(model.query_tokens)  # they start as zeros, all alike
        return model.to(dtype)


def blip2() -> Tiny:
    opt = dict(ffn_dim=48, word_embed_proj_dim=32, dropout=0.0, tie_word_embeddings=False)
    config = t.Blip2Config(
        vision_config=vision(initializer_range=0.02),
        qformer_config=encoder_text() | NO_DROPOUT,
        text_config=dict(model_type="opt", **opt, **encoder_text()),
        num_query_tokens=4,
        image_token_index=IMAGE,
    )
    inputs = prompt(20, {0: [(0, 4)], 1: [(3, 7)]}, {1: 3}) | {"pixel_values": random(2, 3, 28, 28)}
    return TinyBlip2(t.Blip2ForConditionalGeneration, config, inputs, valid=inputs["attention_mask"].bool())


AUDIO_TOWER = dict(num_mel_bins=16, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=48, d_model=32)


def qwen2_audio() -> Tiny:
    config = t.Qwen2AudioConfig(
        audio_config=dict(model_type="qwen2_audio_encoder", max_source_positions=50, **AUDIO_TOWER),
        text_config=dict(model_type="qwen2", **text()),
        audio_token_index=AUDIO,
    )
    inputs = audio_prompt(36, {0: [(4, 29)], 1: [(8, 23)]}, {1: 4})
    inputs |= {"input_features": random(2, 16, 100), "feature_attention_mask": frames(100, 100, 60)}
    return decoder(t.Qwen2AudioForConditionalGeneration, config, inputs)


def voxtral() -> Tiny:
    config = t.VoxtralConfig(
        audio_config=dict(
            model_type="voxtral_encoder", num_mel_bins=16, hidden_size=32, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, max_source_positions=24,
        ),
        text_config=dict(model_type="llama", head_dim=8, **text()),
        audio_token_id=AUDIO,
    )  # fmt: skip
    inputs = audio_prompt(24, {0: [(3, 9), (12, 18)], 1: [(6, 12)]}, {1: 4}) | {"input_features": random(3, 16, 48)}
    return decoder(t.VoxtralForConditionalGeneration, config, inputs)


def qwen3_asr() -> Tiny:
    windows = dict(n_window_infer=100, downsample_hidden_size=8, output_dim=32)  # chunks are of 100 frames, always
    config = t.Qwen3ASRConfig(
        audio_config=dict(model_type="qwen3_asr_encoder", **windows, **AUDIO_TOWER),
        text_config=dict(model_type="qwen3", **text(head_dim=8)),
        audio_token_id=AUDIO, timestamp_token_id=111, pad_token_id=0, eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    inputs = audio_prompt(34, {0: [(4, 30)], 1: [(8, 25)]}, {1: 4})
    inputs |= {"input_features": random(2, 16, 200), "input_features_mask": frames(200, 200, 130)}
    return decoder(t.Qwen3ASRForConditionalGeneration, config, inputs)


def qwen2_5_omni_thinker() -> Tiny:
    rope = dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 1, 1])
    tower = dict(hidden_size=32, intermediate_size=48, out_hidden_size=32, window_size=16, fullatt_block_indexes=[1])
    config = t.Qwen2_5OmniThinkerConfig(
        text_config=text(rope_parameters=rope),
        vision_config=tower | TOWER,
        audio_config=dict(n_window=8, output_dim=32, max_source_positions=50, **AUDIO_TOWER),
        image_token_index=IMAGE, video_token_index=101, vision_start_token_id=102, vision_end_token_id=103,
        audio_token_index=AUDIO, audio_start_token_id=111, audio_end_token_id=112,
    )  # fmt: skip
    inputs = qwen_inputs(46)
    del inputs["mm_token_type_ids"]  # it looks for the tokens around images and audio instead
    ids = inputs["input_ids"]
    for sample, begin, end in ((0, 22, 32), (1, 26, 32)):
        ids[sample, begin - 1], ids[sample, begin:end], ids[sample, end] = 111, AUDIO, 112
    for sample, begin, end in ((0, 3, 7), (0, 10, 18), (1, 6, 22)):
        ids[sample, begin - 1], ids[sample, end] = 102, 103
    inputs |= {"input_features": random(2, 16, 40), "feature_attention_mask": frames(40, 40, 24)}
    return decoder(t.Qwen2_5OmniThinkerForConditionalGeneration, config, inputs)


def granite_speech() -> Tiny:
    qformer = dict(model_type="blip_2_qformer", encoder_hidden_size=32, cross_attention_frequency=1)
    scales = dict(embedding_multiplier=2.0, residual_multiplier=0.5, attention_multiplier=0.25, logits_scaling=2.0)
    config = t.GraniteSpeechConfig(
        encoder_config=dict(
            input_dim=16, num_layers=2, hidden_dim=32, feedforward_mult=2, num_heads=4, output_dim=10, context_size=8,
            max_pos_emb=16, dropout=0.0, conv_kernel_size=3,
        ),
        projector_config=encoder_text() | qformer | NO_DROPOUT,
        text_config=dict(model_type="granite", **text(**scales)),
        audio_token_index=AUDIO, has_lora_adapter=False, window_size=6, downsample_rate=3, tie_word_embeddings=False,
    )  # fmt: skip
    inputs = audio_prompt(22, {0: [(4, 12)], 1: [(8, 13)]}, {1: 4})
    inputs |= {"input_features": random(2, 20, 16), "input_features_mask": frames(8, 8, 5).bool()}
    return decoder(t.GraniteSpeechForConditionalGeneration, config, inputs)


def siglip2() -> Tiny:
    tower = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, patch_size=4)
    config = t.Siglip2Config(text_config=encoder_text(projection_size=32), vision_config=dict(num_patches=16, **tower))
    ids = prompt(12, {}, {})["input_ids"]
    inputs = {"input_ids": ids, "pixel_values": random(2, 16, 3 * 4 * 4), "pixel_attention_mask": frames(16, 16, 12)}
    inputs |= {"spatial_shapes": torch.tensor([[4, 4], [2, 6]])}
    return Tiny(t.Siglip2Model, config, inputs, generates=False)


def vit() -> Tiny:
    config = t.ViTConfig(**vision(patch_size=7))
    return Tiny(t.ViTModel, config, {"pixel_values": random(2, 3, 28, 28)}, generates=False)


def dinov2() -> Tiny:
    config = t.Dinov2Config(**vision(patch_size=7, mlp_ratio=2))
    return Tiny(t.Dinov2Model, config, {"pixel_values": random(2, 3, 28, 28)}, generates=False)


def wav2vec2() -> Tiny:
    convolutions = dict(conv_dim=[16, 16, 16], conv_stride=[5, 2, 2], conv_kernel=[10, 3, 3], feat_extract_norm="layer",
                        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4)  # fmt: skip
    random_parts = ("hidden_dropout", "activation_dropout", "attention_dropout", "final_dropout", "layerdrop")
    config = t.Wav2Vec2Config(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        do_stable_layer_norm=True, apply_spec_augment=False, **convolutions, **dict.fromkeys(random_parts, 0.0),
    )  # fmt: skip
    inputs = {"input_values": random(2, 800), "attention_mask": frames(800, 800, 500)}
    return Tiny(t.Wav2Vec2ForCTC, config, inputs, generates=False, valid=frames(39, 39, 24).bool())


FAMILIES = {f.__name__: f for f in (
    llama, qwen3, llava_next, llava_onevision, qwen2_vl, qwen3_5, gemma4, internvl, idefics3, smolvlm, llama4,
    pixtral_mistral3, blip2, qwen2_audio, voxtral, qwen3_asr, qwen2_5_omni_thinker, granite_speech, siglip2, vit,
    dinov2, wav2vec2,
)}  # fmt: skip
