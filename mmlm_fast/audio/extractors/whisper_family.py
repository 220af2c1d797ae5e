"""Whisper's log-mel in the extractors of other models that use it."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmlm_fast.audio.extractors.shared import Original, features, is_cpu, num_frames, refuse_short
from mmlm_fast.audio.log_mel import WHISPER, below
from mmlm_fast.audio.spec import Framing, Spec, SpecError, spec_with_tables
from mmlm_fast.audio.tables import Table


@spec_with_tables
def whisper_spec(n_fft: int, hop_length: int, filters: Table, center: bool = True) -> Spec:
    """Return Whisper's features with an extractor's own sizes and filters; the last frame is dropped."""
    framing = Framing.centered(n_fft, n_fft, "reflect", 1) if center else Framing.inside(n_fft, n_fft, 1)
    sizes: dict[str, Any] = dict(n_fft=n_fft, frame_length=n_fft, hop_length=hop_length)
    return replace(WHISPER, **sizes, framing=framing, filters=filters, computed_in="float32")


class WhisperMixin(Original):
    """Whisper, Qwen3ASR, Dots3Note, MossTranscribeDiarize: log10, clipped to 8 below each clip's maximum."""

    n_fft: int
    hop_length: int
    dither: float
    mel_filters: Any

    def log_mel_spec(self) -> Spec:
        return whisper_spec(self.n_fft, self.hop_length, Table.of(self.mel_filters, transposed=True))

    def _torch_extract_fbank_features(self, waveform: np.ndarray, device: str = "cpu") -> np.ndarray:
        if self._takes_original("_torch_extract_fbank_features") or not is_cpu(device):
            return super()._torch_extract_fbank_features(waveform, device)
        refuse_short(waveform.shape[-1], self.n_fft // 2 + 1)
        samples = torch.from_numpy(np.ascontiguousarray(waveform)).float()
        if self.dither != 0.0:  # the same draw from the same generator as in the original
            samples = samples + self.dither * torch.randn(samples.shape, dtype=samples.dtype, device="cpu")
        spec = self.log_mel_spec()
        out = features(spec, samples, num_frames(spec, samples))
        return out.reshape(*samples.shape[:-1], *out.shape[1:])


def _limit_of(log_mel_max: Any) -> float:
    if not -300 <= float(log_mel_max) <= 300:
        raise SpecError(f"a limit of {log_mel_max} is for the original")
    return float(log_mel_max)


class VoxtralRealtimeMixin(Original):
    """log10, clipped to 8 below a constant."""

    def _torch_extract_fbank_features(self, waveform: Tensor, device: str = "cpu", center: bool = True) -> Tensor:
        if waveform.dim() > 2:
            raise ValueError(f"clips must be mono, [num_clips, num_samples], got shape {tuple(waveform.shape)}")
        rows = waveform if waveform.dim() > 1 else waveform[None]
        # Without a constant the original takes one maximum over the whole batch.
        over_all = self.global_log_mel_max is None and len(rows) > 1
        if over_all or self._takes_original("_torch_extract_fbank_features") or not is_cpu(device):
            return super()._torch_extract_fbank_features(waveform, device, center)
        refuse_short(waveform.shape[-1], self.n_fft // 2 + 1 if center else self.n_fft)
        spec = whisper_spec(self.n_fft, self.hop_length, Table.of(self.mel_filters, transposed=True), bool(center))
        if self.global_log_mel_max is not None:
            spec = below(spec, _limit_of(self.global_log_mel_max))
        out = torch.from_numpy(features(spec, waveform, num_frames(spec, waveform)))
        return out.reshape(*waveform.shape[:-1], *out.shape[1:])
