"""Mel spectrograms of music-sized transforms, and the float64 mode against transformers' numpy paths."""

from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
import torch
import transformers

from mmlm_benchmarks.audio.speech import RATE, against_float64, speech
from mmlm_benchmarks.harness import OWN_FORMULA, Case
from mmlm_fast import reference
from mmlm_fast.audio import log_mel, mel_spectrogram

SIZE = dict(sample_rate=22050, n_fft=2048, hop_length=512)


def _like_torchaudio(x: np.ndarray) -> torch.Tensor:
    return mel_spectrogram(torch.from_numpy(x), **SIZE)


def _torchaudio() -> Callable:
    if not find_spec("torchaudio"):

        def by_reference(x: np.ndarray) -> torch.Tensor:
            with reference():
                return _like_torchaudio(x)

        return by_reference
    import torchaudio

    transform = torchaudio.transforms.MelSpectrogram(22050, 2048, hop_length=512)
    return lambda x: transform(torch.from_numpy(x))


def cases(device: str) -> list[Case]:
    """CPU only, one thread."""
    if device != "cpu":
        return []
    shared = dict(
        group="audio",
        shape_from="2048-point transform every 512 samples, 128 mel bins, one thread",
        inputs=lambda: [(clip,) for clip in speech(30 * RATE)],
        bytes_moved=4 * (30 * RATE + 128 * 938),
        flops=75000 * 938,
    )
    first = "torchaudio" if find_spec("torchaudio") else OWN_FORMULA
    made = [
        Case(
            name="mel spectrogram 2048, 30 s",
            providers={first: _torchaudio(), "mmlm_fast": _like_torchaudio},
            # Two float32 transforms: which errs less by a few hundredths depends on the clip.
            check=lambda providers, args: {
                name: [
                    found[0]
                    if name != "mmlm_fast"
                    else type(found[0])(found[0].error, 1.05 * found[0].allowed, found[0].scale)
                ]
                for name, found in against_float64(
                    lambda x: mel_spectrogram(torch.from_numpy(x), dtype=torch.float64, **SIZE), first
                )(providers, args).items()
            },
            **shared,
        )
    ]
    if find_spec("librosa"):
        import librosa

        for label, dtype in (("float32", torch.float32), ("float64, librosa's own precision", torch.float64)):
            made.append(
                Case(
                    name=f"mel spectrogram 2048 as librosa's, 30 s, {label}",
                    providers={
                        "librosa": lambda x: librosa.feature.melspectrogram(y=x),
                        "mmlm_fast": lambda x, dtype=dtype: mel_spectrogram(
                            torch.from_numpy(x), convention="librosa", dtype=dtype
                        ),
                    },
                    check=_librosa_check(factor=1.0 if dtype == torch.float64 else 2.0),
                    **shared,
                )
            )
    made.append(_whisper_float64())
    return made


def _librosa_check(factor: float) -> Callable:
    """librosa transforms in float64: ours in float32 errs more than it (allowed: twice), in float64 less."""

    def check(providers: dict[str, Callable], args: tuple) -> dict:
        import librosa

        exact = torch.from_numpy(librosa.feature.melspectrogram(y=args[0].astype(np.float64)))
        found = against_float64(lambda x: exact, "librosa")(providers, args)
        ours = found["mmlm_fast"][0]
        return found | {"mmlm_fast": [type(ours)(ours.error, factor * ours.allowed, ours.scale)]}

    return check


def _whisper_float64() -> Case:
    extractor = transformers.WhisperFeatureExtractor()

    def exact(x: np.ndarray) -> torch.Tensor:
        return log_mel(torch.from_numpy(x), dtype=torch.float64)

    return Case(
        group="audio",
        name="log-mel in float64, 30 s",
        shape_from="Whisper's numpy path, 80 mel bins, one thread",
        inputs=lambda: [(clip,) for clip in speech(30 * RATE)],
        providers={
            "transformers, numpy": lambda x: extractor._np_extract_fbank_features(x[None], "cpu"),
            "mmlm_fast": lambda x: log_mel(torch.from_numpy(x), dtype=torch.float64),
        },
        check=against_float64(exact, "transformers, numpy"),
        bytes_moved=4 * 30 * RATE + 8 * 80 * 3000,
        flops=12200 * 3000,
    )
