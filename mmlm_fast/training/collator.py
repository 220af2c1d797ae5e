"""From samples to batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import get_worker_info

from mmlm_fast.models import MMLMForConditionalGeneration, MMLMForSeq2SeqLM
from mmlm_fast.models.configuration import MODALITIES
from mmlm_fast.training.samples import SAMPLING_RATE, BadSampleError, Loaded, Sample, augmented, class_name, load
from mmlm_fast.training.tasks import TASKS


@dataclass(frozen=True)
class Drawn:
    """A sample with what is drawn of it: its changes by `augmented`, and the seed they are drawn from, so that they
    depend on neither process nor history."""

    sample: Sample
    augment: tuple[str, ...]
    seed: tuple[int, ...]


class Collator:
    """Make batches of samples: read files, in training change them, put them through the processor, add labels.

    Args:
        task: Of `TASKS`.
        model: For which the batch is; only its class and configuration are used.
        processor: `MMLMProcessor`.
        labels: Names of the classes, in order.
        modalities: What of a sample is used.
        augment: See `augmented`; of samples, drawn anew at each use. `Drawn` ones bring their own.
        seed: Of the drawing.
        num_frames: Of a film.
        image_tokenizer: For ``image_generation``.
        with_targets: False at evaluation of generation, where the model is to find them.
    """

    def __init__(
        self,
        task: str,
        model: Any,
        processor: Any,
        *,
        labels: Sequence[str] = (),
        modalities: Sequence[str] = MODALITIES,
        augment: Sequence[str] = (),
        seed: int = 0,
        num_frames: int = 8,
        image_tokenizer: Any = None,
        with_targets: bool = True,
    ) -> None:
        self.task, self.processor, self.labels = TASKS[task], processor, list(labels)
        self.is_seq2seq = isinstance(model, MMLMForSeq2SeqLM)
        self.is_causal = isinstance(model, MMLMForConditionalGeneration)
        known = getattr(model.config, "modalities", None) or MODALITIES
        self.modalities = tuple(m for m in modalities if m in known or m == "text")
        problem_type = getattr(model.config, "problem_type", None)
        self.is_multi_label = problem_type == "multi_label_classification"
        self.is_regression = problem_type == "regression"
        self.augment, self.num_frames = tuple(augment), num_frames
        self.image_tokenizer, self.with_targets = image_tokenizer, with_targets
        self.seed = seed
        self.worker: int | None = None
        self.rng = np.random.default_rng(seed)
        self.max_tokens = _num_positions(getattr(model.config, "text_config", None), processor.tokenizer)
        self.max_target_tokens = _num_positions(getattr(model.config, "decoder_config", None), processor.tokenizer)

    def check(self, sample: Sample) -> None:
        """Raise `BadSampleError` for what can be seen without reading files."""
        needs_text = self.task.needs_text
        used: dict[str, Any] = {"image": sample.images or sample.video, "audio": sample.audio}
        if "text" in self.modalities:
            used["text"] = sample.text or ("" if needs_text else self.task.prompt or sample.messages)
        if (needs_text and not sample.text) or not any(used.get(modality) for modality in self.modalities):
            lacks = "text is empty" if "text" in self.modalities else f"has no {' or '.join(self.modalities)}"
            raise BadSampleError(f"{sample.name}: {lacks}")
        self.task.check_sample(self, sample)
        if sample.messages and sample.messages[-1]["role"] != "assistant":
            raise BadSampleError(f"{sample.name}: the last message must be the assistant's")

    def label_of(self, sample: Sample) -> Any:
        """Return the number of a sample's class; 0 and 1 for each class where several hold at once."""
        if self.is_regression:
            is_number = isinstance(sample.label, (int, float, np.integer, np.floating))
            if not is_number or isinstance(sample.label, bool) or not np.isfinite(sample.label):
                raise BadSampleError(f"{sample.name}: label must be a number, got {sample.label!r}")
            return float(sample.label)
        if self.is_multi_label:
            if sample.label is None:
                raise BadSampleError(f"{sample.name}: label must be a list of classes, got None")
            listed = sample.label if isinstance(sample.label, (list, tuple)) else [sample.label]
            classes = [self._number(sample, label) for label in listed]
            return [float(i in classes) for i in range(len(self.labels))]
        return self._number(sample, sample.label)

    def _number(self, sample: Sample, label: Any) -> int:
        names = [str(name) for name in self.labels]
        if (name := class_name(label)) in names:
            return names.index(str(name))
        first_names = ", ".join(names[:12]) + (" …" if len(names) > 12 else "")
        raise BadSampleError(f"{sample.name}: label must be one of {first_names}, got {label!r}")

    def __call__(self, samples: Sequence[Sample | Drawn]) -> dict[str, Tensor]:
        info = get_worker_info()
        if info is not None and info.id != self.worker:  # a copy in a DataLoader's worker draws what no other draws
            self.worker, self.rng = info.id, np.random.default_rng([self.seed, info.seed % 2**32])
        return self.batch([self._load(item) for item in samples])

    def _load(self, item: Sample | Drawn) -> Loaded:
        if isinstance(item, Drawn):
            loaded = load(item.sample, num_frames=self.num_frames)
            return augmented(loaded, item.augment, np.random.default_rng(item.seed)) if item.augment else loaded
        loaded = load(item, num_frames=self.num_frames)
        return augmented(loaded, self.augment, self.rng) if self.augment else loaded

    def read(self, sample: Sample) -> None:
        """Raise `BadSampleError` for what shows when a sample is read and put through the processor."""
        self.batch([load(sample, num_frames=self.num_frames)])

    def batch(self, loaded: Sequence[Loaded]) -> dict[str, Tensor]:
        """Make a batch of loaded samples.

        Raises:
            BadSampleError: naming the first sample that cannot be made into one.
        """
        try:
            return self.task.batch(self, loaded)
        except BadSampleError:
            raise
        except ValueError as error:
            for one in loaded:
                try:
                    self.task.batch(self, [one])
                except ValueError as own:
                    raise BadSampleError(f"{one.sample.name}: {own}") from error
            raise

    def inputs(self, loaded: Sequence[Loaded], targets: list[str] | None = None) -> dict[str, Any]:
        """Put loaded samples through the processor, with the texts that a generator is to write.

        Raises:
            ValueError: for texts or targets longer than the model has positions for.
        """
        images = [x.images or None for x in loaded] if "image" in self.modalities and self.task.reads_images else None
        audio = [x.clips or None for x in loaded] if "audio" in self.modalities else None
        images = images if images is not None and any(images) else None
        audio = audio if audio is not None and any(audio) else None
        texts = [self.text(x, images is not None, audio is not None) for x in loaded]
        arguments: dict[str, Any] = dict(text=texts, images=images, audio=audio)
        arguments["sampling_rate"] = None if audio is None else SAMPLING_RATE
        if targets is not None:
            arguments["text_target" if self.is_seq2seq else "suffix"] = targets
        batch: dict[str, Any] = dict(self.processor(**arguments))
        _check_length("text", batch["attention_mask"], self.max_tokens)
        if targets is not None and self.is_seq2seq:
            _check_length("target", batch["labels"] != -100, self.max_target_tokens)
        return batch

    def pixels(self, loaded: Sequence[Loaded]) -> Tensor:
        """Return the values of all pictures, ``[N, C, height, width]``."""
        pictures = [picture for x in loaded for picture in x.images]
        return self.processor.pixel_values(pictures)

    def text(self, loaded: Loaded, with_images: bool = True, with_audio: bool = True) -> str:
        """Return what a sample says to the model: for `merge` with placeholders in front, for a decoder with a line
        end."""
        sample = loaded.sample
        text = (sample.text or self.task.prompt) if "text" in self.modalities else ""
        marks = ""
        for token, items, wanted, length in (
            (self.processor.image_token, loaded.images, with_images, self.processor.image_seq_length),
            (self.processor.audio_token, loaded.clips, with_audio, self.processor.audio_seq_length),
        ):
            if length and wanted and items and token not in (self._chat(sample) if sample.messages else text):
                marks += token
        if sample.messages:
            return marks + self._chat(sample)
        return marks + (f"{text}\n" if self.is_causal and self.task.ends_prompts else text)

    def _chat(self, sample: Sample) -> str:
        return self.processor.apply_chat_template(
            list(sample.messages[:-1]), tokenize=False, add_generation_prompt=True
        )

    def target(self, sample: Sample) -> str:
        """Return the text that should come out."""
        if sample.messages:
            content = sample.messages[-1]["content"]
            return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
        return sample.target or ""


def _num_positions(config: Any, tokenizer: Any) -> int | None:
    """Return how many tokens a text model has positions for; None for any number."""
    limit = getattr(config, "max_position_embeddings", None)
    return None if limit is None else min(limit, tokenizer.model_max_length)  # RoBERTa's has fewer than positions


def _check_length(name: str, mask: Tensor, limit: int | None) -> None:
    longest = int(mask.sum(1).max())
    if limit is not None and longest > limit:
        raise ValueError(f"{name} must have at most {limit} tokens, which the model has positions for, got {longest}")
