"""kaldi_fbank and mfcc against torchaudio.compliance.kaldi and kaldi-native-fbank."""

import itertools

import numpy as np
import pytest
import torch

from mmlm_fast import _C, reference
from mmlm_fast.audio import kaldi_fbank, mfcc
from mmlm_fast.audio.kaldi import kaldi_spec
from support.peers import assert_no_worse, errors, need, signals

SIGNALS = signals()
FBANK = {
    "default": {},
    "80 bins": dict(num_mel_bins=80),
    "not snipped": dict(snip_edges=False),
    "energy": dict(use_energy=True),
    "energy last": dict(use_energy=True, htk_compat=True, raw_energy=False, energy_floor=0.0),
    "magnitude": dict(use_power=False, use_log_fbank=False),
    "vtln": dict(window_type="blackman", vtln_warp=1.1, blackman_coeff=0.4),
    "vtln below 1": dict(vtln_warp=0.9, vtln_low=60.0, vtln_high=7000.0),
    "exact length": dict(round_to_power_of_two=False, window_type="hamming"),
    "bare": dict(remove_dc_offset=False, preemphasis_coefficient=0.0, window_type="rectangular"),
    "mean removed": dict(subtract_mean=True, window_type="hanning"),
    "22050 Hz": dict(sample_frequency=22050.0, frame_length=20.0, frame_shift=7.0, low_freq=50.0, high_freq=-100.0),
    "hop above the frame": dict(frame_length=10.0, frame_shift=25.0),
}
MFCC = {
    "default": {},
    "energy, htk": dict(use_energy=True, htk_compat=True),
    "htk": dict(htk_compat=True, num_ceps=20, num_mel_bins=40),
    "energy, no lifter": dict(use_energy=True, cepstral_lifter=0.0),
    "not snipped": dict(snip_edges=False, subtract_mean=True),
}
CASES = [(kaldi_fbank, "fbank", o) for o in FBANK] + [(mfcc, "mfcc", o) for o in MFCC]


def options_of(kind, name):
    return (FBANK if kind == "fbank" else MFCC)[name]


@pytest.mark.parametrize(("ours", "kind", "name"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_against_torchaudio(ours, kind, name):
    theirs = getattr(need("torchaudio.compliance.kaldi"), kind)
    options, pairs = options_of(kind, name), {}
    for signal, x in SIGNALS.items():
        x = x[None] * 32768
        exact = theirs(x.double(), **options)
        ours_64 = ours(x, dtype=torch.float64, **options)
        torch.testing.assert_close(ours_64, exact, rtol=1e-9, atol=2e-9)
        a, b = errors(ours(x, **options), theirs(x, **options), exact)
        scale = max(1.0, exact.abs().max().item())
        pairs[signal] = a / scale, b / scale
    assert_no_worse(pairs)


@pytest.mark.parametrize("num_samples", [400, 401, 559, 560, 561, 2799, 2960, 3121])
@pytest.mark.parametrize("snip_edges", [True, False])
def test_lengths_against_torchaudio(num_samples, snip_edges):
    theirs = need("torchaudio.compliance.kaldi").fbank
    x = SIGNALS["noise"][None, :num_samples] * 32768
    options = dict(snip_edges=snip_edges, num_mel_bins=40)
    exact = theirs(x.double(), **options)
    torch.testing.assert_close(kaldi_fbank(x, dtype=torch.float64, **options), exact, rtol=1e-10, atol=1e-9)


def test_dither_is_torchaudios():
    theirs = need("torchaudio.compliance.kaldi").fbank
    for snip in (True, False):
        torch.manual_seed(3)
        expected = theirs(SIGNALS["speech_en"][None] * 32768, dither=1.0, snip_edges=snip)
        torch.manual_seed(3)
        actual = kaldi_fbank(SIGNALS["speech_en"], dither=1.0, snip_edges=snip, scale=32768.0)
        torch.testing.assert_close(actual, expected, rtol=0, atol=2e-3)
    other = kaldi_fbank(SIGNALS["speech_en"], dither=1.0, scale=32768.0)
    assert not torch.equal(other, kaldi_fbank(SIGNALS["speech_en"], dither=1.0, scale=32768.0))


def test_against_kaldi_native_fbank():
    """An independent implementation of the same definition; it disagrees with torchaudio by 2e-3 on rare bins too."""
    knf = need("kaldi_native_fbank")
    for snip in (True, False):
        opts = knf.FbankOptions()
        opts.frame_opts.dither = 0
        opts.frame_opts.snip_edges = snip
        opts.mel_opts.num_bins = 80
        online = knf.OnlineFbank(opts)
        x = SIGNALS["speech_en"] * 32768
        online.accept_waveform(16000, x.tolist())
        online.input_finished()
        theirs = np.stack([online.get_frame(i) for i in range(online.num_frames_ready)])
        ours = kaldi_fbank(x, num_mel_bins=80, snip_edges=snip)
        exact = kaldi_fbank(x, num_mel_bins=80, snip_edges=snip, dtype=torch.float64)
        a, b = errors(ours, theirs, exact)
        assert a.mean() <= b.mean()
        assert b.mean() < 1e-4  # it is the same definition


def test_reference_agrees():
    for kind, names in (("fbank", FBANK), ("mfcc", MFCC)):
        for options in names.values():
            ours = kaldi_fbank if kind == "fbank" else mfcc
            x = SIGNALS["speech_es"][:9000].double() * 32768
            with reference():
                expected = ours(x, dtype=torch.float64, **options)
            torch.testing.assert_close(ours(x, dtype=torch.float64, **options), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("isa", _C.isas())
@pytest.mark.parametrize(
    ("frame_length", "frame_shift"), [(25.0, 10.0), (20.0, 7.0), (32.0, 4.0), (16.0, 16.0), (5.0, 5.0), (10.0, 25.0)]
)
def test_every_window_on_every_instruction_set(frame_length, frame_shift, isa):
    """What a vector wider than a tile's row would overwrite shows only with a window that is not 0 at its ends."""
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal(9000) * 0.05)
    before = _C.active_isa()
    try:
        if _C.set_isa(isa) != isa:
            pytest.skip(f"this CPU has no {isa}")
        windows = ("povey", "hamming", "rectangular", "hanning", "blackman")
        for window, preemphasis, removes, power_of_two, energy in itertools.product(
            windows, (0.0, 0.5, 0.97), *3 * [(True, False)]
        ):
            options = dict(
                window_type=window,
                preemphasis_coefficient=preemphasis,
                remove_dc_offset=removes,
                round_to_power_of_two=power_of_two,
                use_energy=energy,
                frame_length=frame_length,
                frame_shift=frame_shift,
            )
            with reference():
                exact = kaldi_fbank(noise, dtype=torch.float64, **options)
            double, single = kaldi_fbank(noise, dtype=torch.float64, **options), kaldi_fbank(noise.float(), **options)
            torch.testing.assert_close(double, exact, rtol=1e-9, atol=1e-9)
            # 2e-4 is the largest error measured, in a bin that cancels; a sample overwritten gave 9e-3 at least.
            assert (single - exact).abs().max() < 1e-3, options
    finally:
        _C.set_isa(before)


def test_sample_types_channels_and_batches():
    x = (SIGNALS["speech_en"] * 32767).round().to(torch.int16)
    expected = kaldi_fbank(x.float() / 32768, num_mel_bins=80)
    assert torch.equal(kaldi_fbank(x, num_mel_bins=80), expected)
    assert torch.equal(kaldi_fbank(x.to(torch.int32) * 65536, num_mel_bins=80), expected)
    stereo = torch.stack([x, x])
    assert torch.equal(kaldi_fbank(stereo, num_mel_bins=80, channel=1), expected)
    assert torch.equal(kaldi_fbank(stereo, num_mel_bins=80, channel_dim=0), expected)
    assert torch.equal(kaldi_fbank(stereo.t(), num_mel_bins=80, channel_dim=1), expected)
    with pytest.raises(ValueError, match=r"has 2 channels.*channel=0.*channel_dim=0"):
        kaldi_fbank(stereo)
    clips = [x, x[:5000], x[100:20000]]
    for clip, out in zip(clips, kaldi_fbank(clips, num_mel_bins=80), strict=True):
        assert torch.equal(out, kaldi_fbank(clip, num_mel_bins=80))
    mixed = kaldi_fbank([x, x.float() / 32768], num_mel_bins=80)
    assert torch.equal(mixed[0], mixed[1])
    assert torch.equal(kaldi_fbank(x, num_mel_bins=80, dtype=torch.bfloat16), expected.bfloat16())
    assert kaldi_fbank([]) == []


@pytest.mark.parametrize("snip_edges", [True, False])
def test_gradcheck(snip_edges):
    x = torch.randn(700, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    options = dict(num_mel_bins=5, frame_length=15.0, snip_edges=snip_edges, dtype=torch.float64, use_energy=True)
    assert torch.autograd.gradcheck(lambda x: kaldi_fbank(x, energy_floor=0.0, **options), x)
    assert torch.autograd.gradcheck(lambda x: mfcc(x, num_ceps=4, energy_floor=0.0, **options), x)


def test_compiles():
    compiled = torch.compile(
        lambda x: kaldi_fbank(x, num_mel_bins=80) * 2, fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for n in (16000, 17001):
        x = SIGNALS["speech_fr"][:n]
        assert torch.equal(compiled(x), kaldi_fbank(x, num_mel_bins=80) * 2)
    x = SIGNALS["speech_fr"][:4000].clone().requires_grad_()
    compiled(x).sum().backward()
    twin = x.detach().clone().requires_grad_()
    (kaldi_fbank(twin, num_mel_bins=80) * 2).sum().backward()
    torch.testing.assert_close(x.grad, twin.grad)
    torch.library.opcheck(
        torch.ops.mmlm_fast.spectral_features.default, ([SIGNALS["noise"]], kaldi_spec(num_mel_bins=80).key, [48000], 0)
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(window_type="kaiser"), "window_type must be among povey"),
        (dict(num_mel_bins=3), "num_mel_bins must be above 3, got 3"),
        (dict(frame_length=0.1), "frame_length must be at least 2 samples"),
        (dict(frame_shift=0.0), "frame_shift 1, got"),
        (dict(sample_frequency=0), "sample_frequency must be positive"),
        (dict(preemphasis_coefficient=1.5), r"in \[0, 1\], got 1.5"),
        (dict(high_freq=9000.0), "must rise within 0 to 8000 Hz, got 20 and 9000"),
        (dict(vtln_warp=1.1, vtln_low=10.0), "must rise within low_freq and high_freq"),
        (dict(round_to_power_of_two=False, frame_length=25.1), "even number of samples, got 401"),
        (dict(channel=3), "channel must be below 1, got 3"),
        *(
            (dict(frame_length=ms), "frame_length must be at most 4194304 samples")
            for ms in (1e9, torch.inf, torch.nan)
        ),
        *((dict(frame_shift=ms), "frame_shift must be at most 4194304 samples") for ms in (1e9, torch.inf, torch.nan)),
        *((dict(sample_frequency=f), "sample_frequency must be positive and") for f in (1e12, torch.inf, torch.nan)),
        (dict(num_mel_bins=10**9), "num_mel_bins must be at most 524288 for 512 samples"),
        (dict(dtype=torch.int32), "dtype must be torch.float32"),
        (dict(orig_freq=0), "orig_freq must be a rate in whole hertz"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        kaldi_fbank(torch.zeros(1, 16000), **arguments)


def test_more_errors():
    for waveform in (torch.zeros(16000), [torch.zeros(16000)] * 2, torch.zeros(16000).numpy()):
        with pytest.raises(ValueError, match="channel must be 0 or -1 for waveforms of one channel, got 5"):
            kaldi_fbank(waveform, channel=5)
        with pytest.raises(ValueError, match="channel must be 0 or -1 for waveforms of one channel, got 1"):
            mfcc(waveform, channel=1)
    with pytest.raises(ValueError, match="at least 400 samples"):
        kaldi_fbank(torch.zeros(399))
    with pytest.raises(ValueError, match="num_ceps must be at most num_mel_bins=23, got 24"):
        mfcc(torch.zeros(16000), num_ceps=24)
    with pytest.raises(ValueError, match=r"got shape \(2, 3, 400\)"):
        kaldi_fbank(torch.zeros(2, 3, 400))
    for bad in (torch.nan, torch.inf, 1e30):
        x = SIGNALS["noise"].clone()
        x[20000] = bad
        with pytest.raises(ValueError, match="clip 0"):
            kaldi_fbank(x)
    assert kaldi_fbank(torch.zeros(500), min_duration=0.1).shape == (0,)  # as torchaudio
