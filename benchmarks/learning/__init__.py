"""The presets trained and judged on real data, each with shuffled-modality controls."""

from mmlm_benchmarks.learning.trainings import Experiment, experiments, run

__all__ = ["Experiment", "experiments", "run"]
