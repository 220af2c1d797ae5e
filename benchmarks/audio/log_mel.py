"""Whisper's log-mel on real speech, against every peer that is installed."""

import runpy
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import transformers

from mmlm_benchmarks.audio.speech import RATE, against_float64, speech
from mmlm_benchmarks.harness import Case
from mmlm_fast.audio import WhisperFeatureExtractor, log_mel, log_mel_ref
from mmlm_fast.audio.filters import mel_filters


def _after_mel(mel: torch.Tensor) -> torch.Tensor:
    log_spec = mel.clamp(min=1e-10).log10()
    return (torch.maximum(log_spec, log_spec.amax((-2, -1), keepdim=True) - 8) + 4) / 4


def blocked_numpy() -> Callable:
    """What a careful numpy user writes: float32 scipy FFT over blocks of frames that fit a cache."""
    from scipy.fft import rfft

    filters = np.ascontiguousarray(mel_filters(80), dtype=np.float32)
    window = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)).astype(np.float32)

    def call(x: np.ndarray) -> np.ndarray:
        padded = np.pad(x, 200, mode="reflect")
        frames = np.lib.stride_tricks.sliding_window_view(padded, 400)[::160][: len(x) // 160]
        out = np.empty((80, len(frames)), np.float32)
        for start in range(0, len(frames), 256):
            spectrum = rfft(frames[start : start + 256] * window, axis=-1)
            power = spectrum.real**2 + spectrum.imag**2
            out[:, start : start + 256] = np.log10(np.maximum(filters @ power.T, 1e-10))
        return (np.maximum(out, out.max() - 8) + 4) / 4

    return call


def peers() -> dict[str, Callable]:
    """Whisper features of one clip by other libraries; those that are installed."""
    found: dict[str, Callable] = {}
    if find_spec("whisper"):
        import whisper

        found["openai-whisper"] = lambda x: whisper.log_mel_spectrogram(torch.from_numpy(x))
    if (spec := find_spec("faster_whisper")) is not None and spec.origin is not None:
        # The file alone: the package imports what runs the model, too.
        path = Path(spec.origin).with_name("feature_extractor.py")
        theirs = runpy.run_path(str(path))["FeatureExtractor"]()
        found["faster-whisper"] = lambda x: theirs(x, padding=0)
    if find_spec("torchaudio"):
        import torchaudio

        transform = torchaudio.transforms.MelSpectrogram(
            RATE, 400, hop_length=160, n_mels=80, f_max=8000, norm="slaney", mel_scale="slaney"
        )
        found["torchaudio"] = lambda x: _after_mel(transform(torch.from_numpy(x))[..., :-1])
    if find_spec("scipy"):
        found["numpy + scipy, blocked"] = blocked_numpy()
    if find_spec("librosa"):
        import librosa

        def by_librosa(x: np.ndarray) -> np.ndarray:
            mel = librosa.feature.melspectrogram(
                y=x, sr=RATE, n_fft=400, hop_length=160, n_mels=80, fmax=8000, pad_mode="reflect"
            )[:, :-1]
            log_spec = np.log10(np.maximum(mel, 1e-10))
            return (np.maximum(log_spec, log_spec.max() - 8) + 4) / 4

        found["librosa"] = by_librosa
    return found


def extractor(cls: type, **call_options: object) -> Callable:
    instance = cls()
    return lambda x: instance(x, sampling_rate=RATE, return_tensors="pt", **call_options)["input_features"]


def _check(num_samples: int | None) -> Callable:
    """The clips are padded to num_samples, or to the longest."""

    def exact(clips: object) -> torch.Tensor:
        clips = clips if isinstance(clips, list) else [clips]
        length = num_samples or max(map(len, clips))
        padded = torch.stack([torch.nn.functional.pad(torch.from_numpy(c), (0, length - len(c))) for c in clips])
        return log_mel_ref(padded.double())

    return against_float64(exact, "transformers")


@cache
def _tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.hann_window(400, device=device), torch.from_numpy(np.array(mel_filters(80), np.float32)).to(device)


def stft_chain(x: torch.Tensor) -> torch.Tensor:
    """What transformers' torch path does, on the whole batch, with its tables at hand."""
    window, filters = _tables(x.device)
    power = torch.stft(x, 400, 160, window=window, return_complex=True)[..., :-1].abs() ** 2
    return _after_mel(filters @ power)


def _batched_cases(device: str, num_clips: int, seconds: int) -> list[Case]:
    """On the device. 64 clips of 30 s: 122 MB of float32 in, 61 MB out, 43 µs at 4.3 TB/s."""
    gpu = device == "cuda"

    @cache
    def clips() -> torch.Tensor:
        return torch.from_numpy(np.stack(speech(seconds * RATE, num_clips)))

    def integers(shift: int) -> torch.Tensor:
        rolled = (clips() * 32767).round().to(torch.int16).roll(shift, 0)
        return rolled.pin_memory() if gpu else rolled

    whisper = transformers.WhisperFeatureExtractor()

    def end_to_end(x: torch.Tensor) -> torch.Tensor:
        floats = [clip.numpy().astype(np.float32) / 32768 for clip in x]
        out = whisper(floats, sampling_rate=RATE, return_tensors="pt", device=device)["input_features"]
        return out.to(device)

    def close(providers: dict[str, Callable], args: tuple) -> dict:
        a, b = (call(*args).float().cpu() for call in providers.values())
        assert (a - b).abs().mean() < 1e-2
        return {}

    frames = seconds * RATE // 160
    return [
        Case(
            group="audio",
            name=f"log-mel on the device, {num_clips} clips of {seconds} s",
            shape_from="Whisper, 80 mel bins",
            inputs=lambda: [(clips().to(device).roll(i, 0),) for i in range(4)],
            providers={"torch.stft chain": stft_chain, "mmlm_fast": lambda x: log_mel(x)},
            check=close,
            bytes_moved=4 * num_clips * (seconds * RATE + 80 * frames),
            flops=num_clips * frames * 12200,
        ),
        Case(
            group="audio",
            name=f"log-mel from pinned int16 to bfloat16 on the device, {num_clips} clips of {seconds} s",
            shape_from="Whisper, 80 mel bins",
            inputs=lambda: [(integers(i), torch.empty(0, device=device)) for i in range(4)],
            providers={
                "transformers": lambda x, _: end_to_end(x),
                "mmlm_fast": lambda x, _: log_mel(x.to(device, non_blocking=True), dtype=torch.bfloat16),
            },
            check=close,
            bytes_moved=2 * num_clips * (seconds * RATE + 80 * frames),
            flops=num_clips * frames * 12200,
        ),
    ]


def cases(device: str, sizes: str | None = None) -> list[Case]:
    """On a CPU what a serving front end or a DataLoader worker pays, one thread; on CUDA the fused kernel."""
    if device == "cuda" or sizes == "tiny":
        return _batched_cases(device, *((2, 1) if sizes == "tiny" else (64, 30)))
    shared = {
        "group": "audio",
        "shape_from": "Whisper, 80 mel bins, one thread",
    }

    def one(name: str, num_samples: int, padded: int | None, others: dict[str, Callable], **options: object) -> Case:
        frames = (padded or num_samples) // 160
        return Case(
            name=name,
            inputs=lambda: [(clip,) for clip in speech(num_samples)],
            providers={
                "transformers": extractor(transformers.WhisperFeatureExtractor, **options),
                **others,
                "mmlm_fast": extractor(WhisperFeatureExtractor, **options),
            },
            check=_check(padded),
            bytes_moved=4 * (num_samples + 80 * frames),
            flops=12200 * (num_samples // 160),
            **shared,
        )

    def batch() -> list[tuple]:
        lengths = np.linspace(1, 19, 32) * RATE  # 320 s in all
        tape = speech(20 * RATE, 32)
        return [([clip[: int(n)] for clip, n in zip(tape, lengths[::step], strict=True)],) for step in (1, -1)]

    made = [
        one("log-mel, 30 s", 30 * RATE, None, peers(), padding="longest"),
        one("log-mel, 1 s", RATE, None, peers(), padding="longest"),
        one("log-mel, 10 s padded to 30 s (transformers' default)", 10 * RATE, 30 * RATE, {}),
        one("log-mel, 1 s padded to 30 s (transformers' default)", RATE, 30 * RATE, {}),
    ]
    for label, padded, options in (
        ("padded to the longest", None, {"padding": "longest"}),
        ("padded to 30 s", 30 * RATE, {}),
    ):
        made.append(
            Case(
                name=f"log-mel, batch of 32, 1 to 19 s, {label}",
                inputs=batch,
                providers={
                    "transformers": extractor(transformers.WhisperFeatureExtractor, **options),
                    "mmlm_fast": extractor(WhisperFeatureExtractor, **options),
                },
                check=_check(padded),
                bytes_moved=4 * (320 * RATE + 32 * 80 * ((padded or 19 * RATE) // 160)),
                flops=12200 * 32000,
                **shared,
            )
        )
    made.append(one("log-mel, 10 min", 600 * RATE, None, {}, padding="longest", truncation=False))
    return made
