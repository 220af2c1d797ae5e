"""Ready-made configurations and processors, random weights, no download."""

from typing import Any

from mmlm_fast.models.configuration import MMLMConfig
from mmlm_fast.models.processing import MMLMProcessor

AUDIO_SECONDS = 10


def byte_tokenizer() -> Any:
    """A tokenizer that needs no training data and knows every language: UTF-8 bytes and a few special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<bos>", "<eos>", "<image>", "<audio>"]
    vocabulary = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=["<image>", "<audio>"],
        padding_side="left",
    )


def _image_processor(size: int) -> Any:
    try:  # without torchvision
        from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil as ImageProcessor
    except ImportError:
        from transformers import SiglipImageProcessor as ImageProcessor
    return ImageProcessor(size={"height": size, "width": size})


def token_merge_vlm(
    fusion: str = "merge",
    *,
    hidden_size: int = 64,
    num_hidden_layers: int = 2,
    image_size: int = 56,
    **options: Any,
) -> tuple[MMLMConfig, MMLMProcessor]:
    """LLaVA-style model with audio too: SigLIP vision tower, Whisper-style audio encoder, Qwen3 decoder, bytes.

    Args:
        fusion: See `MMLMConfig`.
        hidden_size: Width of all three; a multiple of 64.
        num_hidden_layers: Depth of all three.
        image_size: Pixels; a multiple of 14.
        options: Further ones of `MMLMConfig`, such as the weights of the loss.

    Returns:
        Configuration and processor. Clips are cut to ten seconds.

    Source: LLaVA 1.5 (Liu et al. 2023), Qwen2-Audio (Chu et al. 2024).
    """
    from mmlm_fast.audio import WhisperFeatureExtractor

    if hidden_size % 64 or image_size % 14:
        raise ValueError(f"hidden_size must be a multiple of 64, image_size of 14, got {hidden_size} and {image_size}")
    tokenizer = byte_tokenizer()
    num_frames = AUDIO_SECONDS * 100
    shared = {
        "hidden_size": hidden_size,
        "intermediate_size": 4 * hidden_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": hidden_size // 32,
    }
    config = MMLMConfig(
        text_config={
            "model_type": "qwen3",
            **shared,
            "num_key_value_heads": hidden_size // 64,
            "head_dim": 32,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 4096,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config={"model_type": "siglip_vision_model", **shared, "image_size": image_size, "patch_size": 14},
        audio_config={
            "model_type": "qwen2_audio_encoder",
            "d_model": hidden_size,
            "encoder_layers": num_hidden_layers,
            "encoder_attention_heads": hidden_size // 32,
            "encoder_ffn_dim": 4 * hidden_size,
            "num_mel_bins": 80,
            "max_source_positions": num_frames // 2,
        },
        fusion=fusion,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        audio_token_id=tokenizer.convert_tokens_to_ids("<audio>"),
        **options,
    )
    merge = fusion == "merge"
    processor = MMLMProcessor(
        image_processor=_image_processor(image_size),
        feature_extractor=WhisperFeatureExtractor(chunk_length=AUDIO_SECONDS),
        tokenizer=tokenizer,
        image_seq_length=(image_size // 14) ** 2 if merge else 0,
        audio_seq_length=num_frames // 4 if merge else 0,
    )
    return config, processor
