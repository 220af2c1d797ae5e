"""The thin multimodal model, a citizen of transformers: Auto classes, generate, Trainer, save and load."""

import transformers
from transformers import AutoConfig, AutoModel, AutoProcessor

from mmlm_fast.models import presets
from mmlm_fast.models.base import MMLMPreTrainedModel
from mmlm_fast.models.classification import MMLMForClassification
from mmlm_fast.models.configuration import MMLMConfig
from mmlm_fast.models.contrastive import MMLMForContrastive
from mmlm_fast.models.decoder import MMLMModel
from mmlm_fast.models.encoders import MMLMEncoderModel
from mmlm_fast.models.generation import MMLMForConditionalGeneration
from mmlm_fast.models.image_tokens import (
    MMLMImageTokenizer,
    MMLMImageTokenizerConfig,
    codes_as_text,
    generate_images,
)
from mmlm_fast.models.pretraining import MMLMForPreTraining
from mmlm_fast.models.processing import MMLMProcessor
from mmlm_fast.models.seq2seq import MMLMForSeq2SeqLM

__all__ = [
    "MMLMConfig",
    "MMLMEncoderModel",
    "MMLMForClassification",
    "MMLMForConditionalGeneration",
    "MMLMForContrastive",
    "MMLMForPreTraining",
    "MMLMForSeq2SeqLM",
    "MMLMImageTokenizer",
    "MMLMImageTokenizerConfig",
    "MMLMModel",
    "MMLMPreTrainedModel",
    "MMLMProcessor",
    "codes_as_text",
    "generate_images",
    "presets",
]

AutoConfig.register("mmlm", MMLMConfig, exist_ok=True)
AutoConfig.register(MMLMImageTokenizerConfig.model_type, MMLMImageTokenizerConfig, exist_ok=True)
# One configuration, several classes: AutoModel takes the one that was saved, of a generator the model without its head.
AutoModel.register(
    MMLMConfig,
    (MMLMModel, MMLMEncoderModel, MMLMForClassification, MMLMForContrastive, MMLMForPreTraining, MMLMForSeq2SeqLM),
    exist_ok=True,
)
AutoModel.register(MMLMImageTokenizerConfig, MMLMImageTokenizer, exist_ok=True)
for _name, _model in (
    ("AutoModelForImageTextToText", MMLMForConditionalGeneration),
    ("AutoModelForMultimodalLM", MMLMForConditionalGeneration),
    ("AutoModelForCausalLM", MMLMForConditionalGeneration),
    ("AutoModelForSeq2SeqLM", MMLMForSeq2SeqLM),
    ("AutoModelForSequenceClassification", MMLMForClassification),
    ("AutoModelForZeroShotImageClassification", MMLMForContrastive),
    ("AutoModelForPreTraining", MMLMForPreTraining),
):
    if hasattr(transformers, _name):
        getattr(transformers, _name).register(MMLMConfig, _model, exist_ok=True)
AutoProcessor.register(MMLMConfig, MMLMProcessor, exist_ok=True)
