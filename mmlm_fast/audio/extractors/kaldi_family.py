"""Kaldi's filter bank: AST, FunAsrNano, SeamlessM4T, Speech2Text."""

from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor
from transformers.utils import is_speech_available

from mmlm_fast.audio.extractors.shared import (
    Original,
    check_rate,
    features,
    mono_clips,
    num_frames,
    one_clip,
    pads_to_longest,
    refuse_short,
    rounded_up,
)
from mmlm_fast.audio.features import run_rows
from mmlm_fast.audio.kaldi import KaldiSettings, kaldi_fbank
from mmlm_fast.audio.spec import KaldiFilters, Spec, Window, prepared, spec_with_tables
from mmlm_fast.audio.standardize import standardize_in_place
from mmlm_fast.audio.tables import Table

KALDI = replace(KaldiSettings().spec(), computed_in="float64")  # 25 ms every 10 ms at 16 kHz, 512 points
MIN_SAMPLES = KALDI.frame_length
SCALE = 32768.0  # of 16-bit integers


class FunAsrNanoMixin(Original):
    """Kaldi's filter bank. Needs no torchaudio here."""

    def _extract_fbank_features(self, waveform: Tensor) -> Tensor:
        if self._takes_original("_extract_fbank_features"):
            return super()._extract_fbank_features(waveform)
        return kaldi_fbank(
            waveform,
            num_mel_bins=self.feature_size,
            frame_length=self.frame_length,
            frame_shift=self.frame_shift,
            sample_frequency=self.sampling_rate,
            window_type=self.window,
        )  # type: ignore[return-value]


@spec_with_tables
def _by_torchaudio(window: str, num_mel_bins: int, scale: float, sampling_rate: int) -> Spec:
    """Return what torchaudio's Kaldi computes, in float64."""
    own: dict[str, Any] = dict(scale=scale, sampling_rate=sampling_rate)
    return replace(KALDI, window=Window(window, False), filters=KaldiFilters(num_mel_bins), **own)


@spec_with_tables
def _by_numpy(window: Table, filters: Table, scale: float) -> Spec:
    """Return what transformers' ``audio_utils.spectrogram`` computes of an extractor's own tables."""
    return replace(KALDI, window=window, filters=filters, scale=scale, round_spectrum=True)


def _spec(extractor: Any, window: str, scale: float) -> Spec:
    """Return Kaldi's filter bank as an extractor has it that takes torchaudio's where that is installed."""
    if is_speech_available():
        return _by_torchaudio(window, extractor.num_mel_bins, scale, extractor.sampling_rate)
    return _own_spec(extractor, scale)


def _own_spec(extractor: Any, scale: float) -> Spec:
    return _by_numpy(Table.of(extractor.window), Table.of(extractor.mel_filters, transposed=True), scale)


def _features(spec: Spec, waveform: np.ndarray, limit: int | None = None) -> np.ndarray:
    """Compute ``[frames, bins]`` of one clip."""
    rows = one_clip(waveform)
    refuse_short(rows.shape[1], MIN_SAMPLES)
    frames = num_frames(spec, rows)
    return features(spec, rows, frames if limit is None else min(frames, limit))[0]


class ASTMixin(Original):
    """Kaldi's filter bank with a Hann window, padded or cut to max_length frames."""

    def _extract_fbank_features(self, waveform: np.ndarray, max_length: int) -> np.ndarray:
        if self._takes_original("_extract_fbank_features") or self.sampling_rate != 16000:
            return super()._extract_fbank_features(waveform, max_length)
        features = _features(_spec(self, "hanning", 1.0), waveform, max_length)
        out = np.zeros((max_length, features.shape[1]), np.float32)
        out[: len(features)] = features
        return out


class SeamlessM4TMixin(Original):
    """Kaldi's filter bank of samples at 16-bit scale, in float64."""

    _takes_channels = True  # the original takes the first

    def _extract_fbank_features(self, waveform: np.ndarray) -> np.ndarray:
        if self._takes_original("_extract_fbank_features"):
            return super()._extract_fbank_features(waveform)
        first = np.squeeze(waveform[0] if waveform.ndim == 2 else waveform)
        if first.ndim != 1:
            raise ValueError(f"a clip must be [num_samples] or [1, num_samples], got shape {waveform.shape}")
        return _features(_own_spec(self, SCALE), first)


class SeamlessM4TCallMixin(SeamlessM4TMixin):
    """Seamless' whole call: features and normalisation in the core, straight into the padded result."""

    def __call__(
        self,
        raw_speech: Any,
        padding: Any = True,
        pad_to_multiple_of: int | None = 2,
        max_length: int | None = None,
        truncation: bool = False,
        return_tensors: Any = None,
        sampling_rate: int | None = None,
        return_attention_mask: bool | None = None,
        do_normalize_per_mel_bins: bool | None = True,
        **kwargs: Any,
    ) -> Any:
        """Extract features; arguments and result are those of transformers' class."""
        from transformers.feature_extraction_utils import BatchFeature

        clips = mono_clips(raw_speech)
        usual = clips is not None and pads_to_longest(padding) and not truncation and self.padding_side == "right"
        if self._takes_original("__call__") or not usual or clips is None or self.feature_size != self.num_mel_bins:
            return super().__call__(
                raw_speech, padding, pad_to_multiple_of, max_length, truncation, return_tensors, sampling_rate,
                return_attention_mask, do_normalize_per_mel_bins, **kwargs,
            )  # fmt: skip
        check_rate(self, sampling_rate)
        spec = _own_spec(self, SCALE)
        for clip in clips:
            refuse_short(len(clip), MIN_SAMPLES)
        valid = [num_frames(spec, clip) for clip in clips]
        num_out = prepared(spec).num_out
        frames = rounded_up(max(valid), pad_to_multiple_of)
        out = np.empty((len(clips), frames, num_out), np.float32)
        run_rows(spec, clips, [len(clip) for clip in clips], valid, out)
        if do_normalize_per_mel_bins:
            standardize_in_place(out, valid, ddof=1, eps_inside=1e-7, padding=float(self.padding_value))
        else:
            for row, n in zip(out, valid, strict=True):
                row[n:] = self.padding_value
        whole = frames // self.stride * self.stride
        data: dict[str, Any] = {"input_features": out[:, :whole].reshape(len(clips), -1, num_out * self.stride)}
        if self.return_attention_mask if return_attention_mask is None else return_attention_mask:
            mask = (np.arange(whole) < np.array(valid)[:, None]).astype(np.int32)
            data["attention_mask"] = mask[:, np.arange(whole) % self.stride == 1]
        return BatchFeature(data, tensor_type=return_tensors)


class Speech2TextMixin(Original):
    """Kaldi's filter bank for Speech2Text; with dither the original's code runs."""

    def _extract_fbank_features(self, waveform: np.ndarray) -> np.ndarray:
        if self._takes_original("_extract_fbank_features") or self.dither != 0 or self.sampling_rate != 16000:
            return super()._extract_fbank_features(waveform)
        return _features(_spec(self, "povey", SCALE), waveform)
