"""From int16 stereo at 48 kHz to float mono at 16 kHz: conversion, mixing and resampling in one pass."""

from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
import torch

from mmlm_benchmarks.audio.speech import against_float64, speech
from mmlm_benchmarks.harness import OWN_FORMULA, Case
from mmlm_fast.audio import resample
from mmlm_fast.audio.resample_op import resample_ref


def _stereo(seconds: int) -> list[tuple]:
    clips = speech(seconds * 48000, 8)
    return [
        ((np.stack([a, b], 1) * 32767).astype(np.int16),) for a, b in zip(clips, clips[1:] + clips[:1], strict=True)
    ]


def _mono(x: np.ndarray) -> torch.Tensor:
    return (torch.from_numpy(x).float() / 32768).mean(1)


def cases(device: str) -> list[Case]:
    """CPU only, one thread."""
    if device != "cpu":
        return []
    providers: dict[str, Callable] = {}
    if find_spec("torchaudio"):
        import torchaudio

        transform = torchaudio.transforms.Resample(48000, 16000)
        providers["torchaudio"] = lambda x: transform(_mono(x))
    else:
        providers[OWN_FORMULA] = lambda x: resample_ref(_mono(x), 48000, 16000)
    if find_spec("soxr"):
        import soxr

        providers["soxr HQ"] = lambda x: soxr.resample(_mono(x).numpy(), 48000, 16000)
    first = next(iter(providers))
    providers["mmlm_fast"] = lambda x: resample(torch.from_numpy(x), 48000, 16000, channel_dim=1)

    def exact(x: np.ndarray) -> torch.Tensor:
        return resample_ref((torch.from_numpy(x).double() / 32768).mean(1), 48000, 16000)

    return [
        Case(
            group="audio",
            name="int16 stereo 48 kHz to mono 16 kHz, 30 s",
            shape_from="a file as it is decoded, one thread",
            inputs=lambda: _stereo(30),
            providers=providers,
            check=against_float64(exact, first, skip=("soxr HQ",)),  # another filter
            bytes_moved=30 * (48000 * 4 + 16000 * 4),
            flops=30 * 16000 * 41 * 2,
        )
    ]
