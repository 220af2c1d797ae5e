"""Pictures from text: its first stage, which makes pictures codes, and what the trained model paints."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from mmlm_fast.models import MMLMImageTokenizer, generate_images
from mmlm_fast.training import checkpoints
from mmlm_fast.training.arguments import DEFAULTS, training_arguments
from mmlm_fast.training.building import image_tokenizer_of
from mmlm_fast.training.collator import Collator
from mmlm_fast.training.fitting import fit, trainer_of
from mmlm_fast.training.metrics import interval_of
from mmlm_fast.training.resuming import CHECKPOINTS, IMAGE_TOKENIZER, begin
from mmlm_fast.training.samples import Sample, load
from mmlm_fast.training.settings import TrainSettings


def load_or_train_image_tokenizer(
    settings: TrainSettings,
    processor: Any,
    train_samples: Sequence[Sample],
    eval_samples: Sequence[Sample],
    record: dict[str, Any],
    resume: bool,
    progress: bool,
) -> Any:
    """Load the image tokenizer that the settings name, or train one first on the same pictures.

    Args:
        record: See `begin`.
    """
    if settings.image_tokenizer:
        return MMLMImageTokenizer.from_pretrained(settings.path(settings.image_tokenizer)).eval()
    folder = Path(settings.output) / IMAGE_TOKENIZER
    transformers.set_seed(settings.seed)  # whatever went before
    model = image_tokenizer_of(settings)
    collator = Collator("image_tokenizer", model, processor, seed=settings.seed)
    epochs = settings.training.get("num_train_epochs", DEFAULTS["num_train_epochs"])
    changes = {"learning_rate": 2e-3, "num_train_epochs": 2 * epochs}
    arguments = training_arguments(settings.training | changes, folder / CHECKPOINTS, settings.seed, progress)
    record = record | {"stage": IMAGE_TOKENIZER}
    resume = resume and (folder / CHECKPOINTS / checkpoints.RECORD).is_file()
    checkpoint = checkpoints.last_whole(folder / CHECKPOINTS)[0] if resume else None
    trainer = trainer_of(model, collator, train_samples, eval_samples, settings, arguments)
    begin(folder / CHECKPOINTS, record, resume)
    fit(trainer, checkpoint)
    return model.eval()


def paint(
    model: Any,
    image_tokenizer: Any,
    collator: Collator,
    train_samples: Sequence[Sample],
    eval_samples: Sequence[Sample],
    output: Path,
    draws: int = 4,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Paint pictures of the different texts, `draws` each by sampling, the first of each as PNG files.

    Returns:
        Text and file of each; and where samples have labels, how often a classifier (scikit-learn's SVC, trained on the
        real training pictures) reads the label of the text from the generated picture, from the picture of another text
        (the control), and from real held-out pictures.
    """
    by_text = {sample.text: sample for sample in eval_samples}
    asked = [sample for sample in by_text.values() for _ in range(draws)]
    texts = [sample.text for sample in asked]
    pixels = generate_images(model.eval(), image_tokenizer, collator.processor, texts, do_sample=True).cpu()
    files = _write_pictures(pixels[::draws], collator.processor.image_processor, output)
    rows = [{"text": text, "file": file} for text, file in zip(by_text, files, strict=True)]
    if any(sample.label is None for sample in (*train_samples, *eval_samples)):
        return rows, {}
    return rows, _readability(pixels, asked, draws * (len(by_text) // 2), collator, train_samples, eval_samples)


def _write_pictures(pixels: torch.Tensor, image_processor: Any, output: Path) -> list[str]:
    """Write values ``[N, C, height, width]`` as PNG files, and return their names in `output`."""
    from PIL import Image

    (output / "pictures").mkdir(exist_ok=True)
    means, deviations = (
        torch.tensor(getattr(image_processor, name))[:, None, None] for name in ("image_mean", "image_std")
    )
    files = []
    for i, picture in enumerate(pixels):
        values = ((picture * deviations + means).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        files.append(f"pictures/{i}.png")
        Image.fromarray(values).save(output / files[-1])
    return files


def _readability(
    pixels: torch.Tensor,
    asked: Sequence[Sample],
    shift: int,
    collator: Collator,
    train_samples: Sequence[Sample],
    eval_samples: Sequence[Sample],
) -> dict[str, Any]:
    """Have a classifier of real pictures read painted ones; `shift` places on, `asked` has another text."""
    from sklearn.svm import SVC

    def values(samples: Sequence[Sample]) -> list[np.ndarray]:
        return [collator.pixels([load(sample)]).flatten().numpy() for sample in samples]

    def labels(samples: Sequence[Sample]) -> list[str]:
        return [str(sample.label) for sample in samples]

    train_samples = train_samples[:2000]
    reader = SVC().fit(values(train_samples), labels(train_samples))
    read = reader.predict(pixels.flatten(1).numpy())
    wanted = np.array(labels(asked))
    hits = (read == wanted).astype(float)
    others = (read == np.roll(wanted, shift)).astype(float)
    return {
        "read_as_asked": float(hits.mean()),
        **interval_of("read_as_asked", hits),
        "read_as_another_text_asked": float(others.mean()),
        "real_pictures_read": float(reader.score(values(eval_samples), labels(eval_samples))),
    }
