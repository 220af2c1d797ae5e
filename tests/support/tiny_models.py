"""Tiny random models of transformers, with inputs that show their masks: padding, images, windows, cross-attention."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as t
from torch import Tensor

VOCABULARY, IMAGE = 128, 100


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what transformers and torch say about models made for tests."""
    before = t.logging.get_verbosity()
    t.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    t.logging.set_verbosity(before)


@dataclass
class Tiny:
    """A model class, its configuration, and inputs; `valid` marks the outputs that mean something."""

    cls: type
    config: Any
    inputs: dict[str, Tensor]
    generates: bool = True
    valid: Tensor | None = None
    says: list[str] = field(default_factory=list)  # parts of what is said once about dense paths

    def build(self, implementation: str, dtype: torch.dtype = torch.float32) -> Any:
        torch.manual_seed(0)
        config = copy.deepcopy(self.config)  # models share what they are built from, the implementation too
        model = self.cls._from_config(config, attn_implementation="eager").to(dtype).eval()
        for name, parameter in model.named_parameters():  # gates start closed, which would hide what they let through
            if "gate" in name and parameter.numel() == 1:
                torch.nn.init.constant_(parameter, 0.5)
        if implementation != "eager":
            model.set_attn_implementation(implementation)
        return model


def text(**changes: Any) -> dict[str, Any]:
    sizes = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256)
    tokens = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return sizes | heads | tokens | changes


def encoder_text(**changes: Any) -> dict[str, Any]:
    return {k: v for k, v in text(**changes).items() if k != "num_key_value_heads"}


def vision(**changes: Any) -> dict[str, Any]:
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, projection_dim=32)
    return sizes | dict(image_size=28, patch_size=14) | changes


def prompt(length: int, images: dict[int, list[tuple[int, int]]], left_padding: dict[int, int]) -> dict[str, Tensor]:
    """Two samples of random tokens with runs of image tokens, padded on the left."""
    ids = torch.randint(10, 90, (2, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for sample, runs in images.items():
        for begin, end in runs:
            ids[sample, begin:end] = IMAGE
    for sample, count in left_padding.items():
        ids[sample, :count], mask[sample, :count] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def llava() -> Tiny:
    config = t.LlavaConfig(
        vision_config=dict(model_type="clip_vision_model", **vision()),
        text_config=dict(model_type="llama", **text()),
        image_token_id=IMAGE,
    )
    inputs = prompt(24, {0: [(3, 7)], 1: [(5, 9)]}, {1: 3}) | {"pixel_values": torch.randn(2, 3, 28, 28)}
    return Tiny(t.LlavaForConditionalGeneration, config, inputs, valid=inputs["attention_mask"].bool())


def gemma3() -> Tiny:
    config = t.Gemma3Config(
        text_config=text(
            head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=8
        ),
        vision_config=vision(image_size=56),
        mm_tokens_per_image=4,
        image_token_id=IMAGE,
        boi_token_id=102,
        eoi_token_id=103,
    )
    runs = [(4, 8), (12, 16)]
    inputs = prompt(30, {0: runs, 1: runs}, {1: 2}) | {"pixel_values": torch.randn(4, 3, 56, 56)}
    inputs["token_type_ids"] = (inputs["input_ids"] == IMAGE).long()
    return Tiny(t.Gemma3ForConditionalGeneration, config, inputs, valid=inputs["attention_mask"].bool())


def paligemma() -> Tiny:
    config = t.PaliGemmaConfig(
        text_config=dict(model_type="gemma", head_dim=8, **text()),
        vision_config=dict(model_type="siglip_vision_model", **vision()),
        image_token_id=IMAGE,
        projection_dim=32,
    )
    inputs = prompt(24, {0: [(0, 4)], 1: [(0, 4)]}, {}) | {"pixel_values": torch.randn(2, 3, 28, 28)}
    inputs["token_type_ids"] = (torch.arange(24) >= 12).long().expand(2, -1).contiguous()
    return Tiny(t.PaliGemmaForConditionalGeneration, config, inputs)


def qwen_inputs() -> dict[str, Tensor]:
    inputs = prompt(26, {0: [(3, 19)], 1: [(8, 16)]}, {1: 4})
    inputs |= {"pixel_values": torch.randn(96, 3 * 2 * 4 * 4), "image_grid_thw": torch.tensor([[1, 8, 8], [1, 4, 8]])}
    return inputs | {"mm_token_type_ids": (inputs["input_ids"] == IMAGE).int()}


QWEN_TOKENS = dict(image_token_id=IMAGE, video_token_id=101, vision_start_token_id=102, vision_end_token_id=103)
QWEN_TOWER = dict(depth=3, hidden_size=32, intermediate_size=48, num_heads=4, patch_size=4, temporal_patch_size=2,
                  spatial_merge_size=2, out_hidden_size=32, in_channels=3)  # fmt: skip


def qwen2_5_vl() -> Tiny:
    rope = dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2])
    config = t.Qwen2_5_VLConfig(
        text_config=text(rope_parameters=rope, layer_types=["full_attention"] * 2),
        vision_config=dict(window_size=16, fullatt_block_indexes=[2], tokens_per_second=2, **QWEN_TOWER),
        **QWEN_TOKENS,
    )
    inputs = qwen_inputs()
    return Tiny(t.Qwen2_5_VLForConditionalGeneration, config, inputs, valid=inputs["attention_mask"].bool())


def qwen3_vl() -> Tiny:
    rope = dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 1, 1], mrope_interleaved=True)
    config = t.Qwen3VLConfig(
        text_config=text(head_dim=8, rope_parameters=rope),
        vision_config=dict(num_position_embeddings=64, deepstack_visual_indexes=[0, 1], **QWEN_TOWER),
        **QWEN_TOKENS,
    )
    inputs = qwen_inputs()
    return Tiny(t.Qwen3VLForConditionalGeneration, config, inputs, valid=inputs["attention_mask"].bool())


def mllama() -> Tiny:
    rope = dict(rope_type="default", rope_theta=1e4)
    tower = dict(hidden_size=32, attention_heads=4, num_hidden_layers=2, num_global_layers=1, intermediate_size=48,
                 image_size=28, patch_size=14, vision_output_dim=64, max_num_tiles=1, supported_aspect_ratios=[[1, 1]],
                 intermediate_layers_indices=[1])  # fmt: skip
    config = t.MllamaConfig(
        text_config=text(num_hidden_layers=3, cross_attention_layers=[1], rope_parameters=rope),
        vision_config=tower,
        image_token_index=IMAGE,
    )
    inputs = prompt(20, {0: [(3, 4)], 1: [(3, 4)]}, {})
    cross = torch.ones(2, 20, 1, 1, dtype=torch.long)
    cross[:, :3] = 0
    inputs |= {"pixel_values": torch.randn(2, 1, 1, 3, 28, 28), "cross_attention_mask": cross}
    inputs |= {name: torch.ones(shape, dtype=torch.long)
               for name, shape in (("aspect_ratio_ids", (2, 1)), ("aspect_ratio_mask", (2, 1, 1)))}  # fmt: skip
    says = [
        "MllamaVisionAttention: it builds its own dense mask",
        "MllamaTextCrossAttention: it builds its own dense mask",
    ]
    return Tiny(t.MllamaForConditionalGeneration, config, inputs, says=says)


def whisper() -> Tiny:
    config = t.WhisperConfig(
        vocab_size=VOCABULARY, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=80, max_source_positions=50,
        max_target_positions=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3,
    )  # fmt: skip
    inputs = {"input_features": torch.randn(2, 80, 100), "decoder_input_ids": torch.randint(5, VOCABULARY, (2, 7))}
    return Tiny(t.WhisperForConditionalGeneration, config, inputs)


def bert() -> Tiny:
    config = t.BertConfig(**encoder_text())
    inputs = {"input_ids": torch.randint(5, VOCABULARY, (2, 12)), "attention_mask": torch.ones(2, 12, dtype=torch.long)}
    inputs["attention_mask"][1, 9:] = 0
    return Tiny(t.BertModel, config, inputs, generates=False, valid=inputs["attention_mask"].bool())


def clip() -> Tiny:
    config = t.CLIPConfig(text_config=encoder_text(projection_dim=32), vision_config=vision(), projection_dim=32)
    inputs = bert().inputs | {"pixel_values": torch.randn(2, 3, 28, 28)}
    return Tiny(t.CLIPModel, config, inputs, generates=False)


def siglip() -> Tiny:
    config = t.SiglipConfig(text_config=encoder_text(projection_size=32), vision_config=vision())
    inputs = {"input_ids": torch.randint(5, VOCABULARY, (2, 12)), "pixel_values": torch.randn(2, 3, 28, 28)}
    return Tiny(t.SiglipModel, config, inputs, generates=False)


MODELS = {f.__name__: f for f in (
    llava, gemma3, paligemma, qwen2_5_vl, qwen3_vl, mllama, whisper, bert, clip, siglip,
)}  # fmt: skip


def output_of(model: Any, inputs: dict[str, Tensor], **changes: Any) -> Tensor:
    """Logits, or the hidden states of a model that has none."""
    out = model(**inputs, **changes)
    for name in ("logits", "logits_per_image", "last_hidden_state"):
        if name in out:
            return out[name]
    raise AssertionError(list(out))
