"""Extractors that compute with torch in float32 or float64: Lasr, Phi4Multimodal, Inkling."""

import math

import numpy as np
import torch
from torch import Tensor

from mmlm_fast import _C
from mmlm_fast.audio.extractors.plans import (
    AS_NUMPY,
    FLOAT64_OUT,
    Framing,
    Original,
    as_filters,
    cached_plan,
    features,
    is_cpu,
    refuse_short,
)
from mmlm_fast.audio.filters import window_of


class LasrMixin(Original):
    """ln(max(mel, 1e-5)) in float64, only frames that fit."""

    def _torch_extract_fbank_features(self, waveform: Tensor, device: str = "cpu") -> Tensor:
        if self._takes_original("_torch_extract_fbank_features") or not is_cpu(device):
            return super()._torch_extract_fbank_features(waveform, device)
        refuse_short(waveform.shape[-1], self.win_length)
        framing = Framing(self.win_length, self.hop_length, self.n_fft)
        options, num_frames = framing.whole(self.win_length)

        def make() -> "_C.SpectralPlan":
            all_options = options | framing.options() | FLOAT64_OUT | dict(log="natural", floor=1e-5, bins_first=False)
            window = window_of("hann", self.win_length, False)
            return _C.SpectralPlan(all_options, window, as_filters(self.mel_filters))

        plan = cached_plan(("lasr", framing), [self.mel_filters], make)
        frames = num_frames(waveform.shape[-1])
        return torch.from_numpy(features(plan, waveform, frames, bins_first=False, dtype=np.float64))


class Phi4MultimodalMixin(Original):
    """ln(max(mel, 1)) of samples at 16-bit scale, pre-emphasised within each frame, in float64."""

    def _torch_extract_fbank_features(self, waveform: Tensor, audio_lengths: Tensor, device: str = "cpu") -> Tensor:
        if self._takes_original("_torch_extract_fbank_features") or not is_cpu(device):
            return super()._torch_extract_fbank_features(waveform, audio_lengths, device)
        refuse_short(waveform.shape[-1], self.win_length)
        framing = Framing(self.win_length, self.hop_length, self.n_fft)
        options, num_frames = framing.whole(self.win_length)

        def make() -> "_C.SpectralPlan":
            all_options = options | framing.options() | AS_NUMPY | dict(log="natural", floor=1.0, bins_first=False)
            all_options |= dict(frame_preemphasis=self.preemphasis, scale=32768.0)
            window = window_of("hamming", self.win_length, False)
            return _C.SpectralPlan(all_options, window, as_filters(self.mel_filters))

        plan = cached_plan(("phi4", framing, self.preemphasis), [self.mel_filters], make)
        out = torch.from_numpy(features(plan, waveform, num_frames(waveform.shape[-1]), bins_first=False))
        # In a batch the original zeroes the frames of shorter clips that see both the clip and its padding, in a range
        # that depends on all of them; a frame of zeros is ln(1).
        shorter = torch.arange(len(out), device="cpu")[audio_lengths != audio_lengths.max()]
        if len(out) > 1 and shorter.numel() > 0:
            down = (audio_lengths[shorter] - self.win_length) // self.hop_length + 1
            up = audio_lengths[shorter] // self.hop_length - 1
            first, last = int(down.min()), int(up.max())
            index = torch.arange(last - first, device="cpu")
            mask = ((down - first)[:, None] <= index) & (index < (up - first)[:, None])
            out[shorter, first:last] = out[shorter, first:last].masked_fill(mask[..., None], 0)
        return out


class InklingMixin(Original):
    """log10 of the mel magnitude, frames that end with each hop, zeros before."""

    def _torch_extract_fbank_features(self, waveform: Tensor, device: str = "cpu") -> Tensor:
        if self._takes_original("_torch_extract_fbank_features") or not is_cpu(device):
            return super()._torch_extract_fbank_features(waveform, device)
        framing = Framing(self.window_size, self.hop_length, self.n_fft)
        left = max(self.n_fft - self.hop_length, 0)

        def make() -> "_C.SpectralPlan":
            options = framing.options() | dict(exponent=1.0, power_floor=1e-10, log="decimal", floor=1e-10)
            options |= dict(edge="zero", offset=(self.n_fft - self.window_size) // 2 - left, bins_first=False)
            return _C.SpectralPlan(options, self.window.double().numpy(), self.mel_filters.double().numpy())

        plan = cached_plan(("inkling", framing), [self.mel_filters, self.window], make)
        padded = left + math.ceil(waveform.shape[-1] / self.hop_length) * self.hop_length
        frames = max(0, (padded - self.n_fft) // self.hop_length + 1)
        return torch.from_numpy(features(plan, waveform, frames, bins_first=False))
