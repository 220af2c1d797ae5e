"""The presets learn real things: scaled down from what the report trains, with shuffled-modality controls."""

import pytest

from mmlm_benchmarks.learning import Experiment, experiments, run

PAIRS = ("data.train_count=2000", "data.eval_count=200")
QUESTION = ("data.train_count=10000", "data.eval_count=200")


@pytest.mark.slow  # two minutes: make test ARGS="-m slow tests/test_learning.py"
def test_alignment_then_a_question_that_needs_three_modalities(tmp_path):
    """Seeds are the configurations' (0). Without one of the three, an answer can be right in at most about 55 % of the
    cases: half of the questions are after what is left, one in ten of the others is right by chance."""
    pairs = run(Experiment("pairs", "digits_pairs"), tmp_path, PAIRS)
    low, _ = pairs["metrics"]["recall_at_1_interval"]
    assert low > 3 * pairs["chance"]
    assert pairs["controls"]["image"]["used"]
    assert pairs["controls"]["audio"]["used"]
    result = run(Experiment("question", "digits_question", "pairs"), tmp_path, QUESTION)
    low, _ = result["metrics"]["accuracy_interval"]
    assert low > 0.55
    for modality in ("text", "image", "audio"):
        control = result["controls"][modality]
        assert control["used"], (modality, control["loss_interval"])
        assert control["metrics"]["accuracy"] < low


def test_experiments_are_complete():
    """Each shipped configuration is in the report, or shown by its full form."""
    names = [e.name for e in experiments(full=True)]
    assert len(set(names)) == len(names)
    assert {e.config for e in experiments()} == {
        "digits_pairs", "digits_question", "digits_caption", "digits_translation", "digits_pictures",
    }  # fmt: skip
    for experiment in experiments(full=True):
        assert experiment.after is None or experiment.after in names[: names.index(experiment.name)]
