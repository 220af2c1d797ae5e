"""Models and processors of a configuration file."""

import dataclasses
import inspect
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

import mmlm_fast.models as models
from mmlm_fast.models import MMLMConfig, MMLMImageTokenizer, MMLMImageTokenizerConfig, MMLMProcessor
from mmlm_fast.models.configuration import CONFIG_OF
from mmlm_fast.models.presets import PRESETS
from mmlm_fast.models.tokenization import byte_tokenizer
from mmlm_fast.training.arguments import in_range, typed, unknown_setting
from mmlm_fast.training.settings import TrainSettings
from mmlm_fast.training.tasks import TASKS

PROBLEMS = ("single_label_classification", "multi_label_classification", "regression")
PADS_LEFT = ("MMLMForConditionalGeneration",)


def class_of(settings: TrainSettings) -> Any:
    """Return the class of the model: the task's where it has one (fine-tuning after pre-training), or the preset's."""
    model_class = TASKS[settings.task].model_class
    if model_class is not None:
        return model_class
    preset_class = getattr(models, PRESETS[settings.preset].model)
    if not hasattr(preset_class, "generate"):
        raise ValueError(f"task {settings.task} needs a preset that generates, got {settings.preset}")
    return preset_class


def check(settings: TrainSettings) -> None:
    """Look at all that can be seen before data is read: options of the model, and whether checkpoints are there.

    Raises:
        ValueError: naming the setting.
    """
    cls = class_of(settings)
    for name, source in settings.towers.items():
        _find_checkpoint(f"towers.{name}", source)
    for name, value in (("start_from", settings.start_from), ("image_tokenizer", settings.image_tokenizer)):
        if value and not (settings.path(value) / "config.json").is_file():
            raise ValueError(f"{name}: no model in {settings.path(value)}")
    preset = inspect.signature(PRESETS[settings.preset].build).parameters
    known = {"num_labels", "problem_type", *MMLMConfig.__annotations__}
    if not settings.start_from:  # a model that goes on has its sizes and its tokenizer
        known |= {"tokenizer", *(n for n, p in preset.items() if p.kind is not p.VAR_KEYWORD)}
    for name in settings.model:
        if name not in known and name in (*preset, "tokenizer"):
            raise ValueError(f"model.{name} is that of the model in start_from, got {settings.model[name]!r}")
        if name not in known:
            raise unknown_setting(name, known, "model.")
    _check_options(settings)
    try:
        if cls is MMLMImageTokenizer or TASKS[settings.task].needs_image_tokenizer:
            image_tokenizer_of(settings)
        if cls is MMLMImageTokenizer or settings.start_from:
            return
        options = dict(settings.model)
        name = str(options.pop("tokenizer", "bytes"))
        kind = "bytes" if name.startswith("bpe:") else name
        tokenizer = _tokenizer(kind, _side(cls), (), _codebook_size(settings))
        if name.startswith("bpe:"):
            _vocabulary_size(name)
        config, _ = PRESETS[settings.preset].build(tokenizer=tokenizer, **options)
        if not settings.towers:
            with torch.device("meta"):
                cls(config)
    except Exception as error:  # transformers' configurations raise errors of several kinds
        raise ValueError(f"model: {error}") from error


def _check_options(settings: TrainSettings) -> None:
    """Raise for options of the model that are not of the types of their annotations, or outside their ranges."""
    hints: dict[str, Any] = dict(MMLMConfig.__annotations__)
    sizes = typing.get_type_hints(PRESETS[settings.preset].build)
    hints |= {"num_labels": int, "problem_type": str} | {n: h for n, h in sizes.items() if n in settings.model}
    for name, value in settings.model.items():
        if name not in hints or hints[name] is Any:
            continue
        settings.model[name] = value = typed(f"model.{name}", value, hints[name])
        if value is not None and (name in sizes or name == "num_labels") and hints[name] is int:
            in_range(f"model.{name}", value, 1)
        if name.endswith("dropout"):
            in_range(f"model.{name}", value, 0, 1)
    kind = settings.model.get("problem_type", PROBLEMS[0])
    if kind not in PROBLEMS:
        raise ValueError(f"model.problem_type must be among {', '.join(PROBLEMS)}, got {kind!r}")


def _find_checkpoint(name: str, source: str) -> None:
    from transformers import AutoConfig

    folder = Path(source)
    weights: Iterable[str] = ("*.safetensors", "*.bin", "*.safetensors.index.json")
    if folder.is_dir() and not any(path for pattern in weights for path in folder.glob(pattern)):
        raise ValueError(f"{name}: no weights in {source}")
    try:
        AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}: no checkpoint {source}: {str(error).splitlines()[0]}") from error


def _side(cls: Any) -> str:
    return "left" if cls.__name__ in PADS_LEFT else "right"


def build(settings: TrainSettings, labels: Sequence[str], texts: Sequence[str]) -> tuple[Any, MMLMProcessor]:
    """Build model and processor.

    Args:
        labels: Names of the classes, where there are some.
        texts: Of the training samples, for a tokenizer that learns.
    """
    cls = class_of(settings)
    if cls is MMLMImageTokenizer:  # the processor is that of the model which will write its codes
        writing = dataclasses.replace(settings, task="image_generation")
        return image_tokenizer_of(settings), build_processor(writing, ())
    if settings.start_from:
        return _trained_model(settings, labels), build_processor(settings, texts)
    config, processor = build_config(settings, labels, texts)
    return from_checkpoints(cls, settings.towers, config, processor) if settings.towers else (cls(config), processor)


def build_processor(settings: TrainSettings, texts: Sequence[str]) -> MMLMProcessor:
    """Build the processor alone, but for towers of checkpoints: how many tokens those make is found by trying.

    Args:
        texts: See `build`.
    """
    if settings.start_from:
        return MMLMProcessor.from_pretrained(settings.path(settings.start_from))
    return build(settings, (), texts)[1] if settings.towers else build_config(settings, (), texts)[1]


def build_config(
    settings: TrainSettings, labels: Sequence[str], texts: Sequence[str]
) -> tuple[MMLMConfig, MMLMProcessor]:
    """Make the preset's configuration, and the processor that goes with it; see `build`."""
    options = _model_options(settings, labels)
    side = _side(class_of(settings))
    tokenizer = _tokenizer(str(options.pop("tokenizer", "bytes")), side, texts, _codebook_size(settings))
    config, processor = PRESETS[settings.preset].build(tokenizer=tokenizer, **options)
    if TASKS[settings.task].drops_unused_towers:
        config.modalities = [m for m in config.modalities or () if m in settings.data.modalities]
    return config, processor


def _trained_model(settings: TrainSettings, labels: Sequence[str]) -> Any:
    """Load the model of ``start_from``, as the settings and the classes want it."""
    options, folder = _model_options(settings, labels), settings.path(settings.start_from)
    if TASKS[settings.task].drops_unused_towers:
        modalities = MMLMConfig.from_pretrained(folder).modalities or []
        options["modalities"] = [m for m in modalities if m in settings.data.modalities]
    return class_of(settings).from_pretrained(folder, **options)


def _model_options(settings: TrainSettings, labels: Sequence[str]) -> dict[str, Any]:
    """Return ``[model]`` with what the names of the classes say.

    Raises:
        ValueError: for another number of classes.
    """
    options = dict(settings.model)
    if labels:
        options |= {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
        if options.setdefault("num_labels", len(labels)) != len(labels):
            raise ValueError(
                f"model.num_labels must be the number of classes, {len(labels)} ({', '.join(labels[:12])}), got "
                f"{options['num_labels']}"
            )
    if options.get("problem_type") == "regression" and options.setdefault("num_labels", 1) != 1:
        raise ValueError(f"model.num_labels must be 1 for regression, got {options['num_labels']}")
    return options


def _codebook_size(settings: TrainSettings) -> int:
    """Return the size of the preset's codebook of pictures, 0 where it has none."""
    options = inspect.signature(PRESETS[settings.preset].build).parameters
    default = options["codebook_size"].default if "codebook_size" in options else 0
    return settings.model.get("codebook_size", default)


def _tokenizer(name: str, side: str, texts: Sequence[str], codebook: int) -> Any:
    if name == "bytes":
        return byte_tokenizer(padding_side=side, codebook_size=codebook)
    if name.startswith("bpe:"):
        return byte_tokenizer(padding_side=side, codebook_size=codebook, texts=texts, vocab_size=_vocabulary_size(name))
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name, padding_side=side)


def _vocabulary_size(name: str) -> int:
    try:
        return int(name.removeprefix("bpe:"))
    except ValueError:
        raise ValueError(f"tokenizer must be bytes, bpe:<number of tokens> or a checkpoint, got {name!r}") from None


def from_checkpoints(cls: Any, towers: dict[str, str], config: Any, processor: Any) -> tuple[Any, MMLMProcessor]:
    """Build a model as `config` says, but with the towers of these checkpoints, and a processor as they expect it."""
    options = config.to_dict()
    for name in ("model_type", "architectures", "transformers_version", "hidden_size"):
        options.pop(name, None)
    for modality in towers:
        options.pop(CONFIG_OF[modality])
    if cls is models.MMLMForSeq2SeqLM and ("text" in towers) != ("decoder" in towers):
        raise ValueError("towers of a sequence-to-sequence model: text and decoder together, as they share a tokenizer")
    if "text" in towers:  # its tokenizer has other placeholders
        options.pop("image_token_id", None)
        options.pop("audio_token_id", None)
    model = cls.from_towers(**towers, **options)
    return model, MMLMProcessor.from_towers(model, **towers, like=processor)


def image_tokenizer_of(settings: TrainSettings) -> MMLMImageTokenizer:
    """Make a new image tokenizer, of the size that the preset's options ask for."""
    options = {k: settings.model[k] for k in ("image_size", "codebook_size") if k in settings.model}
    return MMLMImageTokenizer(MMLMImageTokenizerConfig(**options))
