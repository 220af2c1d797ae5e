"""The place where a Trainer, and what is built on it, lets a model be changed."""

from typing import Any

from transformers import TrainerCallback

from mmlm_fast.hf.acceleration import Acceleration, accelerate


class MmlmFastCallback(TrainerCallback):
    """Accelerate the model of a Trainer: ``Trainer(..., callbacks=[MmlmFastCallback()])``.

    It acts when the Trainer is made, before it wraps the model, and again when training begins, for a model that
    ``model_init`` made. The model stays accelerated after training; `undo` gives the original back.

    Args:
        options: Of `accelerate`, such as ``exclude=["attention"]``.
    """

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.done: list[Acceleration] = []

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._accelerate(model)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._accelerate(model)

    def undo(self) -> None:
        """Give the original behaviour back to every model that was accelerated."""
        while self.done:
            self.done.pop().undo()

    def _accelerate(self, model: Any) -> None:
        if model is None or any(done.is_of(model) for done in self.done):
            return
        self.done.append(accelerate(model, **self.options))
