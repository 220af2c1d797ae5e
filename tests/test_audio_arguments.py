"""Whole numbers of any kind, waveforms in arrays, tables kept within a number of bytes: alike in every function."""

import inspect
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import mmlm_fast
from mmlm_fast import audio
from mmlm_fast.audio.arguments import whole
from mmlm_fast.audio.tables import ByteCache
from support.speech import WAVEFORMS

SPEECH = torch.from_numpy(WAVEFORMS[0][20000:28000])
FUNCTIONS = {
    "log_mel": (audio.log_mel, dict(num_mel_bins=40, sampling_rate=16000, num_samples=9000, orig_freq=15000)),
    "kaldi_fbank": (audio.kaldi_fbank, dict(num_mel_bins=40, channel=0, orig_freq=8000)),
    "mfcc": (audio.mfcc, dict(num_mel_bins=40, num_ceps=7, orig_freq=8000)),
    "spectrogram": (audio.spectrogram, dict(sample_rate=8000, n_fft=256, win_length=200, hop_length=100, pad=3)),
    "mel_spectrogram": (audio.mel_spectrogram, dict(n_mels=20, n_fft=512, hop_length=100, orig_freq=8000)),
    "mel_mfcc": (audio.mel_mfcc, dict(n_mfcc=5, n_mels=20, sample_rate=16000)),
    "nemo_log_mel": (audio.nemo_log_mel, dict(num_mel_bins=20, orig_freq=8000)),
    "resample": (audio.resample, dict(orig_freq=8000, new_freq=16000, lowpass_filter_width=7)),
    "StreamingFbank": (lambda x, **o: audio.StreamingFbank(**o)(x), dict(num_mel_bins=40, orig_freq=8000)),
    "StreamingMfcc": (lambda x, **o: audio.StreamingMfcc(**o)(x), dict(num_mel_bins=40, num_ceps=7, orig_freq=8000)),
    "StreamingLogMel": (lambda x, **o: audio.StreamingLogMel(**o)(x), dict(num_mel_bins=40, orig_freq=8000)),
    "StreamingResample": (lambda x, **o: audio.StreamingResample(**o)(x), dict(orig_freq=8000, new_freq=16000)),
}
KINDS = [np.int64, np.int32, np.uint16, np.array, torch.tensor]
ARGUMENTS = [(name, argument) for name, (_, options) in FUNCTIONS.items() for argument in options]


@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
def test_whole_numbers(name, argument):
    function, options = FUNCTIONS[name]
    expected = function(SPEECH, **options)
    for kind in KINDS:
        assert torch.equal(function(SPEECH, **options | {argument: kind(options[argument])}), expected), kind
    for bad in (True, np.bool_(True), torch.tensor(True), float(options[argument]), np.float64(20), "20", [20]):
        with pytest.raises(ValueError, match=f"{argument} must be"):
            function(SPEECH, **options | {argument: bad})


@pytest.mark.parametrize("name", [n for n in FUNCTIONS if not n.startswith("Streaming")])
def test_arrays_give_arrays_with_the_bits_of_tensors(name):
    function, options = FUNCTIONS[name]

    def alike(ours, theirs):
        ours, theirs = np.asarray(ours), np.asarray(theirs)
        return ours.dtype == theirs.dtype and np.array_equal(ours, theirs)

    x, y = SPEECH.numpy(), SPEECH.numpy()[:7000].copy()
    expected = function(SPEECH, **options)
    readonly = np.frombuffer(x.tobytes(), np.float32)
    padded = np.zeros(2 * len(x), np.float32)
    padded[::2] = x
    unaligned = np.frombuffer(b"x" + x.tobytes(), np.uint8)[1:].view(np.float32)
    kinds = (x, x.astype(">f4"), x[::-1].copy()[::-1], readonly, np.ma.masked_array(x), padded[::2], unaligned)
    for given in kinds:
        out = function(given, **options)
        assert type(out) is np.ndarray
        assert out.dtype == np.float32
        assert alike(out, expected)
    listed, wanted = function([x, y], **options), function([SPEECH, SPEECH[:7000]], **options)
    assert all(type(a) is np.ndarray and alike(a, b) for a, b in zip(listed, wanted, strict=True))
    mixed = function([x, SPEECH[:7000]], **options)
    assert all(torch.equal(a, b) for a, b in zip(mixed, wanted, strict=True))
    integers = (x * 32767).astype(np.int16)
    assert alike(function(integers, **options), function(torch.from_numpy(integers), **options))
    with mmlm_fast.reference():
        assert np.array_equal(function(x, **options), function(SPEECH, **options))
    if "dtype" in inspect.signature(function).parameters:
        for dtype, kind in ((np.float64, torch.float64), ("float16", torch.float16), (torch.float64, "float64")):
            ours, theirs = function(x, dtype=dtype, **options), function(SPEECH, dtype=kind, **options)
            assert alike(ours, theirs)
        with pytest.raises(ValueError, match="numpy has no bfloat16"):
            function(x, dtype=torch.bfloat16, **options)
    masked = np.ma.masked_array(x, mask=np.arange(len(x)) < 9)
    for bad in (masked, [masked], x.astype(np.uint8), x.astype(complex), np.array(["a"]), x.tolist(), "a.wav", x > 0):
        with pytest.raises(ValueError, match=r"clip|waveform"):
            function(bad, **options)


def test_whole_says_what_it_wants():
    assert whole("n", np.int8(3)) == 3
    for value, message in (
        (0, "n must be a whole number of at least 1, got 0"),
        (3.0, "n must be a whole number of at least 1, got 3.0 of float"),
        (True, "got True of bool"),
    ):
        with pytest.raises(ValueError, match=message):
            whole("n", value)


def test_what_is_kept_is_bounded_in_bytes():
    cache = ByteCache(100, len)
    for i in range(50):
        assert cache.get(i, lambda: b"x" * 30) == b"x" * 30
    assert (len(cache), cache.num_bytes) == (3, 90)
    large = cache.get("large", lambda: b"y" * 1000)  # alone, while it is the last
    assert cache.get("large", lambda: b"") is large
    assert (len(cache), cache.num_bytes) == (1, 1000)
    cache.get(0, lambda: b"x")
    assert (len(cache), cache.num_bytes) == (1, 1)


def test_many_settings_keep_no_more_than_the_bound():
    from mmlm_fast.audio.spec import _PREPARED

    for n_fft in range(20000, 20400, 8):
        audio.mel_spectrogram(SPEECH, n_fft=n_fft, n_mels=64, pad=20000)
        assert _PREPARED.num_bytes <= _PREPARED.max_bytes


def test_an_unknown_instruction_set_is_an_import_error():
    env = os.environ | {"MMLM_FAST_ISA": "avx"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", "import mmlm_fast.audio"], env=env, capture_output=True, text=True
    )
    assert "ImportError: MMLM_FAST_ISA must be baseline, avx2, avx512 or wide, got avx" in done.stderr
