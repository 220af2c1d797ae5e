"""GraniteSpeech and GraniteSpeech5, whose originals need torchaudio."""

from typing import Any

import torch
from torch import Tensor

from mmlm_fast import _C
from mmlm_fast.audio.extractors.plans import (
    Framing,
    Original,
    cached_plan,
    features,
    has_torchaudio,
    is_cpu,
    refuse_short,
)
from mmlm_fast.audio.filters import mel_filters, window_of
from mmlm_fast.audio.log_mel import DYNAMIC_RANGE, whisper_options
from mmlm_fast.ops.paths import using_reference


class GraniteSpeechMixin(Original):
    """torchaudio's MelSpectrogram, log10, clipped to 8 below each clip's maximum. Needs no torchaudio here."""

    def __init__(self, sampling_rate: int = 16000, n_fft: int = 512, win_length: int = 400, hop_length: int = 160,
                 n_mels: int = 80, projector_window_size: int = 15, projector_downsample_rate: int = 5,
                 padding_value: float = 0.0, **kwargs: Any) -> None:  # fmt: skip
        from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor

        if has_torchaudio():
            super().__init__(
                sampling_rate=sampling_rate, n_fft=n_fft, win_length=win_length, hop_length=hop_length, n_mels=n_mels,
                projector_window_size=projector_window_size, projector_downsample_rate=projector_downsample_rate,
                padding_value=padding_value, **kwargs,
            )  # fmt: skip
            return
        feature_size = n_mels if kwargs.get("feature_size") is None else kwargs.pop("feature_size")
        SequenceFeatureExtractor.__init__(
            self, feature_size=feature_size, sampling_rate=sampling_rate, padding_value=padding_value, **kwargs
        )
        self.melspec_kwargs = dict(
            sample_rate=sampling_rate, n_fft=n_fft, win_length=win_length, hop_length=hop_length, n_mels=n_mels
        )
        self.mel_filters = None
        self.projector_window_size = projector_window_size
        self.projector_downsample_rate = projector_downsample_rate

    def _extract_mel_spectrograms(self, audio: Tensor, device: str | None = "cpu") -> Tensor:
        if self._takes_original("_extract_mel_spectrograms") or not is_cpu(device):
            return super()._extract_mel_spectrograms(audio, device)
        out = _granite_log_mel(self.melspec_kwargs, audio.float(), DYNAMIC_RANGE)
        out = out[:, : out.shape[1] // 2 * 2]  # the odd last frame
        return torch.from_numpy(out).reshape(len(out), -1, 2 * out.shape[-1])

    def __call__(self, audios: Any, device: str | None = "cpu") -> Any:
        if has_torchaudio() or using_reference():
            return super().__call__(audios, device)
        from transformers.feature_extraction_utils import BatchFeature

        batched, lengths = self._get_audios_and_audio_lengths(audios)
        sizes = self._get_num_audio_features(lengths)
        features = self._extract_mel_spectrograms(batched, device=device)
        mask = torch.arange(max(sizes), device="cpu").view(1, -1) < torch.tensor(sizes, device="cpu").view(-1, 1)
        return BatchFeature(dict(input_features=features, audio_embed_sizes=sizes, input_features_mask=mask))


def _granite_log_mel(melspec: dict[str, int], audio: Any, dynamic_range: float, frames: int | None = None) -> Any:
    """``max(log10 mel, max - range) / 4 + 1``, ``[num_clips, frames, n_mels]``."""

    framing = Framing(melspec["win_length"], melspec["hop_length"], melspec["n_fft"])
    options, num_frames = framing.centred("reflect")
    refuse_short(audio.shape[-1], melspec["n_fft"] // 2 + 1)

    def make() -> "_C.SpectralPlan":
        all_options = whisper_options() | options | framing.options()
        all_options |= dict(dynamic_range=dynamic_range / 4, bins_first=False)
        rate = melspec["sample_rate"]
        filters = mel_filters(melspec["n_mels"], n_fft=melspec["n_fft"], sampling_rate=rate, norm=None, mel_scale="htk",
                              dtype=torch.float32, highest_hz=rate // 2)  # fmt: skip
        return _C.SpectralPlan(all_options, window_of("hann", framing.frame_length), filters)

    plan = cached_plan(("granite", framing, dynamic_range, *melspec.values()), [], make)
    return features(plan, audio, num_frames(audio.shape[-1]) if frames is None else frames, bins_first=False)


class GraniteSpeech5Mixin(Original):
    """The same with deltas and frames stacked. Needs no torchaudio here."""

    def __init__(self, num_mel_bins: int = 80, sampling_rate: int = 16000, n_fft: int = 512, win_length: int = 400,
                 hop_length: int = 160, delta_win_length: int = 3, logmel_floor_db: float = 8.0,
                 padding_value: float = 0.0, **kwargs: Any) -> None:  # fmt: skip
        from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor

        if has_torchaudio():
            super().__init__(
                num_mel_bins=num_mel_bins, sampling_rate=sampling_rate, n_fft=n_fft, win_length=win_length,
                hop_length=hop_length, delta_win_length=delta_win_length, logmel_floor_db=logmel_floor_db,
                padding_value=padding_value, **kwargs,
            )  # fmt: skip
            return
        kwargs.pop("feature_size", None)
        SequenceFeatureExtractor.__init__(
            self,
            feature_size=num_mel_bins * self.delta_expansion * self.frame_stacking,
            sampling_rate=sampling_rate,
            padding_value=padding_value,
            **kwargs,
        )
        self.num_mel_bins = num_mel_bins
        self.n_fft = n_fft
        self.win_length = win_length
        self.hop_length = hop_length
        self.delta_win_length = delta_win_length
        self.logmel_floor_db = logmel_floor_db
        self.mel_filters = None

    def _extract_features(self, audio: Tensor, device: str | None = "cpu") -> Tensor:
        if self._takes_original("_extract_features") or not is_cpu(device):
            return super()._extract_features(audio, device)
        stacking = self.frame_stacking
        frames = stacking * -(-(audio.shape[1] // self.hop_length) // stacking)
        needed = (frames - 1) * self.hop_length + 1
        audio = torch.nn.functional.pad(audio.float(), (0, max(0, needed - audio.shape[1])))
        melspec = dict(sample_rate=self.sampling_rate, n_fft=self.n_fft, win_length=self.win_length,
                       hop_length=self.hop_length, n_mels=self.num_mel_bins)  # fmt: skip
        # The maximum is taken over the frames that are kept.
        logmel = torch.from_numpy(_granite_log_mel(melspec, audio, self.logmel_floor_db, frames))
        deltas = _deltas(logmel, self.delta_win_length)
        both = torch.cat([logmel, deltas], -1)
        return both.reshape(len(audio), -1, stacking * both.shape[-1])


def _deltas(features: Tensor, win_length: int) -> Tensor:
    """Slopes over `win_length` frames, ends repeated: ``[B, T, M]``. Source: torchaudio ``compute_deltas``."""
    n = (win_length - 1) // 2
    x = torch.cat([features[:, :1]] * n + [features] + [features[:, -1:]] * n, 1)
    frames = features.shape[1]
    slope = torch.zeros_like(features)
    for i in range(-n, n + 1):
        slope += i * x[:, n + i : n + i + frames]
    return slope / (n * (n + 1) * (2 * n + 1) / 3)
