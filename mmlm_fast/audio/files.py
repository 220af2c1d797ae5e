"""Reading audio files: soundfile for what libsndfile knows (WAV, FLAC, OGG, MP3, …), PyAV for the rest.

A file that holds less than its header states is an error of that file, never a shorter clip in silence.
"""

import os
import stat
import struct
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mmlm_fast.audio import decoders
from mmlm_fast.audio.arguments import whole
from mmlm_fast.audio.collect import Collector
from mmlm_fast.audio.containers import Stated, parts_of
from mmlm_fast.audio.plain import in_plain_torch

RATE = "a positive whole number of hertz"


class AudioFileError(ValueError):
    """A file that cannot be read, is cut short or lies about itself; `path` says which, the message why."""

    def __init__(self, path: Any, reason: str) -> None:
        name = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else str(path)
        super().__init__(f"{_printable(name)}: {_printable(reason)}")
        self.path, self.reason = name, _printable(reason)

    def __reduce__(self) -> tuple:
        return type(self), (self.path, self.reason)


def _printable(text: str) -> str:
    """What of a name is not UTF-8, as \\xe9: nobody could print it."""
    return os.fsencode(text).decode("utf-8", "backslashreplace") if not text.isascii() else text


@dataclass(frozen=True)
class AudioInfo:
    sampling_rate: int
    num_channels: int
    num_samples: int  # a channel, at the rate above, as the header states; -1 where it does not, or only times
    codec: str


@dataclass(frozen=True)
class _Source:
    path: Any
    name: bytes
    parts: list[tuple[int, int, Stated]]

    @property
    def problem(self) -> str | None:
        return next((facts.problem for *_, facts in self.parts if facts.problem), None)


@dataclass(frozen=True)
class _Result:
    samples: Tensor
    rate: int
    num_received: int
    problem: str | None
    is_proved: bool  # as long as the container states
    is_opened: bool  # all parts were taken by the decoder


def _source(path: Any) -> _Source:
    if not isinstance(path, (str, bytes, os.PathLike)):
        raise ValueError(f"path must be a str, bytes or os.PathLike, got {type(path).__name__}")
    name = os.fsencode(path)
    try:
        mode = os.stat(name)
        if not stat.S_ISREG(mode.st_mode):
            raise AudioFileError(path, "not a file")
        if mode.st_size == 0:
            raise AudioFileError(path, "an empty file")
        with open(name, "rb", buffering=4096) as file:
            return _Source(path, name, parts_of(file))
    except FileNotFoundError:
        raise AudioFileError(path, "no such file") from None
    except AudioFileError:
        raise
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise AudioFileError(path, f"cannot be opened: {reason}") from error
    except (struct.error, ArithmeticError, LookupError) as error:  # a damaged header
        raise AudioFileError(path, f"its header cannot be read: {error}") from error


def _open(source: _Source, part: tuple[int, int, Stated], swap: bool = False) -> tuple[decoders.Reader, bool]:
    """The first decoder that takes a part, and whether it is soundfile; PyAV's turn is first with `swap`.

    It is, too, where libsndfile would guess the length and stop there. Raises `DecoderError`.
    """
    start, end, facts = part
    is_followed = 0 < facts.end < end - start
    piece = None
    if len(source.parts) > 1 or facts.patch or is_followed:
        piece = decoders.Part(start, start + facts.end if is_followed else end, facts.patch)
    reasons = []
    for name in decoders.DECODERS[:: -1 if swap != facts.is_guessed else 1]:
        try:
            return decoders.opened(name, source.name, piece), name == "soundfile"
        except decoders.DecoderError as error:
            reasons.append(str(error))
        except ImportError:
            pass
    lacking = decoders.lacking()
    if not reasons:
        raise AudioFileError(source.path, f"reading files needs soundfile: {lacking}")
    raise decoders.DecoderError("; ".join([*reasons, lacking] if lacking else reasons))


def _promise(reader: decoders.Reader, facts: Stated, is_soundfile: bool) -> tuple[int, int]:
    """Samples a channel that there must be, -1 where nothing states it, and how many fewer a decoder may give."""
    if is_soundfile and not facts.is_guessed and not (facts.is_exact and facts.num_samples >= 0):
        return reader.num_samples, 0
    if facts.num_samples >= 0:
        count = facts.num_samples * reader.sampling_rate // (facts.rate or reader.sampling_rate)
        return count, 0 if facts.is_exact or decoders.is_lossless(reader.codec) else reader.sampling_rate // 10
    return (-1, 0) if is_soundfile else (reader.num_samples, reader.sampling_rate // 10)


def _decoded(source: _Source, swap: bool, target: int | None, mono: bool, block: int) -> _Result:
    """Decode all parts with the preferred decoder of each, or the other one; what fails is a problem of the result."""
    collector, problem, is_proved, is_opened = None, source.problem, True, True
    for part in source.parts:
        facts = part[2]
        try:
            reader, is_soundfile = _open(source, part, swap)
        except decoders.DecoderError as error:
            problem, is_proved, is_opened = problem or str(error), False, False
            continue
        try:
            promised, slack = _promise(reader, facts, is_soundfile)
            if collector is None:
                collector = Collector(target, mono, -1 if len(source.parts) > 1 else max(promised, reader.estimate))
            got, is_padded = 0, promised >= 0 and facts.is_padded
            try:
                for piece in decoders.blocks_of(reader, block):
                    length = min(piece.length, max(promised - got, 0)) if is_padded else piece.length
                    got += piece.length
                    if length:
                        collector.add(replace(piece, length=length))
            except decoders.DecoderError as error:
                if not is_padded or error.after < promised:  # else it is behind the end
                    problem, is_proved = problem or str(error), False
            is_proved &= 0 <= promised <= got + slack
            if got < promised - slack:
                problem = problem or f"cut short: its header promises {promised} samples, {got} can be read"
            if 0 <= promised < got - (reader.sampling_rate // 2 if is_padded else 0) and (facts.is_exact or is_padded):
                problem = problem or f"its header promises {promised} samples, {got} are there"
            if is_soundfile and facts.is_guessed and not 0 <= promised <= got:
                problem = problem or f"its length is not stated, and soundfile stops at a guess; {decoders.lacking()}"
        finally:
            reader.close()
    if collector is None:
        return _Result(torch.empty(0, dtype=torch.float32, device="cpu"), target or 0, 0, problem, False, False)
    samples = collector.finish()
    return _Result(samples, collector.sampling_rate or 0, collector.num_received, problem, is_proved, is_opened)


def _best(source: _Source, target: int | None, mono: bool, strict: bool) -> _Result:
    """The first decoder's result, or the other one's where that failed and the other one does not."""
    # A decoder that fails takes the block with it, so what is wanted though broken is read in small ones.
    block = decoders.BLOCK if strict else decoders.BLOCK // 32
    first = _decoded(source, False, target, mono, block)
    if first.problem is None or not all(map(decoders.is_there, decoders.DECODERS)):
        return first
    if first.problem == source.problem and first.num_received:  # read to the end: it is the file that is short
        return first
    second = _decoded(source, True, target, mono, block)
    # A decoder that skips what is damaged has no complaint: believed where the first could not begin, or by the length.
    if second.problem is None and (second.is_proved or not first.is_opened):
        return second
    longest = max(first, second, key=lambda result: result.samples.shape[-1] / max(result.rate, 1))
    return _Result(longest.samples, longest.rate, longest.num_received, first.problem, False, longest.is_opened)


def audio_info(path: str | bytes | os.PathLike) -> AudioInfo:
    """Rate, channels and length of a file by its header, without decoding it.

    Raises:
        AudioFileError: (a ValueError) for what `read_audio` could not read, as far as can be told without decoding.
    """
    source = _source(path)
    if source.problem is not None:
        raise AudioFileError(path, source.problem)
    infos = []
    for part in source.parts:
        facts = part[2]
        try:
            reader, is_soundfile = _open(source, part)
        except decoders.DecoderError as error:
            raise AudioFileError(path, str(error)) from error
        try:
            count, _ = _promise(reader, facts, is_soundfile)
            if facts.is_unknown or (facts.num_samples < 0 and (facts.is_guessed or reader.is_by_time)):
                count = -1
            infos.append(AudioInfo(reader.sampling_rate, reader.num_channels, count, reader.codec))
        finally:
            reader.close()
    first = infos[0]
    counts = [info.num_samples for info in infos]
    is_known = min(counts) >= 0 and all(info.sampling_rate == first.sampling_rate for info in infos)
    return AudioInfo(first.sampling_rate, first.num_channels, sum(counts) if is_known else -1, first.codec)


def read_audio(
    path: str | bytes | os.PathLike, *, sampling_rate: int | None = None, mono: bool = True, strict: bool = True
) -> tuple[Tensor, int]:
    """Read an audio file: WAV, FLAC, MP3, OGG and what else soundfile or PyAV decode.

    It is decoded to its end, mixed and resampled on the way, in the memory of the result and a few blocks. Of several
    audio streams the first is read; of a chained file (Ogg, FLAC, MP3 put one after the other) all parts.

    The end is where the container states it in samples, `fact` in WAV included. Where nothing states it, or only
    times (FLV, NUT, ASF, the edit lists of MP4, which round to milliseconds), all that is decoded is given, with what
    fills up the last frame of a lossy codec, and `audio_info` says -1.

    Args:
        path: The file.
        sampling_rate: Resample to this rate in hertz (see `resample`); by default the file's own, the first one where
            it changes.
        mono: Average the channels.
        strict: A file that is cut short or broken in the middle is an error; else what is there is returned with a
            warning.

    Returns:
        Samples, float32 in [-1, 1], ``[num_samples]`` (``[channels, num_samples]`` with ``mono=False``), and their
        rate in hertz.

    Raises:
        AudioFileError: (a ValueError) that names the file and says what is wrong with it.
    """
    target = None if sampling_rate is None else whole("sampling_rate", sampling_rate, what=RATE)
    samples, rate, problem = _read(path, target, mono, strict)
    if problem is not None:
        warnings.warn(f"{_printable(os.fsdecode(path))}: {problem}", stacklevel=2)
    return samples, rate


@in_plain_torch
def _read(path: Any, target: int | None, mono: bool, strict: bool) -> tuple[Tensor, int, str | None]:
    source = _source(path)
    if strict and source.problem is not None:
        raise AudioFileError(path, source.problem)
    try:
        result = _best(source, target, mono, strict)
    except AudioFileError:
        raise
    except Exception as error:  # whatever a decoder may raise is a fault of this file
        reason = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        raise AudioFileError(path, reason) from error
    if result.problem is not None and (strict or not result.num_received):
        raise AudioFileError(path, _printable(result.problem))
    if not result.num_received:
        raise AudioFileError(path, "it holds no samples")
    return result.samples, result.rate, result.problem


@dataclass(frozen=True)
class AudioFiles:
    """Result of `read_audio_files`: one waveform a path, None where the file failed, and the failures."""

    waveforms: list[Tensor | None]
    failures: list[AudioFileError]


def read_audio_files(
    paths: Iterable[str | bytes | os.PathLike],
    *,
    sampling_rate: int,
    num_workers: int | None = None,
    progress: bool = False,
) -> AudioFiles:
    """Read many files to mono at one rate; those that fail are reported and the rest go on.

    Args:
        paths: The files.
        sampling_rate: In hertz.
        num_workers: Threads; decoding releases the GIL. Default: `torch.get_num_threads()`.
        progress: Show a progress bar.
    """
    from tqdm import tqdm

    rate = whole("sampling_rate", sampling_rate, what=RATE)

    def read(path: Any) -> Tensor | AudioFileError:
        try:
            return read_audio(path, sampling_rate=rate)[0]
        except AudioFileError as error:
            return error
        except Exception as error:  # one bad file of thousands must not end the run
            return AudioFileError(path, f"{type(error).__name__}: {error}")

    paths = list(paths)
    with ThreadPoolExecutor(num_workers or torch.get_num_threads()) as pool:
        results = list(tqdm(pool.map(read, paths), total=len(paths), unit="file", disable=not progress))
    return AudioFiles(
        [r if isinstance(r, Tensor) else None for r in results], [r for r in results if isinstance(r, AudioFileError)]
    )
