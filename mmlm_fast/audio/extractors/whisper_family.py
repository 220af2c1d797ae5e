"""Whisper's log-mel in the extractors of other models that use it."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmlm_fast import _C
from mmlm_fast.audio.extractors.plans import Framing, Original, as_filters, cached_plan, features, is_cpu, refuse_short
from mmlm_fast.audio.filters import window_of
from mmlm_fast.audio.log_mel import DYNAMIC_RANGE, whisper_options


class WhisperMixin(Original):
    """Whisper, Qwen3ASR, Dots3Note, MossTranscribeDiarize: log10, clipped to 8 below each clip's maximum."""

    n_fft: int
    hop_length: int
    dither: float
    mel_filters: Any

    def log_mel_plan(self) -> "_C.SpectralPlan":
        framing = Framing(self.n_fft, self.hop_length, self.n_fft)

        def make() -> "_C.SpectralPlan":
            options = whisper_options() | framing.centred("reflect")[0] | framing.options()
            options["dynamic_range"] = DYNAMIC_RANGE / 4
            return _C.SpectralPlan(options, window_of("hann", self.n_fft), as_filters(self.mel_filters))

        return cached_plan(("whisper", framing), [self.mel_filters], make)

    def _torch_extract_fbank_features(self, waveform: np.ndarray, device: str = "cpu") -> np.ndarray:
        if self._takes_original("_torch_extract_fbank_features") or not is_cpu(device):
            return super()._torch_extract_fbank_features(waveform, device)
        refuse_short(waveform.shape[-1], self.n_fft // 2 + 1)
        samples = torch.from_numpy(np.ascontiguousarray(waveform)).float()
        if self.dither != 0.0:  # the same draw from the same generator as in the original
            samples = samples + self.dither * torch.randn(samples.shape, dtype=samples.dtype, device="cpu")
        frames = samples.shape[-1] // self.hop_length if self.n_fft % 2 == 0 else -1
        if frames < 0:  # an odd transform has another last frame
            frames = (samples.shape[-1] - 1) // self.hop_length
        out = features(self.log_mel_plan(), samples, frames, bins_first=True)
        return out.reshape(*samples.shape[:-1], *out.shape[1:])


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
        framing = Framing(self.n_fft, self.hop_length, self.n_fft)
        options, num_frames = framing.centred("reflect") if center else framing.whole()
        refuse_short(waveform.shape[-1], self.n_fft // 2 + 1 if center else self.n_fft)

        def make() -> "_C.SpectralPlan":
            limit = self.global_log_mel_max
            floor = 1e-10 if limit is None else max(1e-10, 10.0 ** (limit - DYNAMIC_RANGE))
            all_options = whisper_options(floor) | options | framing.options()
            if limit is None:
                all_options["dynamic_range"] = DYNAMIC_RANGE / 4
            return _C.SpectralPlan(all_options, window_of("hann", self.n_fft), as_filters(self.mel_filters))

        plan = cached_plan(("voxtral", framing, center, self.global_log_mel_max), [self.mel_filters], make)
        frames = num_frames(waveform.shape[-1]) - 1  # the last one is dropped
        out = torch.from_numpy(features(plan, waveform, frames, bins_first=True))
        return out.reshape(*waveform.shape[:-1], *out.shape[1:])
