"""Streams give the bits of the whole signal, however it is cut."""

import copy
import pickle
import threading
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmlm_fast.audio import (
    StreamingFbank,
    StreamingLogMel,
    StreamingMfcc,
    StreamingResample,
    kaldi_fbank,
    log_mel,
    mfcc,
    resample,
)
from support.speech import WAVEFORMS

SPEECH = torch.from_numpy(WAVEFORMS[0])

STREAMS = {
    "fbank": (lambda: StreamingFbank(num_mel_bins=80), lambda x: kaldi_fbank(x, num_mel_bins=80), 0),
    "fbank_mirrored": (
        lambda: StreamingFbank(snip_edges=False, use_energy=True),
        lambda x: kaldi_fbank(x, snip_edges=False, use_energy=True),
        0,
    ),
    "fbank_float64": (
        lambda: StreamingFbank(dtype=torch.float64, scale=32768.0),
        lambda x: kaldi_fbank(x, dtype=torch.float64, scale=32768.0),
        0,
    ),
    "fbank_sparse": (
        lambda: StreamingFbank(frame_length=5.0, frame_shift=20.0),
        lambda x: kaldi_fbank(x, frame_length=5.0, frame_shift=20.0),
        0,
    ),
    "mfcc": (lambda: StreamingMfcc(), lambda x: mfcc(x), 0),
    "mfcc_energy": (
        lambda: StreamingMfcc(num_ceps=20, num_mel_bins=40, use_energy=True, htk_compat=True),
        lambda x: mfcc(x, num_ceps=20, num_mel_bins=40, use_energy=True, htk_compat=True),
        0,
    ),
    "log_mel": (lambda: StreamingLogMel(log_mel_max=1.5), lambda x: log_mel(x, log_mel_max=1.5), 1),
    "log_mel_128": (
        lambda: StreamingLogMel(num_mel_bins=128, log_mel_max=0.5, dtype=torch.float64),
        lambda x: log_mel(x, num_mel_bins=128, log_mel_max=0.5, dtype=torch.float64),
        1,
    ),
}


def cut(x, sizes):
    start = 0
    while start < len(x):
        size = sizes[0]
        sizes = [*sizes[1:], size]
        yield x[start : start + size]
        start += size


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("sizes", [[1600], [1], [0, 1, 777, 160, 5], [100000], [399, 1, 161]], ids=str)
def test_bits_of_the_whole_signal(name, sizes):
    make, whole, dim = STREAMS[name]
    x = SPEECH[20000:24321] if sizes == [1] else SPEECH[20000:60001]
    stream = make()
    parts = [stream.accept(chunk) for chunk in cut(x, sizes)] + [stream.flush()]
    assert torch.equal(torch.cat(parts, dim), whole(x))
    assert stream.num_samples == len(x)
    assert stream.num_frames == whole(x).shape[dim]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(0, 3000), min_size=1, max_size=6).filter(any),
    st.integers(450, 20000),
    st.sampled_from(sorted(STREAMS)),
)
def test_any_cut(sizes, length, name):
    make, whole, dim = STREAMS[name]
    x, stream = SPEECH[30000 : 30000 + length], make()
    parts = [stream.accept(chunk) for chunk in cut(x, sizes)] + [stream.flush()]
    assert torch.equal(torch.cat(parts, dim), whole(x))


def test_frames_come_as_soon_as_they_can():
    stream = StreamingFbank(num_mel_bins=80)
    assert stream.accept(SPEECH[:399]).shape == (0, 80)
    assert stream.accept(SPEECH[399:400]).shape == (1, 80)
    assert stream.accept(SPEECH[400:560]).shape == (1, 80)
    stream = StreamingLogMel(log_mel_max=1.5)
    assert stream.accept(SPEECH[:200]).shape == (80, 0)  # sample 200 is mirrored into frame 0
    assert stream.accept(SPEECH[200:201]).shape == (80, 1)


def test_running_maximum():
    """Without a constant: below the loudest so far, which the whole clip's frames never exceed."""
    stream, whole = StreamingLogMel(), log_mel(SPEECH)
    out = torch.cat([stream.accept(c) for c in cut(SPEECH, [1600])] + [stream.flush()], 1)
    assert out.shape == whole.shape
    above = out > whole - 1e-6
    loud = whole > whole.max() - 1.9
    torch.testing.assert_close(out[loud], whole[loud], rtol=0, atol=1e-6)
    assert (out <= whole + 1e-6).all()
    assert above.float().mean() > 0.5


@pytest.mark.parametrize("name", STREAMS)
def test_pickle_and_copy(name):
    make, whole, dim = STREAMS[name]
    x = SPEECH[20000:40000]
    stream = make()
    head = stream.accept(x[:7777])
    twins = [pickle.loads(pickle.dumps(stream)), copy.deepcopy(stream), copy.copy(stream), stream]
    for twin in twins:
        rest = torch.cat([twin.accept(x[7777:]), twin.flush()], dim)
        assert torch.equal(torch.cat([head, rest], dim), whole(x))
    with pytest.raises(ValueError, match="flushed"):
        pickle.loads(pickle.dumps(stream)).accept(x)


def test_running_maximum_is_pickled():
    stream = StreamingLogMel()
    stream.accept(SPEECH[:80000])
    twin = pickle.loads(pickle.dumps(stream))
    assert torch.equal(twin.accept(SPEECH[80000:90000]), stream.accept(SPEECH[80000:90000]))


def test_many_streams_in_parallel():
    streams = [StreamingFbank(num_mel_bins=80) for _ in range(8)]
    results = [None] * 8

    def work(i):
        x = SPEECH[i * 1000 : i * 1000 + 40000]
        results[i] = torch.cat([streams[i].accept(c) for c in cut(x, [160 * (i + 1)])] + [streams[i].flush()])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, out in enumerate(results):
        assert torch.equal(out, kaldi_fbank(SPEECH[i * 1000 : i * 1000 + 40000], num_mel_bins=80))


def test_one_stream_from_many_threads_does_not_break():
    stream = StreamingFbank(num_mel_bins=80)
    counts = []

    def work():
        counts.append(sum(len(stream.accept(SPEECH[:1600])) for _ in range(50)))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stream.num_samples == 8 * 50 * 1600
    assert stream.num_frames == 1 + (stream.num_samples - 400) // 160


def test_memory_is_bounded():
    stream = StreamingLogMel(log_mel_max=1.5)
    for _ in range(600):
        stream.accept(SPEECH[:16000])
        assert len(stream.__getstate__()["state"][3]) < 3 * 400
    tracemalloc.start()
    for _ in range(200):
        stream.accept(SPEECH[:16000])
    assert tracemalloc.get_traced_memory()[0] < 200_000
    tracemalloc.stop()


def test_samples_of_other_types():
    integers = (SPEECH[:16000] * 32767).round().to(torch.int16)
    expected = kaldi_fbank(integers, num_mel_bins=80)
    for chunk in (integers, integers.numpy(), integers.float() / 32768, (integers.double() / 32768).numpy()):
        out = StreamingFbank(num_mel_bins=80).accept(chunk)
        assert type(out) is type(chunk)
        assert np.array_equal(out, expected)
    assert torch.equal(
        StreamingFbank(num_mel_bins=80).accept(SPEECH[:16000:2]), kaldi_fbank(SPEECH[:16000:2], num_mel_bins=80)
    )


def test_reset_and_empty_signal():
    stream = StreamingLogMel(log_mel_max=1.5)
    assert stream.flush().shape == (80, 0)
    stream.reset()
    first = stream.accept(SPEECH[:16000])
    stream.reset()
    assert torch.equal(stream.accept(SPEECH[:16000]), first)


def test_errors():
    stream = StreamingFbank(num_mel_bins=80)
    for bad in (torch.zeros(2, 100), torch.zeros(100, dtype=torch.int64), [0.0, 1.0], np.zeros(3, np.uint8)):
        with pytest.raises(ValueError, match="samples must be a 1-D tensor or array"):
            stream.accept(bad)
    stream.accept(SPEECH[:1000])
    poisoned = SPEECH[1000:2000].clone()
    poisoned[500] = torch.nan
    with pytest.raises(ValueError, match="samples must be finite"):
        stream.accept(poisoned)
    rest = stream.accept(SPEECH[1000:2000])  # the bad chunk was not taken
    assert torch.equal(rest, kaldi_fbank(SPEECH[:2000], num_mel_bins=80)[-len(rest) :])
    stream.flush()
    for call in (lambda: stream.accept(SPEECH[:10]), stream.flush):
        with pytest.raises(ValueError, match="flushed"):
            call()
    short = StreamingLogMel(log_mel_max=1.5)
    short.accept(SPEECH[:150])
    with pytest.raises(ValueError, match="at least 201 samples"):
        short.flush()
    for options, message in (
        (dict(subtract_mean=True), "subtract_mean needs the whole signal"),
        (dict(dither=1.0), "dither needs the whole signal"),
        (dict(nmels=3), "settings must be among .*, got nmels"),
        (dict(num_ceps=3), "num_ceps"),
    ):
        with pytest.raises(ValueError, match=message):
            StreamingFbank(**options)
    with pytest.raises(ValueError, match=r"dtype must be torch\.float32 or torch\.float64"):
        StreamingLogMel(dtype=torch.float16)


REFUSED = {
    "NaN": np.full(100, np.nan, np.float32),
    "infinity": np.full(1, np.inf),
    "overflow": np.full(100, 1e30, np.float32),
    "of float32": np.full(2, 1e300),
    "int64": np.zeros(100, np.int64),
    "two axes": torch.zeros(2, 100),
    "masked": np.ma.masked_array(np.zeros(100, np.float32), mask=True),
    "a gradient": torch.zeros(100).requires_grad_(),
    "a list": [0.0, 1.0],
}


@pytest.mark.parametrize("orig_freq", [None, 44100, 44099])
@pytest.mark.parametrize("given", REFUSED)
@pytest.mark.parametrize("make", [StreamingFbank, StreamingMfcc, StreamingLogMel], ids=lambda c: c.__name__)
def test_what_is_refused_is_not_taken(make, given, orig_freq):
    """As if it had never been offered: later frames, counts, the end, and copies."""
    untouched, stream = make(orig_freq=orig_freq), make(orig_freq=orig_freq)
    parts = []
    for chunk in SPEECH[20000:28123].split(1777):
        expected = untouched.accept(chunk)
        with pytest.raises(ValueError, match=r"sample|derivatives"):
            stream.accept(REFUSED[given])
        stream = pickle.loads(pickle.dumps(stream))
        assert torch.equal(stream.accept(chunk), expected)
        assert (stream.num_samples, stream.num_frames) == (untouched.num_samples, untouched.num_frames)
        parts.append(expected)
    with pytest.raises(ValueError):
        stream.accept(REFUSED[given])
    assert torch.equal(stream.flush(), untouched.flush())


@pytest.mark.parametrize("name", [n for n in STREAMS if "sparse" not in n])
@pytest.mark.parametrize("orig_freq", [8000, 44100, 44099])
def test_other_rates_have_the_bits_of_the_whole(name, orig_freq):
    make, _, dim = STREAMS[name]
    plain = make()
    options = {k: v for k, v in plain.__getstate__()["settings"].items() if k != "orig_freq"}
    function = {StreamingFbank: kaldi_fbank, StreamingMfcc: mfcc, StreamingLogMel: log_mel}[type(plain)]
    x, stream = SPEECH[20000:40001], type(plain)(orig_freq=orig_freq, **options)
    parts = [stream.accept(chunk) for chunk in cut(x, [777, 0, 2400, 1])] + [stream.flush()]
    assert torch.equal(torch.cat(parts, dim), function(x, orig_freq=orig_freq, **options))
    assert stream.num_samples == len(x)


def test_a_large_sample_is_taken_where_nothing_can_overflow():
    x = SPEECH[20000:28000].double() * 1e12
    for options in (dict(), dict(dtype=torch.float64), dict(use_power=False)):
        stream = StreamingFbank(**options)
        assert torch.equal(torch.cat([stream.accept(x), stream.flush()]), kaldi_fbank(x, **options))


# ---- channels, arrays ---------------------------------------------------------------------------------------------

STEREO = torch.stack([SPEECH[:30000], SPEECH[10000:40000] * 0.5, -SPEECH[5000:35000]])
KINDS = {
    "float32": STEREO,
    "float64": STEREO.double(),
    "int16": (STEREO * 20000).to(torch.int16),
    "int32": (STEREO * 2**30).to(torch.int32),
}
WITH_CHANNELS = {
    "fbank": (StreamingFbank, kaldi_fbank, dict(num_mel_bins=40), 0),
    "fbank float64": (StreamingFbank, kaldi_fbank, dict(num_mel_bins=40, dtype=torch.float64), 0),
    "fbank of 8 kHz": (StreamingFbank, kaldi_fbank, dict(num_mel_bins=40, orig_freq=8000), 0),
    "mfcc": (StreamingMfcc, mfcc, dict(num_mel_bins=40, orig_freq=22050), 0),
    "log_mel": (StreamingLogMel, log_mel, dict(log_mel_max=1.5), 1),
    "log_mel of 44.1 kHz": (StreamingLogMel, log_mel, dict(log_mel_max=1.5, orig_freq=44100), 1),
    "resample": (StreamingResample, resample, dict(orig_freq=44100, new_freq=16000), 0),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", WITH_CHANNELS)
@pytest.mark.parametrize("channel_dim", [0, 1, -1])
def test_channels_are_averaged_as_on_the_whole_signal(name, kind, channel_dim):
    stream_of, function, options, time = WITH_CHANNELS[name]
    if name == "resample":
        options = options | (dict(dtype=torch.float64) if kind == "float64" else {})
    signal = KINDS[kind] if channel_dim == 0 else KINDS[kind].t()
    stream = stream_of(**options, channel_dim=channel_dim)
    pieces = signal.split([1, 0, 159, 4000, 11111, 14729], dim=0 if channel_dim else 1)
    out = [stream.accept(piece) for piece in pieces[:3]]
    stream = pickle.loads(pickle.dumps(stream))
    out += [stream.accept(piece) for piece in pieces[3:]] + [stream.flush()]
    given = {k: v for k, v in options.items() if not (name == "resample" and k == "dtype")}
    assert torch.equal(torch.cat(out, time), function(signal, **given, channel_dim=channel_dim))
    assert stream.num_samples == 30000


def test_what_a_stream_with_channels_refuses():
    stream = StreamingFbank(num_mel_bins=40, channel_dim=0)
    stream.accept(STEREO[:, :5000])
    for bad, message in (
        (STEREO[:2, :100], "the signal has 3 channels, got samples of 2"),
        (STEREO[0, :100], r"samples must be a 2-D \(channel_dim=0\) tensor or array"),
        (STEREO[:0], "at least one channel"),
        (torch.full((3, 10), torch.nan), "finite"),
    ):
        with pytest.raises(ValueError, match=message):
            stream.accept(bad)
    out = torch.cat([stream.accept(STEREO[:, 5000:]), stream.flush()])
    assert torch.equal(out, kaldi_fbank(STEREO, num_mel_bins=40, channel_dim=0)[-len(out) :])
    for wrong in (2, -3, 0.0, True):
        with pytest.raises(ValueError, match="channel_dim must be"):
            StreamingFbank(channel_dim=wrong)
    with pytest.raises(ValueError, match="samples must be a 1-D tensor or array"):
        StreamingFbank().accept(STEREO)


@pytest.mark.parametrize("name", WITH_CHANNELS)
def test_arrays_give_arrays(name):
    stream_of, function, options, time = WITH_CHANNELS[name]
    stream, signal = stream_of(**options), SPEECH[:30000].numpy()
    out = [stream.accept(piece) for piece in np.split(signal, [100, 7777])]
    stream = copy.deepcopy(stream)
    out.append(stream.flush())
    assert all(type(piece) is np.ndarray for piece in out)
    expected = function(signal, **options)
    assert np.array_equal(np.concatenate(out, time), expected)
    assert type(expected) is np.ndarray
    assert isinstance(stream_of(**options).flush(), torch.Tensor)  # torch is loaded, and nothing came
