"""Extractors that compute with torch in float32 or float64: Lasr, Phi4Multimodal, Inkling."""

import torch
from torch import Tensor

from mmlm_fast.audio.extractors.shared import Original, features, is_cpu, num_frames, refuse_short
from mmlm_fast.audio.spec import Framing, Spec, Window, spec_with_tables
from mmlm_fast.audio.tables import Table


@spec_with_tables
def _lasr_spec(n_fft: int, win_length: int, hop_length: int, filters: Table) -> Spec:
    return Spec(
        n_fft=n_fft,
        frame_length=win_length,
        hop_length=hop_length,
        window=Window("hann", periodic=False),
        framing=Framing.snipped(win_length),
        filters=filters,
        floor=1e-5,
        log="natural",
        bins_first=False,
        dtype="float64",
    )


class LasrMixin(Original):
    """ln(max(mel, 1e-5)) in float64, only frames that fit."""

    def _torch_extract_fbank_features(self, waveform: Tensor, device: str = "cpu") -> Tensor:
        if self._takes_original("_torch_extract_fbank_features") or not is_cpu(device):
            return super()._torch_extract_fbank_features(waveform, device)
        refuse_short(waveform.shape[-1], self.win_length)
        filters = Table.of(self.mel_filters, transposed=True)
        spec = _lasr_spec(self.n_fft, self.win_length, self.hop_length, filters)
        return torch.from_numpy(features(spec, waveform, num_frames(spec, waveform)))


@spec_with_tables
def _phi4_spec(n_fft: int, win_length: int, hop_length: int, filters: Table, preemphasis: float) -> Spec:
    return Spec(
        n_fft=n_fft,
        frame_length=win_length,
        hop_length=hop_length,
        window=Window("hamming", periodic=False),
        framing=Framing.snipped(win_length),
        filters=filters,
        scale=32768.0,
        frame_preemphasis=preemphasis,
        round_spectrum=True,
        floor=1.0,
        log="natural",
        bins_first=False,
        computed_in="float64",
    )


class Phi4MultimodalMixin(Original):
    """ln(max(mel, 1)) of samples at 16-bit scale, pre-emphasised within each frame, in float64."""

    def _torch_extract_fbank_features(self, waveform: Tensor, audio_lengths: Tensor, device: str = "cpu") -> Tensor:
        if self._takes_original("_torch_extract_fbank_features") or not is_cpu(device):
            return super()._torch_extract_fbank_features(waveform, audio_lengths, device)
        refuse_short(waveform.shape[-1], self.win_length)
        filters = Table.of(self.mel_filters, transposed=True)
        spec = _phi4_spec(self.n_fft, self.win_length, self.hop_length, filters, float(self.preemphasis))
        out = torch.from_numpy(features(spec, waveform, num_frames(spec, waveform)))
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


@spec_with_tables
def _inkling_spec(n_fft: int, frame_length: int, hop_length: int, window: Table, filters: Table) -> Spec:
    # Frame t ends with sample (t + 1) * hop_length: as many frames as hops are begun.
    offset = (n_fft - frame_length) // 2 - max(n_fft - hop_length, 0)
    return Spec(
        n_fft=n_fft,
        frame_length=frame_length,
        hop_length=hop_length,
        window=window,
        framing=Framing(offset, hop_length - 1, hop_length, "zero"),
        filters=filters,
        exponent=1.0,
        power_floor=1e-10,
        floor=1e-10,
        log="decimal",
        bins_first=False,
        computed_in="float32",
    )


class InklingMixin(Original):
    """log10 of the mel magnitude, frames that end with each hop, zeros before."""

    def _torch_extract_fbank_features(self, waveform: Tensor, device: str = "cpu") -> Tensor:
        if self._takes_original("_torch_extract_fbank_features") or not is_cpu(device):
            return super()._torch_extract_fbank_features(waveform, device)
        sizes = self.n_fft, self.window_size, self.hop_length
        spec = _inkling_spec(*sizes, Table.of(self.window), Table.of(self.mel_filters))
        return torch.from_numpy(features(spec, waveform, num_frames(spec, waveform)))
