"""The data of a training: which samples it has, and how Trainer draws them."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils.data import Dataset

from mmlm_fast.training.builtin import BUILTIN
from mmlm_fast.training.collator import Drawn
from mmlm_fast.training.samples import Sample, read_samples
from mmlm_fast.training.settings import TrainSettings


def read_data(settings: TrainSettings, problems: list[str] | None = None) -> tuple[list[Sample], list[Sample]]:
    """Read training and evaluation samples; without a file for the latter, the last tenth is held out.

    Args:
        problems: See `read_samples`.
    """
    data = settings.data
    if data.name is not None:
        function = BUILTIN[data.name]
        make = lambda split, count: function(data.kind or "question", split, count=count, seed=settings.seed)
        return make("train", data.train_count), make("eval", data.eval_count)
    assert data.train is not None
    train_samples = read_samples(settings.path(data.train), problems, name=data.train)
    if data.eval is not None:
        eval_samples = read_samples(settings.path(data.eval), problems, name=data.eval)
    else:
        held_out = max(1, len(train_samples) // 10)
        if len(train_samples) < 2:
            raise ValueError("one sample cannot be split: name data.eval")
        train_samples, eval_samples = train_samples[:-held_out], train_samples[-held_out:]
    return train_samples[: data.train_count], eval_samples[: data.eval_count]


def num_shared(train_samples: Sequence[Sample], eval_samples: Sequence[Sample]) -> int:
    """Return how many samples from files are in both."""

    def contents(sample: Sample) -> str | None:
        paths = (*sample.images, *sample.audio)
        if not all(isinstance(x, (str, Path)) for x in paths):
            return None
        return repr(dataclasses.replace(sample, name="", images=tuple(map(str, paths)), audio=()))

    seen = {contents(sample) for sample in train_samples} - {None}
    return sum(contents(sample) in seen for sample in eval_samples)


class SampleList(Dataset):
    """Samples as torch's dataset; files are read by the collator, in the DataLoader's workers where there are some.

    What is drawn of a sample depends on the seed, the epoch and its index alone.
    """

    def __init__(self, samples: Sequence[Sample], augment: Sequence[str] = (), seed: int = 0) -> None:
        self.samples, self.augment, self.seed = list(samples), tuple(augment), seed
        self.epoch = torch.zeros((), dtype=torch.int64, device="cpu").share_memory_()  # workers that persist see it

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Drawn:
        return Drawn(self.samples[index], self.augment, (self.seed, int(self.epoch), index))
