"""Samples of multimodal data: described by a line of a file, read when they are needed, checked, augmented."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from mmlm_fast.audio import AudioFileError, read_audio, resample

SAMPLING_RATE = 16000
FIELDS = ("image", "video", "audio", "text", "target", "label", "messages")
AUGMENTATIONS = ("crop", "flip", "noise", "level", "speed")


class BadSampleError(ValueError):
    """A sample that cannot be used; the message begins with its name."""


@dataclass(frozen=True)
class Sample:
    """One example.

    Attributes:
        name: For messages, such as ``train.jsonl:12``.
        images: Paths or PIL pictures.
        audio: Paths, or waveforms with their sampling rates in hertz.
        video: Path of a film, of which frames are taken.
        text: What goes in: a question, a caption to be found, a sentence to be judged.
        target: Text that comes out.
        label: Class, by name or number; a list of them where several hold at once.
        messages: A dialogue in transformers' chat form; the last one is the target.
    """

    name: str
    images: tuple[Any, ...] = ()
    audio: tuple[Any, ...] = ()
    video: Path | None = None
    text: str = ""
    target: str | None = None
    label: Any = None
    messages: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Loaded:
    """A sample with its pictures (PIL, RGB) and clips (float32, mono, 16 kHz) read."""

    sample: Sample
    images: list[Any]
    clips: list[np.ndarray]


def read_samples(path: str | Path) -> list[Sample]:
    """Samples of a JSON-lines file: one object a line with some of ``image`` (path or list), ``video``, ``audio``
    (path or list), ``text``, ``target``, ``label``, ``messages``. Paths are relative to the file.

    Raises:
        BadSampleError: for a line that is no such object, or names a file that is not there.
    """
    path = Path(path)
    samples = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        name = f"{path.name}:{number}"
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            raise BadSampleError(f"{name}: not JSON: {error}") from error
        if not isinstance(fields, dict):
            raise BadSampleError(f"{name}: must be an object, got {type(fields).__name__}")
        samples.append(_sample(name, fields, path.parent))
    if not samples:
        raise ValueError(f"{path} has no samples")
    return samples


def _sample(name: str, fields: dict[str, Any], folder: Path) -> Sample:
    unknown = sorted(set(fields) - set(FIELDS))
    if unknown:
        raise BadSampleError(f"{name}: fields must be among {', '.join(FIELDS)}, got {', '.join(unknown)}")
    paths: dict[str, tuple[Path, ...]] = {}
    for key in ("image", "audio", "video"):
        value = fields.get(key)
        listed = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(x, str) and x for x in listed):
            raise BadSampleError(f"{name}: {key} must be a path or a list of paths, got {value!r}")
        paths[key] = tuple(folder / x for x in listed)
    if len(paths["video"]) > 1:
        raise BadSampleError(f"{name}: video must be one path, got {len(paths['video'])}")
    for key in ("text", "target"):
        if not isinstance(fields.get(key, ""), str):
            raise BadSampleError(f"{name}: {key} must be text, got {fields[key]!r}")
    return Sample(
        name=name,
        images=paths["image"],
        audio=paths["audio"],
        video=paths["video"][0] if paths["video"] else None,
        text=fields.get("text", ""),
        target=fields.get("target"),
        label=fields.get("label"),
        messages=tuple(fields.get("messages", ())),
    )


def load(sample: Sample, *, num_frames: int = 8) -> Loaded:
    """Read the files of a sample; of a film, `num_frames` frames, evenly spread.

    Raises:
        BadSampleError: for a missing or unreadable file, naming the sample.
    """
    try:
        images = [_picture(x) for x in sample.images]
        if sample.video is not None:
            images += _frames(sample.video, num_frames)
        return Loaded(sample, images, [_clip(x) for x in sample.audio])
    except (OSError, AudioFileError, ValueError, SyntaxError) as error:  # SyntaxError: PIL, of broken PNGs
        raise BadSampleError(f"{sample.name}: {error}") from error


def _picture(source: Any) -> Any:
    from PIL import Image

    if not isinstance(source, (str, Path)):
        return source.convert("RGB")
    with Image.open(source) as file:
        if file.mode not in ("RGBA", "LA", "P"):
            return file.convert("RGB")
        picture = file.convert("RGBA")  # what is transparent is white, as on paper
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def _clip(source: Any) -> np.ndarray:
    if isinstance(source, (str, Path)):
        waveform, rate = read_audio(source, sampling_rate=SAMPLING_RATE)
    else:
        waveform, rate = torch.as_tensor(np.asarray(source[0], np.float32)), source[1]
    if rate != SAMPLING_RATE and waveform.numel():
        waveform = resample(waveform, rate, SAMPLING_RATE)  # type: ignore[assignment]
    clip = np.asarray(waveform, np.float32)
    if clip.ndim != 1 or not clip.size:
        raise ValueError(f"a clip must be mono and not empty, got shape {clip.shape}")
    if not np.isfinite(clip).all():
        raise ValueError("a clip has samples that are not finite")
    return clip


def _frames(path: Path, num_frames: int) -> list[Any]:
    import av

    try:
        with av.open(str(path)) as film:
            pictures = [frame.to_image() for frame in film.decode(video=0)]
    except (av.error.FFmpegError, IndexError) as error:
        raise ValueError(f"{path} cannot be read as a film: {error}") from error
    if not pictures:
        raise ValueError(f"{path} has no frames")
    return [pictures[round(i)] for i in np.linspace(0, len(pictures) - 1, min(num_frames, len(pictures)))]


def usable(
    samples: Sequence[Sample], check: Callable[[Sample], None], *, skip: bool, progress: bool = False
) -> tuple[list[Sample], list[str]]:
    """The samples that can be read and pass `check`, and what is wrong with the others.

    Args:
        check: Raises `BadSampleError`.
        skip: Read every file once, and leave out what is bad. Without it the first bad sample raises; files are then
            only looked for.

    Raises:
        BadSampleError: without `skip`.
        ValueError: if nothing is left.
    """
    kept, problems = [], []
    for sample in tqdm(samples, desc="checking samples", disable=not (progress and skip), unit="sample"):
        try:
            check(sample)
            if skip:
                load(sample)
            else:
                _find_files(sample)
        except BadSampleError as error:
            if not skip:
                raise
            problems.append(str(error))
        else:
            kept.append(sample)
    if not kept:
        raise ValueError(f"no usable sample of {len(samples)}; the first: {problems[0] if problems else 'none given'}")
    return kept, problems


def _find_files(sample: Sample) -> None:
    for path in (*sample.images, *sample.audio, sample.video):
        if isinstance(path, (str, Path)) and not Path(path).is_file():
            raise BadSampleError(f"{sample.name}: no file {path}")


def augmented(loaded: Loaded, kinds: Sequence[str], rng: np.random.Generator) -> Loaded:
    """A changed copy, for training: pictures cropped or mirrored, clips noisier, louder or softer, faster or slower.

    Args:
        kinds: Some of ``crop`` (to 80–100 % of each side), ``flip`` (left to right, half of the time), ``noise`` (15
            to 40 dB below the clip), ``level`` (±6 dB), ``speed`` (±10 %, with the pitch).
    """
    images, clips = list(loaded.images), list(loaded.clips)
    for i, picture in enumerate(images):
        if "crop" in kinds:
            width, height = (max(1, round(side * rng.uniform(0.8, 1.0))) for side in picture.size)
            left, top = rng.integers(picture.width - width + 1), rng.integers(picture.height - height + 1)
            picture = picture.crop((left, top, left + width, top + height))
        if "flip" in kinds and rng.random() < 0.5:
            picture = picture.transpose(0)
        images[i] = picture
    for i, clip in enumerate(clips):
        if "speed" in kinds:
            count = max(1, round(len(clip) / rng.uniform(0.9, 1.1)))
            clip = np.interp(np.linspace(0, len(clip) - 1, count), np.arange(len(clip)), clip)
        if "level" in kinds:
            clip = clip * 10 ** (rng.uniform(-6, 6) / 20)
        if "noise" in kinds:
            power = np.sqrt(np.mean(np.square(clip))) * 10 ** (-rng.uniform(15, 40) / 20)
            clip = clip + power * rng.standard_normal(len(clip))
        clips[i] = clip.astype(np.float32)
    return replace(loaded, images=images, clips=clips)
