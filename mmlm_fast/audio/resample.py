"""Polyphase resampling with a windowed sinc: torchaudio's definition, in the native core."""

from collections.abc import Sequence

from mmlm_fast.audio.features import resample_clips
from mmlm_fast.audio.sinc import checked_options, checked_rates
from mmlm_fast.audio.waveforms import Samples, clips_of


def resample(
    waveform: "Samples | Sequence[Samples]",
    orig_freq: int,
    new_freq: int,
    lowpass_filter_width: int = 6,
    rolloff: float = 0.99,
    resampling_method: str = "sinc_interp_hann",
    beta: float | None = None,
    *,
    channel_dim: int | None = None,
) -> "Samples | list[Samples]":
    """Resample by a windowed sinc, with conversion to float and mixing down in the same pass.

    Any two rates do: where they have so little in common that a table of the filters would be large (none that audio
    comes in), the taps are made with each output, in no more memory than the clip's.

    Args:
        waveform: ``[*batch, N]``, or a sequence of 1-D ones: tensors or arrays. float16, bfloat16, float32 and float64
            samples, or int16 and int32 ones, which are scaled to [-1, 1).
        orig_freq: Rate of the samples in whole hertz.
        new_freq: Rate wanted, in whole hertz.
        lowpass_filter_width: Zero crossings of the sinc on each side; more is sharper and dearer.
        rolloff: Cut-off as a fraction of the lower Nyquist frequency, in (0, 1].
        resampling_method: "sinc_interp_hann" or "sinc_interp_kaiser".
        beta: Shape of the Kaiser window; default 14.77.
        channel_dim: Dimension that holds channels, which are averaged; by default there is none.

    Returns:
        ``[*batch, ceil(N * new_freq / orig_freq)]`` in float32 (float64 for float64 samples), sums accumulated in that
        dtype; a list where a sequence came; arrays for arrays. With equal rates only conversion and mixing are done.
        Differentiable.

    Raises:
        ValueError: for rates that are not positive whole numbers, or options out of range.

    Source: torchaudio ``functional.resample``, whose filters these are, made in float64.
    """
    old, new = checked_rates(orig_freq, new_freq)
    options = checked_options(lowpass_filter_width, rolloff, resampling_method, beta)
    return resample_clips(clips_of(waveform, channel_dim=channel_dim, orig_freq=old), old, new, options)
