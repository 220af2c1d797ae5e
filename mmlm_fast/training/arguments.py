"""`[training]`: transformers' TrainingArguments, checked before data is read and a model is built."""

import dataclasses
import json
import math
import re
import types
import typing
from difflib import get_close_matches
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, TrainingArguments
from transformers.integrations import get_available_reporting_integrations

DEFAULTS: dict[str, Any] = {
    "num_train_epochs": 3,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 16,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.1,
    "weight_decay": 0.01,
    "logging_steps": 10,
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "eval_strategy": "epoch",
}
# What the program sets itself, and where it is said instead.
ELSEWHERE = {
    "output_dir": "the setting output",
    "seed": "the setting seed",
    "data_seed": "the setting seed",
    "disable_tqdm": "--quiet",
    "resume_from_checkpoint": "--resume",
    "remove_unused_columns": "",
    "prediction_loss_only": "",
    "do_train": "",
    "do_eval": "",
    "do_predict": "",
    "push_to_hub": "none: upload the output folder when it is there, by hf upload",
}
POSITIVE = (
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "num_train_epochs",
    "logging_steps", "save_steps", "eval_steps", "save_total_limit", "eval_accumulation_steps",
)  # fmt: skip
AT_LEAST_0 = (
    "learning_rate", "weight_decay", "max_grad_norm", "adam_beta1", "adam_beta2", "adam_epsilon", "warmup_steps",
    "dataloader_num_workers", "eval_delay", "label_smoothing_factor", "warmup_ratio",
)  # fmt: skip
BELOW_1 = ("adam_beta1", "adam_beta2", "label_smoothing_factor")
SECTIONS_AS_TEXT = ("lr_scheduler_kwargs", "gradient_checkpointing_kwargs")  # JSON objects, where they are texts
# Of GenerationConfig, whose fields have no types: the type, and from where to where.
GENERATION: dict[str, tuple[Any, float, float]] = {
    "max_new_tokens": (int, 1, math.inf),
    "max_length": (int, 1, math.inf),
    "min_new_tokens": (int, 0, math.inf),
    "min_length": (int, 0, math.inf),
    "num_beams": (int, 1, math.inf),
    "num_return_sequences": (int, 1, 1),  # one for each sample is judged
    "no_repeat_ngram_size": (int, 0, math.inf),
    "encoder_no_repeat_ngram_size": (int, 0, math.inf),
    "top_k": (int, 0, math.inf),
    "temperature": (float, 1e-6, math.inf),
    "top_p": (float, 1e-6, 1),
    "min_p": (float, 0, 1),
    "top_h": (float, 1e-6, 1),
    "typical_p": (float, 1e-6, 1),
    "epsilon_cutoff": (float, 0, 1),
    "eta_cutoff": (float, 0, 1),
    "repetition_penalty": (float, 1e-6, math.inf),
    "encoder_repetition_penalty": (float, 1e-6, math.inf),
    "length_penalty": (float, -math.inf, math.inf),
    "guidance_scale": (float, 0, math.inf),
    "max_time": (float, 1e-6, math.inf),
    "do_sample": (bool, 0, 1),
    "use_cache": (bool, 0, 1),
    "renormalize_logits": (bool, 0, 1),
    "remove_invalid_values": (bool, 0, 1),
    "return_dict_in_generate": (bool, 0, 0),  # tokens alone are judged
    "output_scores": (bool, 0, 0),
    "output_logits": (bool, 0, 0),
    "output_attentions": (bool, 0, 0),
    "output_hidden_states": (bool, 0, 0),
}


def typed(name: str, value: Any, hint: Any) -> Any:
    """Return `value` if it is what the annotation `hint` says.

    Raises:
        ValueError: for anything else, by the setting's name; and for numbers that are not finite.
    """
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    for option in options:
        kind = typing.get_origin(option) or option
        if option is Any:
            return value
        if kind is typing.Literal and value in typing.get_args(option):
            return value
        if option is float and (number := _as_float(value)) is not None:
            return number
        if not isinstance(kind, type) or option is float:
            continue
        if issubclass(kind, Enum) and value in [member.value for member in kind]:
            return value
        if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
            inner = typing.get_args(option)
            if inner and isinstance(value, list):
                return [typed(f"{name}[{i}]", x, inner[0]) for i, x in enumerate(value)]
            if inner and isinstance(value, dict):
                return {key: typed(f"{name}.{key}", x, inner[1]) for key, x in value.items()}
            return value
    expected = " or ".join(dict.fromkeys(filter(None, map(_described, options))))
    raise ValueError(f"{name} must be {expected}, got {value!r}")


def _as_float(value: Any) -> float | int | None:
    if isinstance(value, str):  # YAML's readers take 1e-3 for text
        try:
            value = float(value)
        except ValueError:
            return None
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) else None


def _described(hint: Any) -> str:
    names: dict[Any, str] = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        dict: "a section",
    }
    kind = typing.get_origin(hint) or hint
    if kind is list:
        return "a list"
    if isinstance(kind, type) and issubclass(kind, Enum):
        return ""
    return "nothing" if kind is type(None) else names.get(kind, str(kind))


def unknown_setting(name: str, known: typing.Iterable[str], prefix: str = "") -> ValueError:
    """Make the error for a setting that is not known, with the one that was probably meant."""
    near = get_close_matches(name, known, 1)
    hint = f"; did you mean {prefix}{near[0]}?" if near else ""
    return ValueError(f"unknown setting {prefix}{name}{hint}")


def in_range(name: str, value: Any, least: float, most: float = math.inf) -> None:
    """Raise ValueError for a number outside a range."""
    if not least <= value <= most:
        bounds = f"{least:g}" if least == most else f"at least {least:g}" + f" and at most {most:g}" * (most < math.inf)
        raise ValueError(f"{name} must be {'false' if isinstance(value, bool) else bounds}, got {value}")


def checked_generation(generation: dict[str, Any]) -> dict[str, Any]:
    """Return `[evaluation.generation]` if keys and values are GenerationConfig's.

    Raises:
        ValueError: naming the first setting that is not.
    """
    known, options = {name for name in vars(GenerationConfig()) if not name.startswith("_")}, {}
    for key, value in generation.items():
        name = f"evaluation.generation.{key}"
        if key not in known:
            raise unknown_setting(key, known, "evaluation.generation.")
        if key in GENERATION:
            hint, least, most = GENERATION[key]
            value = typed(name, value, hint)
            in_range(name, value, least, most)
        options[key] = value
    try:
        GenerationConfig(**options).validate()
    except Exception as error:
        raise ValueError(f"evaluation.generation: {error}") from error
    return options


def checked(training: dict[str, Any]) -> dict[str, Any]:
    """Return `[training]` if keys and values are TrainingArguments'.

    Raises:
        ValueError: naming the first setting that is not.
    """
    hints = typing.get_type_hints(TrainingArguments)
    known = {f.name: f for f in dataclasses.fields(TrainingArguments) if f.init}
    options = {}
    for key, value in training.items():
        if key in ELSEWHERE:
            raise ValueError(f"training.{key} is set by {ELSEWHERE[key] or 'the program'}, got {value!r}")
        if key not in known:
            raise unknown_setting(key, set(known) - set(ELSEWHERE), "training.")
        options[key] = value = typed(f"training.{key}", value, hints[key])
        if key in POSITIVE and value is not None and value <= 0:
            raise ValueError(f"training.{key} must be above 0, got {value}")
        if key in AT_LEAST_0 and value < 0:
            raise ValueError(f"training.{key} must be at least 0, got {value}")
        if key in BELOW_1 and value >= 1:
            raise ValueError(f"training.{key} must be below 1, got {value}")
        choices = known[key].metadata.get("choices")
        if choices and isinstance(value, str) and value not in choices:
            raise ValueError(f"training.{key} must be among {', '.join(choices)}, got {value!r}")
        if key in SECTIONS_AS_TEXT and isinstance(value, str):
            options[key] = _section(f"training.{key}", value)
    if options.get("optim_args") and not re.fullmatch(r"[^=,]+=[^=,]+(,[^=,]+=[^=,]+)*", options["optim_args"]):
        raise ValueError(f"training.optim_args must be key=value,key=value, got {options['optim_args']!r}")
    if options.get("dataloader_persistent_workers") and not options.get("dataloader_num_workers"):
        raise ValueError("training.dataloader_persistent_workers needs training.dataloader_num_workers above 0")
    if options.get("use_liger_kernel") and find_spec("liger_kernel") is None:
        raise ValueError("training.use_liger_kernel needs a package that is missing: pip install liger-kernel")
    if options.get("max_steps", 1) < 1 and options["max_steps"] != -1:
        raise ValueError(f"training.max_steps must be at least 1, or -1 for whole epochs, got {options['max_steps']}")
    if options.get("metric_for_best_model") not in (None, "loss", "eval_loss"):
        raise ValueError(
            f"training.metric_for_best_model must be loss, which alone is computed while training, got "
            f"{options['metric_for_best_model']!r}"
        )
    reporters = options.get("report_to") or []
    have = get_available_reporting_integrations()
    for name in [reporters] if isinstance(reporters, str) else reporters:
        if name not in ("none", "all", *have):
            raise ValueError(f"training.report_to must be among {', '.join(have)} (installed here), got {name!r}")
    return options


def _section(name: str, value: str) -> dict[str, Any]:
    try:
        section = json.loads(value)
    except ValueError:
        section = None
    if not isinstance(section, dict):
        raise ValueError(f"{name} must be a section, got {value!r}")
    return section


def training_arguments(training: dict[str, Any], folder: Path, seed: int, progress: bool) -> TrainingArguments:
    """Make TrainingArguments with our defaults, for checkpoints in `folder`.

    Raises:
        ValueError: for values that do not go together, or that this machine cannot do.
    """
    options = DEFAULTS | training
    try:
        return TrainingArguments(
            output_dir=str(folder),
            seed=seed,
            data_seed=seed,
            remove_unused_columns=False,
            prediction_loss_only=True,
            use_cpu=options.pop("use_cpu", not torch.cuda.is_available()),
            report_to=options.pop("report_to", ["tensorboard"] if find_spec("tensorboard") else []),
            disable_tqdm=not progress,
            **options,
        )
    except Exception as error:  # transformers' checks raise errors of several kinds
        raise ValueError(f"training: {error}") from error
