"""Training and evaluation of the thin model on transformers' Trainer, from a configuration file or from Python."""

from mmlm_fast.training.collator import Collator
from mmlm_fast.training.evaluation import controls, evaluate, shuffled
from mmlm_fast.training.fitting import TrainingError
from mmlm_fast.training.running import train
from mmlm_fast.training.samples import BadSampleError, Sample, load, read_samples
from mmlm_fast.training.search import EmbeddingIndex, embed
from mmlm_fast.training.settings import TrainSettings, read_settings, shipped
from mmlm_fast.training.tasks import TASKS, Evaluation

__all__ = [
    "TASKS",
    "BadSampleError",
    "Collator",
    "EmbeddingIndex",
    "Evaluation",
    "Sample",
    "TrainSettings",
    "TrainingError",
    "controls",
    "embed",
    "evaluate",
    "load",
    "read_samples",
    "read_settings",
    "shipped",
    "shuffled",
    "train",
]
