"""The two decoders of audio files, soundfile and PyAV, as one kind of reader that gives blocks until the file ends."""

import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np

BLOCK = 1 << 21  # samples of all channels; with 2^19 an hour of FLAC took an eighth longer
AV_BLOCK = 1 << 18
HEADROOM = 4096
HINT = "pip install '.[audio]' in a checkout, or 'mmlm-fast[audio]'"
# Containers whose header states how long a stream is; PyAV gives an estimate from the bit rate for others.
_STATES_DURATION = {"mov", "asf", "ape", "wv", "tta"}
# Of these, by the timestamp of the last packet, which is no number of samples.
_BY_TIME = {"asf", "flv", "nut"}
_STATES_DURATION_OF_ALL = {"flv", "nut"}  # of the longest stream
# Codecs with a checksum of each frame, which FFmpeg looks at when asked.
_CHECKED = {"flac", "wavpack", "tta"}


def is_lossless(codec: str) -> bool:
    """Whether PyAV's decoder of this name gives all samples, and no more."""
    return codec.startswith("pcm_") or codec in {"flac", "wavpack", "tta", "alac", "ape"}


class DecoderError(Exception):
    """What a decoder says of a file; blocks given before are good. The first fault is behind `after` samples."""

    def __init__(self, words: str, after: int = 0) -> None:
        super().__init__(words)
        self.after = after


@dataclass(frozen=True)
class Block:
    """Samples ``[n, channels]``, with room before them for `HEADROOM` others; good until the second block after it."""

    room: np.ndarray
    length: int
    sampling_rate: int

    @property
    def samples(self) -> np.ndarray:
        return self.room[HEADROOM : HEADROOM + self.length]


class _Rooms:
    """Two rooms for blocks in turn: memory that is touched anew for every block costs more than decoding WAV."""

    def __init__(self) -> None:
        self._rooms: list[np.ndarray] = []

    def next(self, count: int, channels: int, dtype: Any) -> np.ndarray:
        if self._rooms and self._rooms[0].shape == (HEADROOM + count, channels) and self._rooms[0].dtype == dtype:
            if len(self._rooms) == 2:
                self._rooms.reverse()
                return self._rooms[1]
        else:
            self._rooms = []
        self._rooms.append(np.empty((HEADROOM + count, channels), dtype))
        return self._rooms[-1]


class Reader(Protocol):
    sampling_rate: int
    num_channels: int
    codec: str
    num_samples: int  # what it counts on a channel, -1 where it does not know
    estimate: int  # the same, guessed where it does not know
    is_by_time: bool  # what it counts is by timestamps: no fewer samples, but not that many

    def blocks(self, size: int) -> Iterator[Block]:
        """Samples to the end of the file, about `size` of all channels in a block."""

    def close(self) -> None: ...


@dataclass(frozen=True)
class Part:
    """Bytes [start, end) of a file, at one place other ones than there are."""

    start: int
    end: int
    patch: tuple[int, bytes] | None = None


class _PartOfFile(io.RawIOBase):
    def __init__(self, path: bytes, part: Part) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115
        self._start, self._size, self._place = part.start, part.end - part.start, 0
        self._patch = part.patch

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = max(offset + (0, self._place, self._size)[whence], 0)
        return self._place

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._place)
        held = self._file.read(max(0, min(len(buffer), self._size - self._place)))
        if self._patch is not None:
            held = self._patched(bytearray(held), self._start + self._place, *self._patch)
        buffer[: len(held)] = held
        self._place += len(held)
        return len(held)

    @staticmethod
    def _patched(held: bytearray, begin: int, place: int, new: bytes) -> bytearray:
        for i, byte in enumerate(new, place - begin):
            if 0 <= i < len(held):
                held[i] = byte
        return held

    def write(self, data: Any) -> int:  # soundfile asks for the method, and never calls it when reading
        raise io.UnsupportedOperation("not writable")

    def close(self) -> None:
        self._file.close()
        super().close()


@lru_cache(maxsize=1)
def _soundfile_class() -> Any:
    import soundfile

    class File(soundfile.SoundFile):
        def seekable(self) -> bool:
            # soundfile seeks to where it is after every read of a file that can seek, which decoders of telephone
            # codecs cannot and those of lossy codecs do by decoding again.
            return False

    return File


class SoundfileReader:
    def __init__(self, path: bytes, part: Part | None) -> None:
        import soundfile

        self._source = _PartOfFile(path, part) if part else None
        self._error = soundfile.LibsndfileError
        try:
            file = _soundfile_class()(self._source or _named(path))
        except self._error as error:
            raise DecoderError(_soundfile_words(error)) from error
        self._file = file
        self.sampling_rate, self.num_channels, self.codec = file.samplerate, file.channels, file.subtype
        self.num_samples = self.estimate = file.frames if file.frames < 2**62 else -1
        self.is_by_time = False

    def blocks(self, size: int) -> Iterator[Block]:
        # 16-bit files stay 16-bit: half of the memory, and what mixes and resamples them scales them.
        dtype = np.int16 if self.codec == "PCM_16" else np.float32
        count = max(size // self.num_channels, 1)
        if 0 <= self.num_samples < count:
            count = self.num_samples + 1  # one more than there is: a short read is the end
        rooms = _Rooms()
        while True:
            room = rooms.next(count, self.num_channels, dtype)
            try:
                got = len(self._file.read(out=room[HEADROOM:]))
            except (self._error, RuntimeError) as error:
                raise DecoderError(_soundfile_words(error)) from error
            if got:
                yield Block(room, got, self.sampling_rate)
            if got < count:
                return

    def close(self) -> None:
        self._file.close()
        if self._source is not None:
            self._source.close()


def _named(path: bytes) -> Any:
    """What soundfile opens; of a name that ends in .raw it would ask what kind of samples there are."""
    if path[-4:].lower() == b".raw":
        return os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    return path if os.name == "posix" else os.fsdecode(path)


def _soundfile_words(error: Exception) -> str:
    words = getattr(error, "error_string", str(error)).strip(" :.") or str(error)
    return f"{words or 'libsndfile gives no reason'} (soundfile)"


class AvReader:
    def __init__(self, path: bytes, part: Part | None) -> None:
        import av

        self._av = av
        self._source: Any = _PartOfFile(path, part) if part else None
        try:
            name = os.path.abspath(path).decode()  # absolute: 'a:b.wav' alone would name a protocol
        except UnicodeDecodeError:
            self._source = self._source or open(path, "rb")  # noqa: SIM115
            name = ""
        try:
            # tags that are not UTF-8; from 19 on PyAV takes them as they are, and no such option
            options: Any = {"metadata_errors": "ignore"} if int(av.__version__.partition(".")[0]) < 19 else {}
            self._container = av.open(self._source or name, **options)
            try:
                self._start()
            except BaseException:
                self._container.close()
                raise
        except (av.FFmpegError, OSError, ValueError) as error:
            raise DecoderError(_av_words(error)) from error

    def _start(self) -> None:
        if not self._container.streams.audio:
            raise DecoderError("it has no audio stream")
        self._stream = stream = self._container.streams.audio[0]
        context = stream.codec_context
        if context is None:
            raise DecoderError("its codec is not known (PyAV)")
        self.codec = context.name
        if self.codec in _CHECKED:
            context.options = {"err_detect": "crccheck+explode"}
        if self.codec == "alac":  # its last packet holds what there is; FFmpeg takes a CAF file's padding off it again
            context.options = {"flags2": "+skip_manual"}
        self._num_bad, self._words, self._num_given, self._after = 0, "", 0, 0
        # The first frame knows what a header may have wrong: the rate and channels of HE-AAC.
        self._frames = self._decode()
        self._first = next(self._frames, None)
        if self._first is not None:
            self.sampling_rate, self.num_channels = self._first.sample_rate, self._first.layout.nb_channels
        elif self._num_bad:
            raise DecoderError(f"cannot be decoded: {self._words} (PyAV)")
        else:
            self.sampling_rate, self.num_channels = stream.rate, stream.channels
        self.num_samples = -1
        container = self._container.format.name.split(",")[0]
        # An edit list is in milliseconds, mostly; FFmpeg applies its beginning and gives the last frame whole.
        is_edited = container == "mov" and not is_lossless(self.codec)
        self.is_by_time = container in _BY_TIME or is_edited
        if stream.duration and stream.time_base and container in _STATES_DURATION:
            self.num_samples = round(float(stream.duration * stream.time_base) * self.sampling_rate)
        seconds = (self._container.duration or 0) / self._av.time_base
        self.estimate = max(self.num_samples, round(seconds * self.sampling_rate))
        if self._container.format.name in _STATES_DURATION_OF_ALL and len(self._container.streams) == 1:
            self.num_samples = self.estimate

    def _decode(self) -> Iterator[Any]:
        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets, None)
            except self._av.FFmpegError as error:
                self._note(error)
                return
            if packet is None:
                return
            try:
                yield from packet.decode()
            except self._av.EOFError:
                return
            except (self._av.FFmpegError, ValueError) as error:  # what comes after it may be whole
                self._note(error)

    def _note(self, error: Exception) -> None:
        if not self._num_bad:
            self._words, self._after = f"{_av_words(error)}, after {self._num_given} samples", self._num_given
        self._num_bad += 1

    def blocks(self, size: int) -> Iterator[Block]:
        size = min(size, AV_BLOCK)
        rooms, block = _Rooms(), None
        frame = self._first
        while frame is not None:
            samples, rate = _samples_of(frame), frame.sample_rate
            while len(samples):
                if block is not None and (
                    block.sampling_rate != rate
                    or block.room.shape[1] != samples.shape[1]
                    or block.room.dtype != samples.dtype
                    or HEADROOM + block.length == len(block.room)
                ):
                    yield block
                    block = None
                if block is None:
                    room = rooms.next(max(size // samples.shape[1], 1), samples.shape[1], samples.dtype)
                    block = Block(room, 0, rate)
                begin = HEADROOM + block.length
                count = min(len(samples), len(block.room) - begin)
                block.room[begin : begin + count] = samples[:count]
                block = replace(block, length=block.length + count)
                samples = samples[count:]
                self._num_given += count
            self._first = None
            frame = next(self._frames, None)
        if block is not None:
            yield block
        if self._num_bad:
            raise DecoderError(f"broken in {self._num_bad} places: {self._words} (PyAV)", self._after)

    def close(self) -> None:
        self._container.close()
        if self._source is not None:
            self._source.close()


def _av_words(error: Exception) -> str:
    words = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return f"{words} (PyAV)" if "(PyAV)" not in words else words


def _samples_of(frame: Any) -> np.ndarray:
    """``[n, channels]`` of a frame of PyAV, integers as int16 or int32."""
    # Of 8 planes PyAV counts 9 and reads beyond them, of more it gives 8.
    if frame.format.is_planar and frame.layout.nb_channels >= 8:
        from av import AudioResampler

        convert = AudioResampler(format=frame.format.packed.name, layout=frame.layout, rate=frame.sample_rate)
        (frame,) = convert.resample(frame)
    array = frame.to_ndarray()
    array = array.T if frame.format.is_planar else array.reshape(frame.samples, -1)
    if array.dtype == np.uint8:
        return (array.astype(np.int16) - 128) << 8
    return array if array.dtype in (np.int16, np.int32) else array.astype(np.float32, copy=False)


_READERS: dict[str, tuple[str, Callable[[bytes, Part | None], Reader]]] = {
    "soundfile": ("soundfile", SoundfileReader),
    "PyAV": ("av", AvReader),
}
DECODERS = list(_READERS)  # the preferred one first


def lacking() -> str:
    """Which decoders are not installed and what to do about it, in words; empty where both are."""
    names = [f"{name} (av)" if name == "PyAV" else name for name in DECODERS if not is_there(name)]
    return f"{' and '.join(names)} {'are' if len(names) > 1 else 'is'} not installed: {HINT}" if names else ""


def is_there(name: str) -> bool:
    try:
        return find_spec(_READERS[name][0]) is not None
    except (ImportError, ValueError):  # None in sys.modules
        return False


def opened(name: str, path: bytes, part: Part | None) -> Reader:
    """Open a file, or a part of it, with a decoder. Raises `DecoderError`, and ImportError where it is not there."""
    try:
        return _READERS[name][1](path, part)
    except DecoderError:
        raise
    except Exception as error:
        if isinstance(error, ImportError) and not is_there(name):
            raise
        raise DecoderError(f"{type(error).__name__}: {error} ({name})") from error


def blocks_of(reader: Reader, size: int) -> Iterator[Block]:
    """The reader's blocks. Raises `DecoderError` for whatever a decoder raises."""
    try:
        yield from reader.blocks(size)
    except DecoderError:
        raise
    except Exception as error:
        raise DecoderError(f"{type(error).__name__}: {error}") from error
