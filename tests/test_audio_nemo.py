"""nemo_log_mel against transformers' Parakeet; standardize against the formulas."""

import numpy as np
import pytest
import torch
import transformers

from mmlm_fast import reference
from mmlm_fast.audio import nemo_log_mel, resample, standardize
from mmlm_fast.audio.features import run_rows
from mmlm_fast.audio.reference import spectral_ref
from mmlm_fast.audio.spec import Framing, Spec, prepared
from mmlm_fast.audio.tables import Table
from support.peers import need, signals

SIGNALS = signals()


@pytest.mark.parametrize("num_mel_bins", [80, 128])
def test_against_parakeet(num_mel_bins):
    need("librosa")  # makes the original's filters
    theirs = transformers.ParakeetFeatureExtractor(feature_size=num_mel_bins)
    for name, x in SIGNALS.items():
        expected = theirs(x.numpy(), sampling_rate=16000, return_tensors="pt").input_features[0]
        actual = nemo_log_mel(x, num_mel_bins=num_mel_bins)
        assert actual.shape == expected.shape
        assert (actual - expected).abs().mean() < 2e-5, name
        exact = nemo_log_mel(x, num_mel_bins=num_mel_bins, dtype=torch.float64)
        assert (actual - exact).abs().mean() <= (expected - exact).abs().mean()


def test_lists_rates_and_reference():
    clips = [SIGNALS["speech_en"], SIGNALS["noise"][:9000], SIGNALS["clicks"][:320]]
    for clip, out in zip(clips, nemo_log_mel(clips), strict=True):
        assert torch.equal(out, nemo_log_mel(clip))
        assert out.shape == (1 + len(clip) // 160, 80)
        assert (out[len(clip) // 160 :] == 0).all()
    x = SIGNALS["speech_es"].double()
    with reference():
        expected = nemo_log_mel(x, dtype=torch.float64)
    torch.testing.assert_close(nemo_log_mel(x, dtype=torch.float64), expected, rtol=1e-9, atol=1e-9)
    fused = nemo_log_mel(x, orig_freq=44100, dtype=torch.float64)
    torch.testing.assert_close(fused, nemo_log_mel(resample(x, 44100, 16000), dtype=torch.float64))
    raw = nemo_log_mel(SIGNALS["noise"], normalize=False)
    assert torch.equal(standardize(raw, 300, ddof=1, eps_outside=1e-5), nemo_log_mel(SIGNALS["noise"]))


def test_gradcheck():
    x = torch.randn(500, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: nemo_log_mel(x, num_mel_bins=4, dtype=torch.float64), x)


def test_standardize():
    x = torch.randn(2, 50, 7, dtype=torch.float64) * 3 + 1
    out = standardize(x, [50, 20], ddof=1, eps_inside=0.3, eps_outside=0.2, padding=-1.0)
    for row, source, n in zip(out, x, (50, 20), strict=True):
        expected = (source[:n] - source[:n].mean(0)) / ((source[:n].var(0) + 0.3).sqrt() + 0.2)
        torch.testing.assert_close(row[:n], expected)
        assert (row[n:] == -1).all()
    with reference():
        torch.testing.assert_close(standardize(x, [50, 20], ddof=1, eps_inside=0.3, eps_outside=0.2, padding=-1.0), out)
    whole = standardize(x, 50, per="clip")
    torch.testing.assert_close(whole[0], (x[0] - x[0].mean()) / x[0].std(correction=0))
    torch.testing.assert_close(standardize(x, variances=False), x - x.mean(1, keepdim=True))
    torch.testing.assert_close(standardize(x.float()), standardize(x).float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(standardize(x.transpose(1, 2).contiguous().transpose(1, 2)), standardize(x))
    assert standardize(torch.zeros(0, 5, 3)).shape == (0, 5, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nemo_log_mel(torch.zeros(319)), "clip 0 must have at least 320 samples, two frames .* got 319"),
        (lambda: nemo_log_mel(torch.zeros(16000), num_mel_bins=0), "num_mel_bins must be from 1 to 512"),
        (lambda: standardize(torch.zeros(3)), r"\[\*batch, frames, bins\], got torch.float32 \(3,\)"),
        (lambda: standardize(torch.zeros(3, 4, dtype=torch.int32)), "must be floating point"),
        (lambda: standardize(torch.zeros(3, 4), 5), "from 0 to 3, got"),
        (lambda: standardize(torch.zeros(3, 4), per="frame"), 'per must be "bin" or "clip"'),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("edge", ["none", "zero", "reflect", "mirror"])
def test_preemphasis_of_the_signal_at_every_sample(edge):
    """With a window that is not 0 at the frame's first sample, which every tile of frames starts with."""
    offset = 0 if edge == "none" else -200
    spec = Spec(
        n_fft=512,
        frame_length=400,
        hop_length=160,
        window=Table(np.linspace(1, 2, 400)),
        framing=Framing(offset, 0, 0, edge),
        signal_preemphasis=0.9,
        dtype="float64",
    )
    x = SIGNALS["noise"].double()[:20000]
    frames = 122
    out = torch.empty(prepared(spec).num_out, frames, dtype=torch.float64)
    run_rows(spec, [x.numpy()], [len(x)], [frames], out.numpy()[None])
    torch.testing.assert_close(out, spectral_ref(spec, x, frames), rtol=1e-10, atol=1e-12)


def test_arrays_are_standardized_as_tensors_are():
    x = SIGNALS["noise"][:12000].reshape(3, 100, 40)
    for dtype, atol in ((torch.float32, 1e-6), (torch.float64, 1e-12), (torch.float16, 5e-3)):
        for options in (
            {},
            dict(ddof=1, eps_inside=1e-7),
            dict(num_valid=[100, 50, 7], padding=-1.0),
            dict(per="clip"),
        ):
            theirs = standardize(x.to(dtype), **options)
            ours = standardize(x.to(dtype).numpy(), **options)
            assert type(ours) is np.ndarray
            assert ours.dtype == theirs.numpy().dtype
            np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=atol)
    for bad in (
        np.ma.masked_array(x.numpy(), mask=x.numpy() > 0),
        x.numpy().astype(np.longdouble),
        x.numpy().astype(np.int32),
        x.tolist(),
        x.numpy()[0, 0],
    ):
        with pytest.raises(ValueError, match="features must"):
            standardize(bad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_under_autocast(dtype):
    expected = nemo_log_mel(SIGNALS["noise"][:9000], dtype=dtype)
    for kind in (torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype=kind):
            assert torch.equal(nemo_log_mel(SIGNALS["noise"][:9000], dtype=dtype), expected)
