"""Reading audio files: soundfile for what libsndfile knows (WAV, FLAC, OGG, MP3, …), PyAV for the rest.

A file whose header promises more than it holds is an error of that file, never a shorter clip in silence.
"""

import os
import struct
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmlm_fast.audio.plain import in_plain_torch
from mmlm_fast.audio.resample import resample

NO_READER = "not a format that soundfile reads; PyAV may: pip install 'mmlm-fast[audio]'"


class AudioFileError(ValueError):
    """A file that cannot be read, is cut short or lies about itself; `path` says which, the message why."""

    def __init__(self, path: Any, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = str(path), reason

    def __reduce__(self) -> tuple:
        return type(self), (self.path, self.reason)


@dataclass(frozen=True)
class AudioInfo:
    sampling_rate: int
    num_channels: int
    num_samples: int  # a channel, as the header says; -1 where it does not
    codec: str


def _wav_problem(path: Path) -> str | None:
    """What is wrong with a RIFF file's sizes; libsndfile would shorten the clip without a word."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(12)
        if head[:4] not in (b"RIFF", b"RF64") or head[8:] != b"WAVE":
            return None
        while len(chunk := file.read(8)) == 8:
            name, length = chunk[:4], struct.unpack("<I", chunk[4:])[0]
            if name != b"data":
                file.seek(length + length % 2, os.SEEK_CUR)
                continue
            held = size - file.tell()
            # 0 and 2^32 - 1 are what programs write that do not know the length yet.
            if length not in (0, 0xFFFFFFFF) and length > held:
                return f"cut short: its header promises {length} bytes of samples, {held} are there"
            return None
        return "cut short: it has no data chunk"


def _with_soundfile(path: Path) -> tuple[Tensor, int, str | None] | None:
    """Samples ``[num_samples, channels]``, rate and problem; None where libsndfile does not know the format."""
    try:
        import soundfile
    except ImportError:
        return None
    try:
        with soundfile.SoundFile(path) as file:
            promised = file.frames
            # 16-bit files stay 16-bit: half of the memory, and the feature functions scale them.
            is_int16 = file.subtype == "PCM_16"
            data = file.read(dtype="int16" if is_int16 else "float32", always_2d=True)
            problem = None
            if len(data) < promised < 2**62:
                problem = f"cut short: its header promises {promised} samples, {len(data)} can be read"
            return torch.from_numpy(data), file.samplerate, problem
    except soundfile.LibsndfileError as error:
        if "unrecognised" in str(error) or "unknown format" in str(error) or "not recognised" in str(error):
            return None
        raise AudioFileError(path, str(error)) from error


def _with_av(path: Path) -> tuple[Tensor, int, str | None]:
    try:
        import av
    except ImportError:
        raise AudioFileError(
            path, "not a format that soundfile reads; PyAV may: pip install 'mmlm-fast[audio]'"
        ) from None
    problem = None
    try:
        with av.open(str(path)) as container:
            if not container.streams.audio:
                raise AudioFileError(path, "it has no audio stream")
            stream = container.streams.audio[0]
            promised = float(stream.duration * stream.time_base) if stream.duration and stream.time_base else None
            parts = []
            resampler = av.AudioResampler(format="fltp", layout=stream.layout, rate=stream.rate)
            try:
                for frame in container.decode(stream):
                    parts += [torch.from_numpy(f.to_ndarray()) for f in resampler.resample(frame)]
            except av.FFmpegError as error:
                problem = f"broken after {sum(p.shape[1] for p in parts)} samples: {error}"
            parts += [torch.from_numpy(f.to_ndarray()) for f in resampler.resample(None)]
            rate = stream.rate
    except (av.FFmpegError, OSError) as error:
        raise AudioFileError(path, f"cannot be decoded: {error}") from error
    samples = torch.cat(parts, 1).t() if parts else torch.empty(0, 1, dtype=torch.float32, device="cpu")
    if problem is None and promised is not None and len(samples) < (promised - 0.1) * rate:
        problem = f"cut short: its header promises {promised:.2f} s, {len(samples) / rate:.2f} s can be read"
    return samples, rate, problem


def _checked_path(path: str | os.PathLike) -> Path:
    path = Path(path)
    if not path.is_file():
        raise AudioFileError(path, "no such file" if not path.exists() else "not a file")
    if path.stat().st_size == 0:
        raise AudioFileError(path, "an empty file")
    return path


def audio_info(path: str | os.PathLike) -> AudioInfo:
    """Rate, channels and length of a file by its header, without decoding it. Raises `AudioFileError`."""
    path = _checked_path(path)
    try:
        import soundfile

        info = soundfile.info(path)
        return AudioInfo(info.samplerate, info.channels, info.frames, info.subtype)
    except ImportError:
        pass
    except soundfile.LibsndfileError:
        pass
    try:
        import av

        with av.open(str(path)) as container:
            stream = container.streams.audio[0]
            seconds = float(stream.duration * stream.time_base) if stream.duration and stream.time_base else None
            length = -1 if seconds is None else round(seconds * stream.rate)
            return AudioInfo(stream.rate, stream.channels, length, stream.codec_context.name)
    except ImportError:
        raise AudioFileError(
            path, "not a format that soundfile reads; PyAV may: pip install 'mmlm-fast[audio]'"
        ) from None
    except (av.FFmpegError, IndexError, OSError) as error:
        raise AudioFileError(path, f"cannot be read: {error or 'no audio stream'}") from error


@in_plain_torch
def read_audio(
    path: str | os.PathLike, *, sampling_rate: int | None = None, mono: bool = True, strict: bool = True
) -> tuple[Tensor, int]:
    """Read an audio file: WAV, FLAC, MP3, OGG and what else soundfile or PyAV decode.

    Args:
        path: The file.
        sampling_rate: Resample to this rate in hertz (see `resample`); by default the file's own.
        mono: Average the channels.
        strict: A file that is cut short or broken in the middle is an error; else what is there is returned with a
            warning.

    Returns:
        Samples, float32 in [-1, 1], ``[num_samples]`` (``[channels, num_samples]`` with ``mono=False``), and their
        rate in hertz.

    Raises:
        AudioFileError: (a ValueError) that names the file and says what is wrong with it.
    """
    path = _checked_path(path)
    if sampling_rate is not None and (not isinstance(sampling_rate, int) or sampling_rate < 1):
        raise ValueError(f"sampling_rate must be a positive whole number of hertz, got {sampling_rate!r}")
    samples, rate, problem = _with_soundfile(path) or _with_av(path)
    problem = _wav_problem(path) or problem
    if problem is not None:
        if strict:
            raise AudioFileError(path, problem)
        warnings.warn(f"{path}: {problem}", stacklevel=2)
    if len(samples) == 0:
        raise AudioFileError(path, "it holds no samples")
    if samples.is_floating_point() and not bool(samples.isfinite().all()):
        raise AudioFileError(path, "it holds NaN or infinite samples")
    target = rate if sampling_rate is None else sampling_rate
    if mono:
        return resample(samples, rate, target, channel_dim=1), target  # type: ignore[return-value]
    return resample(samples.t().contiguous(), rate, target), target  # type: ignore[return-value]


@dataclass(frozen=True)
class AudioFiles:
    """Result of `read_audio_files`: one waveform a path, None where the file failed, and the failures."""

    waveforms: list[Tensor | None]
    failures: list[AudioFileError]


def read_audio_files(
    paths: Iterable[str | os.PathLike], *, sampling_rate: int, num_workers: int | None = None, progress: bool = False
) -> AudioFiles:
    """Read many files to mono at one rate; those that fail are reported and the rest go on.

    Args:
        paths: The files.
        sampling_rate: In hertz.
        num_workers: Threads; decoding releases the GIL. Default: `torch.get_num_threads()`.
        progress: Show a progress bar.
    """
    from tqdm import tqdm

    def read(path: str | os.PathLike) -> Tensor | AudioFileError:
        try:
            return read_audio(path, sampling_rate=sampling_rate)[0]
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
