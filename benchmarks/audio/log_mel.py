"""Whisper's log-mel on real speech, against every peer that is installed."""

from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
import torch
import transformers

from mmlm_benchmarks.harness import Case
from mmlm_fast.audio import WhisperFeatureExtractor, log_mel_ref
from mmlm_fast.audio.log_mel import mel_filters
from mmlm_fast.data import load_speech
from mmlm_fast.testing import Difference

RATE = 16000
NUM_CLIPS = 16  # rotating, so that no clip stays in a cache


def speech(num_samples: int, num_clips: int = NUM_CLIPS) -> list[np.ndarray]:
    """Different clips of one length, cut from the three recordings put end to end."""
    tape = np.concatenate([s.waveform for s in load_speech()])
    tape = np.tile(tape, 2 + num_samples // len(tape))
    starts = np.linspace(0, len(tape) - num_samples, num_clips).astype(int)
    return [np.ascontiguousarray(tape[s : s + num_samples]) for s in starts]


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


def _difference(actual: object, exact: torch.Tensor, reference_error: float) -> Difference:
    tensor = torch.as_tensor(actual).double().reshape(exact.shape)
    return Difference((tensor - exact).norm().item(), reference_error, exact.norm().item())


def _check(num_samples: int | None) -> Callable:
    """Errors against float64; ours is held to transformers' own error, without a factor."""

    def check(providers: dict[str, Callable], args: tuple) -> dict[str, list[Difference]]:
        clips = args[0] if isinstance(args[0], list) else [args[0]]
        length = num_samples or max(map(len, clips))
        padded = torch.stack([torch.nn.functional.pad(torch.from_numpy(c), (0, length - len(c))) for c in clips])
        exact = log_mel_ref(padded.double())
        theirs = providers["transformers"](*args)
        allowed = (theirs.double() - exact).norm().item()
        return {p: [_difference(call(*args), exact, allowed)] for p, call in providers.items()}

    return check


def cases(device: str) -> list[Case]:
    """CPU only: what a serving front end or a DataLoader worker pays, one thread."""
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
