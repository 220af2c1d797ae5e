"""spectrogram, mel_spectrogram and mel_mfcc against torchaudio.transforms and librosa."""

import numpy as np
import pytest
import torch

from mmlm_fast import _C, reference
from mmlm_fast.audio import mel_mfcc, mel_spectrogram, spectrogram
from support.peers import assert_no_worse, errors, need, signals

SIGNALS = signals()
OPTIONS = {
    "default": {},
    "1024": dict(n_fft=1024, hop_length=256, win_length=800),
    "slaney magnitude": dict(n_fft=512, norm="slaney", mel_scale="slaney", power=1.0),
    "odd": dict(n_fft=401, hop_length=100, n_mels=40),
    "not centred": dict(center=False, n_mels=64, normalized=True),
    "2048": dict(n_fft=2048, f_min=50.0, f_max=7000.0, hop_length=512),
    "padded": dict(n_fft=512, pad=700, n_mels=40),
    "prime": dict(n_fft=331, n_mels=20),
    "twice a prime": dict(n_fft=2 * 331, n_mels=20, normalized="frame_length"),
    "1200": dict(n_fft=1200, n_mels=60),
    "3 * 5 * 7": dict(n_fft=105, n_mels=8, hop_length=50),
    "other window": dict(pad_mode="constant", power=1.5, window_fn=torch.hamming_window, n_mels=40),
    "window arguments": dict(window_fn=torch.hann_window, wkwargs=dict(periodic=False), n_mels=40),
}


def transform_of(options):
    T = need("torchaudio").transforms
    return T.MelSpectrogram(**options), T.MelSpectrogram(**options).double()


@pytest.mark.parametrize("name", OPTIONS)
def test_against_torchaudio(name):
    options, pairs = OPTIONS[name], {}
    theirs, double = transform_of(options)
    for signal, x in SIGNALS.items():
        x = x[:20000]
        exact = double(x.double())
        ours_64 = mel_spectrogram(x.double(), dtype=torch.float64, **options)
        torch.testing.assert_close(ours_64, exact, rtol=1e-9, atol=1e-10)
        a, b = errors(mel_spectrogram(x, **options), theirs(x), exact)
        pairs[signal] = a / exact.max(), b / exact.max()
    ours, peer = (torch.cat(part) for part in zip(*pairs.values(), strict=True))
    # Two float32 transforms of one length: within a few hundredths of each other in the mean (README has the table).
    assert ours.mean() <= 1.05 * peer.mean()
    assert ours.quantile(0.999) <= 1.2 * peer.quantile(0.999)


@pytest.mark.parametrize(
    "n_fft", [1, 2, 3, 7, 16, 30, 64, 120, 243, 250, 343, 400, 480, 509, 512, 1000, 1023, 1331, 4096]
)
def test_any_transform_length(n_fft):
    """Against torch.stft in float64, whatever the prime factors."""
    x = SIGNALS["noise"][: 4 * n_fft + 50].double()
    window = torch.hann_window(n_fft, dtype=torch.float64)
    expected = torch.stft(x, n_fft, max(n_fft // 3, 1), window=window, center=False, return_complex=True).abs() ** 2
    options = dict(n_fft=n_fft, hop_length=max(n_fft // 3, 1), center=False, window_fn=window)
    out = spectrogram(x, dtype=torch.float64, **options)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12 * expected.max().item())
    single = spectrogram(x.float(), **options).double()
    assert (single - expected).norm() <= 3e-6 * expected.norm() + 1e-12


@pytest.mark.parametrize("hop_length", [1, 7, 160, 399, 400, 401, 900])
@pytest.mark.parametrize("isa", _C.isas())
def test_any_hop(hop_length, isa):
    before = _C.active_isa()
    if _C.set_isa(isa) != isa:
        _C.set_isa(before)
        pytest.skip(f"this CPU has no {isa}")
    try:
        x = SIGNALS["speech_en"][:6000].double()
        with reference():
            expected = spectrogram(x, hop_length=hop_length, dtype=torch.float64)
        torch.testing.assert_close(spectrogram(x, hop_length=hop_length, dtype=torch.float64), expected)
        single = spectrogram(x.float(), hop_length=hop_length)
        assert (single - expected).norm() <= 1e-6 * expected.norm()
    finally:
        _C.set_isa(before)


def test_decibels_and_mfcc_against_torchaudio():
    T = need("torchaudio").transforms
    to_db = T.AmplitudeToDB(top_db=80)
    pairs = {}
    for name, x in SIGNALS.items():
        x = x[None]  # it clips per item of a batch
        exact = to_db(T.MelSpectrogram().double()(x.double()))
        ours_64 = mel_spectrogram(x, log="dB", top_db=80.0, dtype=torch.float64)
        torch.testing.assert_close(ours_64, exact, rtol=1e-8, atol=1e-7)
        pairs[name] = errors(mel_spectrogram(x, log="dB", top_db=80.0), to_db(T.MelSpectrogram()(x)), exact)
    assert_no_worse(pairs)
    for log_mels in (False, True):
        pairs = {}
        mfcc, double = T.MFCC(log_mels=log_mels), T.MFCC(log_mels=log_mels).double()
        for name, x in SIGNALS.items():
            exact = double(x[None].double())
            options = dict(log_mels=log_mels, hop_length=200)
            torch.testing.assert_close(mel_mfcc(x[None], dtype=torch.float64, **options), exact, rtol=1e-7, atol=1e-6)
            pairs[name] = errors(mel_mfcc(x[None], **options), mfcc(x[None]), exact)
        assert_no_worse(pairs)
    amplitude = T.AmplitudeToDB(stype="magnitude")(T.MelSpectrogram(power=1.0)(SIGNALS["noise"]))
    torch.testing.assert_close(mel_spectrogram(SIGNALS["noise"], power=1.0, log="dB"), amplitude, rtol=0, atol=1e-3)


LIBROSA = {
    "default": ({}, {}),
    "speech": (dict(sr=16000, n_fft=512, hop_length=160, win_length=400, n_mels=80, fmin=20, fmax=7600),
               dict(sample_rate=16000, n_fft=512, hop_length=160, win_length=400, n_mels=80, f_min=20.0, f_max=7600.0)),
    "htk": (dict(htk=True, norm=None, power=1.0), dict(mel_scale="htk", norm=None, power=1.0)),
    "not centred": (dict(center=False, pad_mode="reflect"), dict(center=False)),
    "reflect": (dict(pad_mode="reflect"), dict(pad_mode="reflect")),
}  # fmt: skip


@pytest.mark.parametrize("name", LIBROSA)
def test_against_librosa(name):
    """The float64 mode has librosa's numbers of float64 samples, and errs less than librosa on float32 ones."""
    librosa = need("librosa")
    theirs_options, options = LIBROSA[name]
    for x in SIGNALS.values():
        exact = librosa.feature.melspectrogram(y=x.double().numpy(), **theirs_options)
        theirs = librosa.feature.melspectrogram(y=x.numpy(), **theirs_options)
        ours = mel_spectrogram(x.double(), convention="librosa", dtype=torch.float64, **options)
        scale = max(exact.max(), 1e-6)
        # librosa's filters are float32.
        np.testing.assert_allclose(ours.numpy(), exact, rtol=3e-7, atol=3e-8 * scale)
        a, b = errors(ours.float(), theirs, exact)
        assert a.mean() <= b.mean()
        single = mel_spectrogram(x, convention="librosa", **options).double().numpy()
        assert np.linalg.norm(single - exact) <= 3e-7 * np.linalg.norm(exact) + 1e-12


def test_decibels_and_mfcc_against_librosa():
    librosa = need("librosa")
    for x in SIGNALS.values():
        y = x.double().numpy()
        exact = librosa.power_to_db(librosa.feature.melspectrogram(y=y))
        ours = mel_spectrogram(x.double(), convention="librosa", log="dB", top_db=80.0, dtype=torch.float64)
        np.testing.assert_allclose(ours.numpy(), exact, rtol=0, atol=2e-5)
        for lifter in (0, 22):
            exact = librosa.feature.mfcc(y=y, lifter=lifter)
            ours = mel_mfcc(x.double(), convention="librosa", lifter=float(lifter), dtype=torch.float64)
            np.testing.assert_allclose(ours.numpy(), exact, rtol=1e-6, atol=3e-4)
            ours = mel_mfcc(x, convention="librosa", lifter=float(lifter))
            np.testing.assert_allclose(ours.numpy(), exact, rtol=0, atol=0.05 if lifter else 0.01)


def test_shapes_types_and_batches():
    x = SIGNALS["speech_en"][:16000]
    batch = torch.stack([x, x.flip(0)]).view(2, 1, -1)
    out = mel_spectrogram(batch)
    assert out.shape == (2, 1, 128, 81)
    assert torch.equal(out[1, 0], mel_spectrogram(x.flip(0)))
    clips = [x, x[:5000]]
    for clip, part in zip(clips, mel_spectrogram(clips), strict=True):
        assert torch.equal(part, mel_spectrogram(clip))
    stereo = torch.stack([x, -x], 1)
    assert (mel_spectrogram(stereo, channel_dim=-1) == 0).all()
    integers = (x * 32767).round().to(torch.int16)
    assert torch.equal(mel_spectrogram(integers), mel_spectrogram(integers.float() / 32768))
    assert mel_spectrogram(torch.zeros(0, 16000)).shape == (0, 128, 81)
    assert mel_spectrogram(x.half()).dtype == torch.float32


@pytest.mark.parametrize("power", [1.0, 2.0])
@pytest.mark.parametrize("log", ["none", "dB", "log"])
def test_gradcheck(power, log):
    x = torch.randn(300, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    options = dict(n_fft=64, hop_length=30, n_mels=6, power=power, log=log, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: mel_spectrogram(x, **options), x)
    assert torch.autograd.gradcheck(lambda x: mel_spectrogram(x, orig_freq=24000, center=False, **options), x)


def test_gradients_of_batches_and_lists():
    x = SIGNALS["speech_en"][:8000]
    batch = torch.stack([x, x.flip(0)]).requires_grad_()
    weight = torch.randn_like(mel_spectrogram(batch))
    (mel_spectrogram(batch, log="log10") * weight).sum().backward()
    parts = [c.detach().clone().requires_grad_() for c in batch]
    total = sum((mel_spectrogram(p, log="log10") * w).sum() for p, w in zip(parts, weight, strict=True))
    total.backward()
    for part, grad in zip(parts, batch.grad, strict=True):
        torch.testing.assert_close(grad, part.grad)
    clips = [p.detach().clone().requires_grad_() for p in parts]
    sum((m * w).sum() for m, w in zip(mel_spectrogram(clips, log="log10"), weight, strict=True)).backward()
    torch.testing.assert_close(clips[1].grad, parts[1].grad)
    with torch.no_grad():
        assert not mel_spectrogram(batch).requires_grad


@pytest.mark.parametrize(
    "call",
    [
        lambda x: mel_spectrogram(x, n_fft=512, log="dB"),
        lambda x: spectrogram(x, n_fft=512),
        mel_mfcc,
        lambda x: mel_mfcc(x, log_mels=True, lifter=22.0),
    ],
    ids=["mel", "spectrogram", "mfcc", "mfcc of logarithms"],
)
def test_compiles(call):
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (8000, 9001):
        assert torch.equal(compiled(SIGNALS["noise"][:n]), call(SIGNALS["noise"][:n]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(win_length=500), "win_length must be at most n_fft=400, got 500"),
        (dict(n_fft=0), "n_fft must be a whole number of at least 1, got 0"),
        (dict(hop_length=-1), "hop_length must be a whole number"),
        (dict(power=0.0), "power must be positive"),
        (dict(pad_mode="circular"), "pad_mode must be among"),
        (dict(norm="area"), 'norm must be None or "slaney", got'),
        (dict(mel_scale="bark"), "mel_scale must be slaney, htk or kaldi"),
        (dict(f_min=9000.0), "f_min must be from 0 to below f_max"),
        (dict(log="ln"), "log must be among none, log, log10, dB, got 'ln'"),
        (dict(log="dB", amin=0.0), "amin must be positive"),
        (dict(window_fn="kaiser"), "window must be among"),
        (dict(window_fn=[1.0, 2.0]), "window must have win_length=400 values, got 2"),
        (dict(normalized="rms"), "normalized must be False"),
        (dict(convention="essentia"), "convention must be among torchaudio, librosa"),
        (dict(n_mels=0), "n_mels must be a whole number"),
        (dict(channel_dim=5), "channel_dim=5 is not a dimension"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        mel_spectrogram(torch.zeros(16000), **arguments)


def test_more_errors():
    with pytest.raises(ValueError, match="at least 201 samples"):
        mel_spectrogram(torch.zeros(200))
    with pytest.raises(ValueError, match="at least 400 samples"):
        mel_spectrogram(torch.zeros(399), center=False)
    with pytest.raises(ValueError, match=r"\[num_samples, channels\]"):
        mel_spectrogram(torch.zeros(16000, 2))
    with pytest.raises(ValueError, match="n_mfcc must be at most n_mels=128, got 200"):
        mel_mfcc(torch.zeros(16000), n_mfcc=200)
    with pytest.raises(ValueError, match="melkwargs must be mel_spectrogram's keywords, got nmels"):
        mel_mfcc(torch.zeros(16000), log_mels=True, nmels=3)
    with pytest.raises(ValueError, match="NaN, infinity"):
        mel_spectrogram(torch.full((16000,), torch.nan))
