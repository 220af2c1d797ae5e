"""Drop-ins for the extractors of speech codecs, which compute their features inside `__call__`."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.audio_utils import make_list_of_audio
from transformers.feature_extraction_utils import BatchFeature

from mmlm_fast.audio.extractors.shared import Original, check_rate
from mmlm_fast.audio.kaldi import kaldi_fbank
from mmlm_fast.audio.standardize import standardize_in_place


def _as_tensor(clip: Any) -> Tensor:
    return torch.as_tensor(clip, dtype=None if hasattr(clip, "dtype") else torch.float32, device="cpu")


class NeuCodecMixin(Original):
    """Kaldi's filter bank of each clip, standardised, two frames to one. Needs no torchaudio here."""

    def _waveform_of(self, clip: Tensor, padded: Tensor, num_valid: int | None) -> Tensor:
        """The samples whose features are taken: the clip padded by itself to a multiple of hop_length."""
        alone = self.acoustic_encoder_padder.pad(
            BatchFeature({"audio": [clip]}), pad_to_multiple_of=self.hop_length, return_tensors="pt"
        )
        return alone["audio"][0]

    def _standardised_fbank(self, waveform: Tensor) -> Tensor:
        features: Any = kaldi_fbank(
            waveform,
            num_mel_bins=self.num_mel_bins,
            frame_length=self.frame_length / self.sampling_rate * 1000,
            frame_shift=self.frame_shift / self.sampling_rate * 1000,
            sample_frequency=self.sampling_rate,
            scale=2.0**15,
        )
        standardize_in_place(features.numpy()[None], [features.shape[0]], ddof=1, eps_inside=1e-7)
        return features

    def __call__(
        self,
        audio: Any,
        padding: Any = True,
        max_length: int | None = None,
        truncation: bool = False,
        return_tensors: Any = None,
        sampling_rate: int | None = None,
        device: str = "cpu",
        **kwargs: Any,
    ) -> BatchFeature:
        """Extract features; arguments and result are those of transformers' class."""
        if self._takes_original("__call__") or torch.device(device).type != "cpu":
            return super().__call__(
                audio, padding, max_length, truncation, return_tensors, sampling_rate, device, **kwargs
            )
        check_rate(self, sampling_rate)
        clips = make_list_of_audio(audio)
        for clip in clips:
            if clip.ndim > 2:
                raise ValueError(f"Expected input shape (channels, length) but got shape {clip.shape}")
        clips = [pad(_as_tensor(clip), (0, 1)) for clip in clips]
        padded = self.acoustic_encoder_padder.pad(
            BatchFeature({"audio": clips}),
            max_length=max_length,
            truncation=truncation,
            padding=padding,
            return_attention_mask=padding,
            pad_to_multiple_of=self.hop_length,
            return_tensors="pt",
        )
        padding_mask = padded.pop("attention_mask")
        padded_audio = padded["audio"][:, None, :]
        features = []
        for i, clip in enumerate(clips):
            num_valid = None if padding_mask is None else int(padding_mask[i].sum())
            features.append(self._standardised_fbank(self._waveform_of(clip, padded_audio[i, 0], num_valid)))
        mel = self.pad(
            BatchFeature({"input_features": features}),
            padding=padding,
            max_length=max_length,
            truncation=truncation,
            pad_to_multiple_of=self.stride,
            return_attention_mask=padding,
            return_tensors="pt",
        )
        stacked, mask = mel["input_features"], mel.get("attention_mask")
        frames = stacked.shape[1] // self.stride * self.stride
        stacked = stacked[:, :frames].reshape(len(clips), -1, self.num_mel_bins * self.stride)
        if mask is not None:
            mask = mask[:, :frames].reshape(len(clips), -1, self.stride).min(dim=-1).values
        return BatchFeature(
            {
                "input_values": padded_audio,
                "padding_mask": padding_mask,
                "input_features": stacked,
                "input_features_mask": mask,
            },
            tensor_type=return_tensors,
        )


class Xcodec2Mixin(NeuCodecMixin):
    def _waveform_of(self, clip: Tensor, padded: Tensor, num_valid: int | None) -> Tensor:
        """The padded row up to the clip's own multiple of hop_length, half a hop of zeros on each side."""
        length = padded.shape[-1] if num_valid is None else -(-num_valid // self.hop_length) * self.hop_length
        waveform = padded[: min(length, padded.shape[-1])]
        return pad(waveform, (self.hop_length // 2, self.hop_length // 2))
