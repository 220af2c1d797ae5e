"""Where a file ends by what its container states: compressed WAV, MP3 with a tag, padding, and bytes behind the end."""

import struct

import numpy as np
import pytest
from audio_files import by_av, by_soundfile
from peers import need

from mmlm_fast.audio import AudioFileError, audio_info, read_audio

soundfile = pytest.importorskip("soundfile")
RNG = np.random.default_rng(0)
CLIP = np.round((RNG.standard_normal(20000) * 0.1).clip(-0.9, 0.9) * 32768) / 32768


@pytest.mark.parametrize("kind", ["wav", "w64"])
@pytest.mark.parametrize("codec", ["libmp3lame", "mp2", "adpcm_ima_wav", "adpcm_ms", "adpcm_yamaha", "ac3", "g722"])
def test_compressed_wav(tmp_path, monkeypatch, codec, kind):
    """The samples that `fact` states; libsndfile guesses their number from the bit rate of MP3."""
    need("av")
    rate = 48000 if codec == "ac3" else 16000
    path = by_av(tmp_path / f"a.{kind}", codec, CLIP, rate, format=kind)
    whole = path.read_bytes()
    at = whole.index(b"fact") + (8 if kind == "wav" else 24)
    count = struct.unpack_from("<I", whole, at)[0]
    assert 0 <= count - len(CLIP) < 2400
    for modules in ([], ["soundfile"]):
        for module in modules:
            monkeypatch.setitem(__import__("sys").modules, module, None)
        assert audio_info(path).num_samples == len(read_audio(path)[0]) == count
    monkeypatch.undo()
    path.write_bytes(whole[: len(whole) * 9 // 10])
    with pytest.raises(AudioFileError, match="cut short"):
        read_audio(path)
    if kind == "w64" and codec == "libmp3lame":
        return  # which FFmpeg reads by `fact` alone
    content = bytearray(whole)
    content[at : at + 4] = bytes(4)  # it says nothing
    path.write_bytes(content)
    assert count <= len(read_audio(path)[0]) <= count + 2048
    if codec not in ("adpcm_ima_wav", "adpcm_ms"):  # whose blocks say it
        assert audio_info(path).num_samples == -1
        struct.pack_into("<I", content, at, 2 * count)
        path.write_bytes(content)
        with pytest.raises(AudioFileError, match=f"promises {2 * count} samples"):
            read_audio(path)


@pytest.mark.parametrize("rate", [16000, 44100])
@pytest.mark.parametrize("encoder", ["soundfile", "av"])
def test_mp3_cut_by_a_few_bytes(tmp_path, encoder, rate):
    """What a tag counts is compared exactly, in bytes and frames."""
    path = tmp_path / "a.mp3"
    clip = np.resize(CLIP, 10 * 20000)[: 200000 if rate > 16000 else 20000]
    if encoder == "av":
        need("av")
        by_av(path, "libmp3lame", clip, rate)
    else:
        path.write_bytes(by_soundfile(clip, rate, format="MP3"))
    whole = path.read_bytes()
    assert len(read_audio(path)[0]) == len(clip) == audio_info(path).num_samples
    for size in (1, 200, 600, len(whole) // 20, len(whole) // 10):
        path.write_bytes(whole[:-size])
        for function in (read_audio, audio_info):
            with pytest.raises(AudioFileError, match="cut short: its header promises"):
                function(path)
    tag = max(whole.find(b"Info"), whole.find(b"Xing"))
    count = int.from_bytes(whole[tag + 12 : tag + 16], "big")
    longer = bytearray(whole)
    longer[tag + 12 : tag + 16] = (count + 128).to_bytes(4, "big")  # bytes of a tag that was taken away
    path.write_bytes(longer)
    assert len(read_audio(path)[0]) == len(clip)
    path.write_bytes(longer[:-600])
    with pytest.raises(AudioFileError, match="cut short: its header promises"):
        read_audio(path)
