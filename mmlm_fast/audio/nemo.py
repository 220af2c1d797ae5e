"""NeMo's log-mel features, as in Parakeet and Canary."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mmlm_fast.audio.arguments import float_name, plain_float, whole
from mmlm_fast.audio.features import as_torch_does, features_of
from mmlm_fast.audio.sinc import num_resampled
from mmlm_fast.audio.spec import Framing, MelFilters, Spec, Window, kept_spec
from mmlm_fast.audio.standardize import standardize
from mmlm_fast.audio.waveforms import Samples, clips_of

SAMPLING_RATE = 16000
HOP_LENGTH = 160
EPSILON = 1e-5  # added to the deviation

NEMO = Spec(
    n_fft=512,
    frame_length=400,
    hop_length=HOP_LENGTH,
    window=Window("hann", periodic=False),
    framing=Framing.centered(512, 400, "zero"),
    sampling_rate=SAMPLING_RATE,
    filters=MelFilters(80),
    signal_preemphasis=0.97,
    add=2.0**-24,
    log="natural",
    bins_first=False,
)


def _plain(*, num_mel_bins: Any, preemphasis: Any, dtype: Any) -> dict[str, Any]:
    return dict(
        num_mel_bins=whole("num_mel_bins", num_mel_bins, 1, 512, "from 1 to 512"),
        preemphasis=plain_float(preemphasis, "preemphasis"),
        dtype=float_name(dtype),
    )


@kept_spec(_plain)
def nemo_spec(*, num_mel_bins: int, preemphasis: float, dtype: str) -> Spec:
    """Return the spec of `nemo_log_mel`'s keywords, without its normalisation."""
    return replace(NEMO, filters=MelFilters(num_mel_bins), signal_preemphasis=preemphasis, dtype=dtype)


def nemo_log_mel(
    waveform: "Samples | Sequence[Samples]",
    *,
    num_mel_bins: int = 80,
    preemphasis: float = 0.97,
    normalize: bool = True,
    orig_freq: int | None = None,
    channel_dim: int | None = None,
    dtype: Any = "float32",
) -> "Samples | list[Samples]":
    """Compute NeMo's log-mel features, ``ln(mel + 2⁻²⁴)``, each bin standardised over the clip.

    Pre-emphasis of the signal, symmetric Hann window of 400 samples every 160, centred in transforms of 512 (zeros
    beyond the ends), power, Slaney filters from 0 to 8000 Hz.

    Args:
        waveform: Audio at 16 kHz: ``[*batch, N]``, or a sequence of 1-D ones: tensors or arrays. Float samples in
            [-1, 1], or int16 or int32 ones, which are scaled to [-1, 1).
        num_mel_bins: 80 (Parakeet), 128 (Canary).
        preemphasis: Of ``x[t] - c x[t-1]``; 0 for none.
        normalize: Subtract each bin's mean and divide by its deviation (n - 1) plus 1e-5, over the ``N // 160`` frames
            that the clip fills; the last frame, which it does not, becomes 0.
        orig_freq: Rate of the waveform where it is not 16 kHz: resampled in the same pass.
        channel_dim: Dimension that holds channels, which are averaged.
        dtype: Of the result, of torch or numpy or by name: float32, float16, bfloat16 (computed in float32), or
            float64, computed in float64.

    Returns:
        ``[*batch, 1 + N // 160, num_mel_bins]``; a list of them where a sequence of clips came; arrays for arrays.
        Differentiable.

    Raises:
        ValueError: for a clip of less than two frames (320 samples) with `normalize`, where NeMo gives NaN, and for
            NaN or infinite samples (CPU).

    Source: NVIDIA NeMo ``FilterbankFeatures``; transformers ``ParakeetFeatureExtractor``.
    """
    spec = nemo_spec(num_mel_bins=num_mel_bins, preemphasis=preemphasis, dtype=dtype)
    clips = clips_of(waveform, channel_dim=channel_dim, orig_freq=orig_freq)
    lengths = [num_resampled(w.shape[-1], clips.orig_freq, SAMPLING_RATE) for w in clips.waveforms]
    if normalize:
        for i, n in enumerate(lengths):
            if n // HOP_LENGTH < 2:
                raise ValueError(
                    f"clip {i} must have at least {2 * HOP_LENGTH} samples, two frames to normalise over, got {n}"
                )
    out = features_of(spec, clips)
    if not normalize or not lengths:
        return out
    if not isinstance(out, list):
        return _standardized(out, lengths[0])
    return [_standardized(x, n) for x, n in zip(out, lengths, strict=True)]


def _standardized(features: Any, num_samples: int) -> Any:
    count = num_samples // HOP_LENGTH
    return as_torch_does(lambda x: standardize(x, count, ddof=1, eps_outside=EPSILON), features)
