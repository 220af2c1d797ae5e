"""NeMo's log-mel: Parakeet, CohereAsr, NemotronAsrStreaming."""

from typing import Any

import torch
from torch import Tensor

from mmlm_fast import _C
from mmlm_fast.audio.extractors.plans import (
    Framing,
    Original,
    cached_plan,
    features,
    is_cpu,
    mono_clips,
    pads_to_longest,
    rate_is_wrong,
    refuse_short,
    rounded_up,
)
from mmlm_fast.audio.filters import window_of
from mmlm_fast.audio.nemo import standardize_in_place
from mmlm_fast.audio.spectral import run_native


class ParakeetMixin(Original):
    """NeMo's: Parakeet, CohereAsr, NemotronAsrStreaming. ln(mel + 2^-24), centred among zeros."""

    mel_filters_dtype = "float32"  # Nemotron can round its tables to bfloat16

    def _torch_extract_fbank_features(self, waveform: Tensor, device: str = "cpu", center: bool = True) -> Tensor:
        if self._takes_original("_torch_extract_fbank_features") or not is_cpu(device):
            extra = {} if center else {"center": center}
            return super()._torch_extract_fbank_features(waveform, device, **extra)
        framing = Framing(self.win_length, self.hop_length, self.n_fft)
        options, num_frames = framing.centred("zero") if center else framing.whole()
        if not center:
            refuse_short(waveform.shape[-1], self.n_fft)

        def make() -> "_C.SpectralPlan":
            window, filters = window_of("hann", self.win_length, False), self.mel_filters
            if self.mel_filters_dtype != "float32":
                dtype = getattr(torch, self.mel_filters_dtype)
                rounded = torch.tensor(window_of("hann", self.win_length, False, dtype=torch.float32)).to(dtype)
                window, filters = rounded.double().numpy(), filters.to(dtype)
            all_options = options | framing.options() | dict(log="natural", add=2.0**-24, bins_first=False)
            return _C.SpectralPlan(all_options, window, filters.double().numpy())

        plan = cached_plan(("parakeet", framing, center, self.mel_filters_dtype), [self.mel_filters], make)
        return torch.from_numpy(features(plan, waveform, num_frames(waveform.shape[-1]), bins_first=False))


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
        if rate_is_wrong(self, sampling_rate):
            raise ValueError(
                f"sampling_rate must be the {self.sampling_rate} that {type(self).__name__} was made for, got "
                f"{sampling_rate}: resample the audio first"
            )
        lengths = [len(clip) for clip in clips]
        valid = [n // self.hop_length for n in lengths]
        for i, frames in enumerate(valid):
            if frames < 2:
                raise ValueError(
                    f"clip {i} must have at least {2 * self.hop_length} samples, two frames to normalise over, got "
                    f"{lengths[i]}: the original returns NaN"
                )
        num_samples = rounded_up(max(lengths), pad_to_multiple_of)
        framing = Framing(self.win_length, self.hop_length, self.n_fft)
        options, num_frames = framing.centred("zero")
        emphasis = 0.0 if self.preemphasis is None else float(self.preemphasis)

        def make() -> "_C.SpectralPlan":
            all_options = options | framing.options() | dict(log="natural", add=2.0**-24, bins_first=False)
            all_options["signal_preemphasis"] = emphasis
            window = window_of("hann", self.win_length, False)
            return _C.SpectralPlan(all_options, window, self.mel_filters.double().numpy())

        plan = cached_plan(("parakeet call", framing, emphasis), [self.mel_filters], make)
        frames = num_frames(num_samples)
        out = torch.empty(len(clips), frames, plan.num_out, dtype=torch.float32, device="cpu")
        run_native(plan, clips, [num_samples] * len(clips), [frames] * len(clips), out)
        standardize_in_place(out, valid, ddof=1, eps_outside=1e-5)
        mask = torch.arange(frames, device="cpu")[None, :] < torch.tensor(valid, device="cpu")[:, None]
        return BatchFeature({"input_features": out, "attention_mask": mask}, tensor_type=return_tensors)
