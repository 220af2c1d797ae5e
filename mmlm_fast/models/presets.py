"""Ready-made configurations and processors, random weights, no download: the systems that multimodal articles describe.

Sizes default to ones that train in seconds on a CPU; the docstrings give the published ones. Weights of published
towers come by `from_towers`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mmlm_fast.models import preset_parts as parts
from mmlm_fast.models.configuration import MMLMConfig
from mmlm_fast.models.processing import MMLMProcessor
from mmlm_fast.models.tokenization import byte_tokenizer, image_processor

AUDIO_SECONDS = 10
Built = tuple[MMLMConfig, MMLMProcessor]


@dataclass(frozen=True)
class Preset:
    """A preset: `build(**options)` gives configuration and processor of the class named `model`; `task` is its usual
    one."""

    build: Callable[..., Built]
    model: str
    task: str


def _processor(tokenizer: Any, image_size: int, seconds: int, num_mel_bins: int = 80, **options: Any) -> MMLMProcessor:
    from mmlm_fast.audio import WhisperFeatureExtractor

    return MMLMProcessor(
        image_processor=image_processor(image_size),
        feature_extractor=WhisperFeatureExtractor(feature_size=num_mel_bins, chunk_length=seconds),
        tokenizer=tokenizer,
        **options,
    )


def multimodal_lstm(
    *,
    hidden_size: int = 64,
    num_hidden_layers: int = 2,
    lstm_size: int = 128,
    image_size: int = 56,
    audio_seconds: int = AUDIO_SECONDS,
    tokenizer: Any = None,
    **options: Any,
) -> Built:
    """Configure BERT states, the picture's mean colour and the mean spectrum as further steps, an LSTM, its last state,
    classes.

    Published: BERT-base (``hidden_size=768, num_hidden_layers=12``), pictures of 224, 128 mel bins, LSTM of 128.
    """
    tokenizer = tokenizer or byte_tokenizer(padding_side="right")
    joint = {"model_type": "mmlm_lstm", "vocab_size": 0, "embedding_size": hidden_size, "hidden_size": lstm_size}
    config = MMLMConfig(
        **{
            "text_config": parts.bert(tokenizer, hidden_size, num_hidden_layers),
            "vision_config": {"model_type": "mmlm_mean", "hidden_size": 3},
            "audio_config": {"model_type": "mmlm_mean", "hidden_size": 128},
            "joint_config": joint,
            "projector_layers": 1,
            "fusion": "sequence",
            "pooling": "last",
            "classifier_hidden": False,
        }
        | options
    )
    return config, _processor(tokenizer, image_size, audio_seconds, num_mel_bins=128)


def two_encoder_seq2seq(
    *,
    hidden_size: int = 64,
    image_size: int = 32,
    audio: bool = True,
    audio_seconds: int = AUDIO_SECONDS,
    tokenizer: Any = None,
    **options: Any,
) -> Built:
    """Configure a CNN of the picture, word embeddings of the text, an RNN over the spectrogram if wanted, joined
    feature by feature; an LSTM decoder.

    Published: words as tokens, Adam, 10 epochs in batches of 32.
    """
    tokenizer = tokenizer or byte_tokenizer(padding_side="right")
    hearing = {
        "model_type": "mmlm_conv_audio",
        "hidden_size": hidden_size,
        "hidden_sizes": [hidden_size],
        "recurrent": True,
    }
    config = MMLMConfig(
        **{
            "text_config": parts.lstm(tokenizer, hidden_size, num_hidden_layers=0),
            "vision_config": {
                "model_type": "mmlm_conv_image",
                "image_size": image_size,
                "hidden_sizes": [32, 64],
                "hidden_size": hidden_size,
            },
            "audio_config": hearing if audio else None,
            "decoder_config": parts.lstm(tokenizer, hidden_size, add_cross_attention=True),
            "projector_layers": 0,
            "fusion": "concat",
        }
        | options
    )
    return config, _processor(tokenizer, image_size, audio_seconds)


def mmlm_basic(
    *,
    hidden_size: int = 128,
    image_size: int = 32,
    audio_seconds: int = AUDIO_SECONDS,
    tokenizer: Any = None,
    **options: Any,
) -> Built:
    """Configure an embedding and an LSTM for text, convolution, pooling and a linear layer for pictures, a CNN for
    sound; a linear layer over all three; an LSTM decoder.

    Published: 10,000 words, pictures of 224, LSTM of 256 where the fusion expects 128: here all are `hidden_size`.
    """
    tokenizer = tokenizer or byte_tokenizer(padding_side="right")
    config = MMLMConfig(
        **{
            "text_config": parts.lstm(tokenizer, hidden_size),
            "vision_config": {"model_type": "mmlm_conv_image", "image_size": image_size, "hidden_size": hidden_size},
            "audio_config": {"model_type": "mmlm_conv_audio", "hidden_size": hidden_size},
            "decoder_config": parts.lstm(tokenizer, hidden_size, add_cross_attention=True),
            "projector_layers": 0,
            "pooling": "last",
            "fusion": "concat",
        }
        | options
    )
    return config, _processor(tokenizer, image_size, audio_seconds)


def transformer_encoder_decoder(
    *,
    hidden_size: int = 64,
    num_hidden_layers: int = 2,
    image_size: int = 56,
    audio_seconds: int = AUDIO_SECONDS,
    tokenizer: Any = None,
    **options: Any,
) -> Built:
    """Configure BERT, ResNet and a CNN; fused = Σ aᵢ·featureᵢ with a = softmax(scores); a Transformer encoder over the
    fused feature and all tokens; a Transformer decoder with cross-attention.

    Published: BERT-base and ResNet; also ``fusion="mean"`` and ``"weighted"``. ``fusion="cross_attention"`` leaves the
    fused feature out.
    """
    tokenizer = tokenizer or byte_tokenizer(padding_side="right")
    decoder = {"model_type": "gpt2", **parts.sizes(hidden_size, num_hidden_layers), **parts.vocabulary(tokenizer)}
    del decoder["intermediate_size"]
    config = MMLMConfig(
        **{
            "text_config": parts.bert(tokenizer, hidden_size, num_hidden_layers),
            "vision_config": parts.resnet(16),
            "audio_config": {
                "model_type": "mmlm_conv_audio",
                "hidden_sizes": [64, 64, 64, 64],
                "hidden_size": hidden_size,
            },
            "joint_config": parts.bert(tokenizer, hidden_size, num_hidden_layers)
            | {"vocab_size": 1, "pad_token_id": 0},
            "decoder_config": decoder | {"add_cross_attention": True},
            "fusion": "attention",
        }
        | options
    )
    return config, _processor(tokenizer, image_size, audio_seconds)


def clip_contrastive(
    *,
    hidden_size: int = 64,
    num_hidden_layers: int = 2,
    image_size: int = 56,
    patch_size: int = 14,
    audio: bool = False,
    audio_seconds: int = AUDIO_SECONDS,
    tokenizer: Any = None,
    **options: Any,
) -> Built:
    """Configure a dual encoder of text and pictures (and sound), trained contrastively; for matching probabilities and
    search.

    Published: CLIP ViT-B/32 (``from_towers(text=…, image="openai/clip-vit-base-patch32")``), AdamW at 1e-5.
    """
    tokenizer = tokenizer or byte_tokenizer(padding_side="right")
    config = MMLMConfig(
        **{
            "text_config": parts.bert(tokenizer, hidden_size, num_hidden_layers),
            "vision_config": parts.siglip(hidden_size, num_hidden_layers, image_size, patch_size),
            "audio_config": {
                "model_type": "mmlm_conv_audio",
                "hidden_sizes": [64, 64, 64, 64],
                "hidden_size": hidden_size,
            }
            if audio
            else None,
            "fusion": "mean",
            "projection_dim": 64,
        }
        | options
    )
    return config, _processor(tokenizer, image_size, audio_seconds)


def resnet_text_classifier(
    *,
    resnet_width: int = 16,
    hidden_size: int = 64,
    num_hidden_layers: int = 2,
    image_size: int = 56,
    audio: bool = False,
    audio_seconds: int = AUDIO_SECONDS,
    num_labels: int = 10,
    tokenizer: Any = None,
    **options: Any,
) -> Built:
    """Configure ResNet-18 and a text encoder, joined feature by feature, dropout, classes.

    Published: ``resnet_width=64``, pictures of 224, ten classes, AdamW at 2e-5, batches of 16, five epochs.
    """
    tokenizer = tokenizer or byte_tokenizer(padding_side="right")
    config = MMLMConfig(
        **{
            "text_config": parts.bert(tokenizer, hidden_size, num_hidden_layers),
            "vision_config": parts.resnet(resnet_width),
            "audio_config": {
                "model_type": "mmlm_conv_audio",
                "hidden_sizes": [64, 64, 64, 64],
                "hidden_size": hidden_size,
            }
            if audio
            else None,
            "fusion": "concat",
            "classifier_dropout": 0.5,
            "num_labels": num_labels,
        }
        | options
    )
    return config, _processor(tokenizer, image_size, audio_seconds)


def token_merge_vlm(
    fusion: str = "merge",
    *,
    hidden_size: int = 64,
    num_hidden_layers: int = 2,
    image_size: int = 56,
    patch_size: int = 14,
    audio_seconds: int = AUDIO_SECONDS,
    tokenizer: Any = None,
    **options: Any,
) -> Built:
    """Configure a LLaVA-style model with audio too: SigLIP vision tower, Whisper-style audio encoder, Qwen3 decoder,
    bytes.

    Args:
        fusion: See `MMLMConfig`.
        hidden_size: Width of all three; a multiple of 64.
        num_hidden_layers: Depth of all three.
        image_size, patch_size: Pixels; the first a multiple of the second.
        audio_seconds: Of a chunk; longer clips become several.
        tokenizer: Of transformers, with ``<image>`` and ``<audio>``; bytes by default.
        options: Further ones of `MMLMConfig`, such as the weights of the loss.

    Source: LLaVA 1.5 (Liu et al. 2023), Qwen2-Audio (Chu et al. 2024).
    """
    if hidden_size % 64:
        raise ValueError(f"hidden_size must be a multiple of 64, got {hidden_size}")
    tokenizer = tokenizer or byte_tokenizer()
    config = MMLMConfig(
        **{
            "text_config": parts.qwen(tokenizer, hidden_size, num_hidden_layers),
            "vision_config": parts.siglip(hidden_size, num_hidden_layers, image_size, patch_size),
            "audio_config": parts.audio_encoder(hidden_size, num_hidden_layers, audio_seconds),
            "fusion": fusion,
            "image_token_id": tokenizer.convert_tokens_to_ids("<image>"),
            "audio_token_id": tokenizer.convert_tokens_to_ids("<audio>"),
        }
        | options
    )
    places_tokens = config.fusion_kind.places_tokens
    processor = _processor(
        tokenizer,
        image_size,
        audio_seconds,
        image_seq_length=(image_size // patch_size) ** 2 if places_tokens else 0,
        audio_seq_length=audio_seconds * 25 if places_tokens else 0,
        chat_template=tokenizer.chat_template,
    )
    return config, processor


def joint_pretrain(
    *,
    hidden_size: int = 64,
    num_hidden_layers: int = 2,
    image_size: int = 56,
    patch_size: int = 14,
    audio_seconds: int = AUDIO_SECONDS,
    tokenizer: Any = None,
    **options: Any,
) -> Built:
    """Configure BERT, SigLIP's vision tower and a Whisper-style audio encoder, trained on masked words, hidden patches,
    hidden stretches of sound, and alignment.

    Then fine-tuned: ``MMLMForClassification.from_pretrained(folder, num_labels=…)``.
    """
    tokenizer = tokenizer or byte_tokenizer(padding_side="right")
    config = MMLMConfig(
        **{
            "text_config": parts.bert(tokenizer, hidden_size, num_hidden_layers),
            "vision_config": parts.siglip(hidden_size, num_hidden_layers, image_size, patch_size),
            "audio_config": parts.audio_encoder(hidden_size, num_hidden_layers, audio_seconds),
            "fusion": "concat",
            "mask_token_id": tokenizer.mask_token_id,
            "contrastive_weight": 1.0,
            "reconstruction_weight": 1.0,
            "projection_dim": 64,
        }
        | options
    )
    return config, _processor(tokenizer, image_size, audio_seconds)


def image_tokens(
    *,
    hidden_size: int = 64,
    num_hidden_layers: int = 2,
    codebook_size: int = 64,
    image_size: int = 16,
    tokenizer: Any = None,
    **options: Any,
) -> Built:
    """Configure a decoder over bytes and a codebook, which writes the tokens of a picture after its text;
    `MMLMImageTokenizer` makes and paints them.

    Published: DALL-E, a discrete VAE of 8,192 codes and a Transformer of 12 billion parameters.
    """
    tokenizer = tokenizer or byte_tokenizer(codebook_size=codebook_size)
    text = parts.qwen(tokenizer, hidden_size, num_hidden_layers)
    config = MMLMConfig(**{"text_config": text, "fusion": "merge"} | options)
    return config, _processor(tokenizer, image_size, AUDIO_SECONDS)


PRESETS = {
    "multimodal_lstm": Preset(multimodal_lstm, "MMLMForClassification", "classification"),
    "two_encoder_seq2seq": Preset(two_encoder_seq2seq, "MMLMForSeq2SeqLM", "captioning"),
    "mmlm_basic": Preset(mmlm_basic, "MMLMForSeq2SeqLM", "captioning"),
    "transformer_encoder_decoder": Preset(transformer_encoder_decoder, "MMLMForSeq2SeqLM", "translation"),
    "clip_contrastive": Preset(clip_contrastive, "MMLMForContrastive", "retrieval"),
    "resnet_text_classifier": Preset(resnet_text_classifier, "MMLMForClassification", "classification"),
    "token_merge_vlm": Preset(token_merge_vlm, "MMLMForConditionalGeneration", "captioning"),
    "joint_pretrain": Preset(joint_pretrain, "MMLMForPreTraining", "pretraining"),
    "image_tokens": Preset(image_tokens, "MMLMForConditionalGeneration", "image_generation"),
}
