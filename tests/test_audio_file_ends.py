"""Where a file ends by what its container states: compressed WAV, MP3 with a tag, padding, and bytes behind the end."""

import struct

import numpy as np
import pytest
import torch

from mmlm_fast.audio import AudioFileError, audio_info, read_audio
from support.audio_files import by_av, by_soundfile
from support.peers import need

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


BY_SOUNDFILE = [("W64", "PCM_16"), ("W64", "IMA_ADPCM"), ("W64", "GSM610"), ("CAF", "PCM_16"), ("CAF", "ALAC_16")]
BY_SOUNDFILE += [("AIFF", "PCM_16"), ("AU", "PCM_16"), ("AU", "G721_32"), ("SVX", "PCM_16"), ("VOC", "PCM_16")]
BY_SOUNDFILE += [("WAV", "PCM_16"), ("WAV", "IMA_ADPCM"), ("RF64", "PCM_16"), ("MAT4", "PCM_16"), ("MAT5", "PCM_16")]
BY_SOUNDFILE += [("SDS", "PCM_16"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("MP3", "MPEG_LAYER_III")]
UNSTATED = [("PAF", "PCM_16"), ("PVF", "PCM_16"), ("IRCAM", "PCM_16"), ("XI", "DPCM_16")]
BY_AV = [
    ("sox", "pcm_s32le"),
    ("adx", "adpcm_adx"),
    ("kvag", "adpcm_ima_ssi"),
    ("rso", "pcm_u8"),
    ("flv", "libmp3lame"),
]
BY_AV += [("flv", "aac"), ("tta", "tta"), ("rm", "ac3"), ("apm", "adpcm_ima_apm"), ("m4a", "aac"), ("mka", "aac")]
BY_AV += [("ts", "aac")]
BY_AV_UNSTATED = [("wtv", "pcm_s16le"), ("nut", "pcm_s16le"), ("asf", "aac")]


def content_of(tmp_path, kind, codec):
    if kind.isupper():
        return by_soundfile(CLIP, 16000, format=kind, subtype=codec)
    need("av")
    rate = dict(ac3=48000, libmp3lame=22050).get(codec, 16000)
    path = tmp_path / f"whole.{kind}"
    by_av(path, codec, CLIP, rate, format="kvag" if kind == "kvag" else None, sample_format={"tta": "s16"}.get(codec))
    return path.read_bytes()


@pytest.mark.parametrize(("kind", "codec"), BY_SOUNDFILE + BY_AV)
def test_bytes_behind_the_end(tmp_path, kind, codec):
    """Zeros and tags behind the stated end are no samples."""
    whole = content_of(tmp_path, kind, codec)
    path = tmp_path / f"a.{kind.lower()}"
    path.write_bytes(whole)
    expected, info = read_audio(path)[0], audio_info(path)
    assert len(CLIP) <= len(expected) <= len(CLIP) + 2048
    for junk in (bytes(5000), b"TAG" + b"x" * 122, b"APETAGEX" + bytes(24), b"\xf3\xa1\x80\x93" * 31 + b"\xc5"):
        path.write_bytes(whole + junk)
        try:
            assert torch.equal(read_audio(path)[0], expected), junk[:4]
            assert audio_info(path) == info, junk[:4]
        except AudioFileError:
            # No name ends in .rso in a part of a file; boxes and packets may be of any kind.
            assert kind in ("rso", "m4a", "ts", "FLAC", "OGG"), junk[:4]


@pytest.mark.parametrize(("kind", "codec"), BY_AV[:-1])
def test_cut_where_a_length_is_stated(tmp_path, kind, codec):
    whole = content_of(tmp_path, kind, codec)
    path = tmp_path / f"a.{kind}"
    for size in (len(whole) // 2, len(whole) * 9 // 10, len(whole) * 99 // 100):
        path.write_bytes(whole[:size])
        for function in (read_audio, audio_info):
            with pytest.raises(AudioFileError, match="cut short"):
                function(path)


def test_cut_xi(tmp_path):
    """libsndfile writes no length into it, trackers do."""
    whole = bytearray(by_soundfile(CLIP, 16000, format="XI", subtype="DPCM_16"))
    struct.pack_into("<I", whole, 298, 40000)
    path = tmp_path / "a.xi"
    path.write_bytes(whole + bytes(5000))
    assert len(read_audio(path)[0]) == audio_info(path).num_samples == 20000
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(AudioFileError, match="promises 40000 bytes of samples"):
        read_audio(path)


@pytest.mark.parametrize(("kind", "codec"), BY_SOUNDFILE + UNSTATED + BY_AV[:-1] + BY_AV_UNSTATED)
def test_another_file_behind(tmp_path, kind, codec):
    """All parts or an error, never the first one alone and never a header as samples."""
    need("av")
    first = content_of(tmp_path, kind, codec)
    path = tmp_path / f"a.{kind.lower()}"
    path.write_bytes(first)
    alone = read_audio(path)[0]
    others = [(kind, codec), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("WAV", "PCM_16"), ("MP3", "MPEG_LAYER_III")]
    for other in others:
        second = content_of(tmp_path, *other)
        if other[0] == "MP3" and ((kind, codec) in UNSTATED + BY_AV_UNSTATED or kind == "FLAC"):
            continue  # whose frames may be samples as well
        path.write_bytes(first + second)
        for function in (read_audio, audio_info):
            try:
                result = function(path)
            except AudioFileError:
                continue
            assert kind == other[0], other
            got = result.num_samples if function is audio_info else len(result[0])
            assert got == 2 * len(alone), other


@pytest.mark.parametrize("length", [500, 1000, 20000, 20480])
@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.m4a", "aac"),
        ("a.mov", "aac"),
        ("a.mp4", "libmp3lame"),
        ("a.mp4", "libopus"),
        ("a.m4a", "alac"),
        ("a.mov", "pcm_s16le"),
    ],
)
def test_padding_of_mp4(tmp_path, name, codec, length):
    """An edit list rounds to milliseconds: no sample is cut off by it, and the number is not known before."""
    need("av")
    rate = 48000 if codec == "libopus" else 16000
    clip = 0.3 * np.sin(np.arange(length) * 0.05)
    path = by_av(tmp_path / name, codec, clip, rate)
    samples, _ = read_audio(path)
    assert length <= len(samples) <= length + 1152 + 1105
    is_lossless = codec in ("alac", "pcm_s16le")
    assert audio_info(path).num_samples == (len(samples) if is_lossless else -1)
    if length > 10000 and codec == "aac":
        np.testing.assert_allclose(samples[2000 : length - 2000].numpy(), clip[2000:-2000], atol=0.02)
    fragmented = by_av(tmp_path / name, codec, clip, rate, movflags="frag_keyframe+empty_moov", frag_duration="100000")
    assert audio_info(fragmented).num_samples == -1
    assert length <= len(read_audio(fragmented)[0]) <= length + 3 * 1152


@pytest.mark.parametrize(
    ("kind", "codec"), [("nut", "pcm_s16le"), ("nut", "aac"), ("flv", "aac"), ("flv", "libmp3lame"), ("asf", "aac")]
)
def test_timestamps_are_no_lengths(tmp_path, kind, codec):
    path = tmp_path / f"a.{kind}"
    path.write_bytes(content_of(tmp_path, kind, codec))
    assert audio_info(path).num_samples == -1
    assert len(CLIP) <= len(read_audio(path)[0]) <= len(CLIP) + 2048
