"""Tasks: what each trains, what a sample and a batch of it hold, and how a model is judged by it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from mmlm_fast.models import (
    MMLMForClassification,
    MMLMForContrastive,
    MMLMForPreTraining,
    MMLMImageTokenizer,
    codes_as_text,
)
from mmlm_fast.models.features import VALUES
from mmlm_fast.training import metrics
from mmlm_fast.training.samples import BadSampleError, Loaded, Sample, class_name

if TYPE_CHECKING:
    from mmlm_fast.training.collator import Collator
    from mmlm_fast.training.settings import TrainSettings


@dataclass
class Evaluation:
    """What came out of an evaluation.

    Attributes:
        metrics: By name; with the interval of the first in ``<name>_interval``.
        scores: One number a sample, of the first metric; NaN for one that has nothing to be judged (retrieval).
        predictions: What the model said of each sample; empty for retrieval and pre-training.
    """

    metrics: dict[str, Any]
    scores: np.ndarray = field(default_factory=lambda: np.zeros(0))
    predictions: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class Task:
    """A task; its kind is its class.

    Attributes:
        prompt: What a decoder is told where a sample has no text.
        metrics: Names of what is reported; the first is the one that confidence intervals and controls are of.
        pipeline_tag: The hub's name for models of this task.
        kind: Name of the class of tasks: ``generation``, ``classification``, ``retrieval``, ``pretraining``,
            ``image_generation`` or ``image_tokenizer``.
        model_class: What is trained; None for the model of the preset, which must generate.
        drops_unused_towers: Whether the model is built without the towers of modalities that are not used.
        needs_text: Whether every sample must have a text of its own.
        reads_images: Whether the pictures of a sample are among the inputs of the model.
        ends_prompts: Whether a prompt ends with a line feed, behind which a causal decoder writes.
        needs_image_tokenizer: Whether pictures are written as the codes of an image tokenizer.
        needs_targets_to_evaluate: Whether batches have targets in evaluation as well.
        extra_imports: What code that uses the model imports beside its class and its processor.
    """

    prompt: str = ""
    metrics: tuple[str, ...] = ()
    pipeline_tag: str = "image-text-to-text"

    kind: ClassVar[str]
    model_class: ClassVar[Any] = None
    drops_unused_towers: ClassVar[bool] = False
    needs_text: ClassVar[bool] = False
    reads_images: ClassVar[bool] = True
    ends_prompts: ClassVar[bool] = True
    needs_image_tokenizer: ClassVar[bool] = False
    needs_targets_to_evaluate: ClassVar[bool] = False
    extra_imports: ClassVar[tuple[str, ...]] = ()

    def class_names(self, settings: "TrainSettings", samples: Sequence[Sample]) -> list[str]:
        """Return the names of the classes that a model tells apart, in order; none for most tasks."""
        return []

    def check_sample(self, collator: "Collator", sample: Sample) -> None:
        """Raise `BadSampleError` for a sample without what the task needs beside its inputs."""

    def check_evaluation(self, settings: "TrainSettings", samples: Sequence[Sample]) -> None:
        """Raise ValueError for evaluation samples from which nothing can be judged."""

    def batch(self, collator: "Collator", loaded: Sequence[Loaded]) -> dict[str, Any]:
        """Make a batch of loaded samples."""
        return collator.inputs(loaded)

    def evaluate(
        self,
        model: Any,
        collator: "Collator",
        samples: Sequence[Sample],
        batches: Iterable[dict[str, Any]],
        generation: dict[str, Any],
    ) -> Evaluation:
        """Judge a model in eval mode by the batches of `samples`: here, by its losses.

        Args:
            generation: Options of ``generate``.
        """
        values: dict[str, list[float]] = {}
        for batch in batches:
            out = model(**batch)
            for name in out:
                if name.endswith("loss") and out[name] is not None:
                    values.setdefault(name, []).append(float(out[name]))
        return Evaluation({name: float(np.mean(each)) for name, each in values.items()})

    def reference(self, collator: "Collator", sample: Sample) -> Any:
        """Return what a prediction for `sample` is compared with."""
        return collator.target(sample)

    def chance(self, collator: "Collator", samples: Sequence[Sample], evaluation: Evaluation) -> float | None:
        """Return what the first metric would be without a look at the samples; None where that is not known."""
        return None

    def example_text(self, config: Any, marks: str) -> str:
        """Return the text of the model card's example; `marks` are the placeholders of its picture and clip."""
        return "a text"

    def example(self, config: Any, modalities: Sequence[str], text: str, inputs: Sequence[str]) -> list[str]:
        """Return the last lines of the model card's example, which use the model.

        Args:
            modalities: Those of the example.
            inputs: The processor's arguments for its picture and clip.
        """
        arguments = ", ".join([f'text=["{text}"]', *inputs])
        return [f"inputs = processor({arguments})", *self._use(config, modalities)]

    def _use(self, config: Any, modalities: Sequence[str]) -> list[str]:
        """Return the lines that hand ``inputs`` to the model and show what comes out."""
        return []


class Generation(Task):
    """Text is written: by a causal decoder behind its prompt, or by the decoder of a sequence-to-sequence model."""

    kind = "generation"

    def check_sample(self, collator: "Collator", sample: Sample) -> None:
        if not (sample.messages or (sample.target or "").strip()):
            raise BadSampleError(f"{sample.name}: target is empty")
        for token in (collator.processor.image_token, collator.processor.audio_token):
            if token in collator.target(sample):
                raise BadSampleError(f"{sample.name}: target has {token}, which stands for what goes in")

    def batch(self, collator: "Collator", loaded: Sequence[Loaded]) -> dict[str, Any]:
        return collator.inputs(loaded, [collator.target(x.sample) for x in loaded] if collator.with_targets else None)

    def evaluate(
        self,
        model: Any,
        collator: "Collator",
        samples: Sequence[Sample],
        batches: Iterable[dict[str, Any]],
        generation: dict[str, Any],
    ) -> Evaluation:
        """Judge the texts that a model writes."""
        tokenizer = collator.processor.tokenizer
        options = {"do_sample": False, "max_new_tokens": 64, "pad_token_id": tokenizer.pad_token_id} | generation
        predictions: list[str] = []
        for batch in batches:
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            tokens = model.generate(**inputs, **options)
            if collator.is_causal:
                tokens = tokens[:, batch["input_ids"].shape[1] :]
            predictions += tokenizer.batch_decode(tokens, skip_special_tokens=True)
        references = [collator.target(sample) for sample in samples]
        values: dict[str, Any] = {name: metrics.text(name, references, predictions) for name in self.metrics}
        first = self.metrics[0]
        scores = metrics.text_scores(first, references, predictions)
        return Evaluation(values | metrics.interval_of(first, scores), scores, predictions)

    def example_text(self, config: Any, marks: str) -> str:
        return f"{marks}a text" if config.is_encoder_decoder else f"{marks}a text\\n"  # as in training

    def _use(self, config: Any, modalities: Sequence[str]) -> list[str]:
        tokens = "tokens" if config.is_encoder_decoder else 'tokens[:, inputs["input_ids"].shape[1] :]'
        return [
            "tokens = model.generate(**inputs, max_new_tokens=20)",
            f"print(processor.batch_decode({tokens}, skip_special_tokens=True))",
        ]


class Classification(Task):
    """A sample's class is named, or several of them, or (regression) a number."""

    kind = "classification"
    model_class = MMLMForClassification
    drops_unused_towers = True

    def class_names(self, settings: "TrainSettings", samples: Sequence[Sample]) -> list[str]:
        """Return the classes of `settings`, or else those of the samples, sorted; none for regression."""
        if settings.model.get("problem_type") == "regression":
            return []
        if settings.data.labels:
            return settings.data.labels
        listed = [s.label if isinstance(s.label, (list, tuple)) else [s.label] for s in samples]
        names = {name for labels in listed for label in labels if (name := class_name(label)) is not None}
        if len(names) < 2:
            raise ValueError(f"classification needs two labels or more, got {sorted(names)}; name them in data.labels")
        return sorted(names)

    def check_sample(self, collator: "Collator", sample: Sample) -> None:
        collator.label_of(sample)

    def batch(self, collator: "Collator", loaded: Sequence[Loaded]) -> dict[str, Any]:
        return collator.inputs(loaded) | {"labels": torch.tensor([collator.label_of(x.sample) for x in loaded])}

    def evaluate(
        self,
        model: Any,
        collator: "Collator",
        samples: Sequence[Sample],
        batches: Iterable[dict[str, Any]],
        generation: dict[str, Any],
    ) -> Evaluation:
        """Judge the classes, or numbers, that a model gives."""
        logits = torch.cat([model(**batch).logits.float().cpu() for batch in batches])
        truth = [collator.label_of(sample) for sample in samples]
        if collator.is_regression:
            numbers = logits[:, 0].numpy()
            errors = np.abs(numbers - np.array(truth))
            return Evaluation({"mean_absolute_error": float(errors.mean())}, -errors, numbers.tolist())
        if collator.is_multi_label:
            chosen = (logits > 0).int().numpy()
            values = metrics.multi_label(np.array(truth, int), chosen, collator.labels)
            scores = (chosen == np.array(truth, int)).all(1).astype(float)
            predictions: list[Any] = [[collator.labels[i] for i in np.flatnonzero(row)] for row in chosen]
        else:
            guesses = logits.argmax(-1).tolist()
            values = metrics.classification(truth, guesses, collator.labels)
            scores = np.array([t == g for t, g in zip(truth, guesses, strict=True)], float)
            predictions = [collator.labels[i] for i in guesses]
        return Evaluation(values | metrics.interval_of("accuracy", scores), scores, predictions)

    def reference(self, collator: "Collator", sample: Sample) -> Any:
        return sample.label

    def chance(self, collator: "Collator", samples: Sequence[Sample], evaluation: Evaluation) -> float | None:
        """Return the accuracy of always naming the most frequent class of these samples."""
        if collator.is_multi_label or collator.is_regression:
            return None
        counts = np.bincount([collator.label_of(sample) for sample in samples])
        return float(counts.max() / counts.sum())

    def example_text(self, config: Any, marks: str) -> str:
        return f"{marks}a text"

    def _use(self, config: Any, modalities: Sequence[str]) -> list[str]:
        if config.problem_type in ("regression", "multi_label_classification"):
            return ["print(model(**inputs).logits)"]
        return ["print(model.config.id2label[model(**inputs).logits.argmax().item()])"]


class Retrieval(Task):
    """Pictures and clips are matched with texts."""

    kind = "retrieval"
    model_class = MMLMForContrastive
    drops_unused_towers = True
    needs_text = True

    def check_evaluation(self, settings: "TrainSettings", samples: Sequence[Sample]) -> None:
        if not any(s.images or s.video or s.audio for s in samples):
            raise ValueError(f"task {settings.task} needs pictures or clips to evaluate, got texts alone")

    def batch(self, collator: "Collator", loaded: Sequence[Loaded]) -> dict[str, Any]:
        batch = collator.inputs(loaded)
        keys = [_match_key(x.sample) for x in loaded]
        numbers = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        return batch | {"positive_ids": torch.tensor([numbers[key] for key in keys])}

    def evaluate(
        self,
        model: Any,
        collator: "Collator",
        samples: Sequence[Sample],
        batches: Iterable[dict[str, Any]],
        generation: dict[str, Any],
    ) -> Evaluation:
        """Judge how each modality finds all different texts, and the other way round.

        The first metrics, and the scores, are the mean over the modalities that look for their text.
        """
        modalities = [m for m in VALUES if m in collator.modalities]
        embeddings = _embeddings(model, ("text", *modalities), batches)
        texts = [sample.text for sample in samples]
        first_row = np.array([texts.index(text) for text in dict.fromkeys(texts)])
        keys = [_match_key(sample) for sample in samples]
        matches = np.array([[key == keys[row] for row in first_row] for key in keys])
        directions: dict[str, Any] = {}
        forward_by_modality, hits_by_sample = [], np.full((len(modalities), len(samples)), np.nan)
        for row, modality in enumerate(modalities):
            present = np.abs(embeddings[modality]).sum(1) > 0
            if not present.any():
                continue
            similarity = embeddings[modality][present] @ embeddings["text"][first_row].T
            positive = matches[present]
            forward, hits = metrics.retrieval(similarity, positive)
            asked = positive.any(0)
            backward, _ = metrics.retrieval(similarity.T[asked], positive.T[asked])
            forward_by_modality.append(forward)
            hits_by_sample[row, present] = hits
            directions[f"{modality}_to_text"], directions[f"text_to_{modality}"] = forward, backward
        if not forward_by_modality:
            raise ValueError("retrieval needs pictures or clips, got none")
        judged = ~np.isnan(hits_by_sample).all(0)
        scores = np.full(len(samples), np.nan)
        scores[judged] = np.nanmean(hits_by_sample[:, judged], 0)
        mean = {name: float(np.mean([f[name] for f in forward_by_modality])) for name in forward_by_modality[0]}
        return Evaluation(mean | metrics.interval_of("recall_at_1", scores[judged]) | directions, scores)

    def chance(self, collator: "Collator", samples: Sequence[Sample], evaluation: Evaluation) -> float | None:
        """Return the recall of a random candidate."""
        return evaluation.metrics["chance_at_1"]

    def _use(self, config: Any, modalities: Sequence[str]) -> list[str]:
        return ["print(model(**inputs).logits_per_image)" if "image" in modalities else "print(model(**inputs))"]


def _embeddings(model: Any, modalities: Sequence[str], batches: Iterable[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Embed every modality of all samples, ``[N, D]``; zeros for those without."""
    parts: dict[str, list[torch.Tensor]] = {modality: [] for modality in modalities}
    for batch in batches:
        out = model(**batch, return_loss=False)
        for modality in modalities:
            name = f"{modality}_embeds"
            embeds = out[name] if name in out else torch.zeros_like(out.text_embeds)
            parts[modality].append(embeds.float().cpu())
    return {modality: torch.cat(rows).numpy() for modality, rows in parts.items()}


def _match_key(sample: Sample) -> Any:
    """Return what samples that match each other share: the label where there is one (a caption in any language), else
    the text."""
    return sample.text if sample.label is None else ("label", str(sample.label))


class Pretraining(Task):
    """Encoders are trained by masked words, hidden patches and alignment, and judged by these losses."""

    kind = "pretraining"
    model_class = MMLMForPreTraining

    def _use(self, config: Any, modalities: Sequence[str]) -> list[str]:
        return ["print(model(**inputs).loss)"]


class ImageGeneration(Task):
    """Pictures are written as codes of an image tokenizer behind their texts, and judged by the loss."""

    kind = "image_generation"
    needs_text = True
    reads_images = False
    ends_prompts = False
    needs_image_tokenizer = True
    needs_targets_to_evaluate = True
    extra_imports = ("MMLMImageTokenizer", "generate_images")

    def check_sample(self, collator: "Collator", sample: Sample) -> None:
        _check_picture(sample)

    def batch(self, collator: "Collator", loaded: Sequence[Loaded]) -> dict[str, Any]:
        return collator.inputs(loaded, self._targets(collator, loaded) if collator.with_targets else None)

    def _targets(self, collator: "Collator", loaded: Sequence[Loaded]) -> list[str]:
        with torch.no_grad():
            pixels = collator.pixels(loaded).to(collator.image_tokenizer.device)
            return codes_as_text(collator.image_tokenizer.encode(pixels))

    def example(self, config: Any, modalities: Sequence[str], text: str, inputs: Sequence[str]) -> list[str]:
        return [
            'painter = MMLMImageTokenizer.from_pretrained(f"{folder}/image_tokenizer")',
            f'print(generate_images(model, painter, processor, ["{text}"]).shape)',
        ]


class ImageTokenizer(Task):
    """Pictures are made codes and painted again."""

    kind = "image_tokenizer"
    model_class = MMLMImageTokenizer

    def check_sample(self, collator: "Collator", sample: Sample) -> None:
        _check_picture(sample)

    def batch(self, collator: "Collator", loaded: Sequence[Loaded]) -> dict[str, Any]:
        return {"pixel_values": collator.pixels(loaded)}

    def example(self, config: Any, modalities: Sequence[str], text: str, inputs: Sequence[str]) -> list[str]:
        return ["print(model.encode(processor.pixel_values([picture])))"]


def _check_picture(sample: Sample) -> None:
    if not sample.images:
        raise BadSampleError(f"{sample.name}: has no picture")


TASKS: dict[str, Task] = {
    "captioning": Generation("Describe the picture.", ("chrf", "bleu", "exact_match")),
    "video_description": Generation("Describe the film.", ("chrf", "bleu", "exact_match")),
    "question_answering": Generation("", ("exact_match", "chrf")),
    "dialogue": Generation("", ("chrf", "bleu", "exact_match")),
    "speech_recognition": Generation(
        "Write down what is said.", ("wer", "cer", "exact_match"), "automatic-speech-recognition"
    ),
    "translation": Generation("Translate into English.", ("chrf", "bleu", "exact_match")),
    "summarization": Generation("Summarise.", ("chrf", "bleu")),
    "classification": Classification("", ("accuracy", "macro_f1"), "text-classification"),
    "sentiment": Classification("", ("accuracy", "macro_f1")),
    "emotion": Classification("", ("accuracy", "macro_f1")),
    "retrieval": Retrieval("", ("recall_at_1", "recall_at_5", "recall_at_10", "matching_auc"), "feature-extraction"),
    "matching": Retrieval("", ("matching_auc", "recall_at_1", "recall_at_5", "recall_at_10")),
    "pretraining": Pretraining("", ("loss",), "feature-extraction"),
    "image_generation": ImageGeneration("", ("loss",), "text-to-image"),
    "image_tokenizer": ImageTokenizer("", ("loss",)),
}
