"""The first call of an audio function, which makes its tables, inside a transform or a mode; the next is any call."""

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from mmlm_fast import audio

SIGNAL = 0.1 * torch.randn(4000, generator=torch.Generator().manual_seed(0))
_fresh = itertools.count()  # sizes that no call before had, so that tables are made

# By a size of its own.
FUNCTIONS = {
    "log_mel": lambda n: lambda w: audio.log_mel(w, num_mel_bins=30 + n),
    "kaldi_fbank": lambda n: lambda w: audio.kaldi_fbank(w, num_mel_bins=20 + n),
    "mfcc": lambda n: lambda w: audio.mfcc(w, num_mel_bins=20 + n),
    "mel_spectrogram": lambda n: lambda w: audio.mel_spectrogram(w, n_mels=20 + n),
    "spectrogram": lambda n: lambda w: audio.spectrogram(w, n_fft=200 + 2 * n, hop_length=100),
    "mel_mfcc": lambda n: lambda w: audio.mel_mfcc(w, n_mfcc=10, n_mels=20 + n),
    "resample": lambda n: lambda w: audio.resample(w, 16000, 100 * (80 + n)),
    "resample, no common factor": lambda n: lambda w: audio.resample(w, 16000, 7919 + 10 * n),
}  # fmt: skip


def jvp(f):
    return torch.func.jvp(f, (SIGNAL,), (torch.ones_like(SIGNAL),))[0]


def vmap(f):
    return torch.func.vmap(f)(torch.stack([SIGNAL, SIGNAL]))[0]


def grad(f):
    return torch.func.grad_and_value(lambda w: (f(w).sum(), f(w)), has_aux=True)(SIGNAL)[1][1]


def dual(f):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(SIGNAL, torch.ones_like(SIGNAL)))).primal.clone()


def inference(f):
    with torch.inference_mode():
        return f(SIGNAL).clone()


def fake(f):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert type(f(mode.from_tensor(SIGNAL))).__name__ == "FakeTensor"
    return f(SIGNAL)


def another_default(f):
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            return f(SIGNAL)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("way", [jvp, vmap, grad, dual, inference, fake, another_default], ids=lambda way: way.__name__)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_first_call_is_any_call(name, way):
    f = FUNCTIONS[name](next(_fresh))
    first, expected = way(f), f(SIGNAL)
    assert first.device == expected.device
    assert first.dtype == expected.dtype
    # Transforms take PyTorch's formula, whose float32 sums have another order: up to 2.0e-6 of the largest value over
    # all of these (the Kaldi filter bank's logarithms), half of what is allowed.
    torch.testing.assert_close(first, expected, rtol=0, atol=2**-18 * expected.abs().max().item())
    signal = SIGNAL.clone().requires_grad_()  # what was kept serves training
    f(signal).square().sum().backward()
    assert signal.grad.isfinite().all()
