"""Real data that needs no download: digits, written and spoken, and, where Debian's package is installed, the stamps of
Tux Paint."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mmlm_fast.data import load_spoken_digits
from mmlm_fast.training.samples import Sample

STAMPS_FOLDER = "/usr/share/tuxpaint/stamps"
LANGUAGES = ("en", "es", "fr")
HELD_OUT = 400  # of the 1,797 written digits, the last ones: mostly of other writers

QUESTIONS = {
    "written": {
        "en": ("Which digit is written?", "What number do you see?"),
        "es": ("¿Qué cifra está escrita?", "¿Qué número ves?"),
        "fr": ("Quel chiffre est écrit ?", "Quel nombre vois-tu ?"),
    },
    "spoken": {
        "en": ("Which digit is spoken?", "What number do you hear?"),
        "es": ("¿Qué cifra se dice?", "¿Qué número oyes?"),
        "fr": ("Quel chiffre est dit ?", "Quel nombre entends-tu ?"),
    },
}
CAPTIONS = {
    "en": "a handwritten {}",
    "es": "un {} escrito a mano",
    "fr": "un {} écrit à la main",
}
INSTRUCTIONS = {"en": "Describe the picture.", "es": "Describe la imagen.", "fr": "Décris l'image."}


def digits(kind: str, split: str, *, count: int | None = None, seed: int = 0, **options: Any) -> list[Sample]:
    """Draw handwritten digits (UCI, by scikit-learn: 1,797 of 8 × 8 pixels) and spoken ones (English, Spanish, French;
    one reading each), put together at random.

    Args:
        kind: ``question``: a written digit, another one spoken, and a question in one of three languages after one of
            the two; the label is the answer, which needs all three. ``caption``: a written digit and an instruction in
            one of three languages; the target is its description in that language. ``speech``: a spoken digit and its
            word. ``translation``: a spoken Spanish or French digit, the target its English word. ``pair``: a written
            digit, the same one spoken, and its description, for retrieval and pre-training. ``picture``: the
            description; the target is the picture's.
        split: ``train`` or ``eval``. Written digits of the two are different; spoken ones are the same readings, which
            `augmented` changes in training and, with another seed, in evaluation: they say nothing of other speakers.
        count: Number of samples; by default as many as there are pictures.

    Raises:
        ValueError: for another kind or split.
    """
    from PIL import Image
    from sklearn.datasets import load_digits

    kinds: dict[str, Callable[..., dict[str, Any]]] = {
        "question": _question, "caption": _caption, "speech": _speech, "translation": _translation, "pair": _pair,
        "picture": _picture,
    }  # fmt: skip
    if kind not in kinds or split not in ("train", "eval"):
        raise ValueError(f"digits: kind must be among {', '.join(kinds)}, split train or eval, got {kind!r}, {split!r}")
    data = load_digits()
    rows = np.arange(len(data.target))
    rows = rows[:-HELD_OUT] if split == "train" else rows[-HELD_OUT:]
    rng = np.random.default_rng([seed, split == "eval"])
    spoken = load_spoken_digits()
    order = np.concatenate([rng.permutation(rows) for _ in range(-(-(count or len(rows)) // len(rows)))])
    samples = []
    for i, row in enumerate(order[: count or len(rows)]):
        pixels = np.clip(data.images[row] * 16, 0, 255).astype(np.uint8)
        picture = Image.fromarray(255 - pixels).resize((32, 32), Image.Resampling.BICUBIC)
        fields = kinds[kind](int(data.target[row]), picture, spoken, rng)
        samples.append(Sample(name=f"digits/{kind}/{split}:{i}", **fields))
    return samples


def _clip(spoken: Any, language: str, digit: int) -> tuple:
    reading = spoken[language][digit]
    return ((reading.waveform, reading.sampling_rate),)


def _language(rng: np.random.Generator) -> str:
    return LANGUAGES[rng.integers(len(LANGUAGES))]


def _question(digit: int, picture: Any, spoken: Any, rng: np.random.Generator) -> dict[str, Any]:
    heard, about = int(rng.integers(10)), ("written", "spoken")[rng.integers(2)]
    asked = QUESTIONS[about][_language(rng)]
    label = digit if about == "written" else heard
    clip = _clip(spoken, _language(rng), heard)
    return dict(images=(picture,), audio=clip, text=asked[rng.integers(len(asked))], label=label, target=str(label))


def _caption(digit: int, picture: Any, spoken: Any, rng: np.random.Generator) -> dict[str, Any]:
    language = _language(rng)
    word = spoken[language][digit].text
    return dict(images=(picture,), text=INSTRUCTIONS[language], target=CAPTIONS[language].format(word))


def _speech(digit: int, picture: Any, spoken: Any, rng: np.random.Generator) -> dict[str, Any]:
    language = _language(rng)
    return dict(audio=_clip(spoken, language, digit), target=spoken[language][digit].text)


def _translation(digit: int, picture: Any, spoken: Any, rng: np.random.Generator) -> dict[str, Any]:
    return dict(audio=_clip(spoken, ("es", "fr")[rng.integers(2)], digit), target=spoken["en"][digit].text)


def _pair(digit: int, picture: Any, spoken: Any, rng: np.random.Generator) -> dict[str, Any]:
    language = _language(rng)
    text = CAPTIONS[language].format(spoken[language][digit].text)
    return dict(images=(picture,), audio=_clip(spoken, language, digit), text=text, label=digit)


def _picture(digit: int, picture: Any, spoken: Any, rng: np.random.Generator) -> dict[str, Any]:
    language = _language(rng)
    text = CAPTIONS[language].format(spoken[language][digit].text)
    return dict(images=(picture,), text=text, target="", label=digit)


def stamps_folder() -> Path | None:
    """Return where the stamps of Tux Paint are: `MMLM_FAST_STAMPS` or Debian's folder; None where there are none."""
    folder = Path(os.environ.get("MMLM_FAST_STAMPS", STAMPS_FOLDER))
    return folder if folder.is_dir() else None


def stamps(
    kind: str, split: str, *, count: int | None = None, seed: int = 0, languages: Any = LANGUAGES
) -> list[Sample]:
    """Read stamps of Tux Paint (GPL-2, Debian's ``tuxpaint-stamps-default``): pictures with captions and spoken
    captions.

    Args:
        kind: ``topic``: picture, caption in one of the languages and its reading where there is one; the label is the
            topic, of the ten with the most stamps. ``caption``: a picture and an instruction in a language; the target
            is the caption in it. ``pair``: picture, caption and reading in the same language, for retrieval.
        split: ``train`` or ``eval``, one fifth, by English caption: no caption is in both.
        count: Number of samples; by default one a stamp and language (``topic``, ``pair``: one a stamp).
        languages: Of captions and readings, by two letters.

    Raises:
        ValueError: if the stamps are not installed, or for another kind or split.
    """
    folder = stamps_folder()
    if folder is None:
        raise ValueError(
            "stamps: not installed: apt install tuxpaint-stamps-default, or name the folder in MMLM_FAST_STAMPS"
        )
    if kind not in ("topic", "caption", "pair") or split not in ("train", "eval"):
        raise ValueError(f"stamps: kind must be topic, caption or pair, split train or eval, got {kind!r}, {split!r}")
    every_stamp = _stamps(folder)
    topics = sorted({t for t, *_ in every_stamp}, key=lambda t: (-sum(t == x for x, *_ in every_stamp), t))[:10]
    captions = sorted({texts["en"] for _, _, texts, _ in every_stamp})
    np.random.default_rng(0).shuffle(captions)  # the split does not depend on the seed of the training
    held_out = set(captions[: len(captions) // 5])
    rng = np.random.default_rng([seed, split == "eval"])
    samples = []
    for topic, path, texts, readings in every_stamp:
        if (texts["en"] in held_out) != (split == "eval") or (kind == "topic" and topic not in topics):
            continue
        spoken = [x for x in languages if x in texts and (x in readings or kind == "caption")]
        if not spoken and kind != "topic":
            continue
        chosen = spoken if kind == "caption" else [spoken[rng.integers(len(spoken))]] if spoken else ["en"]
        for language in chosen:
            audio = () if kind == "caption" or language not in readings else (readings[language],)
            asked: dict[str, Any] = (
                {"text": INSTRUCTIONS[language], "target": texts[language]}
                if kind == "caption"
                else {"text": texts[language]}
            )
            label = topic if kind == "topic" else None
            name = f"stamps/{kind}/{split}:{path.relative_to(folder)}/{language}"
            samples.append(Sample(name=name, images=(path,), audio=audio, label=label, **asked))
    return samples if count is None else [samples[i] for i in rng.permutation(len(samples))[:count]]


def _stamps(folder: Path) -> list[tuple[str, Path, dict[str, str], dict[str, Path]]]:
    """Read topic, picture, captions and readings by language of every stamp that has a caption in English."""
    every_stamp = []
    for path in sorted(folder.rglob("*.png")):
        described = path.with_suffix(".txt")
        if path.stem.endswith(("_mirror", "_flip")) or not described.is_file():
            continue
        first, *rest = described.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
        texts = {"en": first.strip()}
        for line in rest:
            key, _, text = line.partition(".utf8=")
            if text.strip():
                texts.setdefault(key, text.strip())
        if not texts["en"]:
            continue
        readings = {}
        for language in LANGUAGES:
            ending = "_desc.ogg" if language == "en" else f"_desc_{language}.ogg"
            reading = path.with_name(path.stem + ending)
            if reading.is_file():
                readings[language] = reading
        every_stamp.append((path.relative_to(folder).parts[0], path, texts, readings))
    return every_stamp


BUILTIN: dict[str, Callable[..., list[Sample]]] = {"digits": digits, "stamps": stamps}
