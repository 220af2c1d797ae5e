"""The thin multimodal model, a citizen of transformers: Auto classes, generate, Trainer, save and load."""

import transformers
from transformers import AutoConfig, AutoModel, AutoProcessor

from mmlm_fast.models import presets
from mmlm_fast.models.configuration import MMLMConfig
from mmlm_fast.models.modeling import MMLMForConditionalGeneration, MMLMModel, MMLMPreTrainedModel
from mmlm_fast.models.processing import MMLMProcessor

__all__ = [
    "MMLMConfig",
    "MMLMForConditionalGeneration",
    "MMLMModel",
    "MMLMPreTrainedModel",
    "MMLMProcessor",
    "presets",
]

AutoConfig.register("mmlm", MMLMConfig, exist_ok=True)
AutoModel.register(MMLMConfig, MMLMModel, exist_ok=True)
for _name in ("AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModelForCausalLM"):
    if hasattr(transformers, _name):
        getattr(transformers, _name).register(MMLMConfig, MMLMForConditionalGeneration, exist_ok=True)
AutoProcessor.register(MMLMConfig, MMLMProcessor, exist_ok=True)
