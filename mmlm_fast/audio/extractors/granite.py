"""GraniteSpeech and GraniteSpeech5, whose originals need torchaudio."""

from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from mmlm_fast.audio.extractors.shared import (
    Original,
    features,
    has_torchaudio,
    is_cpu,
    num_frames,
    refuse_short,
)
from mmlm_fast.audio.log_mel import DYNAMIC_RANGE, WHISPER
from mmlm_fast.audio.spec import Framing, MelFilters, Spec, SpecError, Window, spec_with_tables
from mmlm_fast.audio.tables import Table
from mmlm_fast.ops.paths import using_reference


class GraniteSpeechMixin(Original):
    """torchaudio's MelSpectrogram, log10, clipped to 8 below each clip's maximum. Needs no torchaudio here."""

    mel_filters: Any

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
            _AS_MADE[self.mel_filters] = _tables_of(self.mel_filters)
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
        audio = audio.float()
        spec = _spec_of(self.mel_filters, self.melspec_kwargs, DYNAMIC_RANGE)
        out = _log_mel(spec, audio, num_frames(spec, audio))
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


# Tables of torchaudio's MelSpectrogram as its extractor made them, in whatever default dtype that was: ours take their
# place. Tables that the user changed are taken as they are.
_AS_MADE: WeakKeyDictionary[Any, tuple[Table, Table]] = WeakKeyDictionary()


def _tables_of(transform: Any) -> tuple[Table, Table]:
    return Table.of(transform.spectrogram.window), Table.of(transform.mel_scale.fb, transposed=True)


def _is_usual(transform: Any) -> bool:
    """Return whether torchaudio's own classes compute what the extractors ask them for, and nothing listens."""
    parts = [transform, getattr(transform, "spectrogram", None), getattr(transform, "mel_scale", None)]
    kinds = [(type(part).__module__.partition(".")[0], type(part).__name__) for part in parts]
    if kinds != [("torchaudio", "MelSpectrogram"), ("torchaudio", "Spectrogram"), ("torchaudio", "MelScale")]:
        return False
    if any(part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part) for part in parts):
        return False
    inner = transform.spectrogram
    settings = (inner.power, inner.normalized, inner.pad, inner.center, inner.pad_mode, inner.onesided)
    return settings == (2, False, 0, True, "reflect", True)


def _spec_of(transform: Any, melspec: dict[str, int], dynamic_range: float) -> Spec:
    """Return ``max(log10 mel, max - range) / 4 + 1`` of torchaudio's MelSpectrogram, or of its arguments without it."""
    if not dynamic_range > 0:
        raise SpecError(f"a dynamic range of {dynamic_range} is for the original")
    if transform is not None:
        if not _is_usual(transform):
            raise SpecError("a transform of one's own is for the original")
        inner = transform.spectrogram
        melspec = dict(
            n_fft=inner.n_fft,
            win_length=inner.win_length,
            hop_length=inner.hop_length,
            sample_rate=transform.sample_rate,
            n_mels=transform.n_mels,
        )
    rate = melspec["sample_rate"]
    window, filters = (
        Window("hann"),
        MelFilters(melspec["n_mels"], norm=None, mel_scale="htk", computed_in="float32", highest_hz=rate // 2),
    )
    sizes = melspec["n_fft"], melspec["win_length"], melspec["hop_length"], rate
    if transform is not None and (own := _tables_of(transform)) != _AS_MADE.get(transform):
        usual = Table(replace(window, computed_in="float32").table(sizes[1])), Table(filters.table(sizes[0], rate))
        if own != usual:
            return _spec(*sizes, *own, dynamic_range)
    return _spec(*sizes, window, filters, dynamic_range)


@spec_with_tables
def _spec(
    n_fft: int,
    win_length: int,
    hop_length: int,
    sampling_rate: int,
    window: Window | Table,
    filters: MelFilters | Table,
    dynamic_range: float,
) -> Spec:
    return replace(
        WHISPER,
        n_fft=n_fft,
        frame_length=win_length,
        hop_length=hop_length,
        sampling_rate=sampling_rate,
        window=window,
        framing=Framing.centered(n_fft, win_length, "reflect"),
        filters=filters,
        dynamic_range=dynamic_range / 4,
        bins_first=False,
        computed_in="float32",
    )


def _log_mel(spec: Spec, audio: Any, frames: int) -> Any:
    """Compute ``[num_clips, frames, n_mels]``."""
    refuse_short(audio.shape[-1], spec.n_fft // 2 + 1)
    return features(spec, audio, frames)


class GraniteSpeech5Mixin(Original):
    """The same with deltas and frames stacked. Needs no torchaudio here."""

    mel_filters: Any

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
            _AS_MADE[self.mel_filters] = _tables_of(self.mel_filters)
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
        spec = _spec_of(self.mel_filters, melspec, self.logmel_floor_db)
        logmel = torch.from_numpy(_log_mel(spec, audio, min(frames, num_frames(spec, audio))))
        deltas = _deltas(logmel, self.delta_win_length)
        both = torch.cat([logmel, deltas], -1)
        return both.reshape(len(audio), -1, stacking * both.shape[-1])


def _deltas(features: Tensor, win_length: int) -> Tensor:
    """Slopes over `win_length` frames, ends repeated: ``[B, T, M]``. Source: torchaudio ``compute_deltas``."""
    if win_length < 3:
        raise SpecError(f"slopes need 3 frames or more, got {win_length}")
    n = (win_length - 1) // 2
    x = torch.cat([features[:, :1]] * n + [features] + [features[:, -1:]] * n, 1)
    frames = features.shape[1]
    slope = torch.zeros_like(features)
    for i in range(-n, n + 1):
        slope += i * x[:, n + i : n + i + frames]
    return slope / (n * (n + 1) * (2 * n + 1) / 3)
