"""Samples that ship with the package: speech in three languages, a picture, prompts. Licences: LICENSE.md."""

import json
from dataclasses import dataclass
from importlib.resources import as_file, files
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Speech:
    language: str  # ISO 639-1
    text: str
    waveform: np.ndarray  # float32, mono, in [-1, 1]
    sampling_rate: int


def _index() -> dict[str, Any]:
    return json.loads((files(__name__) / "samples.json").read_text(encoding="utf-8"))


def load_speech() -> list[Speech]:
    """Three read prompts of about ten seconds, 16 kHz: English, Spanish, French. Needs soundfile."""
    import soundfile

    samples = []
    for entry in _index()["speech"]:
        with as_file(files(__name__) / entry["file"]) as path:
            waveform, sampling_rate = soundfile.read(path, dtype="float32")
        samples.append(Speech(entry["language"], entry["text"], waveform, sampling_rate))
    return samples


def load_spoken_digits() -> dict[str, list[Speech]]:
    """The digits 0 to 9 in English, Spanish and French, one reading each, 8 kHz, by language. Needs soundfile."""
    import soundfile

    digits = {}
    for entry in _index()["digits"]:
        with as_file(files(__name__) / entry["file"]) as path:
            waveform, sampling_rate = soundfile.read(path, dtype="float32")
        clips = np.split(waveform, entry["ends"][:-1])
        language = entry["language"]
        digits[language] = [Speech(language, w, c, sampling_rate) for w, c in zip(entry["words"], clips, strict=True)]
    return digits


def load_image() -> tuple[Any, str]:
    """A picture (PIL image, RGB, 336 × 336) and its caption. Needs pillow."""
    from PIL import Image

    entry = _index()["image"]
    with as_file(files(__name__) / entry["file"]) as path:
        return Image.open(path).convert("RGB"), entry["text"]


def load_prompts() -> list[str]:
    """Short instructions in English, Chinese and French."""
    return _index()["prompts"]
