"""Extractors that compute with numpy in float64: Clap, Clvp, Gemma3n, Gemma4, Pop2Piano, SpeechT5, UnivNet."""

import math
from typing import Any

import numpy as np

from mmlm_fast import _C
from mmlm_fast.audio.extractors.plans import (
    AS_NUMPY,
    FLOAT64,
    FLOAT64_OUT,
    Framing,
    Original,
    as_filters,
    cached_plan,
    features,
    one_clip,
    refuse_short,
)
from mmlm_fast.audio.filters import window_of
from mmlm_fast.ops.paths import using_reference


class Gemma3nAudioMixin(Original):
    """ln of the mel magnitude, floored or with the floor added; computed in float64."""

    _adds_floor = False

    def _extract_spectrogram(self, waveform: np.ndarray, attention_mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows = waveform[None] if waveform.ndim == 1 else waveform
        if self._takes_original("_extract_spectrogram") or len(rows) != 1:
            return super()._extract_spectrogram(waveform, attention_mask)
        if self.dither > 0.0:  # the same draw from the same generator as in the original
            rows = rows + self.dither * np.random.randn(*rows.shape).astype(rows.dtype)
        left = self.frame_length // 2 if self._adds_floor else 0
        framing = Framing(self.frame_length, self.hop_length, self.fft_length)
        per_bin = self.per_bin_mean is not None or self.per_bin_stddev is not None

        def make() -> "_C.SpectralPlan":
            floor = float(self.mel_floor)
            options = framing.options() | dict(exponent=1.0, log="natural", bins_first=False, edge="zero", offset=-left)
            options |= {"add": floor} if self._adds_floor else {"floor": floor}
            options |= FLOAT64_OUT if per_bin else FLOAT64
            options["scale"] = float(self.input_scale_factor)
            if self.preemphasis > 0 and self.preemphasis_htk_flavor:
                options["frame_preemphasis"] = self.preemphasis
            elif self.preemphasis > 0:  # of the signal, a frame starting one sample later
                options |= dict(signal_preemphasis=self.preemphasis, offset=1 - left)
            return _C.SpectralPlan(options, self.window.astype(np.float64), as_filters(self.mel_filters))

        settings = (self.preemphasis, self.preemphasis_htk_flavor, float(self.mel_floor), self.input_scale_factor)
        key = ("gemma", framing, left, per_bin, *settings)
        plan = cached_plan(key, [self.mel_filters, self.window], make)
        span = self.frame_length + 1
        frames = max(0, (rows.shape[1] + left - span) // self.hop_length + 1)
        out = features(plan, rows, frames, bins_first=False, dtype=np.float64 if per_bin else np.float32)[0]
        if self.per_bin_mean is not None:
            out = out - self.per_bin_mean[0]
        if self.per_bin_stddev is not None:
            out = out / self.per_bin_stddev[0]
        return out, self._frame_mask(attention_mask, frames, left)

    def _frame_mask(self, attention_mask: np.ndarray, frames: int, left: int) -> np.ndarray:
        return attention_mask[:: self.hop_length].astype(bool)[:frames]


class Gemma4AudioMixin(Gemma3nAudioMixin):
    """The same with the floor added and half a frame of zeros before. A clip that is not in a list is one clip; the
    original takes it for one sample of as many channels and fills the memory."""

    _adds_floor = True

    def __call__(self, raw_speech: Any, *args: Any, **kwargs: Any) -> Any:
        if not using_reference():
            is_list = isinstance(raw_speech, (list, tuple))
            if not is_list or (raw_speech and isinstance(raw_speech[0], (int, float))):
                array = np.asarray(raw_speech)
                raw_speech = [array] if array.ndim == 1 else raw_speech
        return super().__call__(raw_speech, *args, **kwargs)

    def _frame_mask(self, attention_mask: np.ndarray, frames: int, left: int) -> np.ndarray:
        ends = np.arange(frames) * self.hop_length + self.frame_length
        return np.pad(attention_mask, (left, 0))[ends].astype(bool)


def _numpy_features(
    extractor: Any,
    waveform: np.ndarray,
    framing: Framing,
    window: Any,
    filters: np.ndarray,
    *,
    bins_first: bool,
    center: bool = True,
    double: bool = False,
    **options: Any,
) -> np.ndarray:
    """What transformers' ``audio_utils.spectrogram`` computes, of one clip."""
    edges, num_frames = framing.centred("reflect") if center else framing.whole()
    rows = one_clip(waveform)
    refuse_short(rows.shape[1], framing.n_fft // 2 + 1 if center else framing.n_fft)

    def make() -> "_C.SpectralPlan":
        table = np.asarray(window_of(window, framing.frame_length) if isinstance(window, str) else window, np.float64)
        all_options = edges | framing.options() | AS_NUMPY | dict(bins_first=bins_first, double_output=double) | options
        return _C.SpectralPlan(all_options, table, as_filters(filters))

    tables = [filters] if isinstance(window, str) else [filters, window]
    key = (type(extractor).__name__, framing, center, double, bins_first, *sorted(options.items()))
    plan = cached_plan(key, tables, make)
    dtype = np.float64 if double else np.float32
    return features(plan, rows, num_frames(rows.shape[1]), bins_first=bins_first, dtype=dtype)[0]


class ClapMixin(Original):
    """Decibels of the mel power."""

    def _np_extract_fbank_features(self, waveform: np.ndarray, mel_filters: np.ndarray | None = None) -> np.ndarray:
        if self._takes_original("_np_extract_fbank_features") or mel_filters is None:
            return super()._np_extract_fbank_features(waveform, mel_filters)
        framing = Framing(self.fft_window_size, self.hop_length, self.fft_window_size)
        options: dict[str, Any] = dict(log="decimal", floor=1e-10, multiply=10.0)
        return _numpy_features(self, waveform, framing, "hann", mel_filters, bins_first=False, **options)


class ClvpMixin(Original):
    """ln(max(mel, 1e-5)), divided by the norms of the bins; float64."""

    def _np_extract_fbank_features(self, waveform: np.ndarray) -> np.ndarray:
        if self._takes_original("_np_extract_fbank_features"):
            return super()._np_extract_fbank_features(waveform)
        framing = Framing(self.n_fft, self.hop_length, self.n_fft)
        options: dict[str, Any] = dict(log="natural", floor=1e-5)
        out = _numpy_features(
            self, waveform, framing, "hann", self.mel_filters, bins_first=True, double=True, **options
        )
        return out if self.mel_norms is None else out / np.array(self.mel_norms)[:, None]


class SpeechT5Mixin(Original):
    """log10 of the mel magnitude: the targets; inputs are waveforms."""

    def _extract_mel_features(self, one_waveform: np.ndarray) -> np.ndarray:
        # Its frames are centred by half a frame, which is half a transform only where both are of one length.
        if self._takes_original("_extract_mel_features") or self.sample_size != self.n_fft:
            return super()._extract_mel_features(one_waveform)
        framing = Framing(self.sample_size, self.sample_stride, self.n_fft)
        options: dict[str, Any] = dict(exponent=1.0, log="decimal", floor=float(self.mel_floor))
        return _numpy_features(self, one_waveform, framing, self.window, self.mel_filters, bins_first=False, **options)


class UnivNetMixin(Original):
    """ln of the mel of sqrt(|X|^2 + floor); float64."""

    def mel_spectrogram(self, waveform: np.ndarray) -> np.ndarray:
        if self._takes_original("mel_spectrogram") or self.win_length != self.n_fft:
            return super().mel_spectrogram(waveform)
        pad = int((self.n_fft - self.hop_length) / 2)
        padded = np.pad(waveform, (pad, pad), mode="reflect")
        framing = Framing(self.n_fft, self.hop_length, self.n_fft)
        options: dict[str, Any] = dict(
            exponent=1.0,
            power_add=float(self.mel_floor),
            log="natural",
            floor=float(self.compression_clip_val),
            shift=math.log(self.compression_factor),
        )
        tables: tuple = (self.window, self.mel_filters)
        return _numpy_features(
            self, padded, framing, *tables, bins_first=False, center=self.center, double=True, **options
        )


class Pop2PianoMixin(Original):
    """Mel power, floored at 1e-10; float64. Beats are found by essentia, as in the original."""

    def mel_spectrogram(self, sequence: np.ndarray) -> np.ndarray:
        if self._takes_original("mel_spectrogram"):
            return super().mel_spectrogram(sequence)
        framing = Framing(self.window_size, self.hop_length, self.window_size)
        options: dict[str, Any] = dict(floor=1e-10)
        return np.array([
            _numpy_features(self, clip, framing, "hann", self.mel_filters, bins_first=True, double=True, **options)
            for clip in sequence
        ])  # fmt: skip
