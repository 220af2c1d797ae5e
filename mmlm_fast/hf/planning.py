"""What `accelerate` does with a model that is named, not built: from its configuration, or from its weights."""

from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, PretrainedConfig

from mmlm_fast.hf.acceleration import Acceleration, accelerate


def plan(name: str) -> Acceleration:
    """What would be done with a model, from its configuration alone.

    Args:
        name: A folder, a ``config.json``, or a name on the hub.

    Raises:
        ValueError, OSError: where there is no such configuration, or none that this version of transformers builds.
    """
    config = AutoConfig.from_pretrained(name)
    return accelerate(skeleton(config), plan_only=True, strict=False, quiet=True)


def prove(name: str, dtype: str = "auto") -> Acceleration:
    """What is done with a model's own weights.

    Raises:
        ValueError, OSError: where there is no such model.
    """
    config = AutoConfig.from_pretrained(name)
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"dtype must be auto or a dtype of torch such as bfloat16, got {dtype!r}")
    model = model_class(config).from_pretrained(name, dtype=dtype if dtype == "auto" else getattr(torch, dtype))
    return accelerate(model, strict=False, quiet=True)


def model_class(config: PretrainedConfig) -> Any:
    """The class that a configuration names, else that of its bare model."""
    for name in config.architectures or ():
        if isinstance(getattr(transformers, name, None), type):
            return getattr(transformers, name)
    return AutoModel


def skeleton(config: PretrainedConfig) -> Any:
    """The model of a configuration, without weights."""
    cls = model_class(config)
    with torch.device("meta"):
        return cls.from_config(config) if cls is AutoModel else cls._from_config(config)
