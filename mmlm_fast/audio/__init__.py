"""Audio features: functions on tensors, and drop-ins for the feature extractors of transformers."""

from typing import TYPE_CHECKING, Any

from mmlm_fast.audio.log_mel import log_mel, log_mel_ref

if TYPE_CHECKING:
    from mmlm_fast.audio.whisper import WhisperFeatureExtractor

__all__ = ["WhisperFeatureExtractor", "log_mel", "log_mel_ref"]


def __getattr__(name: str) -> Any:
    # Importing transformers takes seconds: only who asks for a drop-in pays.
    if name == "WhisperFeatureExtractor":
        from mmlm_fast.audio.whisper import WhisperFeatureExtractor

        return WhisperFeatureExtractor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
