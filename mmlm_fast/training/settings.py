"""The configuration file of `mmlm-fast train`."""

import dataclasses
import tomllib
import typing
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from mmlm_fast.models import MMLMImageTokenizer
from mmlm_fast.models.configuration import MODALITIES
from mmlm_fast.models.presets import PRESETS
from mmlm_fast.training.arguments import checked, checked_generation, typed
from mmlm_fast.training.builtin import BUILTIN
from mmlm_fast.training.samples import AUGMENTATIONS, class_name, strict_json
from mmlm_fast.training.tasks import TASKS


@dataclass
class DataSettings:
    """The section ``[data]``.

    Attributes:
        name, kind: A built-in set (``digits``, ``stamps``) and its kind, see `mmlm_fast.training.builtin`.
        train, eval: JSON-lines files instead; without ``eval`` the last tenth of ``train`` is held out.
        train_count, eval_count: At most so many samples.
        labels: Names of the classes; by default those of the training samples, sorted.
        modalities: What of a sample is used.
        augment: Changes of training samples, see `mmlm_fast.training.samples.augmented`.
        bad_samples: ``raise`` at the first bad sample, or ``skip``: leave them out, count and list them.
        num_frames: Of a film.
    """

    name: str | None = None
    kind: str | None = None
    train: str | None = None
    eval: str | None = None
    train_count: int | None = None
    eval_count: int | None = None
    labels: list[str] | None = None
    modalities: list[str] = field(default_factory=lambda: list(MODALITIES))
    augment: list[str] = field(default_factory=list)
    bad_samples: str = "raise"
    num_frames: int = 8


@dataclass
class EvaluationSettings:
    """The section ``[evaluation]``.

    Attributes:
        controls: Modalities to shuffle.
        augment: Changes of evaluated samples: for data whose clips are the same in training.
        batch_size: Of evaluation.
        generation: Options of ``generate``.
        examples: How many predictions the model card shows.
    """

    controls: list[str] = field(default_factory=list)
    augment: list[str] = field(default_factory=list)
    batch_size: int = 32
    generation: dict[str, Any] = field(default_factory=dict)
    examples: int = 8


@dataclass
class TrainSettings:
    """A whole configuration file.

    Attributes:
        task: Of `mmlm_fast.training.tasks.TASKS`.
        preset: Of `mmlm_fast.models.presets.PRESETS`.
        output: Folder of the results.
        seed: Of everything drawn.
        model: Options of the preset; ``tokenizer`` may be ``bytes`` (default), ``bpe:<tokens>``, trained on the
            training texts, or a name or folder that AutoTokenizer loads.
        towers: Checkpoints by modality (``text``, ``image``, ``audio``, ``decoder``) whose towers take the preset's
            place, with their tokenizer, image processor and feature extractor.
        start_from: Folder of a trained model to go on from, of the same class or, from pre-training, another.
        image_tokenizer: Folder of an `MMLMImageTokenizer`, for ``image_generation``.
        training: Options of transformers' TrainingArguments.

    Raises:
        ValueError: for settings of another type, outside their range or unknown, naming them.
    """

    task: str
    preset: str
    output: str
    seed: int = 0
    start_from: str = ""
    image_tokenizer: str = ""
    data: DataSettings = field(default_factory=DataSettings)
    model: dict[str, Any] = field(default_factory=dict)
    towers: dict[str, str] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    folder: Path = field(default_factory=Path)  # what paths are relative to

    def __post_init__(self) -> None:
        for prefix, section in (("", self), ("data.", self.data), ("evaluation.", self.evaluation)):
            hints = typing.get_type_hints(type(section))
            for name, value in vars(section).items():
                if name != "labels":
                    setattr(section, name, typed(prefix + name, value, hints[name]))
        self._check_numbers_and_labels()
        _choice("task", self.task, TASKS)
        _choice("preset", self.preset, PRESETS)
        _choice("data.bad_samples", self.data.bad_samples, ("raise", "skip"))
        for name, values, known in (
            ("data.modalities", self.data.modalities, MODALITIES),
            ("data.augment", self.data.augment, AUGMENTATIONS),
            ("evaluation.augment", self.evaluation.augment, AUGMENTATIONS),
            ("evaluation.controls", self.evaluation.controls, MODALITIES),
            ("towers", self.towers, (*MODALITIES, "decoder")),
        ):
            for value in values:
                _choice(name, value, known)
            if len(set(values)) < len(values):
                raise ValueError(f"{name} must be different ones of {', '.join(known)}, got {values!r}")
        if not self.data.modalities:
            raise ValueError(f"data.modalities must be one or more of {', '.join(MODALITIES)}, got []")
        if (self.data.name is None) == (self.data.train is None):
            raise ValueError("data needs either name (a built-in set) or train (a file), got both or neither")
        if self.data.name is not None:
            _choice("data.name", self.data.name, BUILTIN)
            if self.data.eval is not None:
                raise ValueError(f"data.eval is for files; {self.data.name} has its own, got {self.data.eval!r}")
        elif self.data.kind is not None:
            raise ValueError(f"data.kind is for built-in sets, got {self.data.kind!r} with data.train")
        if self.image_tokenizer and not TASKS[self.task].needs_image_tokenizer:
            raise ValueError(f"image_tokenizer is for task image_generation, got task {self.task}")
        if self.start_from and TASKS[self.task].model_class is MMLMImageTokenizer:
            raise ValueError("start_from is not for task image_tokenizer")
        if self.start_from and self.towers:
            raise ValueError("towers are those of the model in start_from, got both")
        self.training = checked(self.training)
        self.evaluation.generation = checked_generation(self.evaluation.generation)

    def _check_numbers_and_labels(self) -> None:
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed must be from 0 to 2 ** 31 - 1, got {self.seed}")
        for name, number, least in (
            ("data.train_count", self.data.train_count, 1),
            ("data.eval_count", self.data.eval_count, 1),
            ("data.num_frames", self.data.num_frames, 1),
            ("evaluation.batch_size", self.evaluation.batch_size, 1),
            ("evaluation.examples", self.evaluation.examples, 0),
        ):
            if number is not None and number < least:
                raise ValueError(f"{name} must be at least {least}, got {number}")
        if not self.output:
            raise ValueError("output must be a folder, got ''")
        labels: Any = self.data.labels
        if labels is None:
            return
        names = [class_name(x) for x in labels] if isinstance(labels, list) else []
        if len(names) < 2 or not all(names) or len(set(names)) < len(names):
            raise ValueError(f"data.labels must be two different names of classes or more, got {labels!r}")
        self.data.labels = typing.cast("list[str]", names)

    def path(self, name: str) -> Path:
        """Return a path of the file, relative to it."""
        return self.folder / name


def _choice(name: str, value: Any, known: Any) -> None:
    if value not in known:
        raise ValueError(f"{name} must be among {', '.join(known)}, got {value!r}")


def shipped() -> list[str]:
    """Return the names of the configurations that come with the package."""
    return sorted(p.name.removesuffix(".toml") for p in _configs().iterdir() if p.name.endswith(".toml"))


def _configs() -> Any:
    return files("mmlm_fast.training") / "configs"


def read_settings(source: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> TrainSettings:
    """Read the settings of a TOML, YAML or JSON file, or of a shipped configuration by name.

    Args:
        source: A path, or one of `shipped`.
        overrides: ``key=value`` with dots for sections and a TOML value: ``training.max_steps=10``.

    Raises:
        ValueError: for a file that is not there or not readable, and unknown or wrong settings, naming them.
    """
    path = Path(source)
    folder = path.parent
    if path.suffix and not path.is_file():
        raise ValueError(f"no configuration {path}")
    file, suffix = path, path.suffix
    if not path.suffix:
        if str(source) not in shipped():
            raise ValueError(
                f"no configuration {source}: a .toml, .yaml or .json file, or one of {', '.join(shipped())}"
            )
        file, suffix, folder = _configs() / f"{source}.toml", ".toml", Path()
    try:
        values = _parse(file.read_text(encoding="utf-8-sig"), suffix)
    except (OSError, ValueError) as error:
        raise ValueError(f"{source} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{source} must hold sections, got {type(values).__name__}")
    for override in overrides:
        _override(values, override)
    if "folder" in values:
        raise ValueError("unknown setting folder: that of the results is output, paths are relative to the file")
    return _filled(TrainSettings, {**values, "folder": folder}, "")


def _parse(content: str, suffix: str) -> dict[str, Any]:
    if suffix == ".toml":
        return tomllib.loads(content)
    if suffix == ".json":
        return strict_json(content)
    if suffix in (".yaml", ".yml"):
        try:
            import yaml
        except ImportError as error:
            raise ValueError("reading YAML needs pyyaml: pip install pyyaml") from error
        try:
            return yaml.safe_load(content)
        except yaml.YAMLError as error:
            raise ValueError(str(error)) from error
    raise ValueError(f"must end in .toml, .yaml or .json, got {suffix}")


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ValueError(f"must be key=value, got {override!r}")
    try:
        parsed = tomllib.loads(f"x = {value}")["x"]
    except tomllib.TOMLDecodeError:
        parsed = value
    *sections, last = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ValueError(f"{key}: {section} is no section")
    values[last] = parsed


def _filled(cls: Any, values: Any, prefix: str) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"{prefix.rstrip('.') or 'the file'} must be a section, got {values!r}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(fields), key=str)
    if unknown:
        known = ", ".join(name for name in fields if name != "folder")
        raise ValueError(f"unknown setting {prefix}{unknown[0]}; known are {known}")
    missing = [
        name
        for name, f in fields.items()
        if name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"missing setting {prefix}{missing[0]}")
    nested = {"data": DataSettings, "evaluation": EvaluationSettings}
    return cls(**{k: _filled(nested[k], v, f"{k}.") if not prefix and k in nested else v for k, v in values.items()})
