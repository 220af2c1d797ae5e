"""Extractors that compute with numpy in float64: Clap, Clvp, Gemma3n, Gemma4, Pop2Piano, SpeechT5, UnivNet."""

import math
from dataclasses import replace
from typing import Any

import numpy as np

from mmlm_fast.audio.extractors.shared import Original, features, num_frames, one_clip, refuse_short
from mmlm_fast.audio.spec import Framing, Spec, Window, spec_with_tables
from mmlm_fast.audio.tables import Table
from mmlm_fast.ops.paths import using_reference


@spec_with_tables
def _gemma_spec(
    fft_length: int,
    frame_length: int,
    hop_length: int,
    window: Table,
    filters: Table,
    num_zeros: int,
    dtype: str,
    **options: float,
) -> Spec:
    # Frames are cut a sample longer than their window; pre-emphasis of the signal takes the first of these.
    first = 1 if options.get("signal_preemphasis") else 0
    return Spec(
        n_fft=fft_length,
        frame_length=frame_length,
        hop_length=hop_length,
        window=window,
        framing=Framing(first - num_zeros, num_zeros, frame_length + 1, "zero"),
        filters=filters,
        exponent=1.0,
        log="natural",
        bins_first=False,
        dtype=dtype,
        computed_in="float64",
        **options,  # type: ignore[arg-type]
    )


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
        per_bin = self.per_bin_mean is not None or self.per_bin_stddev is not None
        if any(np.ndim(x) == 0 for x in (self.per_bin_mean, self.per_bin_stddev) if x is not None):
            return super()._extract_spectrogram(waveform, attention_mask)
        options = {"add" if self._adds_floor else "floor": float(self.mel_floor)}
        if self.preemphasis > 0:
            emphasis = "frame_preemphasis" if self.preemphasis_htk_flavor else "signal_preemphasis"
            options[emphasis] = float(self.preemphasis)
        spec = _gemma_spec(
            self.fft_length,
            self.frame_length,
            self.hop_length,
            Table.of(self.window),
            Table.of(self.mel_filters, transposed=True),
            left,
            "float64" if per_bin else "float32",
            scale=float(self.input_scale_factor),
            **options,
        )
        frames = num_frames(spec, rows)
        out = features(spec, rows, frames)[0]
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


# What transformers' audio_utils.spectrogram does: transform in float64, keep complex64.
AUDIO_UTILS = Spec(
    n_fft=400,
    frame_length=400,
    hop_length=160,
    window=Window("hann"),
    framing=Framing.centered(400, 400, "reflect"),
    round_spectrum=True,
    computed_in="float64",
)


@spec_with_tables
def _audio_utils_spec(
    frame_length: int, hop_length: int, n_fft: int, window: Window | Table, filters: Table, center: bool, **options: Any
) -> Spec:
    framing = Framing.centered(n_fft, frame_length, "reflect") if center else Framing.inside(n_fft, frame_length)
    sizes = dict(n_fft=n_fft, frame_length=frame_length, hop_length=hop_length)
    return replace(AUDIO_UTILS, **sizes, window=window, framing=framing, filters=filters, **options)  # type: ignore[arg-type]


def _spectrogram(
    waveform: np.ndarray,
    sizes: tuple[int, int, int],
    window: Any,
    filters: np.ndarray,
    center: bool = True,
    **options: Any,
) -> np.ndarray:
    """Compute what transformers' ``audio_utils.spectrogram`` does of one clip.

    Args:
        sizes: Of frame, hop and transform.
        window: By name or by its values.
        filters: ``[bins, num_filters]``.
        options: Fields of the spec that differ from `AUDIO_UTILS`.
    """
    rows = one_clip(waveform)
    refuse_short(rows.shape[1], sizes[2] // 2 + 1 if center else sizes[2])
    shape = Window(window) if isinstance(window, str) else Table.of(window)
    spec = _audio_utils_spec(*sizes, shape, Table.of(filters, transposed=True), bool(center), **options)
    return features(spec, rows, num_frames(spec, rows))[0]


class ClapMixin(Original):
    """Decibels of the mel power."""

    def _np_extract_fbank_features(self, waveform: np.ndarray, mel_filters: np.ndarray | None = None) -> np.ndarray:
        if self._takes_original("_np_extract_fbank_features") or mel_filters is None:
            return super()._np_extract_fbank_features(waveform, mel_filters)
        sizes = self.fft_window_size, self.hop_length, self.fft_window_size
        options: dict[str, Any] = dict(log="decimal", floor=1e-10, multiply=10.0)
        return _spectrogram(waveform, sizes, "hann", mel_filters, bins_first=False, **options)


class ClvpMixin(Original):
    """ln(max(mel, 1e-5)), divided by the norms of the bins; float64."""

    def _np_extract_fbank_features(self, waveform: np.ndarray) -> np.ndarray:
        if self._takes_original("_np_extract_fbank_features"):
            return super()._np_extract_fbank_features(waveform)
        sizes = self.n_fft, self.hop_length, self.n_fft
        options: dict[str, Any] = dict(log="natural", floor=1e-5, dtype="float64")
        out = _spectrogram(waveform, sizes, "hann", self.mel_filters, **options)
        return out if self.mel_norms is None else out / np.array(self.mel_norms)[:, None]


class SpeechT5Mixin(Original):
    """log10 of the mel magnitude: the targets; inputs are waveforms."""

    def _extract_mel_features(self, one_waveform: np.ndarray) -> np.ndarray:
        # Its frames are centred by half a frame, which is half a transform only where both are of one length.
        if self._takes_original("_extract_mel_features") or self.sample_size != self.n_fft:
            return super()._extract_mel_features(one_waveform)
        sizes = self.sample_size, self.sample_stride, self.n_fft
        options: dict[str, Any] = dict(exponent=1.0, log="decimal", floor=float(self.mel_floor))
        return _spectrogram(one_waveform, sizes, self.window, self.mel_filters, bins_first=False, **options)


class UnivNetMixin(Original):
    """ln of the mel of sqrt(|X|^2 + floor); float64."""

    def mel_spectrogram(self, waveform: np.ndarray) -> np.ndarray:
        if self._takes_original("mel_spectrogram") or self.win_length != self.n_fft:
            return super().mel_spectrogram(waveform)
        pad = int((self.n_fft - self.hop_length) / 2)
        padded = np.pad(waveform, (pad, pad), mode="reflect")
        options: dict[str, Any] = dict(
            exponent=1.0,
            power_add=float(self.mel_floor),
            log="natural",
            floor=float(self.compression_clip_val),
            shift=math.log(self.compression_factor),
            bins_first=False,
            dtype="float64",
        )
        sizes = self.n_fft, self.hop_length, self.n_fft
        return _spectrogram(padded, sizes, self.window, self.mel_filters, self.center, **options)


class Pop2PianoMixin(Original):
    """Mel power, floored at 1e-10; float64. Beats are found by essentia, as in the original."""

    def mel_spectrogram(self, sequence: np.ndarray) -> np.ndarray:
        if self._takes_original("mel_spectrogram"):
            return super().mel_spectrogram(sequence)
        sizes = self.window_size, self.hop_length, self.window_size
        options: dict[str, Any] = dict(floor=1e-10, dtype="float64")
        return np.array([_spectrogram(clip, sizes, "hann", self.mel_filters, **options) for clip in sequence])
