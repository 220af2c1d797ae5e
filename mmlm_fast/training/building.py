"""Models and processors of a configuration file."""

from collections.abc import Sequence
from typing import Any

import torch

import mmlm_fast.models as models
from mmlm_fast.models import MMLMConfig, MMLMImageTokenizer, MMLMImageTokenizerConfig, MMLMProcessor
from mmlm_fast.models.base import CONFIG_OF
from mmlm_fast.models.presets import PRESETS
from mmlm_fast.models.tokenization import byte_tokenizer
from mmlm_fast.training.settings import TrainSettings
from mmlm_fast.training.tasks import TASKS

PADS_LEFT = ("MMLMForConditionalGeneration",)


def class_of(settings: TrainSettings) -> Any:
    """The class of the model: the preset's, or where the task is of another kind (fine-tuning after pre-training), the
    task's."""
    kinds: dict[str, Any] = {
        "classification": models.MMLMForClassification,
        "retrieval": models.MMLMForContrastive,
        "pretraining": models.MMLMForPreTraining,
        "image_tokenizer": MMLMImageTokenizer,
    }
    kind = TASKS[settings.task].kind
    if kind in kinds:
        return kinds[kind]
    found = getattr(models, PRESETS[settings.preset].model)
    if not hasattr(found, "generate"):
        raise ValueError(f"task {settings.task} needs a preset that generates, got {settings.preset}")
    return found


def build(settings: TrainSettings, labels: Sequence[str], texts: Sequence[str]) -> tuple[Any, MMLMProcessor]:
    """Model and processor.

    Args:
        labels: Names of the classes, where there are some.
        texts: Of the training samples, for a tokenizer that learns.
    """
    cls, options = class_of(settings), dict(settings.model)
    if labels:
        options |= {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
        options["num_labels"] = len(labels)
    if settings.start_from:
        folder = settings.path(settings.start_from)
        if not (folder / "config.json").is_file():
            raise ValueError(f"start_from: no model in {folder}")
        options.pop("tokenizer", None)
        if _drops_towers(settings):
            had = MMLMConfig.from_pretrained(folder).modalities or []
            options["modalities"] = [m for m in had if m in settings.data.modalities]
        return cls.from_pretrained(folder, **options), MMLMProcessor.from_pretrained(folder)
    side = "left" if cls.__name__ in PADS_LEFT else "right"
    tokenizer = _tokenizer(str(options.pop("tokenizer", "bytes")), side, texts, options)
    config, processor = PRESETS[settings.preset].build(tokenizer=tokenizer, **options)
    if _drops_towers(settings):
        config.modalities = [m for m in config.modalities or () if m in settings.data.modalities]
    return from_checkpoints(cls, settings.towers, config, processor) if settings.towers else (cls(config), processor)


def _drops_towers(settings: TrainSettings) -> bool:
    """Towers of modalities that are not used are not built, where a model can do without."""
    return TASKS[settings.task].kind in ("classification", "retrieval")


def _tokenizer(name: str, side: str, texts: Sequence[str], options: dict[str, Any]) -> Any:
    codebook = options.get("codebook_size", 0)
    if name == "bytes":
        return None if codebook else byte_tokenizer(padding_side=side)
    if name.startswith("bpe:"):
        return byte_tokenizer(
            padding_side=side, codebook_size=codebook, texts=texts, vocab_size=int(name.removeprefix("bpe:"))
        )
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name, padding_side=side)


def from_checkpoints(cls: Any, towers: dict[str, str], config: Any, processor: Any) -> tuple[Any, MMLMProcessor]:
    """A model as `config` says, but with the towers of these checkpoints, and a processor as they expect it.

    Raises:
        ValueError: for ``merge``, if an input of the towers does not fit.
    """
    from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer

    options = config.to_dict()
    for name in ("model_type", "architectures", "transformers_version", "hidden_size"):
        options.pop(name, None)
    for modality in ("text", "image", "audio", "decoder"):
        if modality in towers:
            options.pop(CONFIG_OF[modality])
    text = towers.get("decoder" if cls is models.MMLMForSeq2SeqLM else "text")
    if cls is models.MMLMForSeq2SeqLM and ("text" in towers) != ("decoder" in towers):
        raise ValueError("towers of a sequence-to-sequence model: text and decoder together, as they share a tokenizer")
    tokenizer = processor.tokenizer
    if text is not None:
        tokenizer = AutoTokenizer.from_pretrained(text, padding_side=tokenizer.padding_side)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if config.fusion == "merge":  # only there are placeholders among the tokens
            tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<audio>"]})
            for name in ("image_token_id", "audio_token_id"):
                options[name] = tokenizer.convert_tokens_to_ids(f"<{name.removesuffix('_token_id')}>")
    seeing, hearing = processor.image_processor, processor.feature_extractor
    if "image" in towers:
        seeing = AutoImageProcessor.from_pretrained(towers["image"])
    if "audio" in towers:
        hearing = _feature_extractor(AutoFeatureExtractor.from_pretrained(towers["audio"]))
    model = cls.from_towers(**towers, **options)
    if text is not None and len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))
    made = MMLMProcessor(image_processor=seeing, feature_extractor=hearing, tokenizer=tokenizer)
    if config.fusion == "merge":
        made.image_seq_length, made.audio_seq_length = _tokens_per_item(model, made)
    return model, made


def _feature_extractor(found: Any) -> Any:
    """Ours of the same name, where there is one."""
    import mmlm_fast.audio

    ours = getattr(mmlm_fast.audio, type(found).__name__, None)
    return found if ours is None else ours(**found.to_dict())


@torch.no_grad()
def _tokens_per_item(model: Any, processor: Any) -> tuple[int, int]:
    """How many tokens the towers make of a picture and of a chunk of sound, found by trying."""
    import numpy as np
    from PIL import Image

    counts = [0, 0]
    if model.config.vision_config is not None:
        pixels = processor.image_processor([Image.new("RGB", (64, 64))], return_tensors="pt")["pixel_values"]
        counts[0] = model.get_image_features(pixels).pooler_output.shape[1]
    if model.config.audio_config is not None:
        rate = processor.feature_extractor.sampling_rate
        features = processor.feature_extractor([np.zeros(rate, np.float32)], sampling_rate=rate, return_tensors="pt")
        counts[1] = model.get_audio_features(features["input_features"]).pooler_output.shape[1]
    return counts[0], counts[1]


def image_tokenizer_of(settings: TrainSettings) -> MMLMImageTokenizer:
    """A new one, of the size that the preset's options ask for."""
    options = {k: settings.model[k] for k in ("image_size", "codebook_size") if k in settings.model}
    return MMLMImageTokenizer(MMLMImageTokenizerConfig(**options))
