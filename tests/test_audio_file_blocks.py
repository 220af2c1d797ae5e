"""Decoding, mixing and resampling block by block: the bits of the whole, in the memory of the result."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from mmlm_fast.audio import decoders, read_audio, resample
from mmlm_fast.audio.collect import Collector
from mmlm_fast.audio.decoders import HEADROOM, Block
from support.peers import need
from support.speech import WAVEFORMS

soundfile = pytest.importorskip("soundfile")
RNG = np.random.default_rng(0)
# The last ones have a period longer than a block, and a reach longer than the room before one.
RATES = [(48000, 16000), (44100, 16000), (8000, 16000), (16000, 16000), (22050, 48000), (44101, 16000), (16000, 44101)]


def block_of(samples, rate, channels=None):
    room = np.full((HEADROOM + len(samples), samples.shape[1]), 7, samples.dtype)
    room[HEADROOM:] = samples
    return Block(room, len(samples), rate)


@pytest.mark.parametrize("mono", [True, False])
@pytest.mark.parametrize(("old", "new"), RATES)
def test_the_bits_of_the_whole(old, new, mono):
    for dtype, lengths in ((np.int16, [1]), (np.float32, [5, 1, 40000, 3, 200, 17000]), (np.int16, [9000] * 7)):
        x = RNG.standard_normal((sum(lengths), 2)) * 0.1
        x = (x * 32767).astype(dtype) if dtype == np.int16 else x.astype(dtype)
        collector = Collector(new, mono)
        for part in np.split(x, np.cumsum(lengths)[:-1]):
            collector.add(block_of(part, old))
        got = collector.finish()
        whole = torch.from_numpy(x)
        expected = resample(whole, old, new, channel_dim=1) if mono else resample(whole.t().contiguous(), old, new)
        assert torch.equal(got, expected)
        assert got.is_contiguous()
        assert got.untyped_storage().nbytes() == got.numel() * 4


@pytest.mark.parametrize("expected", [-1, 0, 1000, 90000, 10**15])
def test_whatever_length_was_expected(expected):
    x = RNG.standard_normal((90000, 2)).astype(np.float32)
    for mono in (True, False):
        collector = Collector(None, mono, expected)
        for part in np.split(x, 9):
            collector.add(block_of(part, 16000))
        whole = torch.from_numpy(x)
        assert torch.equal(collector.finish(), whole.mean(1) if mono else whole.t())


def test_rate_channels_and_format_that_change():
    """All of it at the right speed, or an error."""
    x = (RNG.standard_normal((3, 20000, 2)) * 3000).astype(np.int16)
    one, two, three = (torch.from_numpy(part) for part in x)
    collector = Collector(None, True)
    for part, rate in ((x[0], 16000), (x[1][:, :1], 16000), (x[1], 16000), (x[2], 48000)):
        collector.add(block_of(part, rate))
    expected = [resample(one, 16000, 16000, channel_dim=1), two[:, 0] / 32768]
    expected += [resample(two, 16000, 16000, channel_dim=1), resample(three, 48000, 16000, channel_dim=1)]
    assert torch.equal(collector.finish(), torch.cat(expected))
    collector = Collector(48000, False)
    floats = (x[1] / np.float32(32768)).astype(np.float32)
    collector.add(block_of(x[0], 16000))
    collector.add(block_of(floats, 16000))
    both = torch.cat([one / 32768, torch.from_numpy(floats)]).t().contiguous()
    assert torch.equal(collector.finish(), resample(both, 16000, 48000))
    collector.add(block_of(x[0], 16000))
    with pytest.raises(ValueError, match="its channels changes from 2 to 1 after 60000 samples"):
        collector.add(block_of(x[0][:, :1], 16000))


def test_numbers_that_are_none():
    collector = Collector(8000, True)
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(ValueError, match="NaN or infinite"):
            collector.add(block_of(np.array([[0.5], [bad]], np.float32), 16000))
    collector.add(block_of(np.full((50, 2), 3e38, np.float32), 16000))
    with pytest.raises(ValueError, match="too large to be mixed"):
        collector.finish()


def test_files_of_many_blocks(tmp_path, monkeypatch):
    speech = np.tile(WAVEFORMS[0][:40000], 3)
    stereo = np.stack([speech, speech[::-1]], 1)
    expected = {}
    for extension in ("wav", "flac", "ogg", "mp3"):
        soundfile.write(tmp_path / f"a.{extension}", stereo, 44100)
        for mono in (True, False):
            expected[extension, mono] = read_audio(tmp_path / f"a.{extension}", sampling_rate=16000, mono=mono)[0]
    for block in (1 << 14, 3001):
        monkeypatch.setattr(decoders, "BLOCK", block)
        for (extension, mono), samples in expected.items():
            got, _ = read_audio(tmp_path / f"a.{extension}", sampling_rate=16000, mono=mono)
            assert torch.equal(got, samples)


MEMORY = """
import sys
from mmlm_fast.audio import read_audio
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
path, small, rate, mono = sys.argv[1:]
settings = dict(sampling_rate=int(rate) or None, mono=mono == "mono")
read_audio(small, **settings)  # libraries, tables, threads
before = peak()
result = read_audio(path, **settings)[0]
print((peak() - before) * 1024 / (result.numel() * 4))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("extension", ["wav", *(pytest.param(e, marks=pytest.mark.slow) for e in ("flac", "mka"))])
def test_memory_of_the_result(tmp_path, extension):
    """Of three minutes of 48 kHz stereo: the result, a few blocks, and half of it where the length is not known."""
    av = need("av") if extension == "mka" else None
    second = np.repeat((np.sin(np.arange(48000) * 0.05) * 3000).astype(np.int16)[:, None], 2, 1)
    for name, seconds in (("small", 1), ("long", 200)):
        path = tmp_path / f"{name}.{extension}"
        if av is None:
            with soundfile.SoundFile(path, "w", 48000, 2) as file:
                for _ in range(seconds):
                    file.write(second)
            continue
        with av.open(str(path), "w") as container:
            stream = container.add_stream("pcm_s16le", rate=48000, layout="stereo")
            for i in range(seconds):
                frame = av.AudioFrame.from_ndarray(second.reshape(1, -1), format="s16", layout="stereo")
                frame.rate, frame.pts = 48000, i * 48000
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    for rate, mono in ((16000, "mono"), (0, "all")) if extension == "wav" else ((16000, "mono"),):
        arguments = [str(tmp_path / f"{name}.{extension}") for name in ("long", "small")]
        command = [sys.executable, "-P", "-c", MEMORY, *arguments, str(rate), mono]
        ratio = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        assert ratio < 3, (rate, mono)
