"""Random shapes and options, bounded: the core and the reference agree, or both refuse; nothing crashes or leaks in."""

import math
import os

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmlm_fast import _C, reference
from mmlm_fast.audio import kaldi_fbank, mel_spectrogram, mfcc, resample, spectrogram

# The same examples in every run, so that CI says what the change did; MMLM_FAST_FUZZ=5000 looks for others.
EXAMPLES = int(os.environ.get("MMLM_FAST_FUZZ", "0"))
BOUNDED = settings(
    max_examples=EXAMPLES or 120,
    derandomize=not EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


def waveform(num_samples: int, seed: int, kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_samples, dtype=torch.float64, generator=generator)
    if kind == "zeros":
        x *= 0
    if kind == "clicks":
        x = (x > 2).double()
    return x


SIGNALS = st.tuples(st.integers(0, 3000), st.integers(0, 99), st.sampled_from(["noise", "zeros", "clicks"]))


def outcome(call):
    try:
        return call()
    except ValueError as error:
        return error


def agree(call):
    ours = outcome(call)
    with reference():
        theirs = outcome(call)
    if isinstance(theirs, ValueError) or isinstance(ours, ValueError):
        assert isinstance(ours, ValueError) == isinstance(theirs, ValueError), (ours, theirs)
        return
    scale = max(1.0, theirs.abs().max().item()) if theirs.numel() else 1.0
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-8 * scale)


@BOUNDED
@given(
    SIGNALS,
    st.fixed_dictionaries(
        dict(
            n_fft=st.integers(1, 700),
            hop_length=st.integers(1, 900),
            center=st.booleans(),
            pad_mode=st.sampled_from(["reflect", "constant", "symmetric"]),
            power=st.sampled_from([1.0, 2.0, 0.7]),
            normalized=st.sampled_from([False, True, "frame_length"]),
            window_fn=st.sampled_from(["hann", "hamming", "povey", "blackman", "rectangular"]),
            log=st.sampled_from(["none", "log10", "dB"]),
            top_db=st.sampled_from([None, 20.0]),
            pad=st.sampled_from([0, 0, 5]),
        )
    ),
    st.integers(1, 700),
)
def test_spectrogram(signal, options, win_length):
    options["win_length"] = min(win_length, options["n_fft"])
    agree(lambda: spectrogram(waveform(*signal), dtype=torch.float64, **options))


@BOUNDED
@given(
    SIGNALS,
    st.fixed_dictionaries(
        dict(
            frame_length=st.floats(1, 60),
            frame_shift=st.floats(0.5, 40),
            num_mel_bins=st.integers(4, 40),
            snip_edges=st.booleans(),
            use_energy=st.booleans(),
            raw_energy=st.booleans(),
            htk_compat=st.booleans(),
            remove_dc_offset=st.booleans(),
            preemphasis_coefficient=st.sampled_from([0.0, 0.5, 0.97, 1.0]),
            round_to_power_of_two=st.booleans(),
            energy_floor=st.sampled_from([0.0, 1.0, 1e4]),
            window_type=st.sampled_from(["povey", "hanning", "hamming", "blackman", "rectangular"]),
            scale=st.sampled_from([1.0, 32768.0]),
        )
    ),
    st.booleans(),
)
def test_kaldi(signal, options, cepstra):
    function = mfcc if cepstra else kaldi_fbank
    if cepstra:
        options["num_ceps"] = max(1, options["num_mel_bins"] // 2)
    agree(lambda: function(waveform(*signal), dtype=torch.float64, **options))


@BOUNDED
@given(SIGNALS, st.integers(1, 60), st.integers(1, 60), st.integers(1, 12), st.floats(0.3, 1.0))
def test_resample(signal, old, new, width, rolloff):
    agree(lambda: resample(waveform(*signal), old, new, width, rolloff))


@BOUNDED
@given(
    SIGNALS, st.sampled_from([torch.int16, torch.int32, torch.float32, torch.float64]), st.integers(1, 5), st.booleans()
)
def test_sample_types_and_channels(signal, dtype, channels, interleaved):
    x = waveform(*signal) / 8
    x = torch.stack([x.roll(c) for c in range(channels)], 1 if interleaved else 0)
    scale = {torch.int16: 2.0**15, torch.int32: 2.0**31}.get(dtype, 1.0)
    x = (x.clamp(-0.99, 0.99) * scale).to(dtype)
    dim = 1 if interleaved else 0
    mono = (x.double() / scale).mean(dim)
    options = dict(n_fft=64, hop_length=20, dtype=torch.float64)
    ours = outcome(lambda: mel_spectrogram(x, n_mels=8, channel_dim=dim, **options))
    theirs = outcome(lambda: mel_spectrogram(mono, n_mels=8, **options))
    if isinstance(theirs, ValueError):
        assert isinstance(ours, ValueError)
    else:
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@BOUNDED
@given(SIGNALS, st.integers(0, 2999), st.sampled_from([math.nan, math.inf, -math.inf]))
def test_a_sample_that_is_not_finite_is_an_error_where_a_frame_sees_it(signal, at, bad):
    num_samples, seed, _ = signal
    x = waveform(max(num_samples, 400), seed, "noise").float()
    at = at % len(x)
    x[at] = bad
    seen = at < 400 + (len(x) - 400) // 160 * 160
    result = outcome(lambda: kaldi_fbank(x))
    assert isinstance(result, ValueError) == seen


@pytest.mark.parametrize("isa", _C.isas())
def test_every_isa_agrees_with_the_others(isa):
    before = _C.active_isa()
    if _C.set_isa(isa) != isa:
        _C.set_isa(before)
        pytest.skip(f"this CPU has no {isa}")
    try:
        x = torch.from_numpy(np.random.default_rng(0).standard_normal(20000)) * 1000
        for n_fft in (400, 512, 600, 1024):
            for dtype in (torch.float32, torch.float64):
                y = spectrogram(x.to(dtype), n_fft=n_fft, dtype=dtype).double()
                with reference():
                    expected = spectrogram(x, n_fft=n_fft, dtype=torch.float64)
                tolerance = 1e-6 if dtype == torch.float32 else 1e-13
                assert (y - expected).norm() <= tolerance * expected.norm()
        chunks = mfcc(x.float())
        assert (chunks - mfcc(x, dtype=torch.float64)).abs().mean() < 1e-4
    finally:
        _C.set_isa(before)
