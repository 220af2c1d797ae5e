"""Drop-in for transformers' WhisperFeatureExtractor: the same call and the same output, from the native core."""

from operator import attrgetter
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature
from transformers.utils import PaddingStrategy

from mmlm_fast.audio.extractors.shared import check_rate
from mmlm_fast.audio.extractors.whisper_family import WhisperMixin, whisper_spec
from mmlm_fast.audio.features import run_rows
from mmlm_fast.audio.log_mel import HOP_LENGTH, N_FFT
from mmlm_fast.audio.tables import Table
from mmlm_fast.audio.waveforms import check_mono

MIN_SAMPLES = N_FFT // 2 + 1
_FLOATS = (np.dtype(np.float32), np.dtype(np.float64))
_SETTINGS = attrgetter("n_fft", "hop_length", "padding_side", "padding_value", "dither", "feature_size", "mel_filters")
_STRATEGIES = {"longest": PaddingStrategy.LONGEST, "max_length": PaddingStrategy.MAX_LENGTH}


class WhisperCallMixin(WhisperMixin):
    """`transformers.WhisperFeatureExtractor` with Whisper's log-mel from the native core.

    Same constructor, call, keys, dtypes, padding, truncation and attention mask; `from_pretrained`, `save_pretrained`
    and Processors work as before, and what it saves loads without this package. It differs where the original's answer
    helps nobody, and raises ValueError: integer samples (unscaled in silence there), NaN, infinite or overflowing
    samples (a whole clip of NaN there), and arrays shaped ``[num_samples, channels]`` (taken for as many clips there).
    `do_normalize` works in float32 for float16 samples too.
    """

    _checks_samples = True  # on its own; integers, which the original takes unscaled, are refused

    # Set by the original's constructor.
    sampling_rate: int
    feature_size: int
    n_samples: int
    padding_value: float
    padding_side: str
    return_attention_mask: bool

    def __call__(
        self,
        raw_speech: Any,
        truncation: bool = True,
        pad_to_multiple_of: int | None = None,
        return_tensors: Any = None,
        return_attention_mask: bool | None = None,
        padding: Any = "max_length",
        max_length: int | None = None,
        sampling_rate: int | None = None,
        do_normalize: bool | None = None,
        device: str | None = "cpu",
        **kwargs: Any,
    ) -> BatchFeature:
        """Extract log-mel features; arguments and result are those of transformers' class."""
        given: dict[str, Any] = dict(
            truncation=truncation,
            pad_to_multiple_of=pad_to_multiple_of,
            return_tensors=return_tensors,
            return_attention_mask=return_attention_mask,
            padding=padding,
            max_length=max_length,
            sampling_rate=sampling_rate,
            do_normalize=do_normalize,
            device=device,
        )
        clips = _as_clips(raw_speech)
        out = self._computed(clips, **given)
        return super().__call__(clips, **given, **kwargs) if out is None else out

    def _direct(self, raw_speech: Any, *args: Any, **kwargs: Any) -> BatchFeature | None:
        """Answer a call with one float clip, or a list of them, as `__call__` would; None for others."""
        clips = [raw_speech] if isinstance(raw_speech, np.ndarray) else raw_speech
        if args or type(clips) is not list or not clips:
            return None
        for clip in clips:
            if type(clip) is not np.ndarray or clip.ndim != 1 or clip.dtype not in _FLOATS:
                return None
        return self._computed([np.ascontiguousarray(clip, np.float32) for clip in clips], **kwargs)

    def _computed(
        self,
        clips: list[np.ndarray],
        truncation: bool = True,
        pad_to_multiple_of: int | None = None,
        return_tensors: Any = None,
        return_attention_mask: bool | None = None,
        padding: Any = "max_length",
        max_length: int | None = None,
        sampling_rate: int | None = None,
        do_normalize: bool | None = None,
        device: str | None = "cpu",
        **kwargs: Any,
    ) -> BatchFeature | None:
        """Answer a call in the core; None where the original is to pad, to normalise or to raise its own error.

        Features are from our core there too: with dither, normalisation and on other devices.
        """
        if do_normalize or device != "cpu" or not self._is_native():
            return None
        if sampling_rate != self.sampling_rate:
            if sampling_rate is not None:
                return None
            check_rate(self, None)
        lengths = self._padded_lengths(clips, truncation, pad_to_multiple_of, padding, max_length)
        if lengths is None:  # clips that come out unequal
            return None
        num_valid, num_samples = lengths
        if num_samples < MIN_SAMPLES:
            _refuse_short(num_samples)
        frames = num_samples // HOP_LENGTH
        out = np.empty((len(clips), self.feature_size, frames), np.float32)
        valid = [clip if len(clip) == n else clip[:n] for clip, n in zip(clips, num_valid, strict=True)]
        spec = whisper_spec(N_FFT, HOP_LENGTH, Table.of(self.mel_filters, transposed=True))
        if spec.why_not:
            return None
        run_rows(spec, valid, [num_samples] * len(clips), [frames] * len(clips), out)

        wants_tensor = return_tensors == "pt"
        result = BatchFeature(tensor_type=None if wants_tensor else return_tensors)
        result.data["input_features"] = torch.from_numpy(out) if wants_tensor else out
        # As in the original, an explicit False leaves the choice to the extractor's own setting, and only a mask
        # asked for in the call is brought from samples to frames.
        if return_attention_mask or self.return_attention_mask:
            step = HOP_LENGTH if return_attention_mask else 1
            positions = np.arange(num_samples // step) * step
            mask = (positions < np.array(num_valid)[:, None]).astype(np.int32)
            result.data["attention_mask"] = torch.from_numpy(mask) if wants_tensor else mask
        return result if wants_tensor or return_tensors is None else result.convert_to_tensors(return_tensors)

    def _is_native(self) -> bool:
        n_fft, hop, side, value, dither, bins, filters = _SETTINGS(self)
        if n_fft != N_FFT or hop != HOP_LENGTH or side != "right" or value != 0 or dither != 0:
            return False
        if type(bins) is not int or getattr(filters, "shape", None) != (N_FFT // 2 + 1, bins):
            return False
        return not self._takes_original("__call__")

    def _padded_lengths(
        self, clips: list[np.ndarray], truncation: bool, multiple: int | None, padding: Any, max_length: int | None
    ) -> tuple[list[int], int] | None:
        """Valid samples of each clip and the padded length of all; None where the clips end up unequal."""
        limit = max_length if max_length else self.n_samples
        if multiple is None and padding == "longest" and len(clips) == 1:
            n = min(len(clips[0]), limit) if truncation else len(clips[0])
            return [n], n

        def rounded(n: int) -> int:
            return n if multiple is None else -(-n // multiple) * multiple

        num_valid = [min(len(c), rounded(limit)) if truncation else len(c) for c in clips]
        strategy = _STRATEGIES.get(padding) if type(padding) is str else None
        if strategy is None:
            strategy = self._get_padding_strategies(padding=padding, max_length=limit)
        if strategy == PaddingStrategy.DO_NOT_PAD:
            target = 0
        else:
            target = rounded(max(num_valid) if strategy == PaddingStrategy.LONGEST else limit)
        padded = {max(n, target) for n in num_valid}
        return (num_valid, padded.pop()) if len(padded) == 1 else None


def _refuse_short(num_samples: int) -> None:
    raise ValueError(
        f"a clip needs at least {MIN_SAMPLES} samples after padding, got {num_samples}: use padding='max_length'"
    )


def _as_clips(raw_speech: Any) -> list[np.ndarray]:
    """One clip, or a batch of them, as contiguous float32 arrays."""
    if isinstance(raw_speech, torch.Tensor):
        raw_speech = raw_speech.detach().cpu().numpy()
    if isinstance(raw_speech, np.ndarray) and raw_speech.ndim > 1:
        if raw_speech.ndim > 2:
            raise ValueError(f"only mono-channel audio is supported: [batch, num_samples], got {raw_speech.shape}")
        check_mono(raw_speech.shape, "raw_speech")
        raw_speech = list(raw_speech)
    is_sequence = isinstance(raw_speech, (list, tuple))
    if is_sequence and len(raw_speech) == 0:
        raise ValueError("raw_speech must hold at least one clip, got an empty list")
    if is_sequence and isinstance(raw_speech[0], (np.ndarray, torch.Tensor, list, tuple)):
        return [_as_clip(clip, i) for i, clip in enumerate(raw_speech)]
    return [_as_clip(raw_speech, 0)]


def _as_clip(clip: Any, index: int) -> np.ndarray:
    if isinstance(clip, torch.Tensor):
        clip = clip.detach().cpu().float().numpy() if clip.is_floating_point() else clip.cpu().numpy()
    try:
        array = np.asarray(clip)
    except ValueError:
        raise ValueError(f"clip {index} must be a flat sequence of samples, got ragged lists") from None
    if array.ndim != 1:
        raise ValueError(f"clip {index} must be mono, [num_samples], got shape {array.shape}: mix down first")
    if array.size and array.dtype.kind != "f":
        raise ValueError(
            f"clip {index} must hold floats in [-1, 1], got {array.dtype}: divide int16 by 32768 to scale it"
        )
    return np.ascontiguousarray(array, dtype=np.float32)
