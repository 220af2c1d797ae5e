"""Which decoder reads what, with one, the other or none of them there; names, streams and failures of all kinds."""

import io
import os
import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest
import torch

from mmlm_fast.audio import AudioFileError, audio_info, decoders, read_audio, read_audio_files
from support.audio_files import by_av, by_soundfile, pcm_format, wav
from support.peers import need
from support.speech import WAVEFORMS

soundfile = pytest.importorskip("soundfile")
RNG = np.random.default_rng(0)
CLIP = np.round((RNG.standard_normal(16000) * 0.1).clip(-0.9, 0.9) * 32768) / 32768
EXPECTED = torch.from_numpy(CLIP).float()


def without(monkeypatch, *modules):
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)


@pytest.mark.parametrize(
    ("codec", "kind", "rate"),
    [("ac3", "wav", 48000), ("g722", "wav", 16000), ("adpcm_yamaha", "wav", 16000), ("flac", "ogg", 16000),
     ("alac", "caf", 16000), ("adpcm_ima_qt", "aiff", 16000)],
)  # fmt: skip
def test_codecs_that_libsndfile_does_not_know(tmp_path, codec, kind, rate):
    need("av")
    clip = 0.3 * np.sin(np.arange(2 * rate) * 0.05)
    path = by_av(tmp_path / f"a.{kind}", codec, clip, rate, format=kind)
    samples, got_rate = read_audio(path)
    assert got_rate == rate == audio_info(path).sampling_rate
    assert len(clip) <= len(samples) < len(clip) + 2000
    if codec in ("flac", "alac"):
        assert len(samples) == len(clip) == audio_info(path).num_samples


@pytest.mark.parametrize(
    ("kind", "subtype"),
    [("WAV", "PCM_16"), ("WAV", "PCM_U8"), ("WAV", "PCM_24"), ("WAV", "PCM_32"), ("WAV", "FLOAT"), ("WAV", "DOUBLE"),
     ("WAV", "ULAW"), ("AIFF", "PCM_16"), ("AU", "PCM_16"), ("W64", "PCM_16"), ("CAF", "PCM_16"), ("FLAC", "PCM_16"),
     ("FLAC", "PCM_24"), ("RF64", "PCM_16")],
)  # fmt: skip
def test_the_same_from_either_decoder(tmp_path, monkeypatch, kind, subtype):
    need("av")
    path = tmp_path / "a.x"
    stereo = np.stack([CLIP, CLIP[::-1]], 1)
    path.write_bytes(by_soundfile(stereo, format=kind, subtype=subtype))
    expected, info = read_audio(path, mono=False)[0], audio_info(path)
    resampled = read_audio(path, sampling_rate=8000)[0]
    without(monkeypatch, "soundfile")
    assert torch.equal(read_audio(path, mono=False)[0], expected)
    assert torch.equal(read_audio(path, sampling_rate=8000)[0], resampled)
    assert audio_info(path).num_samples == info.num_samples == len(CLIP)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(AudioFileError, match=r"cut short|broken"):
        read_audio(path)


def test_without_decoders(tmp_path, monkeypatch):
    (tmp_path / "a.wav").write_bytes(by_soundfile(CLIP, format="WAV"))
    (tmp_path / "a.mp3").write_bytes(by_soundfile(CLIP, format="MP3"))
    (tmp_path / "junk").write_bytes(b"not audio at all" * 50)
    need("av")
    by_av(tmp_path / "b.mp3", "libmp3lame", CLIP, write_xing="0")
    by_av(tmp_path / "a.m4a", "aac", CLIP)
    without(monkeypatch, "av")
    assert torch.equal(read_audio(tmp_path / "a.wav")[0], EXPECTED)
    assert len(read_audio(tmp_path / "a.mp3")[0]) == len(CLIP)
    for name in ("a.m4a", "junk"):
        for function in (read_audio, audio_info):
            with pytest.raises(AudioFileError, match=r"PyAV \(av\) is not installed: pip install '\.\[audio\]'"):
                function(tmp_path / name)
    with pytest.raises(AudioFileError, match=r"its length is not stated.*PyAV \(av\) is not installed"):
        read_audio(tmp_path / "b.mp3")
    assert audio_info(tmp_path / "b.mp3").num_samples == -1
    with pytest.warns(UserWarning, match="its length is not stated"):
        assert len(read_audio(tmp_path / "b.mp3", strict=False)[0]) > 0.9 * len(CLIP)
    without(monkeypatch, "soundfile")
    for function in (read_audio, audio_info):
        with pytest.raises(
            AudioFileError, match=r"reading files needs soundfile: soundfile and PyAV \(av\) are not inst"
        ):
            function(tmp_path / "a.wav")
    result = read_audio_files([tmp_path / "a.wav"] * 3, sampling_rate=8000)
    assert result.waveforms == [None] * 3
    assert all("reading files needs soundfile" in error.reason for error in result.failures)


@pytest.mark.parametrize(
    "error", [RuntimeError("no"), MemoryError(), OSError("gone"), UnicodeDecodeError("x", b"", 0, 1, "")]
)
def test_whatever_a_decoder_raises(tmp_path, monkeypatch, error):
    path = tmp_path / "a.wav"
    path.write_bytes(by_soundfile(CLIP, format="WAV"))

    def fail(*_, **__):
        raise error

    need("av")
    monkeypatch.setattr(decoders.SoundfileReader, "blocks", fail)
    assert torch.equal(read_audio(path)[0], EXPECTED)
    monkeypatch.setattr(decoders.AvReader, "blocks", fail)
    with pytest.raises(AudioFileError, match=r"a\.wav: .*" + type(error).__name__):
        read_audio(path)
    monkeypatch.undo()
    for name, module in (("soundfile", "soundfile"), ("PyAV", "av")):
        monkeypatch.setitem(decoders._READERS, name, (module, fail))
        if name == "soundfile":
            assert torch.equal(read_audio(path)[0], EXPECTED)
            assert audio_info(path).codec == "pcm_s16le"
    for function in (read_audio, audio_info):
        with pytest.raises(AudioFileError, match=rf"{type(error).__name__}: .*\(soundfile\); .*\(PyAV\)"):
            function(path)
    monkeypatch.setitem(decoders._READERS, "soundfile", ("soundfile", interrupt))
    with pytest.raises(KeyboardInterrupt):
        read_audio(path)


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes")
def test_names(tmp_path):
    """Names that are not UTF-8, that look like protocols or like samples without a header; as str, bytes and Path."""
    av = need("av")
    names = [b"\xe9\xff.wav", b"12:30.wav", b"http:x.wav", b"a.raw", "ü—.wav".encode(), b"%d.wav", b"no extension"]
    folder = os.fsencode(tmp_path)
    here = os.getcwd()
    for name in names:
        for content in (by_soundfile(CLIP, format="WAV"), by_soundfile(CLIP, format="CAF", subtype="ALAC_16")):
            with open(os.path.join(folder, name), "wb") as file:
                file.write(content)
            os.chdir(folder)
            try:
                for path in (os.path.join(folder, name), name):
                    for given in (path, os.fsdecode(path)):
                        assert torch.equal(read_audio(given)[0], EXPECTED)
                        assert audio_info(given).num_samples == len(CLIP)
                        reader = decoders.AvReader(os.fsencode(given), None)
                        assert sum(block.length for block in reader.blocks(5000)) == len(CLIP)
                        reader.close()
            finally:
                os.chdir(here)
    bad = os.path.join(folder, b"\xe9.wav")
    with open(bad, "wb") as file:
        file.write(by_soundfile(CLIP, format="WAV")[:9000])
    for given in (bad, os.fsdecode(bad)):
        with pytest.raises(AudioFileError, match=r"\\xe9\.wav: cut short") as caught:
            read_audio(given)
        str(caught.value).encode()
        assert os.fsencode(caught.value.path) == bad
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            read_audio(given, strict=False)
        str(said[0].message).encode()
    failures = read_audio_files([bad, os.fsdecode(bad)], sampling_rate=8000).failures
    assert [os.fsencode(error.path) for error in failures] == [bad, bad]
    assert av


def test_what_is_no_file(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", "/dev/zero", tmp_path):
        for function in (read_audio, audio_info):
            with pytest.raises(AudioFileError, match="not a file"):
                function(path)
    for path in ("a\0b", "x" * 5000, tmp_path / "a" / "b"):
        with pytest.raises(AudioFileError):
            read_audio(path)
    for path in (None, 3, io.BytesIO()):
        with pytest.raises(ValueError, match=f"path must be a str, bytes or os.PathLike, got {type(path).__name__}"):
            read_audio(path)
    result = read_audio_files([None, 3, tmp_path / "none"], sampling_rate=8000)
    assert len(result.failures) == 3
    monkeypatch.setattr(os, "stat", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(AudioFileError, match="cannot be opened: Permission denied"):
        read_audio("a")


def test_rates_of_numpy(tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(by_soundfile(CLIP, format="WAV"))
    for rate in (np.int64(8000), np.int32(8000), torch.tensor(8000)):
        samples, got = read_audio(path, sampling_rate=rate)
        assert (len(samples), got, type(got)) == (8000, 8000, int)
        assert len(read_audio_files([path], sampling_rate=rate).waveforms[0]) == 8000
    for bad in (True, 8000.0, "8000", 0, -1, np.float32(8000), np.bool_(True)):
        with pytest.raises(ValueError, match="sampling_rate must be a positive whole number of hertz, got "):
            read_audio(path, sampling_rate=bad)
        with pytest.raises(ValueError, match="sampling_rate must be a positive whole number of hertz, got "):
            read_audio_files([path], sampling_rate=bad)


def test_films_and_several_streams(tmp_path):
    """The first audio stream, whatever stands before it."""
    av = need("av")
    path = tmp_path / "film.mkv"
    with av.open(str(path), "w") as file:
        video = file.add_stream("mpeg4", rate=10)
        video.width = video.height = 32
        sound = [file.add_stream("pcm_s16le", rate=16000, layout="mono") for _ in range(2)]
        for i in range(10):
            file.mux(video.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
            for stream, factor in zip(sound, (1, -1), strict=True):
                part = (CLIP[1600 * i : 1600 * (i + 1)] * 32768 * factor).astype(np.int16)
                frame = av.AudioFrame.from_ndarray(part[None], format="s16", layout="mono")
                frame.rate, frame.pts = 16000, 1600 * i
                file.mux(stream.encode(frame))
        for stream in (video, *sound):
            file.mux(stream.encode(None))
    assert torch.equal(read_audio(path)[0], EXPECTED)
    silent = tmp_path / "silent.mkv"
    with av.open(str(silent), "w") as file:
        video = file.add_stream("mpeg4", rate=10)
        video.width = video.height = 32
        file.mux(video.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
        file.mux(video.encode(None))
    for function in (read_audio, audio_info):
        with pytest.raises(AudioFileError, match="no audio stream"):
            function(silent)


@pytest.mark.parametrize("codec", ["wavpack", "tta", "aac", "libopus"])
def test_eight_and_more_planes(tmp_path, codec):
    need("av")
    layouts = {1: "mono", 6: "5.1", 8: "7.1"} | ({14: "9.1.4"} if codec == "wavpack" else {})
    for channels, layout in layouts.items():
        clip = 0.1 * np.sin(np.arange(9600) * 0.03 * np.arange(1, channels + 1)[:, None])
        kind = {"wavpack": "wv", "libopus": "mka", "aac": "m4a"}.get(codec, codec)
        form = {"wavpack": "s16p", "tta": "s16"}.get(codec)
        path = by_av(tmp_path / f"a.{kind}", codec, clip, 48000, layout=layout, sample_format=form)
        samples, _ = read_audio(path, mono=False)
        assert len(samples) == channels
        if codec in ("wavpack", "tta"):
            np.testing.assert_allclose(samples.numpy(), clip, atol=2**-15)
        else:
            power = samples.double().std(1).numpy() / clip.std(1)
            assert np.sum(abs(power - 1) < 0.2) >= channels - 1  # all but the low-pass one of the bass


def test_a_rate_that_changes_in_the_middle(tmp_path):
    need("av")
    slow = by_av(tmp_path / "a.aac", "aac", 0.3 * np.sin(np.arange(32000) * 0.1), 16000)
    fast = by_av(tmp_path / "b.aac", "aac", 0.3 * np.sin(np.arange(96000) * 0.1), 48000)
    both = tmp_path / "c.aac"
    both.write_bytes(slow.read_bytes() + fast.read_bytes())
    samples, rate = read_audio(both)
    assert rate == 16000
    assert 64000 <= len(samples) < 64000 + 3000  # two seconds and two seconds


def test_metadata_that_is_not_utf8(tmp_path):
    path = tmp_path / "a.wav"
    pcm = (CLIP * 32768).astype("<i2").tobytes()
    title = b"INFOINAM" + (4).to_bytes(4, "little") + b"\xff\xfe\xe9\0"
    path.write_bytes(wav(pcm_format(), (b"LIST", title), (b"data", pcm)))
    assert torch.equal(read_audio(path)[0], EXPECTED)
    need("av")
    reader = decoders.AvReader(os.fsencode(path), None)
    assert sum(block.length for block in reader.blocks(4000)) == len(CLIP)


def test_threads_and_forks(tmp_path):
    paths = []
    for i, extension in enumerate(["wav", "flac", "ogg", "mp3"] * 3):
        paths.append(tmp_path / f"{i}.{extension}")
        paths[-1].write_bytes(by_soundfile(WAVEFORMS[0][: 8000 + i], format=extension.upper()))
    alone = [read_audio(path, sampling_rate=8000)[0] for path in paths]
    together = read_audio_files(paths * 4, sampling_rate=8000, num_workers=8)
    assert not together.failures
    for got, expected in zip(together.waveforms, alone * 4, strict=True):
        assert torch.equal(got, expected)
    code = "import os, sys; from mmlm_fast.audio import read_audio; p = sys.argv[1:]\n"
    code += (
        "[read_audio(x) for x in p]\nif os.fork() == 0: [read_audio(x, sampling_rate=8000) for x in p]; os._exit(7)\n"
    )
    code += "raise SystemExit(os.waitstatus_to_exitcode(os.wait()[1]) - 7)"
    if sys.platform == "linux":
        subprocess.run([sys.executable, "-P", "-c", code, *map(str, paths[:4])], check=True, timeout=60)


def test_an_interrupt_ends_the_batch(tmp_path, monkeypatch):
    path = tmp_path / "a.wav"
    path.write_bytes(by_soundfile(CLIP, format="WAV"))
    monkeypatch.setitem(decoders._READERS, "soundfile", ("soundfile", interrupt))
    with pytest.raises(KeyboardInterrupt):
        read_audio_files([path] * 3, sampling_rate=8000)
    assert threading.active_count() < 50
