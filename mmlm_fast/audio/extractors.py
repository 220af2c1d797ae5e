"""Drop-ins for the feature extractors of transformers: same class name, subclass of the original.

Each class overrides the one method in which the original computes its spectrum; padding, truncation, batching, masks
and normalisation stay the original's code. `EXTRACTORS` lists them all; classes are made when first asked for, since
importing an original costs seconds and not every version of transformers has them all.
"""

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmlm_fast import _C
from mmlm_fast.audio.filters import kaldi_mel_filters, window_of
from mmlm_fast.audio.kaldi import EPSILON, kaldi_fbank
from mmlm_fast.audio.log_mel import DYNAMIC_RANGE, whisper_options
from mmlm_fast.audio.spectral import run_native
from mmlm_fast.ops._registry import using_reference

# ---- plans --------------------------------------------------------------------------------------------------------

_PLANS: OrderedDict[tuple, tuple[list, "_C.SpectralPlan"]] = OrderedDict()
_MAX_PLANS = 64
_LOCK = Lock()


def _identity(array: Any) -> Any:
    """What tells this table from another. Arrays become read-only: a change in place would go unnoticed."""
    if isinstance(array, np.ndarray):
        array.setflags(write=False)
        return id(array)
    if isinstance(array, Tensor):
        return id(array), array._version
    return array


def cached_plan(key: tuple, tables: list, make: Callable[[], "_C.SpectralPlan"]) -> "_C.SpectralPlan":
    """The plan for `key` and the identity of `tables`, which are kept so that no other array can have it."""
    full_key = (*key, *map(_identity, tables))
    with _LOCK:
        known = _PLANS.get(full_key)
        if known is None:
            known = _PLANS[full_key] = (tables, make())
            while len(_PLANS) > _MAX_PLANS:
                _PLANS.popitem(last=False)
        return known[1]


def _as_filters(filters: Any) -> np.ndarray:
    """``[num_filters, bins]`` in float64 from ``[bins, num_filters]``."""
    return np.asarray(filters, dtype=np.float64).T


@dataclass(frozen=True)
class Framing:
    """Frames of `frame_length` samples every `hop_length`, transformed at `n_fft`."""

    frame_length: int
    hop_length: int
    n_fft: int

    def centred(self, edge: str) -> tuple[dict[str, Any], Callable[[int], int]]:
        """Options and number of frames where frame t is centred at sample t * hop_length."""
        middle = self.n_fft // 2
        offset = (self.n_fft - self.frame_length) // 2 - middle
        return dict(edge=edge, offset=offset), lambda n: 1 + (n + 2 * middle - self.n_fft) // self.hop_length

    def whole(self, span: int | None = None) -> tuple[dict[str, Any], Callable[[int], int]]:
        """The same where only frames (or spans) that fit are taken."""
        span = self.n_fft if span is None else span
        offset = (span - self.frame_length) // 2 if span == self.n_fft else 0
        return dict(edge="none", offset=offset), lambda n: max(0, (n - span) // self.hop_length + 1)

    def options(self) -> dict[str, int]:
        return dict(frame_length=self.frame_length, hop_length=self.hop_length, n_fft=self.n_fft)


def rows_of(waveform: Any) -> np.ndarray:
    """``[num_clips, num_samples]`` as the native core reads it."""
    array = waveform.detach().cpu().numpy() if isinstance(waveform, Tensor) else np.asarray(waveform)
    array = array if array.dtype in (np.float32, np.float64) else array.astype(np.float32)
    array = np.ascontiguousarray(array)
    return array.reshape(-1, array.shape[-1]) if array.ndim != 2 else array


def _features(plan: "_C.SpectralPlan", waveform: Any, frames: int, *, bins_first: bool, dtype: Any = np.float32) -> Any:
    """Features ``[num_clips, …]`` of ``[num_clips, num_samples]``."""
    rows = rows_of(waveform)
    shape = (plan.num_out, frames) if bins_first else (frames, plan.num_out)
    out = np.empty((len(rows), *shape), dtype)
    run_native(plan, rows, [rows.shape[1]] * len(rows), frames, out, torch.get_num_threads())
    return out


_FLOAT64 = dict(double_precision=True)
_FLOAT64_OUT = dict(double_precision=True, double_output=True)
# What transformers' audio_utils.spectrogram does: transform in float64, keep complex64.
_NUMPY = dict(double_precision=True, round_spectrum=True)


def _refuse_short(num_samples: int, needed: int) -> None:
    if num_samples < needed:
        raise ValueError(f"a clip needs at least {needed} samples after padding, got {num_samples}")


def _is_cpu(device: Any) -> bool:
    return device is None or torch.device(device).type == "cpu"


# ---- families -----------------------------------------------------------------------------------------------------


class WhisperMixin:
    """Whisper, Qwen3ASR, Dots3Note, MossTranscribeDiarize: log10, clipped to 8 below each clip's maximum."""

    n_fft: int
    hop_length: int
    dither: float
    mel_filters: Any

    def log_mel_plan(self) -> "_C.SpectralPlan":
        framing = Framing(self.n_fft, self.hop_length, self.n_fft)

        def make() -> "_C.SpectralPlan":
            options = whisper_options() | framing.centred("reflect")[0] | framing.options()
            options["dynamic_range"] = DYNAMIC_RANGE / 4
            return _C.SpectralPlan(options, window_of("hann", self.n_fft), _as_filters(self.mel_filters))

        return cached_plan(("whisper", framing), [self.mel_filters], make)

    def _torch_extract_fbank_features(self, waveform: np.ndarray, device: str = "cpu") -> np.ndarray:
        if using_reference() or not _is_cpu(device):
            return super()._torch_extract_fbank_features(waveform, device)  # type: ignore[misc]
        _refuse_short(waveform.shape[-1], self.n_fft // 2 + 1)
        samples = torch.from_numpy(np.ascontiguousarray(waveform)).float()
        if self.dither != 0.0:  # the same draw from the same generator as in the original
            samples = samples + self.dither * torch.randn(samples.shape)
        frames = samples.shape[-1] // self.hop_length if self.n_fft % 2 == 0 else -1
        if frames < 0:  # an odd transform has another last frame
            frames = (samples.shape[-1] - 1) // self.hop_length
        out = _features(self.log_mel_plan(), samples, frames, bins_first=True)
        return out.reshape(*samples.shape[:-1], *out.shape[1:])


class VoxtralRealtimeMixin:
    """log10, clipped to 8 below a constant."""

    def _torch_extract_fbank_features(self, waveform: Tensor, device: str = "cpu", center: bool = True) -> Tensor:
        rows = waveform if waveform.dim() > 1 else waveform[None]
        if using_reference() or not _is_cpu(device) or (self.global_log_mel_max is None and len(rows) > 1):
            # Without a constant the original takes one maximum over the whole batch.
            return super()._torch_extract_fbank_features(waveform, device, center)  # type: ignore[misc]
        framing = Framing(self.n_fft, self.hop_length, self.n_fft)
        options, num_frames = framing.centred("reflect") if center else framing.whole()
        _refuse_short(waveform.shape[-1], self.n_fft // 2 + 1 if center else self.n_fft)

        def make() -> "_C.SpectralPlan":
            limit = self.global_log_mel_max
            floor = 1e-10 if limit is None else max(1e-10, 10.0 ** (limit - DYNAMIC_RANGE))
            all_options = whisper_options(floor) | options | framing.options()
            if limit is None:
                all_options["dynamic_range"] = DYNAMIC_RANGE / 4
            return _C.SpectralPlan(all_options, window_of("hann", self.n_fft), _as_filters(self.mel_filters))

        plan = cached_plan(("voxtral", framing, center, self.global_log_mel_max), [self.mel_filters], make)
        frames = num_frames(waveform.shape[-1]) - 1  # the last one is dropped
        out = torch.from_numpy(_features(plan, waveform, frames, bins_first=True))
        return out.reshape(*waveform.shape[:-1], *out.shape[1:])


class ParakeetMixin:
    """NeMo's: Parakeet, CohereAsr, NemotronAsrStreaming. ln(mel + 2^-24), centred among zeros."""

    mel_filters_dtype = "float32"  # Nemotron can round its tables to bfloat16

    def _torch_extract_fbank_features(self, waveform: Tensor, device: str = "cpu", center: bool = True) -> Tensor:
        if using_reference() or not _is_cpu(device):
            extra = {} if center else {"center": center}
            return super()._torch_extract_fbank_features(waveform, device, **extra)  # type: ignore[misc]
        framing = Framing(self.win_length, self.hop_length, self.n_fft)
        options, num_frames = framing.centred("zero") if center else framing.whole()
        if not center:
            _refuse_short(waveform.shape[-1], self.n_fft)

        def make() -> "_C.SpectralPlan":
            window, filters = window_of("hann", self.win_length, False), self.mel_filters
            if self.mel_filters_dtype != "float32":
                dtype = getattr(torch, self.mel_filters_dtype)
                window = torch.hann_window(self.win_length, periodic=False).to(dtype).double().numpy()
                filters = filters.to(dtype)
            all_options = options | framing.options() | dict(log="natural", add=2.0**-24, bins_first=False)
            return _C.SpectralPlan(all_options, window, filters.double().numpy())

        plan = cached_plan(("parakeet", framing, center, self.mel_filters_dtype), [self.mel_filters], make)
        return torch.from_numpy(_features(plan, waveform, num_frames(waveform.shape[-1]), bins_first=False))


class LasrMixin:
    """ln(max(mel, 1e-5)) in float64, only frames that fit."""

    def _torch_extract_fbank_features(self, waveform: Tensor, device: str = "cpu") -> Tensor:
        if using_reference() or not _is_cpu(device):
            return super()._torch_extract_fbank_features(waveform, device)  # type: ignore[misc]
        _refuse_short(waveform.shape[-1], self.win_length)
        framing = Framing(self.win_length, self.hop_length, self.n_fft)
        options, num_frames = framing.whole(self.win_length)

        def make() -> "_C.SpectralPlan":
            all_options = options | framing.options() | _FLOAT64_OUT | dict(log="natural", floor=1e-5, bins_first=False)
            window = window_of("hann", self.win_length, False)
            return _C.SpectralPlan(all_options, window, _as_filters(self.mel_filters))

        plan = cached_plan(("lasr", framing), [self.mel_filters], make)
        frames = num_frames(waveform.shape[-1])
        return torch.from_numpy(_features(plan, waveform, frames, bins_first=False, dtype=np.float64))


class Phi4MultimodalMixin:
    """ln(max(mel, 1)) of samples at 16-bit scale, pre-emphasised within each frame, in float64."""

    def _torch_extract_fbank_features(self, waveform: Tensor, audio_lengths: Tensor, device: str = "cpu") -> Tensor:
        if using_reference() or not _is_cpu(device):
            return super()._torch_extract_fbank_features(waveform, audio_lengths, device)  # type: ignore[misc]
        _refuse_short(waveform.shape[-1], self.win_length)
        framing = Framing(self.win_length, self.hop_length, self.n_fft)
        options, num_frames = framing.whole(self.win_length)

        def make() -> "_C.SpectralPlan":
            all_options = options | framing.options() | _NUMPY | dict(log="natural", floor=1.0, bins_first=False)
            all_options |= dict(frame_preemphasis=self.preemphasis, scale=32768.0)
            window = window_of("hamming", self.win_length, False)
            return _C.SpectralPlan(all_options, window, _as_filters(self.mel_filters))

        plan = cached_plan(("phi4", framing, self.preemphasis), [self.mel_filters], make)
        out = torch.from_numpy(_features(plan, waveform, num_frames(waveform.shape[-1]), bins_first=False))
        # In a batch the original zeroes the frames of shorter clips that see both the clip and its padding, in a range
        # that depends on all of them; a frame of zeros is ln(1).
        shorter = torch.arange(len(out))[audio_lengths != audio_lengths.max()]
        if len(out) > 1 and shorter.numel() > 0:
            down = (audio_lengths[shorter] - self.win_length) // self.hop_length + 1
            up = audio_lengths[shorter] // self.hop_length - 1
            first, last = int(down.min()), int(up.max())
            index = torch.arange(last - first)
            mask = ((down - first)[:, None] <= index) & (index < (up - first)[:, None])
            out[shorter, first:last] = out[shorter, first:last].masked_fill(mask[..., None], 0)
        return out


class InklingMixin:
    """log10 of the mel magnitude, frames that end with each hop, zeros before."""

    def _torch_extract_fbank_features(self, waveform: Tensor, device: str = "cpu") -> Tensor:
        if using_reference() or not _is_cpu(device):
            return super()._torch_extract_fbank_features(waveform, device)  # type: ignore[misc]
        framing = Framing(self.window_size, self.hop_length, self.n_fft)
        left = max(self.n_fft - self.hop_length, 0)

        def make() -> "_C.SpectralPlan":
            options = framing.options() | dict(exponent=1.0, power_floor=1e-10, log="decimal", floor=1e-10)
            options |= dict(edge="zero", offset=(self.n_fft - self.window_size) // 2 - left, bins_first=False)
            return _C.SpectralPlan(options, self.window.double().numpy(), self.mel_filters.double().numpy())

        plan = cached_plan(("inkling", framing), [self.mel_filters, self.window], make)
        padded = left + math.ceil(waveform.shape[-1] / self.hop_length) * self.hop_length
        frames = max(0, (padded - self.n_fft) // self.hop_length + 1)
        return torch.from_numpy(_features(plan, waveform, frames, bins_first=False))


def _has_torchaudio() -> bool:
    from transformers.utils import is_torchaudio_available

    return is_torchaudio_available()


class GraniteSpeechMixin:
    """torchaudio's MelSpectrogram, log10, clipped to 8 below each clip's maximum. Needs no torchaudio here."""

    def __init__(self, sampling_rate: int = 16000, n_fft: int = 512, win_length: int = 400, hop_length: int = 160,
                 n_mels: int = 80, projector_window_size: int = 15, projector_downsample_rate: int = 5,
                 padding_value: float = 0.0, **kwargs: Any) -> None:  # fmt: skip
        from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor

        if _has_torchaudio():
            super().__init__(  # type: ignore[call-arg]
                sampling_rate=sampling_rate, n_fft=n_fft, win_length=win_length, hop_length=hop_length, n_mels=n_mels,
                projector_window_size=projector_window_size, projector_downsample_rate=projector_downsample_rate,
                padding_value=padding_value, **kwargs,
            )  # fmt: skip
            return
        feature_size = n_mels if kwargs.get("feature_size") is None else kwargs.pop("feature_size")
        SequenceFeatureExtractor.__init__(  # type: ignore[arg-type]
            self, feature_size=feature_size, sampling_rate=sampling_rate, padding_value=padding_value, **kwargs
        )
        self.melspec_kwargs = dict(
            sample_rate=sampling_rate, n_fft=n_fft, win_length=win_length, hop_length=hop_length, n_mels=n_mels
        )
        self.mel_filters = None
        self.projector_window_size = projector_window_size
        self.projector_downsample_rate = projector_downsample_rate

    def _extract_mel_spectrograms(self, audio: Tensor, device: str | None = "cpu") -> Tensor:
        if using_reference() or not _is_cpu(device):
            return super()._extract_mel_spectrograms(audio, device)  # type: ignore[misc]
        out = _granite_log_mel(self.melspec_kwargs, audio.float(), DYNAMIC_RANGE)
        out = out[:, : out.shape[1] // 2 * 2]  # the odd last frame
        return torch.from_numpy(out).reshape(len(out), -1, 2 * out.shape[-1])

    def __call__(self, audios: Any, device: str | None = "cpu") -> Any:
        if _has_torchaudio() or using_reference():
            return super().__call__(audios, device)  # type: ignore[misc]
        from transformers.feature_extraction_utils import BatchFeature

        batched, lengths = self._get_audios_and_audio_lengths(audios)  # type: ignore[attr-defined]
        sizes = self._get_num_audio_features(lengths)  # type: ignore[attr-defined]
        features = self._extract_mel_spectrograms(batched, device=device)
        mask = torch.arange(max(sizes)).view(1, -1) < torch.tensor(sizes).view(-1, 1)
        return BatchFeature(dict(input_features=features, audio_embed_sizes=sizes, input_features_mask=mask))


def _granite_log_mel(melspec: dict[str, int], audio: Any, dynamic_range: float, frames: int | None = None) -> Any:
    """``max(log10 mel, max - range) / 4 + 1``, ``[num_clips, frames, n_mels]``."""
    from mmlm_fast.audio.filters import mel_filters

    framing = Framing(melspec["win_length"], melspec["hop_length"], melspec["n_fft"])
    options, num_frames = framing.centred("reflect")
    _refuse_short(audio.shape[-1], melspec["n_fft"] // 2 + 1)

    def make() -> "_C.SpectralPlan":
        all_options = whisper_options() | options | framing.options()
        all_options |= dict(dynamic_range=dynamic_range / 4, bins_first=False)
        rate = melspec["sample_rate"]
        filters = mel_filters(melspec["n_mels"], n_fft=melspec["n_fft"], sampling_rate=rate, norm=None, mel_scale="htk",
                              dtype=torch.float32, highest_hz=rate // 2)  # fmt: skip
        return _C.SpectralPlan(all_options, window_of("hann", framing.frame_length), filters)

    plan = cached_plan(("granite", framing, dynamic_range, *melspec.values()), [], make)
    return _features(plan, audio, num_frames(audio.shape[-1]) if frames is None else frames, bins_first=False)


class GraniteSpeech5Mixin:
    """The same with deltas and frames stacked. Needs no torchaudio here."""

    def __init__(self, num_mel_bins: int = 80, sampling_rate: int = 16000, n_fft: int = 512, win_length: int = 400,
                 hop_length: int = 160, delta_win_length: int = 3, logmel_floor_db: float = 8.0,
                 padding_value: float = 0.0, **kwargs: Any) -> None:  # fmt: skip
        from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor

        if _has_torchaudio():
            super().__init__(  # type: ignore[call-arg]
                num_mel_bins=num_mel_bins, sampling_rate=sampling_rate, n_fft=n_fft, win_length=win_length,
                hop_length=hop_length, delta_win_length=delta_win_length, logmel_floor_db=logmel_floor_db,
                padding_value=padding_value, **kwargs,
            )  # fmt: skip
            return
        kwargs.pop("feature_size", None)
        SequenceFeatureExtractor.__init__(  # type: ignore[arg-type]
            self,
            feature_size=num_mel_bins * self.delta_expansion * self.frame_stacking,  # type: ignore[attr-defined]
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
        if using_reference() or not _is_cpu(device):
            return super()._extract_features(audio, device)  # type: ignore[misc]
        stacking = self.frame_stacking  # type: ignore[attr-defined]
        frames = stacking * -(-(audio.shape[1] // self.hop_length) // stacking)
        needed = (frames - 1) * self.hop_length + 1
        audio = torch.nn.functional.pad(audio.float(), (0, max(0, needed - audio.shape[1])))
        melspec = dict(sample_rate=self.sampling_rate, n_fft=self.n_fft, win_length=self.win_length,  # type: ignore
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
    slope = sum(i * x[:, n + i : n + i + frames] for i in range(-n, n + 1))
    return slope / (n * (n + 1) * (2 * n + 1) / 3)


class FunAsrNanoMixin:
    """Kaldi's filter bank. Needs no torchaudio here."""

    def _extract_fbank_features(self, waveform: Tensor) -> Tensor:
        if using_reference():
            return super()._extract_fbank_features(waveform)  # type: ignore[misc]
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
        options |= dict(remove_dc_offset=True, frame_preemphasis=0.97) | (_NUMPY if own is not None else _FLOAT64)
        if own is not None:
            return _C.SpectralPlan(options, np.asarray(extractor.window, np.float64), _as_filters(own))
        filters = kaldi_mel_filters(num_mel_bins, _KALDI.n_fft, extractor.sampling_rate)
        return _C.SpectralPlan(options, window_of(window, _KALDI.frame_length, False), filters)

    tables = [] if own is None else [own, extractor.window]
    return cached_plan(("kaldi", window, num_mel_bins, scale, extractor.sampling_rate), tables, make)


def _kaldi_features(plan: "_C.SpectralPlan", waveform: np.ndarray, limit: int | None = None) -> np.ndarray:
    """``[frames, bins]`` of one clip."""
    rows = rows_of(waveform)
    _refuse_short(rows.shape[1], _KALDI.frame_length)
    frames = (rows.shape[1] - _KALDI.frame_length) // _KALDI.hop_length + 1
    return _features(plan, rows, frames if limit is None else min(frames, limit), bins_first=False)[0]


class ASTMixin:
    """Kaldi's filter bank with a Hann window, padded or cut to max_length frames."""

    def _extract_fbank_features(self, waveform: np.ndarray, max_length: int) -> np.ndarray:
        if using_reference() or self.sampling_rate != 16000:
            return super()._extract_fbank_features(waveform, max_length)  # type: ignore[misc]
        plan = _kaldi_plan(self, "hanning", self.num_mel_bins, 1.0)
        features = _kaldi_features(plan, waveform, max_length)
        out = np.zeros((max_length, features.shape[1]), np.float32)
        out[: len(features)] = features
        return out


class SeamlessM4TMixin:
    """Kaldi's filter bank of samples at 16-bit scale, in float64."""

    def _extract_fbank_features(self, waveform: np.ndarray) -> np.ndarray:
        if using_reference():
            return super()._extract_fbank_features(waveform)  # type: ignore[misc]
        first = np.squeeze(waveform[0] if waveform.ndim == 2 else waveform)
        if first.ndim != 1:
            raise ValueError(f"a clip must be [num_samples] or [1, num_samples], got shape {waveform.shape}")
        return _kaldi_features(_kaldi_plan(self, "povey", 0, 32768.0), first)


class Speech2TextMixin:
    """The same; without dither."""

    def _extract_fbank_features(self, waveform: np.ndarray) -> np.ndarray:
        if using_reference() or self.dither != 0 or self.sampling_rate != 16000:
            return super()._extract_fbank_features(waveform)  # type: ignore[misc]
        return _kaldi_features(_kaldi_plan(self, "povey", self.num_mel_bins, 32768.0), np.squeeze(waveform))


class Gemma3nAudioMixin:
    """ln of the mel magnitude, floored or with the floor added; computed in float64."""

    _adds_floor = False

    def _extract_spectrogram(self, waveform: np.ndarray, attention_mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows = waveform[None] if waveform.ndim == 1 else waveform
        if using_reference() or len(rows) != 1:
            return super()._extract_spectrogram(waveform, attention_mask)  # type: ignore[misc]
        if self.dither > 0.0:  # the same draw from the same generator as in the original
            rows = rows + self.dither * np.random.randn(*rows.shape).astype(rows.dtype)
        left = self.frame_length // 2 if self._adds_floor else 0
        framing = Framing(self.frame_length, self.hop_length, self.fft_length)
        per_bin = self.per_bin_mean is not None or self.per_bin_stddev is not None

        def make() -> "_C.SpectralPlan":
            floor = float(self.mel_floor)
            options = framing.options() | dict(exponent=1.0, log="natural", bins_first=False, edge="zero", offset=-left)
            options |= {"add": floor} if self._adds_floor else {"floor": floor}
            options |= _FLOAT64_OUT if per_bin else _FLOAT64
            options["scale"] = float(self.input_scale_factor)
            if self.preemphasis > 0 and self.preemphasis_htk_flavor:
                options["frame_preemphasis"] = self.preemphasis
            elif self.preemphasis > 0:  # of the signal, a frame starting one sample later
                options |= dict(signal_preemphasis=self.preemphasis, offset=1 - left)
            return _C.SpectralPlan(options, self.window.astype(np.float64), _as_filters(self.mel_filters))

        settings = (self.preemphasis, self.preemphasis_htk_flavor, float(self.mel_floor), self.input_scale_factor)
        key = ("gemma", framing, left, per_bin, *settings)
        plan = cached_plan(key, [self.mel_filters, self.window], make)
        span = self.frame_length + 1
        frames = max(0, (rows.shape[1] + left - span) // self.hop_length + 1)
        out = _features(plan, rows, frames, bins_first=False, dtype=np.float64 if per_bin else np.float32)[0]
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
        return super().__call__(raw_speech, *args, **kwargs)  # type: ignore[misc]

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
    rows = rows_of(waveform)
    _refuse_short(rows.shape[1], framing.n_fft // 2 + 1 if center else framing.n_fft)

    def make() -> "_C.SpectralPlan":
        table = np.asarray(window_of(window, framing.frame_length) if isinstance(window, str) else window, np.float64)
        all_options = edges | framing.options() | _NUMPY | dict(bins_first=bins_first, double_output=double) | options
        return _C.SpectralPlan(all_options, table, _as_filters(filters))

    tables = [filters] if isinstance(window, str) else [filters, window]
    key = (type(extractor).__name__, framing, center, double, bins_first, *sorted(options.items()))
    plan = cached_plan(key, tables, make)
    dtype = np.float64 if double else np.float32
    return _features(plan, rows, num_frames(rows.shape[1]), bins_first=bins_first, dtype=dtype)[0]


class ClapMixin:
    """Decibels of the mel power."""

    def _np_extract_fbank_features(self, waveform: np.ndarray, mel_filters: np.ndarray | None = None) -> np.ndarray:
        if using_reference() or mel_filters is None:
            return super()._np_extract_fbank_features(waveform, mel_filters)  # type: ignore[misc]
        framing = Framing(self.fft_window_size, self.hop_length, self.fft_window_size)
        options = dict(log="decimal", floor=1e-10, multiply=10.0)
        return _numpy_features(self, waveform, framing, "hann", mel_filters, bins_first=False, **options)


class ClvpMixin:
    """ln(max(mel, 1e-5)), divided by the norms of the bins; float64."""

    def _np_extract_fbank_features(self, waveform: np.ndarray) -> np.ndarray:
        if using_reference():
            return super()._np_extract_fbank_features(waveform)  # type: ignore[misc]
        framing = Framing(self.n_fft, self.hop_length, self.n_fft)
        options = dict(log="natural", floor=1e-5)
        out = _numpy_features(self, waveform, framing, "hann", self.mel_filters, bins_first=True, double=True, **options)
        return out if self.mel_norms is None else out / np.array(self.mel_norms)[:, None]


class SpeechT5Mixin:
    """log10 of the mel magnitude: the targets; inputs are waveforms."""

    def _extract_mel_features(self, one_waveform: np.ndarray) -> np.ndarray:
        # Its frames are centred by half a frame, which is half a transform only where both are of one length.
        if using_reference() or self.sample_size != self.n_fft:
            return super()._extract_mel_features(one_waveform)  # type: ignore[misc]
        framing = Framing(self.sample_size, self.sample_stride, self.n_fft)
        options = dict(exponent=1.0, log="decimal", floor=float(self.mel_floor))
        return _numpy_features(self, one_waveform, framing, self.window, self.mel_filters, bins_first=False, **options)


class UnivNetMixin:
    """ln of the mel of sqrt(|X|^2 + floor); float64."""

    def mel_spectrogram(self, waveform: np.ndarray) -> np.ndarray:
        if using_reference() or self.win_length != self.n_fft:
            return super().mel_spectrogram(waveform)  # type: ignore[misc]
        pad = int((self.n_fft - self.hop_length) / 2)
        padded = np.pad(waveform, (pad, pad), mode="reflect")
        framing = Framing(self.n_fft, self.hop_length, self.n_fft)
        options = dict(
            exponent=1.0,
            power_add=float(self.mel_floor),
            log="natural",
            floor=float(self.compression_clip_val),
            shift=math.log(self.compression_factor),
        )
        tables = (self.window, self.mel_filters)
        return _numpy_features(
            self, padded, framing, *tables, bins_first=False, center=self.center, double=True, **options
        )


class Pop2PianoMixin:
    """Mel power, floored at 1e-10; float64. Beats are found by essentia, as in the original."""

    def mel_spectrogram(self, sequence: np.ndarray) -> np.ndarray:
        if using_reference():
            return super().mel_spectrogram(sequence)  # type: ignore[misc]
        framing = Framing(self.window_size, self.hop_length, self.window_size)
        options = dict(floor=1e-10)
        return np.array([
            _numpy_features(self, clip, framing, "hann", self.mel_filters, bins_first=True, double=True, **options)
            for clip in sequence
        ])  # fmt: skip


# ---- the list -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Extractor:
    module: str  # in transformers.models
    mixin: str  # "module:class"
    computes: str


_HERE = "mmlm_fast.audio.extractors"
EXTRACTORS = {
    "WhisperFeatureExtractor": Extractor("whisper", "mmlm_fast.audio.whisper:FastWhisperMixin", "log-mel"),
    "ASTFeatureExtractor": Extractor("audio_spectrogram_transformer", f"{_HERE}:ASTMixin", "Kaldi fbank"),
    "ClapFeatureExtractor": Extractor("clap", f"{_HERE}:ClapMixin", "mel in dB, float64"),
    "ClvpFeatureExtractor": Extractor("clvp", f"{_HERE}:ClvpMixin", "log-mel, float64"),
    "CohereAsrFeatureExtractor": Extractor("cohere_asr", f"{_HERE}:ParakeetMixin", "NeMo log-mel"),
    "Dots3NoteFeatureExtractor": Extractor("dots3_note", f"{_HERE}:WhisperMixin", "log-mel"),
    "FunAsrNanoFeatureExtractor": Extractor("fun_asr_nano", f"{_HERE}:FunAsrNanoMixin", "Kaldi fbank, stacked"),
    "Gemma3nAudioFeatureExtractor": Extractor("gemma3n", f"{_HERE}:Gemma3nAudioMixin", "log-mel magnitude"),
    "Gemma4AudioFeatureExtractor": Extractor("gemma4", f"{_HERE}:Gemma4AudioMixin", "log-mel magnitude"),
    "GraniteSpeechFeatureExtractor": Extractor("granite_speech", f"{_HERE}:GraniteSpeechMixin", "log-mel, stacked"),
    "GraniteSpeech5FeatureExtractor": Extractor(
        "granite_speech5", f"{_HERE}:GraniteSpeech5Mixin", "log-mel and deltas, stacked"
    ),
    "InklingFeatureExtractor": Extractor("inkling", f"{_HERE}:InklingMixin", "log-mel magnitude"),
    "LasrFeatureExtractor": Extractor("lasr", f"{_HERE}:LasrMixin", "log-mel, float64"),
    "MossTranscribeDiarizeFeatureExtractor": Extractor("moss_transcribe_diarize", f"{_HERE}:WhisperMixin", "log-mel"),
    "NemotronAsrStreamingFeatureExtractor": Extractor(
        "nemotron_asr_streaming", f"{_HERE}:ParakeetMixin", "NeMo log-mel"
    ),
    "NeuCodecFeatureExtractor": Extractor("neucodec", "mmlm_fast.audio.codecs:NeuCodecMixin", "Kaldi fbank, stacked"),
    "ParakeetFeatureExtractor": Extractor("parakeet", f"{_HERE}:ParakeetMixin", "NeMo log-mel"),
    "Phi4MultimodalFeatureExtractor": Extractor("phi4_multimodal", f"{_HERE}:Phi4MultimodalMixin", "log-mel, float64"),
    "Pop2PianoFeatureExtractor": Extractor("pop2piano", f"{_HERE}:Pop2PianoMixin", "mel, float64"),
    "Qwen3ASRFeatureExtractor": Extractor("qwen3_asr", f"{_HERE}:WhisperMixin", "log-mel"),
    "SeamlessM4TFeatureExtractor": Extractor("seamless_m4t", f"{_HERE}:SeamlessM4TMixin", "Kaldi fbank, float64"),
    "Speech2TextFeatureExtractor": Extractor("speech_to_text", f"{_HERE}:Speech2TextMixin", "Kaldi fbank, float64"),
    "SpeechT5FeatureExtractor": Extractor("speecht5", f"{_HERE}:SpeechT5Mixin", "log-mel magnitude, float64 (targets)"),
    "UnivNetFeatureExtractor": Extractor("univnet", f"{_HERE}:UnivNetMixin", "log-mel, float64"),
    "VoxtralRealtimeFeatureExtractor": Extractor("voxtral_realtime", f"{_HERE}:VoxtralRealtimeMixin", "log-mel"),
    "Xcodec2FeatureExtractor": Extractor("xcodec2", "mmlm_fast.audio.codecs:Xcodec2Mixin", "Kaldi fbank, stacked"),
}
# Feature extractors of transformers that compute no mel features, and why they are left as they are.
NOT_REPLACED = {
    "MusicgenMelodyFeatureExtractor": "chroma, no mel; one-hot of a 16384-point spectrum",
    "DacFeatureExtractor": "waveform, padded",
    "DiaFeatureExtractor": "waveform, padded",
    "EncodecFeatureExtractor": "waveform, padded",
    "Gemma4UnifiedAudioFeatureExtractor": "waveform, cut into frames",
    "KyutaiSpeechToTextFeatureExtractor": "waveform, padded",
    "MuseSparkFeatureExtractor": "waveform, padded",
    "PeAudioFeatureExtractor": "waveform, padded",
    "PocketTTSFeatureExtractor": "waveform, padded",
    "VibeVoiceAcousticTokenizerFeatureExtractor": "waveform, loudness normalised",
    "Wav2Vec2FeatureExtractor": "waveform, normalised",
    "MarkupLMFeatureExtractor": "no audio: HTML",
}
_made: dict[str, type] = {}


def drop_in(name: str) -> type:
    """The drop-in of that name; AttributeError where this transformers has no such class."""
    known = _made.get(name)
    if known is None:
        entry = EXTRACTORS[name]
        try:
            module = import_module(f"transformers.models.{entry.module}.feature_extraction_{entry.module}")
            original = getattr(module, name)
        except (ImportError, AttributeError) as error:
            raise AttributeError(f"this version of transformers has no {name}: {error}") from error
        module_name, _, mixin = entry.mixin.partition(":")
        bases = (getattr(import_module(module_name), mixin), original)
        doc = f"`transformers.{name}` with its {entry.computes} from the native core; see {entry.mixin}."
        known = _made.setdefault(name, type(name, bases, {"__module__": "mmlm_fast.audio", "__doc__": doc}))
    return known
