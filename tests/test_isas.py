"""The core's kernels on every instruction set, AVX-512's width among them on any machine (`wide`): at sizes around a
vector's, within what was allocated for them, and as near to float64 as their number type allows."""

import functools
import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree

from mmlm_fast import _C, reference
from mmlm_fast.audio import (
    StreamingFbank,
    StreamingLogMel,
    StreamingMfcc,
    kaldi_fbank,
    log_mel,
    mel_mfcc,
    mel_spectrogram,
    mfcc,
    nemo_log_mel,
    resample,
    spectrogram,
)
from mmlm_fast.ops import contrastive
from support.op_calls import EVERY_OP, Fence, calls
from support.speech import WAVEFORMS

SIZES = (1, 7, 8, 9, 15, 16, 17, 31, 33)
# Of an error's norm, in units of the last place of the result's norm.
ALLOWED = {torch.float32: 32, torch.bfloat16: 4}


@pytest.fixture(params=_C.isas())
def isa(request):
    before = _C.active_isa()
    assert _C.set_isa(request.param) == request.param
    yield request.param
    _C.set_isa(before)


def test_wide_is_there():
    if not Path(_C.__file__).is_relative_to(Path(__file__).parents[1]):
        pytest.skip("not the build of `make env`")
    assert "wide" in _C.isas() or _C.best_isa() == "baseline"
    assert _C.best_isa() != "wide"


@pytest.mark.parametrize("name", _C.isas())
def test_the_environment_names_it(name):
    # Without the package, which takes seconds to import.
    code = (
        "from importlib.util import module_from_spec, spec_from_file_location\n"
        f"spec = spec_from_file_location('mmlm_fast._C', {_C.__file__!r})\n"
        "core = module_from_spec(spec)\n"
        "spec.loader.exec_module(core)\n"
        "print(core.active_isa())"
    )
    env = os.environ | {"MMLM_FAST_ISA": name}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [name]


# ---- audio ----------------------------------------------------------------------------------------------------------

NOISE = torch.from_numpy(np.random.default_rng(0).standard_normal(3001) * 0.05)
WINDOWS = ("povey", "hamming", "hanning", "rectangular", "blackman")
FRAMES = ((25.0, 10.0), (10.0, 25.0), (7.0, 1.5), (5.5, 3.1), (16.0, 16.0))  # ms; odd numbers of samples among them


@functools.cache
def exact(function, **options):
    with reference():
        return function(NOISE, dtype=torch.float64, **options)


def compare(function, stream=None, **options):
    """Within 1e-9 of float64 in float64; in float32 within what single bins that cancel err: a stray sample is 9 times
    as large. A stream has the bits of the whole signal."""
    expected = exact(function, **options)
    torch.testing.assert_close(function(NOISE, dtype=torch.float64, **options), expected, rtol=1e-9, atol=1e-9)
    single = function(NOISE.float(), **options)
    scale = max(1.0, expected.abs().max().item())
    assert (single - expected).abs().max() < 1e-3 * scale, options
    if stream is not None:
        live = stream(**options)
        pieces = [*map(live.accept, NOISE.float().split(777)), live.flush()]
        assert torch.equal(torch.cat(pieces, -1 if stream is StreamingLogMel else 0), single), options


@pytest.mark.parametrize(("frame_length", "frame_shift"), FRAMES)
def test_kaldi(frame_length, frame_shift, isa):
    for window, emphasis, whole in itertools.product(WINDOWS, (0.0, 0.97), (True, False)):
        options = dict(window_type=window, preemphasis_coefficient=emphasis, snip_edges=whole)
        options |= dict(frame_length=frame_length, frame_shift=frame_shift)
        compare(kaldi_fbank, StreamingFbank, num_mel_bins=17, **options)
        compare(mfcc, StreamingMfcc, num_ceps=11, use_energy=whole, **options)


@pytest.mark.parametrize(
    ("n_fft", "hop_length"), [(400, 160), (45, 33), (77, 90), (64, 100), (512, 31), (30, 15), (2, 1)]
)
def test_spectra(n_fft, hop_length, isa):
    for window, edge in itertools.product(WINDOWS, ("reflect", "constant", None)):
        options = dict(n_fft=n_fft, hop_length=hop_length, window_fn=window, center=edge is not None)
        options |= {} if edge is None else dict(pad_mode=edge)
        compare(spectrogram, win_length=max(1, n_fft - 3), power=1.0, **options)
        if n_fft >= 64:
            compare(mel_spectrogram, n_mels=9, log="dB", amin=1e-5, **options)
            compare(mel_mfcc, n_mfcc=7, n_mels=9, log_mels=True, **options)


def test_speech_families(isa):
    for bins in (1, 15, 80, 128):
        compare(log_mel, num_mel_bins=bins)
        compare(log_mel, StreamingLogMel, num_mel_bins=bins, log_mel_max=1.5)
        for emphasis in (0.0, 0.97):
            compare(nemo_log_mel, num_mel_bins=bins, preemphasis=emphasis, normalize=False)


def test_resampling(isa):
    for (old, new), size in itertools.product([(3, 1), (1, 3), (441, 160), (147, 320), (1, 1)], (1, 15, 16, 17, 1000)):
        for dtype, error in ((torch.float64, 1e-13), (torch.float32, 1e-6)):
            x = NOISE[:size].to(dtype)
            with reference():
                expected = resample(x.double(), old, new)
            with Fence():
                out = resample(x, old, new)
                torch.testing.assert_close(out.double(), expected, rtol=0, atol=error)
                pair = torch.stack([x, x], -1)
                torch.testing.assert_close(resample(pair, old, new, channel_dim=1), out, rtol=0, atol=error)


def drop_ins():
    from test_audio_extractors import NAMES

    return [*NAMES, "WhisperFeatureExtractor"]


@pytest.mark.parametrize("name", drop_ins())
def test_drop_ins(name):
    """As on the next instruction set: what is compared with the originals elsewhere is compared on the best alone."""
    from test_audio_extractors import assert_same, call

    from mmlm_fast.audio.extractors import drop_in

    try:
        extractor = drop_in(name)()
    except (AttributeError, ImportError) as error:
        pytest.skip(str(error).splitlines()[0])
    clip = np.concatenate([WAVEFORMS[0][:9001], np.random.default_rng(0).standard_normal(3001).astype(np.float32) / 9])
    results, before = {}, _C.active_isa()
    try:
        for isa in _C.isas():
            _C.set_isa(isa)
            results[isa] = call(extractor, clip)
    finally:
        _C.set_isa(before)
    for result in results.values():
        assert_same(result, results["baseline"])


# ---- ops ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def several_tiles(native, monkeypatch):
    monkeypatch.setitem(contrastive.TILE, "cpu", 20)  # several tiles


def results_of(call, dtype):
    """Outputs and gradients."""
    inputs = [x.detach().to(dtype if x.dtype != torch.float32 or dtype == torch.float64 else x.dtype).requires_grad_()
              for x in call.inputs]  # fmt: skip
    outputs = [x for x in pytree.tree_leaves(call.function(*inputs)) if x is not None]
    if not inputs:
        return outputs
    torch.manual_seed(1)
    incoming = [torch.randn(o.shape).to(o.dtype) for o in outputs]
    used = [(o, g) for o, g in zip(outputs, incoming, strict=True) if o.requires_grad]
    grads = torch.autograd.grad([o for o, _ in used], inputs, [g for _, g in used], allow_unused=True)
    return [x.detach() for x in (*outputs, *(g for g in grads if g is not None))]


@functools.cache
def exact_results(width, dtype):
    with reference():
        return [results_of(call, torch.float64) for call in calls(width, dtype)]


def within_fences(call, dtype, expected, where):
    with Fence():
        results = results_of(call, dtype)
    for i, (result, e) in enumerate(zip(results, expected, strict=True)):
        assert result.shape == e.shape, (where, i)
        e = e.double()
        assert result.isfinite().equal(e.isfinite()), (where, i)
        keep = e.isfinite()
        error, scale = (result.double()[keep] - e[keep]).norm().item(), max(0.1, e[keep].norm().item())
        assert error <= ALLOWED[dtype] * torch.finfo(dtype).eps * scale, f"{where} {i}: {error:.2e} of {scale:.2e}"


@pytest.mark.parametrize("dtype", ALLOWED, ids=str)
@pytest.mark.parametrize("width", SIZES)
def test_ops(width, dtype, several_tiles, isa):
    seen = {"rope_tables"}
    for call, expected in zip(calls(width, dtype), exact_results(width, dtype), strict=True):
        within_fences(call, dtype, expected, f"{call.op} {call.name}")
        seen.add(call.op)
    assert seen == set(EVERY_OP)


def large_calls(dtype):
    """With outputs of 8 MiB, which are written past the caches; rows begin anywhere in a vector."""
    width = 2049 if dtype == torch.float32 else 4097
    for call in itertools.takewhile(lambda c: c.op in ("add_norm", "glu", "bias_act"), calls(width, dtype, rows=520)):
        if call.name in ("rms sum", "silu"):
            yield call


@functools.cache
def large_results(dtype):
    with reference():
        return [results_of(call, torch.float32) for call in large_calls(dtype)]


@pytest.mark.parametrize(
    "dtype", [pytest.param(d, marks=pytest.mark.slow if d == torch.bfloat16 else ()) for d in ALLOWED], ids=str
)
def test_ops_past_the_caches(dtype, several_tiles, isa):
    for call, expected in zip(large_calls(dtype), large_results(dtype), strict=True):
        within_fences(call, dtype, expected, f"{call.op} {call.name}")


@pytest.mark.skipif("wide" not in _C.isas() or "avx512" not in _C.isas(), reason="needs AVX-512, and `make env`")
@pytest.mark.parametrize("width", [9, 16, 33])
def test_wide_is_avx512(width, several_tiles):
    """What is tested without AVX-512 is what runs with it: the bits of audio, sums of ops but for their contraction."""
    before, features, found = _C.active_isa(), {}, {}
    functions = (kaldi_fbank, mfcc, log_mel, mel_spectrogram, lambda w, dtype: resample(w, width, 8))
    try:
        for isa in ("avx512", "wide"):
            _C.set_isa(isa)
            x = NOISE[: 80 * width]
            features[isa] = [f(x.to(t), dtype=t) for f in functions for t in (torch.float32, torch.float64)]
            found[isa] = [results_of(call, torch.float32) for call in calls(width, torch.float32)]
    finally:
        _C.set_isa(before)
    assert all(map(torch.equal, features["avx512"], features["wide"]))
    for ours, theirs in zip(found["avx512"], found["wide"], strict=True):
        for x, y in zip(ours, theirs, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5, equal_nan=True)
