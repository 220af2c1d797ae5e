"""Kaldi's filter bank: AST, FunAsrNano, SeamlessM4T, Speech2Text."""

from typing import Any

import numpy as np
from torch import Tensor

from mmlm_fast import _C
from mmlm_fast.audio.extractors.plans import (
    AS_NUMPY,
    FLOAT64,
    Framing,
    Original,
    as_filters,
    cached_plan,
    features,
    mono_clips,
    one_clip,
    pads_to_longest,
    rate_is_wrong,
    refuse_short,
    rounded_up,
)
from mmlm_fast.audio.filters import kaldi_mel_filters, window_of
from mmlm_fast.audio.kaldi import EPSILON, kaldi_fbank
from mmlm_fast.audio.nemo import standardize_in_place
from mmlm_fast.audio.spectral import run_native


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


_KALDI = Framing(400, 160, 512)


def _kaldi_plan(extractor: Any, window: str, num_mel_bins: int, scale: float, bins: tuple = ()) -> "_C.SpectralPlan":
    """Kaldi's filter bank in float64, with the extractor's own filters where it has some (no torchaudio there)."""
    own = getattr(extractor, "mel_filters", None)

    def make() -> "_C.SpectralPlan":
        options, _ = _KALDI.whole(_KALDI.frame_length)
        options |= _KALDI.options() | dict(log="natural", floor=EPSILON, bins_first=False, scale=scale)
        options |= dict(remove_dc_offset=True, frame_preemphasis=0.97) | (AS_NUMPY if own is not None else FLOAT64)
        if own is not None:
            return _C.SpectralPlan(options, np.asarray(extractor.window, np.float64), as_filters(own))
        filters = kaldi_mel_filters(num_mel_bins, _KALDI.n_fft, extractor.sampling_rate)
        return _C.SpectralPlan(options, window_of(window, _KALDI.frame_length, False), filters)

    tables = [] if own is None else [own, extractor.window]
    return cached_plan(("kaldi", window, num_mel_bins, scale, extractor.sampling_rate), tables, make)


def _kaldi_features(plan: "_C.SpectralPlan", waveform: np.ndarray, limit: int | None = None) -> np.ndarray:
    """``[frames, bins]`` of one clip."""
    rows = one_clip(waveform)
    refuse_short(rows.shape[1], _KALDI.frame_length)
    frames = (rows.shape[1] - _KALDI.frame_length) // _KALDI.hop_length + 1
    return features(plan, rows, frames if limit is None else min(frames, limit), bins_first=False)[0]


class ASTMixin(Original):
    """Kaldi's filter bank with a Hann window, padded or cut to max_length frames."""

    def _extract_fbank_features(self, waveform: np.ndarray, max_length: int) -> np.ndarray:
        if self._takes_original("_extract_fbank_features") or self.sampling_rate != 16000:
            return super()._extract_fbank_features(waveform, max_length)
        plan = _kaldi_plan(self, "hanning", self.num_mel_bins, 1.0)
        features = _kaldi_features(plan, waveform, max_length)
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
        return _kaldi_features(_kaldi_plan(self, "povey", 0, 32768.0), first)


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
        if rate_is_wrong(self, sampling_rate):
            raise ValueError(
                f"sampling_rate must be the {self.sampling_rate} that {type(self).__name__} was made for, got "
                f"{sampling_rate}: resample the audio first"
            )
        plan = _kaldi_plan(self, "povey", 0, 32768.0)
        for clip in clips:
            refuse_short(len(clip), _KALDI.frame_length)
        valid = [(len(clip) - _KALDI.frame_length) // _KALDI.hop_length + 1 for clip in clips]
        frames = rounded_up(max(valid), pad_to_multiple_of)
        out = np.empty((len(clips), frames, plan.num_out), np.float32)
        run_native(plan, clips, [len(clip) for clip in clips], valid, out)
        if do_normalize_per_mel_bins:
            standardize_in_place(out, valid, ddof=1, eps_inside=1e-7, padding=float(self.padding_value))
        else:
            for row, n in zip(out, valid, strict=True):
                row[n:] = self.padding_value
        whole = frames // self.stride * self.stride
        data: dict[str, Any] = {"input_features": out[:, :whole].reshape(len(clips), -1, plan.num_out * self.stride)}
        if self.return_attention_mask if return_attention_mask is None else return_attention_mask:
            mask = (np.arange(whole) < np.array(valid)[:, None]).astype(np.int32)
            data["attention_mask"] = mask[:, np.arange(whole) % self.stride == 1]
        return BatchFeature(data, tensor_type=return_tensors)


class Speech2TextMixin(Original):
    """The same; without dither."""

    def _extract_fbank_features(self, waveform: np.ndarray) -> np.ndarray:
        if self._takes_original("_extract_fbank_features") or self.dither != 0 or self.sampling_rate != 16000:
            return super()._extract_fbank_features(waveform)
        return _kaldi_features(_kaldi_plan(self, "povey", self.num_mel_bins, 32768.0), waveform)
