"""Tasks: what goes into a model and comes out, and how it is judged."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from mmlm_fast.models import MMLMForConditionalGeneration, MMLMForSeq2SeqLM, codes_as_text
from mmlm_fast.training.samples import SAMPLING_RATE, BadSampleError, Loaded, Sample, augmented, load


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        kind: ``generation``, ``classification``, ``retrieval``, ``pretraining``, ``image_generation`` or
            ``image_tokenizer``.
        prompt: What a decoder is told where a sample has no text.
        metrics: Names of what is reported; the first is the one that confidence intervals and controls are of.
    """

    kind: str
    prompt: str = ""
    metrics: tuple[str, ...] = ()


TASKS = {
    "captioning": Task("generation", "Describe the picture.", ("chrf", "bleu", "exact_match")),
    "video_description": Task("generation", "Describe the film.", ("chrf", "bleu", "exact_match")),
    "question_answering": Task("generation", "", ("exact_match", "chrf")),
    "dialogue": Task("generation", "", ("chrf", "bleu", "exact_match")),
    "speech_recognition": Task("generation", "Write down what is said.", ("wer", "cer", "exact_match")),
    "translation": Task("generation", "Translate into English.", ("chrf", "bleu", "exact_match")),
    "summarization": Task("generation", "Summarise.", ("chrf", "bleu")),
    "classification": Task("classification", "", ("accuracy", "macro_f1")),
    "sentiment": Task("classification", "", ("accuracy", "macro_f1")),
    "emotion": Task("classification", "", ("accuracy", "macro_f1")),
    "retrieval": Task("retrieval", "", ("recall_at_1", "recall_at_5", "recall_at_10", "matching_auc")),
    "matching": Task("retrieval", "", ("matching_auc", "recall_at_1", "recall_at_5", "recall_at_10")),
    "pretraining": Task("pretraining", "", ("loss",)),
    "image_generation": Task("image_generation", "", ("loss",)),
    "image_tokenizer": Task("image_tokenizer", "", ("loss",)),
}
MODALITIES = ("text", "image", "audio")


def kind_of_model(model: Any) -> str:
    """``decoder``, ``seq2seq`` or ``encoder``."""
    if isinstance(model, MMLMForSeq2SeqLM):
        return "seq2seq"
    return "decoder" if isinstance(model, MMLMForConditionalGeneration) else "encoder"


@dataclass(frozen=True)
class Drawn:
    """A sample with what is drawn of it: its changes by `augmented`, and the seed they are drawn from, so that they
    depend on neither process nor history."""

    sample: Sample
    augment: tuple[str, ...]
    seed: tuple[int, ...]


def class_name(label: Any) -> str | None:
    """The name of a class, which a whole number is too; None for what names none."""
    if isinstance(label, str):
        return label
    return str(label) if isinstance(label, (int, np.integer)) and not isinstance(label, bool) else None


def match_of(sample: Sample) -> Any:
    """What samples that match each other share: the label where there is one (a caption in any language), else the
    text."""
    return sample.text if sample.label is None else ("label", str(sample.label))


class Collator:
    """Samples to a batch: files read, in training changed, put through the processor, with labels.

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
        self.model_kind = kind_of_model(model)
        has = getattr(model.config, "modalities", None) or MODALITIES
        self.modalities = tuple(m for m in modalities if m in has or m == "text")
        self.several = getattr(model.config, "problem_type", None) == "multi_label_classification"
        self.regression = getattr(model.config, "problem_type", None) == "regression"
        self.augment, self.num_frames = tuple(augment), num_frames
        self.image_tokenizer, self.with_targets = image_tokenizer, with_targets
        self.seed = seed
        self.worker: int | None = None
        self.rng = np.random.default_rng(seed)
        self.max_tokens = _positions(getattr(model.config, "text_config", None), processor.tokenizer)
        self.max_target_tokens = _positions(getattr(model.config, "decoder_config", None), processor.tokenizer)

    def check(self, sample: Sample) -> None:
        """Raise `BadSampleError` for what can be seen without reading files."""
        kind = self.task.kind
        needs_text = kind in ("retrieval", "image_generation")
        used: dict[str, Any] = {"image": sample.images or sample.video, "audio": sample.audio}
        if "text" in self.modalities:
            used["text"] = sample.text or ("" if needs_text else self.task.prompt or sample.messages)
        if (needs_text and not sample.text) or not any(used.get(modality) for modality in self.modalities):
            lacks = "text is empty" if "text" in self.modalities else f"has no {' or '.join(self.modalities)}"
            raise BadSampleError(f"{sample.name}: {lacks}")
        if kind == "generation" and not (sample.messages or (sample.target or "").strip()):
            raise BadSampleError(f"{sample.name}: target is empty")
        for token in (self.processor.image_token, self.processor.audio_token) if kind == "generation" else ():
            if token in self.target(sample):
                raise BadSampleError(f"{sample.name}: target has {token}, which stands for what goes in")
        if kind in ("image_generation", "image_tokenizer") and not sample.images:
            raise BadSampleError(f"{sample.name}: has no picture")
        if kind == "classification":
            self.label_of(sample)
        if sample.messages and sample.messages[-1]["role"] != "assistant":
            raise BadSampleError(f"{sample.name}: the last message must be the assistant's")

    def label_of(self, sample: Sample) -> Any:
        """Number of a sample's class; 0 and 1 for each class where several hold at once."""
        if self.regression:
            is_number = isinstance(sample.label, (int, float, np.integer, np.floating))
            if not is_number or isinstance(sample.label, bool) or not np.isfinite(sample.label):
                raise BadSampleError(f"{sample.name}: label must be a number, got {sample.label!r}")
            return float(sample.label)
        if self.several:
            if sample.label is None:
                raise BadSampleError(f"{sample.name}: label must be a list of classes, got None")
            listed = sample.label if isinstance(sample.label, (list, tuple)) else [sample.label]
            found = [self._number(sample, label) for label in listed]
            return [float(i in found) for i in range(len(self.labels))]
        return self._number(sample, sample.label)

    def _number(self, sample: Sample, label: Any) -> int:
        names = [str(name) for name in self.labels]
        if (name := class_name(label)) in names:
            return names.index(str(name))
        shown = ", ".join(names[:12]) + (" …" if len(names) > 12 else "")
        raise BadSampleError(f"{sample.name}: label must be one of {shown}, got {label!r}")

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
        """The batch of loaded samples.

        Raises:
            BadSampleError: naming the first sample that cannot be made into one.
        """
        try:
            return self._batch(loaded)
        except BadSampleError:
            raise
        except ValueError as error:
            for one in loaded:
                try:
                    self._batch([one])
                except ValueError as own:
                    raise BadSampleError(f"{one.sample.name}: {own}") from error
            raise

    def _batch(self, loaded: Sequence[Loaded]) -> dict[str, Tensor]:
        kind = self.task.kind
        if kind == "image_tokenizer":
            return {"pixel_values": self.pixels(loaded)}
        images = [x.images or None for x in loaded] if "image" in self.modalities else None
        audio = [x.clips or None for x in loaded] if "audio" in self.modalities else None
        if kind == "image_generation" or images is None or not any(images):
            images = None
        if audio is None or not any(audio):
            audio = None
        texts = [self.text(x, images is not None, audio is not None) for x in loaded]
        given: dict[str, Any] = dict(text=texts, images=images, audio=audio)
        given["sampling_rate"] = None if audio is None else SAMPLING_RATE
        if kind in ("generation", "image_generation") and self.with_targets:
            given["text_target" if self.model_kind == "seq2seq" else "suffix"] = self._targets(loaded)
        batch: dict[str, Any] = dict(self.processor(**given))
        _check_length("text", batch["attention_mask"], self.max_tokens)
        if kind == "classification":
            labels = [self.label_of(x.sample) for x in loaded]
            batch["labels"] = torch.tensor(labels)
        elif kind == "retrieval":
            keys = [match_of(x.sample) for x in loaded]
            numbers = {key: i for i, key in enumerate(dict.fromkeys(keys))}
            batch["positive_ids"] = torch.tensor([numbers[key] for key in keys])
        elif "text_target" in given:
            _check_length("target", batch["labels"] != -100, self.max_target_tokens)
        return batch

    def pixels(self, loaded: Sequence[Loaded]) -> Tensor:
        """Values of all pictures, ``[N, C, height, width]``."""
        pictures = [picture for x in loaded for picture in x.images]
        return self.processor.pixel_values(pictures)

    def text(self, loaded: Loaded, with_images: bool = True, with_audio: bool = True) -> str:
        """What a sample says to the model; `merge` with placeholders in front, a decoder with a line end."""
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
        writes_on = self.model_kind == "decoder" and self.task.kind != "image_generation"
        return marks + (f"{text}\n" if writes_on else text)

    def _chat(self, sample: Sample) -> str:
        return self.processor.apply_chat_template(
            list(sample.messages[:-1]), tokenize=False, add_generation_prompt=True
        )

    def target(self, sample: Sample) -> str:
        """The text that should come out."""
        if sample.messages:
            content = sample.messages[-1]["content"]
            return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
        return sample.target or ""

    def _targets(self, loaded: Sequence[Loaded]) -> list[str]:
        if self.task.kind == "generation":
            return [self.target(x.sample) for x in loaded]
        with torch.no_grad():
            pixels = self.pixels(loaded).to(self.image_tokenizer.device)
            return codes_as_text(self.image_tokenizer.encode(pixels))


def _positions(config: Any, tokenizer: Any) -> int | None:
    """How many tokens a text model has positions for; None for any number."""
    limit = getattr(config, "max_position_embeddings", None)
    return None if limit is None else min(limit, tokenizer.model_max_length)  # RoBERTa's has fewer than positions


def _check_length(name: str, there: Tensor, limit: int | None) -> None:
    longest = int(there.sum(1).max())
    if limit is not None and longest > limit:
        raise ValueError(f"{name} must have at most {limit} tokens, which the model has positions for, got {longest}")


def shuffled(samples: Sequence[Sample], modality: str, seed: int = 0) -> list[Sample]:
    """Samples that keep everything but one modality, which they take from another sample: the control that shows
    whether a model uses it.

    Args:
        modality: ``text``, ``image`` (with films) or ``audio``.

    Raises:
        ValueError: for another modality, or fewer than two samples.
    """
    fields: dict[str, tuple[str, ...]] = {"text": ("text",), "image": ("images", "video"), "audio": ("audio",)}
    if modality not in fields or len(samples) < 2:
        raise ValueError(
            f"modality must be text, image or audio, and samples two or more, got {modality!r}, {len(samples)}"
        )
    order = np.random.default_rng(seed).permutation(len(samples))
    source = np.empty_like(order)
    source[order] = np.roll(order, 1)  # one cycle: nothing stays where it was
    return [
        replace(sample, **{name: getattr(samples[source[i]], name) for name in fields[modality]})
        for i, sample in enumerate(samples)
    ]
