"""Samples of multimodal data: described by a line of a file, read when they are needed, checked, augmented."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from mmlm_fast.audio import read_audio, resample

SAMPLING_RATE = 16000
FIELDS = ("image", "video", "audio", "text", "target", "label", "messages")
AUGMENTATIONS = ("crop", "flip", "noise", "level", "speed")


class BadSampleError(ValueError):
    """A sample that cannot be used; the message begins with its name."""


@dataclass(frozen=True)
class Sample:
    """A sample.

    Attributes:
        name: For messages, such as ``train.jsonl:12``.
        images: Paths or PIL pictures.
        audio: Paths, or waveforms with their sampling rates in hertz.
        video: Path of a film, of which frames are taken.
        text: What goes in: a question, a caption to be found, a sentence to be judged; ``""`` for none.
        target: Text that comes out.
        label: Class, by its name, of which a whole number is one too; a list of them where several hold at once; a
            number for regression.
        messages: A dialogue in transformers' chat form; the last one is the target. The parts of a message are texts
            and marks of pictures and clips, whose files are in `images` and `audio`.

    Raises:
        BadSampleError: for texts, labels and messages that are no such things.
    """

    name: str
    images: tuple[Any, ...] = ()
    audio: tuple[Any, ...] = ()
    video: Path | None = None
    text: str = ""
    target: str | None = None
    label: Any = None
    messages: tuple[dict[str, Any], ...] = ()

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem is not None:
            raise BadSampleError(f"{self.name}: {problem}")

    def _problem(self) -> str | None:
        if not isinstance(self.text, str):
            return f"text must be text, got {self.text!r}"
        if not isinstance(self.target, (str, type(None))):
            return f"target must be text, got {self.target!r}"
        if self.text and not self.text.strip():
            return f"text is empty, got {self.text!r}"
        for label in self.label if isinstance(self.label, (list, tuple)) else (self.label,):
            if not isinstance(label, (str, int, float, np.integer, np.floating, type(None))) or label == "":
                return f"label must be a class, a list of classes or a number, got {self.label!r}"
        if isinstance(self.label, (list, tuple)) and None in self.label:
            return f"label must be a class or a list of classes, got {self.label!r}"
        for message in self.messages:
            if (problem := _message_problem(message)) is not None:
                return problem
        return None


def class_name(label: Any) -> str | None:
    """Return the name of a class, which a whole number is too; None for what names none."""
    if isinstance(label, str):
        return label
    return str(label) if isinstance(label, (int, np.integer)) and not isinstance(label, bool) else None


@dataclass(frozen=True)
class Loaded:
    """A sample with its pictures (PIL, RGB) and clips (float32, mono, 16 kHz) read."""

    sample: Sample
    images: list[Any]
    clips: list[np.ndarray]


def _message_problem(message: Any) -> str | None:
    if not isinstance(message, dict) or not {"role", "content"} <= set(message):
        return f"a message must have role and content, got {message!r}"
    if not isinstance(message["role"], str) or not isinstance(message["content"], (str, list)):
        return f"a message's role must be text, its content text or a list of parts, got {message!r}"
    for part in message["content"] if isinstance(message["content"], list) else ():
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and set(part) == {"type", "text"} and isinstance(part["text"], str):
            continue
        if kind not in ("image", "audio") or set(part) != {"type"}:
            return (
                'a part of a message must be {"type": "text", "text": …}, {"type": "image"} or {"type": "audio"}, '
                f"whose files are in the sample's image and audio, got {part!r}"
            )
    return None


def read_samples(path: str | Path, problems: list[str] | None = None, *, name: str | None = None) -> list[Sample]:
    """Read the samples of a JSON-lines file in UTF-8: one object a line with some of ``image`` (path or list),
    ``video``, ``audio`` (path or list), ``text``, ``target``, ``label``, ``messages``; null is the same as nothing.
    Paths are relative to the file. Lines end at line feeds alone; byte order marks are passed over.

    Args:
        problems: Takes what is wrong with bad lines, which are then left out.
        name: What samples are named after, ``name:line``; by default the file's name.

    Raises:
        BadSampleError: for a line that is no such object, without `problems`.
        ValueError: for a file that cannot be read or has no samples.
    """
    path, samples, before = Path(path), [], len(problems or ())
    for number, line in _lines(path):
        try:
            samples.append(_sample(f"{name or path.name}:{number}", line, path.parent))
        except BadSampleError as error:
            if problems is None:
                raise
            problems.append(str(error))
    if not samples:
        bad = (problems or [])[before:]
        raise ValueError(f"{path} has no samples" + (f" but {len(bad)} bad lines; the first: {bad[0]}" if bad else ""))
    return samples


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that are not empty, with their numbers."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if number == 1 and line.startswith((b"\xff\xfe", b"\xfe\xff")):
                    raise ValueError(f"{path} must be UTF-8, got UTF-16 or UTF-32")
                line = line.strip(b" \t\r\n").removeprefix(b"\xef\xbb\xbf")  # files put together have some inside
                if line := line.strip(b" \t\r\n"):
                    yield number, line
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error


def _sample(name: str, line: bytes, folder: Path) -> Sample:
    try:
        fields = strict_json(line.decode())
    except UnicodeDecodeError as error:
        raise BadSampleError(f"{name}: not UTF-8: {error.reason} at byte {error.start + 1}") from error
    except json.JSONDecodeError as error:
        raise BadSampleError(f"{name}: not JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise BadSampleError(f"{name}: {error}") from error
    if not isinstance(fields, dict):
        raise BadSampleError(f"{name}: must be an object, got {type(fields).__name__}")
    unknown = sorted(set(fields) - set(FIELDS))
    if unknown:
        raise BadSampleError(f"{name}: fields must be among {', '.join(FIELDS)}, got {', '.join(unknown)}")
    fields = {key: value for key, value in fields.items() if value is not None}
    paths: dict[str, tuple[Path, ...]] = {}
    for key in ("image", "audio", "video"):
        value = fields.get(key, [])
        listed = value if isinstance(value, list) else [value]
        if not all(isinstance(x, str) and x for x in listed):
            raise BadSampleError(f"{name}: {key} must be a path or a list of paths, got {value!r}")
        paths[key] = tuple(folder / x for x in listed)
    if len(paths["video"]) > 1:
        raise BadSampleError(f"{name}: video must be one path, got {len(paths['video'])}")
    if fields.get("text") == "":
        raise BadSampleError(f"{name}: text is empty: leave it out where there is none")
    if not isinstance(fields.get("messages", []), list):
        raise BadSampleError(f"{name}: messages must be a list, got {fields['messages']!r}")
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


def strict_json(text: str) -> Any:
    """Return what a JSON text holds.

    Raises:
        ValueError: also for what Python's reader passes over: keys given twice, NaN and infinity, numbers beyond
            float64, and halves of surrogate pairs, which are no characters.
    """

    def number(digits: str) -> float:
        if not math.isfinite(value := float(digits)):
            raise ValueError(f"{digits} is no finite number")
        return value

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if len(set(keys)) < len(keys):
            raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} is given twice")
        return dict(pairs)

    value = json.loads(text, parse_constant=number, parse_float=number, object_pairs_hook=once)
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"half of a surrogate pair, {error.object[error.start]!a}, is no character") from error
    return value


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
    except (OSError, ValueError) as error:
        raise BadSampleError(f"{sample.name}: {error}") from error


def _picture(source: Any) -> Any:
    """Read the first picture of a file, upright, in RGB of 8 bits."""
    from PIL import Image

    try:
        if not isinstance(source, (str, Path)):
            return _as_rgb(source)
        with Image.open(source) as file:
            return _as_rgb(file)
    except Exception as error:  # of a broken file PIL's readers raise anything, and their own class for huge ones
        reason = str(error) or type(error).__name__
        is_unnamed = isinstance(source, (str, Path)) and str(source) not in reason
        raise ValueError(f"{source}: {reason}" if is_unnamed else reason) from error


def _as_rgb(picture: Any) -> Any:
    from PIL import Image, ImageOps

    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I;16"):  # PIL would cut values above 255 off
        values = np.asarray(picture).astype(np.float64)
        clear = picture.info.get("transparency")
        values[values == (-1 if clear is None else clear)] = 65535
        return Image.fromarray(np.rint(values / 257).astype(np.uint8)).convert("RGB")
    if picture.mode in ("I", "F"):
        raise ValueError(f"pictures must have 8 or 16 bits a channel, got PIL's mode {picture.mode}")
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La", "P") or "transparency" in picture.info:
        picture = picture.convert("RGBA")  # what is transparent is white, as on paper
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


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
    try:
        import av
    except ImportError as error:
        raise ValueError(f"{path}: reading films needs PyAV: pip install av") from error
    try:
        with av.open(str(path)) as film:
            # As it is to be shown: telephones write films as the sensor lies.
            pictures = [
                frame.to_image().rotate(getattr(frame, "rotation", 0), expand=True) for frame in film.decode(video=0)
            ]
    except (av.error.FFmpegError, IndexError) as error:
        raise ValueError(f"{path} cannot be read as a film: {error}") from error
    if not pictures:
        raise ValueError(f"{path} has no frames")
    return [pictures[round(i)] for i in np.linspace(0, len(pictures) - 1, min(num_frames, len(pictures)))]


def usable(
    samples: Sequence[Sample],
    check: Callable[[Sample], None],
    *,
    skip: bool,
    progress: bool = False,
    read: Callable[[Sample], Any] = load,
) -> tuple[list[Sample], list[str]]:
    """Return the samples that can be read and pass `check`, and what is wrong with the others.

    Args:
        check: Raises `BadSampleError`.
        skip: `read` every sample once, and leave out what is bad. Without it the first bad sample raises; files are
            then only looked for.
        read: Raises `BadSampleError` for a sample that cannot be used.

    Raises:
        BadSampleError: without `skip`.
        ValueError: if nothing is left.
    """
    kept, problems = [], []
    for sample in tqdm(samples, desc="checking samples", disable=not (progress and skip), unit="sample"):
        try:
            check(sample)
            _find_files(sample)
            if skip:
                read(sample)
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
        try:
            is_missing = isinstance(path, (str, Path)) and not Path(path).is_file()
        except OSError as error:  # a name too long, a folder that may not be read
            raise BadSampleError(f"{sample.name}: {error}") from error
        if is_missing:
            raise BadSampleError(f"{sample.name}: no file {path}")


def augmented(loaded: Loaded, kinds: Sequence[str], rng: np.random.Generator) -> Loaded:
    """Return a changed copy, for training: pictures cropped or mirrored, clips noisier, louder or softer, faster or
    slower.

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
