"""Kaldi's filter bank and MFCC of real speech, as functions and inside transformers' extractors."""

import importlib
import warnings
from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
import torch
import transformers

from mmlm_benchmarks.audio.speech import RATE, against_float64, speech
from mmlm_benchmarks.harness import OWN_FORMULA, Case
from mmlm_fast.audio import ParakeetFeatureExtractor, SeamlessM4TFeatureExtractor, kaldi_fbank, mfcc

SHAPE = "80 mel bins, 25 ms every 10 ms, one thread"


def _native_fbank(kind: str) -> Callable:
    import kaldi_native_fbank as knf

    def call(x: np.ndarray) -> np.ndarray:
        options = knf.FbankOptions() if kind == "fbank" else knf.MfccOptions()
        options.frame_opts.dither = 0
        options.mel_opts.num_bins = 80 if kind == "fbank" else 23
        online = (knf.OnlineFbank if kind == "fbank" else knf.OnlineMfcc)(options)
        online.accept_waveform(RATE, x)
        online.input_finished()
        return np.stack([online.get_frame(i) for i in range(online.num_frames_ready)])

    return call


def _lhotse() -> Callable:
    from lhotse.features import Fbank, FbankConfig

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own conventions for frame counts
        extractor = Fbank(FbankConfig(num_mel_bins=80, dither=0.0, snip_edges=True))
    return lambda x: extractor.extract(x, RATE)


def _peers(kind: str) -> dict[str, Callable]:
    found: dict[str, Callable] = {}
    if find_spec("torchaudio"):
        kaldi = importlib.import_module("torchaudio.compliance.kaldi")
        if kind == "fbank":
            found["torchaudio"] = lambda x: kaldi.fbank(torch.from_numpy(x)[None], num_mel_bins=80)
        else:
            found["torchaudio"] = lambda x: kaldi.mfcc(torch.from_numpy(x)[None])
    if find_spec("kaldi_native_fbank"):
        found["kaldi-native-fbank"] = _native_fbank(kind)
    if kind == "fbank" and find_spec("lhotse"):
        found["lhotse"] = _lhotse()
    if kind == "mfcc" and find_spec("librosa"):
        import librosa

        found["librosa"] = lambda x: librosa.feature.mfcc(y=x, sr=RATE, n_fft=512, hop_length=160, n_mfcc=13, n_mels=23)
    return found


def _plain() -> dict[str, Callable]:
    """What is compared with where no peer is installed: the reference in PyTorch."""
    from mmlm_fast import reference

    def call(x: np.ndarray) -> torch.Tensor:
        with reference():
            return kaldi_fbank(torch.from_numpy(x), num_mel_bins=80)

    return {OWN_FORMULA: call}


def _function(kind: str, seconds: int) -> Case | None:
    peers = _peers(kind) or (_plain() if kind == "fbank" else {})
    if not peers:
        return None
    ours = (
        (lambda x: kaldi_fbank(torch.from_numpy(x), num_mel_bins=80))
        if kind == "fbank"
        else (lambda x: mfcc(torch.from_numpy(x)))
    )

    def exact(x: np.ndarray) -> torch.Tensor:
        function = kaldi_fbank if kind == "fbank" else mfcc
        options = dict(num_mel_bins=80) if kind == "fbank" else {}
        return function(torch.from_numpy(x), dtype=torch.float64, **options)

    frames = 1 + (seconds * RATE - 400) // 160
    return Case(
        group="audio",
        name=f"Kaldi {'filter bank' if kind == 'fbank' else 'MFCC'}, {seconds} s",
        shape_from=SHAPE if kind == "fbank" else "13 coefficients of 23 mel bins, one thread",
        inputs=lambda: [(clip * 32768,) for clip in speech(seconds * RATE)],
        providers={**peers, "mmlm_fast": ours},
        check=against_float64(exact, next(iter(peers)), skip=("lhotse", "librosa")),
        bytes_moved=4 * (seconds * RATE + (80 if kind == "fbank" else 13) * frames),
        flops=13000 * frames,
    )


def _extractor(name: str, ours: type, theirs: type) -> Case:
    def close(providers: dict[str, Callable], args: tuple) -> dict:
        """Normalised features differ in bins that nearly cancel; tests/test_audio_extractors.py has the errors."""
        a, b = (np.asarray(call(*args)) for call in providers.values())
        assert a.shape == b.shape
        assert np.abs(a - b).mean() < 1e-4, np.abs(a - b).mean()
        return {}

    def call(cls: type) -> Callable:
        instance = cls()
        return lambda x: instance(x, sampling_rate=RATE, return_tensors="pt")["input_features"]

    return Case(
        group="audio",
        name=f"{name}, 30 s",
        shape_from=f"transformers' {theirs.__name__}, one thread",
        inputs=lambda: [(clip,) for clip in speech(30 * RATE)],
        providers={"transformers": call(theirs), "mmlm_fast": call(ours)},
        check=close,
        bytes_moved=4 * (30 * RATE + 80 * 3000),
        flops=13000 * 3000,
    )


def cases(device: str) -> list[Case]:
    """CPU only: what a serving front end or a DataLoader worker pays, one thread."""
    if device != "cpu":
        return []
    made = [_function("fbank", 30), _function("fbank", 1), _function("mfcc", 30)]
    made += [
        _extractor("SeamlessM4T (float64)", SeamlessM4TFeatureExtractor, transformers.SeamlessM4TFeatureExtractor),
        _extractor("Parakeet", ParakeetFeatureExtractor, transformers.ParakeetFeatureExtractor),
    ]
    return [case for case in made if case is not None]
