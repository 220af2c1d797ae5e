"""Audio features: functions on tensors, streams, and drop-ins for the feature extractors of transformers."""

from typing import Any

from mmlm_fast.audio.files import AudioFileError, audio_info, read_audio, read_audio_files
from mmlm_fast.audio.kaldi import kaldi_fbank, mfcc
from mmlm_fast.audio.log_mel import log_mel, log_mel_ref
from mmlm_fast.audio.mel_spectrogram import mel_mfcc, mel_spectrogram, spectrogram
from mmlm_fast.audio.nemo import nemo_log_mel, standardize
from mmlm_fast.audio.resample import resample
from mmlm_fast.audio.streaming import StreamingFbank, StreamingLogMel, StreamingMfcc, StreamingResample

__all__ = [
    "AudioFileError",
    "StreamingFbank",
    "StreamingLogMel",
    "StreamingMfcc",
    "StreamingResample",
    "audio_info",
    "kaldi_fbank",
    "log_mel",
    "log_mel_ref",
    "mel_mfcc",
    "mel_spectrogram",
    "mfcc",
    "nemo_log_mel",
    "read_audio",
    "read_audio_files",
    "resample",
    "spectrogram",
    "standardize",
]


def __getattr__(name: str) -> Any:
    # Importing transformers takes seconds: only who asks for a drop-in pays.
    if name.endswith("FeatureExtractor"):
        from mmlm_fast.audio.extractors import EXTRACTORS, drop_in

        if name in EXTRACTORS:
            return drop_in(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    from mmlm_fast.audio.extractors import EXTRACTORS

    return sorted([*__all__, *EXTRACTORS])
