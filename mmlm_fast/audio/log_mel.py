"""Whisper's log-mel spectrogram."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mmlm_fast.audio.arguments import float_name, plain_float, whole
from mmlm_fast.audio.features import features_of
from mmlm_fast.audio.sinc import num_resampled
from mmlm_fast.audio.spec import Framing, MelFilters, Spec, Window, kept_spec, prepared, spec_of, torch_is_loaded
from mmlm_fast.audio.waveforms import ARRAYS, Samples, clips_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

N_FFT = 400
HOP_LENGTH = 160
SAMPLING_RATE = 16000
DYNAMIC_RANGE = 8.0  # in log10 mel, below the loudest value of a clip

# (max(log10(max(mel, 1e-10)), loudest - 8) + 4) / 4; the last frame is dropped.
WHISPER = Spec(
    n_fft=N_FFT,
    frame_length=N_FFT,
    hop_length=HOP_LENGTH,
    window=Window("hann"),
    framing=Framing.centered(N_FFT, N_FFT, "reflect", num_dropped=1),
    sampling_rate=SAMPLING_RATE,
    filters=MelFilters(80),
    floor=1e-10,
    log="decimal",
    multiply=0.25,
    shift=1.0,
    dynamic_range=DYNAMIC_RANGE / 4,
)


def below(spec: Spec, log_mel_max: float) -> Spec:
    """Return a spec that clips to 8 below a constant, not below each clip's own maximum."""
    return replace(spec, floor=max(1e-10, 10.0 ** (log_mel_max - DYNAMIC_RANGE)), dynamic_range=0.0)


def _plain(*, num_mel_bins: Any, log_mel_max: Any, dtype: Any) -> dict[str, Any]:
    return dict(
        num_mel_bins=whole("num_mel_bins", num_mel_bins, 1, 512, "from 1 to 512"),
        log_mel_max=None if log_mel_max is None else _limit(log_mel_max),
        dtype=float_name(dtype),
    )


def _limit(log_mel_max: Any) -> float:
    limit = plain_float(log_mel_max, "log_mel_max")
    if not -300 <= limit <= 300:
        raise ValueError(f"log_mel_max must be a power of ten that float64 holds, from -300 to 300, got {limit}")
    return limit


@kept_spec(_plain)
def log_mel_spec(*, num_mel_bins: int, log_mel_max: float | None, dtype: str) -> Spec:
    """Return the spec of `log_mel`'s keywords.

    Raises:
        ValueError: for keywords out of range.
    """
    spec = replace(WHISPER, filters=MelFilters(num_mel_bins), dtype=dtype)
    return spec if log_mel_max is None else below(spec, log_mel_max)


def log_mel_ref(waveform: "Tensor", num_mel_bins: int = 80) -> "Tensor":
    """Compute the definition, in plain PyTorch and in the waveform's dtype: ``[*batch, N]`` to ``[*batch, M, F]``."""
    from mmlm_fast.audio.reference import spectral_ref

    spec = log_mel_spec(num_mel_bins=num_mel_bins, log_mel_max=None, dtype="float32")
    spec = spec_of(spec) if isinstance(spec, str) else spec
    return spectral_ref(spec, waveform, prepared(spec).layout.num_frames(waveform.shape[-1]))


def log_mel(
    waveform: "Samples | Sequence[Samples]",
    *,
    num_mel_bins: int = 80,
    sampling_rate: int = SAMPLING_RATE,
    num_samples: int | None = None,
    orig_freq: int | None = None,
    channel_dim: int | None = None,
    log_mel_max: float | None = None,
    dtype: Any = "float32",
) -> Samples:
    """Compute Whisper's log-mel spectrogram, ``(max(log₁₀ mel, max − 8) + 4) / 4``.

    Frames of 400 samples every 160, centred (reflect padding), periodic Hann window, power, Slaney mel filters from
    0 to 8000 Hz, floor 1e-10, clipped to 8 below the clip's maximum.

    Args:
        waveform: Audio at 16 kHz: a tensor or an array ``[*batch, N]``, or a sequence of 1-D ones of different lengths.
            Float samples in [-1, 1], or int16 or int32 ones, which are scaled to [-1, 1).
        num_mel_bins: 80 (Whisper up to large-v2) or 128 (large-v3), any number from 1 to 512.
        sampling_rate: In hertz, for callers that carry it along. Only 16000 is accepted; see `orig_freq`.
        num_samples: Every clip is padded with zeros to this length before anything else, as Whisper pads to 30 s
            (480000). Default: the longest clip. A longer clip is an error, never cut.
        orig_freq: Rate of the waveform where it is another: it is resampled to 16 kHz in the same pass (see
            `resample`). `num_samples` counts resampled ones.
        channel_dim: Dimension that holds channels, which are averaged; by default there is none.
        log_mel_max: Clip to 8 below this value of log₁₀ mel, not below each clip's own maximum: 1.5 is Voxtral
            Realtime's. Then frames do not depend on what comes later, and `StreamingLogMel` has the same bits.
        dtype: Of the result, of torch or numpy or by name: float32, float16, bfloat16 (computed in float32, rounded
            once), or float64, computed in float64, for what a peer in float64 computes.

    Returns:
        ``[*batch, num_mel_bins, num_samples // 160]`` of `dtype`: a tensor on the device of the waveform, an array for
        arrays. On a CPU the native
        core computes each clip's own samples only, on `torch.get_num_threads()` threads above 20 s of audio. Where the
        waveform needs a gradient, the differentiable reference runs instead.

    Raises:
        ValueError: for another sampling rate, complex samples, a clip that is too long or shorter than 201 samples
            after padding, NaN or infinite samples (CPU only: on CUDA they become NaN features, since looking would
            synchronise), or a stereo array in place of clips.

    Source: openai/whisper ``audio.py``; transformers ``WhisperFeatureExtractor``.
    """
    if whole("sampling_rate", sampling_rate) != SAMPLING_RATE:
        raise ValueError(
            f"sampling_rate must be {SAMPLING_RATE}, got {sampling_rate}: pass orig_freq={sampling_rate} to have the "
            f"waveform resampled"
        )
    spec = log_mel_spec(num_mel_bins=num_mel_bins, log_mel_max=log_mel_max, dtype=dtype)
    clips = clips_of(waveform, channel_dim=channel_dim, orig_freq=orig_freq)
    if num_samples is not None:
        num_samples = whole("num_samples", num_samples, 0)
    elif clips.batch is None:
        lengths = [num_resampled(w.shape[-1], clips.orig_freq, SAMPLING_RATE) for w in clips.waveforms]
        num_samples = max(lengths, default=0)
    if clips.batch is None and clips.waveforms:
        clips = clips._replace(batch=(len(clips.waveforms),))  # all are padded to one length
    out = features_of(spec, clips, num_samples)
    return out if clips.batch is not None else _of_no_clips(num_mel_bins, num_samples or 0, dtype)


def _of_no_clips(num_mel_bins: Any, num_samples: int, dtype: Any) -> Any:
    """Return no features: of no clips, which are neither tensors nor arrays, what torch is loaded for."""
    library: Any = ARRAYS
    if torch_is_loaded():
        from mmlm_fast.audio.tensors import TENSORS as library
    shape = (0, whole("num_mel_bins", num_mel_bins), num_samples // HOP_LENGTH)
    return library.empty(shape, float_name(dtype))
