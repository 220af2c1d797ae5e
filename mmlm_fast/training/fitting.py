"""Fitting a model on transformers' Trainer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from mmlm_fast.training import checkpoints
from mmlm_fast.training.collator import Collator
from mmlm_fast.training.data import SampleList
from mmlm_fast.training.samples import BadSampleError, Sample
from mmlm_fast.training.settings import TrainSettings


class TrainingError(RuntimeError):
    """What went wrong after the first step of a training began."""


class _Trainer(Trainer):
    """Trainer that lists the files of its checkpoints, and whose loaders draw the seeds of their workers from a
    generator of their own.

    Otherwise those come from the one that dropout draws from, of workers that persist once a process: a resumed run
    would drop others than an uninterrupted one.
    """

    begin: "_Begin"

    def get_train_dataloader(self) -> Any:
        return self._apart(super().get_train_dataloader())

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        return self._apart(super().get_eval_dataloader(*args, **kwargs))

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # Trainer deletes others' folders too
        try:
            super()._save_checkpoint(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit
        PartialState().wait_for_everyone()
        folder = Path(self.args.output_dir)
        if PartialState().is_main_process and (folder / f"checkpoint-{self.state.global_step}").is_dir():
            checkpoints.write_files(folder / f"checkpoint-{self.state.global_step}")
            best = self.state.best_model_checkpoint
            checkpoints.delete_all_but(folder, limit, None if best is None else Path(best))

    def _apart(self, loader: Any) -> Any:
        inner = getattr(loader, "base_dataloader", loader)  # of accelerate's wrapper
        inner.generator = torch.Generator(device="cpu").manual_seed(self.args.seed)
        return loader


class _Begin(TrainerCallback):
    """Do what Trainer leaves out when it begins a training or an epoch."""

    def __init__(self, samples: SampleList) -> None:
        self.samples = samples
        self.begun = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun = True
        state.compute_steps(args, state.max_steps)  # when to log and save is what is said now, not in the checkpoint

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.samples.epoch.fill_(int(state.epoch or 0))  # accelerate's loaders tell it to their samplers alone


def trainer_of(
    model: Any,
    collator: Collator,
    train_samples: Sequence[Sample],
    eval_samples: Sequence[Sample],
    settings: TrainSettings,
    arguments: TrainingArguments,
) -> Trainer:
    """Make transformers' Trainer, and see that all that a training begins with can be built.

    Raises:
        ValueError: for settings that it cannot be built from, whatever the error was.
    """
    changing = SampleList(train_samples, settings.data.augment, settings.seed)
    begin = _Begin(changing)
    try:
        trainer = _Trainer(
            model=model,
            args=arguments,
            train_dataset=changing,
            eval_dataset=SampleList(eval_samples, settings.evaluation.augment, settings.seed + 1),
            data_collator=collator,
            callbacks=[begin],
        )
        trainer.get_train_dataloader()
        trainer.create_optimizer()
        trainer.create_scheduler(num_training_steps=100, optimizer=trainer.optimizer)
    except Exception as error:
        raise ValueError(f"training: {message_of(error)}") from error
    trainer.optimizer = trainer.lr_scheduler = None  # made again when it trains, for as many steps as there are
    trainer.begin = begin
    if arguments.disable_tqdm:
        trainer.remove_callback(PrinterCallback)
    return trainer


def fit(trainer: Trainer, checkpoint: Path | None) -> list[dict[str, Any]]:
    """Train, and return Trainer's log.

    Raises:
        BadSampleError: for a sample that shows when it is read.
        ValueError: for settings that no training begins with.
        TrainingError: for other errors on the way.
    """
    transformers.set_seed(trainer.args.seed)  # whatever went before
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except BadSampleError as error:
        # Out of a DataLoader's worker comes the text of a traceback, whose last line is the error.
        mark = f"{BadSampleError.__module__}.{BadSampleError.__name__}: "
        raise BadSampleError(str(error).rpartition(mark)[2].strip()) from error
    except Exception as error:
        if not trainer.begin.begun:
            raise ValueError(f"training: {message_of(error)}") from error
        raise TrainingError(f"step {trainer.state.global_step + 1}: {message_of(error)}") from error
    return trainer.state.log_history


def message_of(error: Exception) -> str:
    """Return what an error says, with its class where that is needed to make sense of it."""
    return str(error) if isinstance(error, (ValueError, ImportError)) else f"{type(error).__name__}: {error}"
