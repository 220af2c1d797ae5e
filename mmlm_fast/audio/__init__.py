"""Audio features: functions on tensors and arrays, streams, and drop-ins for the feature extractors of transformers.

On arrays the functions and streams need numpy alone; see `mmlm_fast.audio.np`. With torch loaded, their ops are
registered.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from mmlm_fast.audio.kaldi import kaldi_fbank, kaldi_mfcc, mfcc
from mmlm_fast.audio.log_mel import log_mel, log_mel_ref
from mmlm_fast.audio.mel_spectrogram import mel_mfcc, mel_spectrogram, spectrogram
from mmlm_fast.audio.nemo import nemo_log_mel
from mmlm_fast.audio.resample import resample
from mmlm_fast.audio.standardize import standardize
from mmlm_fast.audio.streaming import StreamingFbank, StreamingLogMel, StreamingMfcc, StreamingResample

if TYPE_CHECKING:
    from mmlm_fast.audio.files import AudioFileError, audio_info, read_audio, read_audio_files

if hasattr(sys.modules.get("torch"), "compile"):  # what an exported graph asks for; later: mmlm_fast/_registration.py
    import mmlm_fast.audio.spectral  # noqa: F401

__all__ = [
    "AudioFileError",
    "StreamingFbank",
    "StreamingLogMel",
    "StreamingMfcc",
    "StreamingResample",
    "audio_info",
    "kaldi_fbank",
    "kaldi_mfcc",
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
_OF_FILES = ("AudioFileError", "audio_info", "read_audio", "read_audio_files")


def __getattr__(name: str) -> Any:
    if name in _OF_FILES or name.endswith("FeatureExtractor"):
        import_module("torch")  # first: see mmlm_fast/_registration.py
    if name in _OF_FILES:  # files become tensors
        from mmlm_fast.audio import files

        return getattr(files, name)
    # Importing transformers takes seconds: only who asks for a drop-in pays.
    if name.endswith("FeatureExtractor"):
        from mmlm_fast.audio.extractors import EXTRACTORS, drop_in

        if name in EXTRACTORS:
            return drop_in(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    from mmlm_fast.audio.extractors import EXTRACTORS

    return sorted([*__all__, *EXTRACTORS])
