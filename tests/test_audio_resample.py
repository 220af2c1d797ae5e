"""resample against torchaudio.functional.resample; resampling fused before features."""

import resource
import tracemalloc

import numpy as np
import pytest
import torch

from mmlm_fast import reference
from mmlm_fast.audio import StreamingResample, kaldi_fbank, log_mel, mel_spectrogram, resample, sinc
from mmlm_fast.audio.resample_op import _taps_at
from mmlm_fast.audio.sinc import MAX_RATE, Filter
from support.peers import errors, need, signals

SIGNALS = signals()
RATES = [(48000, 16000), (44100, 16000), (8000, 16000), (16000, 44100), (22050, 16000), (16000, 8000), (11025, 48000)]


@pytest.mark.parametrize("method", ["sinc_interp_hann", "sinc_interp_kaiser"])
@pytest.mark.parametrize(("old", "new"), RATES)
def test_against_torchaudio(old, new, method):
    theirs = need("torchaudio").functional.resample
    total = [0.0, 0.0]
    for x in SIGNALS.values():
        x = x[:20011]
        exact = theirs(x.double(), old, new, resampling_method=method)
        ours_64 = resample(x.double(), old, new, resampling_method=method)
        torch.testing.assert_close(ours_64, exact, rtol=0, atol=1e-7 if "kaiser" in method else 1e-12)
        a, b = errors(
            resample(x, old, new, resampling_method=method), theirs(x, old, new, resampling_method=method), exact
        )
        total[0] += a.mean().item()
        total[1] += b.mean().item()
    assert total[0] <= 1.03 * total[1]  # by the exact ratio 2 both only round


@pytest.mark.parametrize("options", [dict(lowpass_filter_width=24, rolloff=0.945), dict(lowpass_filter_width=1)])
def test_options_against_torchaudio(options):
    theirs = need("torchaudio").functional.resample
    x = SIGNALS["speech_en"].double()
    torch.testing.assert_close(
        resample(x, 32000, 22050, **options), theirs(x, 32000, 22050, **options), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("num_samples", [0, 1, 2, 3, 40, 441, 442, 12345, 100003])
def test_lengths(num_samples):
    x = SIGNALS["noise"].repeat(3)[:num_samples].double()
    for old, new in RATES:
        with reference():
            expected = resample(x, old, new)
        assert expected.shape[-1] == -(-num_samples * new // old)
        torch.testing.assert_close(resample(x, old, new), expected, rtol=0, atol=1e-12)


def test_types_channels_and_batches():
    x = (SIGNALS["speech_en"][:9000] * 32767).round().to(torch.int16)
    expected = resample(x.float() / 32768, 48000, 16000)
    assert torch.equal(resample(x, 48000, 16000), expected)
    assert torch.equal(resample(x.to(torch.int32) * 65536, 48000, 16000), expected)
    stereo = torch.stack([x, x], 1)
    assert torch.equal(resample(stereo, 48000, 16000, channel_dim=1), expected)
    assert torch.equal(resample(stereo.t().contiguous(), 48000, 16000, channel_dim=0), expected)
    five = torch.stack([x, x, x, x, x])
    torch.testing.assert_close(resample(five, 48000, 16000, channel_dim=0), expected, rtol=0, atol=1e-6)
    batch = torch.stack([x, x.flip(0)])
    assert torch.equal(resample(batch, 48000, 16000)[1], resample(x.flip(0), 48000, 16000))
    clips = [x, x[:4000], x[::2]]
    for clip, out in zip(clips, resample(clips, 48000, 16000), strict=True):
        assert torch.equal(out, resample(clip, 48000, 16000))
    assert torch.equal(resample(x, 16000, 16000), x.float() / 32768)
    left = torch.stack([x, torch.zeros_like(x)], 1)
    torch.testing.assert_close(resample(left, 16000, 16000, channel_dim=1), x.float() / 65536)


@pytest.mark.parametrize(("old", "new"), [(48000, 16000), (44100, 16000), (8000, 16000)])
def test_fused_before_features(old, new):
    """The same as in two steps: frames are computed from the same resampled samples."""
    x = (SIGNALS["speech_fr"][:40000] * 32767).round().to(torch.int16)
    stereo = torch.stack([x, x.flip(0)], 1)
    apart = resample(stereo, old, new, channel_dim=1)
    for function, options in (
        (log_mel, {}),
        (log_mel, dict(num_samples=480000)),
        (kaldi_fbank, dict(num_mel_bins=80)),
        (kaldi_fbank, dict(num_mel_bins=80, snip_edges=False)),
        (mel_spectrogram, dict(sample_rate=16000, n_fft=1024)),
    ):
        fused = function(stereo, orig_freq=old, channel_dim=1, **options)
        torch.testing.assert_close(fused, function(apart, **options), rtol=2e-6, atol=2e-4)
    clips = [stereo[:, 0], stereo[:9000, 1]]
    for clip, out in zip(clips, kaldi_fbank(clips, orig_freq=old, num_mel_bins=80), strict=True):
        torch.testing.assert_close(out, kaldi_fbank(resample(clip, old, new), num_mel_bins=80), rtol=2e-6, atol=2e-3)


def test_gradcheck_and_compile():
    x = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: resample(x, 3, 2), x)
    compiled = torch.compile(lambda x: resample(x, 44100, 16000), fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (5000, 5001):
        assert torch.equal(compiled(SIGNALS["noise"][:n]), resample(SIGNALS["noise"][:n], 44100, 16000))
    arguments = ([SIGNALS["noise"]], 3, 1, 6, 0.99, "sinc_interp_hann", 0.0)
    torch.library.opcheck(torch.ops.mmlm_fast.resample.default, arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 16000), "orig_freq must be a positive whole number"),
        ((16000, 16000.5), "new_freq must be a positive whole number of hertz, got 16000.5"),
        ((48000, 16000, 0), "lowpass_filter_width must be a whole number from 1"),
        ((48000, 16000, 6, 1.5), r"rolloff must be in \(0, 1\]"),
        ((48000, 16000, 6, 0.9, "linear"), "resampling_method must be among"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        resample(torch.zeros(100), *arguments)


# Rates without a common factor: a table of their filters would have up to 10 GB.
COPRIME = [(44099, 16000), (22255, 16000), (16000, 44101), (999983, 16000), (999983, 1000003), (16001, 16000)]


@pytest.mark.parametrize("method", ["sinc_interp_hann", "sinc_interp_kaiser"])
@pytest.mark.parametrize(("old", "new"), COPRIME)
def test_any_two_rates_in_little_memory(old, new, method):
    x = SIGNALS["speech_en"][20000 : 20000 + min(old, 40000) // 10].double()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    out = resample(x, old, new, resampling_method=method)
    python_peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 20 * 1024  # KiB
    assert python_peak < 4 * 2**20
    # The definition, sample by sample, with distances exact in whole numbers.
    f = Filter.between(old, new, 6, 0.99, method, 14.769656459379492 if "kaiser" in method else 0.0)
    k = torch.arange(len(x))
    for i in (0, 1, 7, len(out) // 2, len(out) - 1):
        taps = _taps_at(f, k * f.new - i * f.old)
        torch.testing.assert_close(out[i], (x * taps).sum(), rtol=0, atol=1e-12)
    torch.testing.assert_close(resample(x.float(), old, new, resampling_method=method).double(), out, rtol=0, atol=2e-6)
    with reference():
        torch.testing.assert_close(resample(x, old, new, resampling_method=method), out, rtol=0, atol=1e-12)
    assert sinc._native.cache.num_bytes <= sinc._native.cache.max_bytes


@pytest.mark.parametrize(("old", "new"), [(441, 160), (160, 441), (97, 89), (3, 2), (1, 5), (5, 1)])
def test_without_a_table_as_with_one(old, new, monkeypatch):
    x = SIGNALS["speech_fr"][:9001].double()
    for options in (dict(), dict(resampling_method="sinc_interp_kaiser"), dict(lowpass_filter_width=31, rolloff=0.9)):
        expected = resample(x, old, new, **options)
        with monkeypatch.context() as patched:
            patched.setattr(sinc, "_MAX_TAPS", 0)
            sinc._native.cache._kept.clear()
            out = resample(x, old, new, **options)
            with reference():
                torch.testing.assert_close(resample(x, old, new, **options), out, rtol=0, atol=1e-13)
        sinc._native.cache._kept.clear()
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)


def test_features_and_gradients_between_any_two_rates():
    x = SIGNALS["speech_en"][20000:30000]
    torch.testing.assert_close(log_mel(x, orig_freq=15999), log_mel(resample(x, 15999, 16000)), rtol=0, atol=1e-4)
    v = torch.randn(300, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: resample(v, 15999, 16000), v)
    assert torch.autograd.gradgradcheck(lambda v: resample(v, 15999, 16000).square(), v)


def test_compiled_with_a_gradient():
    for old, new in ((44100, 16000), (44099, 16000)):
        compiled = torch.compile(lambda x, o=old, n=new: resample(x, o, n), fullgraph=True, backend="aot_eager")
        x, y = (SIGNALS["noise"][:3000].clone().requires_grad_() for _ in range(2))
        out = compiled(x)
        out.square().sum().backward()
        resample(y, old, new).square().sum().backward()
        torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("old", "new"), [*COPRIME, (44100, 16000), (8000, 16000), (16000, 16000)])
def test_streams_have_the_bits_of_the_whole(old, new, dtype):
    x = SIGNALS["speech_es"][:30000].to(dtype)
    stream, sizes = StreamingResample(old, new, dtype=dtype), [1, 0, 999, 4000, 17]
    parts, start = [], 0
    while start < len(x):
        parts.append(stream.accept(x[start : start + sizes[0]]))
        start, sizes = start + sizes[0], [*sizes[1:], sizes[0]]
    assert torch.equal(torch.cat([*parts, stream.flush()]), resample(x, old, new))


@pytest.mark.parametrize("rate", [True, 16000.0, np.float32(8000), "8000", 0, -1, MAX_RATE + 1, None, np.bool_(True)])
def test_rates_are_whole_numbers(rate):
    x = torch.zeros(100)
    for call in (lambda: resample(x, rate, 16000), lambda: StreamingResample(rate, 16000)):
        with pytest.raises(ValueError, match="orig_freq must be a positive whole number of hertz"):
            call()
