"""Configurations of towers and decoders, small or as published, as the presets put them together."""

from typing import Any


def vocabulary(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def sizes(hidden_size: int, num_hidden_layers: int) -> dict[str, int]:
    if hidden_size % 32:
        raise ValueError(f"hidden_size must be a multiple of 32, got {hidden_size}")
    return {
        "hidden_size": hidden_size,
        "intermediate_size": 4 * hidden_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": hidden_size // 32,
    }


def bert(tokenizer: Any, hidden_size: int, num_hidden_layers: int) -> dict[str, Any]:
    return {"model_type": "bert", **sizes(hidden_size, num_hidden_layers), **vocabulary(tokenizer)}


def siglip(hidden_size: int, num_hidden_layers: int, image_size: int, patch_size: int) -> dict[str, Any]:
    if image_size % patch_size:
        raise ValueError(f"image_size must be a multiple of {patch_size}, got {image_size}")
    shared = sizes(hidden_size, num_hidden_layers)
    return {"model_type": "siglip_vision_model", **shared, "image_size": image_size, "patch_size": patch_size}


def audio_encoder(hidden_size: int, num_hidden_layers: int, seconds: int) -> dict[str, Any]:
    return {
        "model_type": "qwen2_audio_encoder",
        "d_model": hidden_size,
        "encoder_layers": num_hidden_layers,
        "encoder_attention_heads": hidden_size // 32,
        "encoder_ffn_dim": 4 * hidden_size,
        "num_mel_bins": 80,
        "max_source_positions": seconds * 50,
    }


def resnet(width: int) -> dict[str, Any]:
    """Configure a ResNet; at width 64 it is ResNet-18."""
    sizes = [width * 2**i for i in range(4)]
    return {
        "model_type": "resnet",
        "embedding_size": width,
        "hidden_sizes": sizes,
        "depths": [2, 2, 2, 2],
        "layer_type": "basic",
    }


def lstm(tokenizer: Any, hidden_size: int, **options: Any) -> dict[str, Any]:
    return {"model_type": "mmlm_lstm", "hidden_size": hidden_size, **vocabulary(tokenizer), **options}


def qwen(tokenizer: Any, hidden_size: int, num_hidden_layers: int) -> dict[str, Any]:
    heads = {"num_key_value_heads": hidden_size // 64, "head_dim": 32, "max_position_embeddings": 4096}
    return {"model_type": "qwen3", **sizes(hidden_size, num_hidden_layers), **heads, **vocabulary(tokenizer)}
