"""NeMo's log-mel: Parakeet, CohereAsr, NemotronAsrStreaming."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmlm_fast.audio.extractors.shared import (
    Original,
    check_rate,
    check_settings,
    features,
    is_cpu,
    mono_clips,
    num_frames,
    pads_to_longest,
    refuse_short,
    rounded_up,
)
from mmlm_fast.audio.features import run_rows
from mmlm_fast.audio.filters import window_of
from mmlm_fast.audio.nemo import EPSILON, NEMO
from mmlm_fast.audio.spec import Framing, Spec, Window, prepared, spec_with_tables
from mmlm_fast.audio.standardize import standardize_in_place
from mmlm_fast.audio.tables import Table


@spec_with_tables
def _spec(
    n_fft: int,
    win_length: int,
    hop_length: int,
    window: Window | Table,
    filters: Table,
    preemphasis: float,
    center: bool,
) -> Spec:
    framing = Framing.centered(n_fft, win_length, "zero") if center else Framing.inside(n_fft, win_length)
    return replace(
        NEMO,
        n_fft=n_fft,
        frame_length=win_length,
        hop_length=hop_length,
        window=window,
        framing=framing,
        filters=filters,
        signal_preemphasis=preemphasis,
        computed_in="float32",
    )


class ParakeetMixin(Original):
    """NeMo's: Parakeet, CohereAsr, NemotronAsrStreaming. ln(mel + 2^-24), centred among zeros."""

    mel_filters_dtype = "float32"  # Nemotron can round its tables to bfloat16

    def _torch_extract_fbank_features(self, waveform: Tensor, device: str = "cpu", center: bool = True) -> Tensor:
        if self._takes_original("_torch_extract_fbank_features") or not is_cpu(device):
            extra = {} if center else {"center": center}
            return super()._torch_extract_fbank_features(waveform, device, **extra)
        if not center:
            refuse_short(waveform.shape[-1], self.n_fft)
        window: Window | Table = NEMO.window
        filters = self.mel_filters
        if self.mel_filters_dtype != "float32":
            dtype = getattr(torch, self.mel_filters_dtype)
            exact = window_of("hann", self.win_length, False, dtype="float32")
            window, filters = Table.of(torch.tensor(exact, device="cpu").to(dtype)), filters.to(dtype)
        sizes = self.n_fft, self.win_length, self.hop_length
        spec = _spec(*sizes, window, Table.of(filters), 0.0, bool(center))
        return torch.from_numpy(features(spec, waveform, num_frames(spec, waveform)))


class ParakeetCallMixin(ParakeetMixin):
    """Parakeet's whole call: pre-emphasis, features and normalisation in the core, without the copies between them."""

    def __call__(
        self,
        raw_speech: Any,
        truncation: bool = False,
        pad_to_multiple_of: int | None = None,
        return_tensors: Any = None,
        return_attention_mask: bool | None = None,
        padding: Any = "longest",
        max_length: int | None = None,
        sampling_rate: int | None = None,
        do_normalize: bool | None = None,
        device: str | None = "cpu",
        return_token_timestamps: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Extract features; arguments and result are those of transformers' class."""
        from transformers.feature_extraction_utils import BatchFeature

        clips = mono_clips(raw_speech)
        usual = clips is not None and pads_to_longest(padding) and not truncation and is_cpu(device)
        right = self.padding_side == "right" and self.padding_value == 0
        if self._takes_original("__call__") or not usual or not right or clips is None:
            return super().__call__(
                raw_speech, truncation, pad_to_multiple_of, return_tensors, return_attention_mask, padding, max_length,
                sampling_rate, do_normalize, device, return_token_timestamps, **kwargs,
            )  # fmt: skip
        check_rate(self, sampling_rate)
        lengths = [len(clip) for clip in clips]
        valid = [n // self.hop_length for n in lengths]
        for i, frames in enumerate(valid):
            if frames < 2:
                raise ValueError(
                    f"clip {i} must have at least {2 * self.hop_length} samples, two frames to normalise over, got "
                    f"{lengths[i]}: the original returns NaN"
                )
        num_samples = rounded_up(max(lengths), pad_to_multiple_of)
        emphasis = 0.0 if self.preemphasis is None else float(self.preemphasis)
        sizes = self.n_fft, self.win_length, self.hop_length
        spec = _spec(*sizes, NEMO.window, Table.of(self.mel_filters), emphasis, True)
        check_settings(spec)
        made = prepared(spec)
        frames = made.layout.num_frames(num_samples)
        out = np.empty((len(clips), frames, made.num_out), np.float32)
        run_rows(spec, clips, [num_samples] * len(clips), [frames] * len(clips), out)
        standardize_in_place(out, valid, ddof=1, eps_outside=EPSILON)
        mask = torch.arange(frames, device="cpu")[None, :] < torch.tensor(valid, device="cpu")[:, None]
        return BatchFeature(
            {"input_features": torch.from_numpy(out), "attention_mask": mask}, tensor_type=return_tensors
        )
