"""What containers state of their lengths: compared where they do, never taken for stated where they do not."""

import struct
import warnings

import numpy as np
import pytest
import torch

from mmlm_fast.audio import AudioFileError, audio_info, read_audio
from support.audio_files import by_av, by_soundfile, pcm_format, wav
from support.peers import need

soundfile = pytest.importorskip("soundfile")
RNG = np.random.default_rng(0)
CLIP = np.round((RNG.standard_normal(16000) * 0.1).clip(-0.9, 0.9) * 32768) / 32768
PCM = (CLIP * 32768).astype("<i2").tobytes()
# libsndfile's containers that state a length, in whatever sample format.
STATING = ["WAV", "WAVEX", "AIFF", "AU", "RF64", "W64", "CAF", "SVX", "NIST", "VOC", "AVR", "MPC2K"]
STATING += ["MAT4", "MAT5", "SDS"]
TELEPHONE = ["GSM610", "G721_32", "NMS_ADPCM_16", "NMS_ADPCM_32", "IMA_ADPCM", "MS_ADPCM"]


def write(folder, name, content):
    (folder / name).write_bytes(content)
    return folder / name


def leniently(path, **settings):
    """Samples and the only warning, which names the file and this line's file."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        samples, _ = read_audio(path, strict=False, **settings)
    assert len(caught) == 1, [str(w.message) for w in caught]
    assert caught[0].filename == __file__
    assert str(caught[0].message).startswith(f"{path}: ")
    return samples


@pytest.mark.parametrize("kind", STATING)
def test_cut_short(tmp_path, kind):
    subtype = "PCM_S8" if kind == "SDS" else "PCM_16"
    whole = by_soundfile(CLIP, format=kind, subtype=subtype)
    path = write(tmp_path, "a.x", whole)
    if kind != "SDS":
        assert torch.equal(read_audio(path)[0], torch.from_numpy(CLIP).float())
    assert audio_info(path).num_samples == len(read_audio(path)[0]) == len(CLIP)
    for share in (0.3, 0.5, 0.9, 0.99):
        write(tmp_path, "a.x", whole[: int(len(whole) * share)])
        for function in (read_audio, audio_info) if kind not in ("NIST", "AVR", "MPC2K") else (read_audio,):
            with pytest.raises(AudioFileError, match=r"a\.x: cut short: its header promises \d+"):
                function(path)
        if kind != "SDS":  # which libsndfile fills up
            samples = leniently(path)
            assert abs(len(samples) - share * len(CLIP)) < 2200
            assert torch.equal(samples, torch.from_numpy(CLIP[: len(samples)]).float())


@pytest.mark.parametrize(("extension", "settings"), [("flac", {}), ("ogg", {}), ("mp3", {})])
def test_compressed_and_cut_short(tmp_path, extension, settings):
    noise = RNG.standard_normal(160000) * 0.1
    whole = by_soundfile(noise, format=extension.upper(), **settings)
    path = write(tmp_path, f"a.{extension}", whole)
    complete, _ = read_audio(path)
    assert len(complete) == len(noise) == audio_info(path).num_samples
    for share in (0.5, 0.8):
        write(tmp_path, f"a.{extension}", whole[: int(len(whole) * share)])
        with pytest.raises(AudioFileError, match=rf"a\.{extension}: "):
            read_audio(path)
        samples = leniently(path)
        assert 0.9 * share * len(noise) - 8192 < len(samples) < share * len(noise) * 1.1
        if extension == "flac":
            assert torch.equal(samples, complete[: len(samples)])


@pytest.mark.parametrize("subtype", TELEPHONE)
def test_files_that_cannot_seek(tmp_path, subtype):
    for kind in ("WAV", "W64", "AIFF"):
        try:
            content = by_soundfile(CLIP, 8000, format=kind, subtype=subtype)
        except (ValueError, soundfile.LibsndfileError):
            continue
        path = write(tmp_path, "a.x", content)
        expected = soundfile.read(path, dtype="float32")[0]
        assert torch.equal(read_audio(path)[0], torch.from_numpy(expected))
        write(tmp_path, "a.x", content[: len(content) // 2])
        with pytest.raises(AudioFileError, match="cut short"):
            read_audio(path)
        assert len(leniently(path)) > 0.4 * len(CLIP)


PLACEHOLDERS = [0, 0xFFFFFFFF, 0xFFFFFFFF - 36, 0xFFFFFFFE, 0xFFFFF000, 0x7FFFFFFF, 0x7FFFFFFF - 44, 0x7FFFF000]
PLACEHOLDERS += [10**9, 2 * 10**9]


@pytest.mark.parametrize("size", PLACEHOLDERS)
def test_placeholders(tmp_path, size):
    path = tmp_path / "a.wav"
    for total in {min(size + 36, 0xFFFFFFFF), 0, 0xFFFFFFFF} if size else {0, 36, 0xFFFFFFFF, 36 + len(PCM)}:
        head = wav(pcm_format(), size=total) + b"data" + struct.pack("<I", size)
        path.write_bytes(head + PCM)
        samples, rate = read_audio(path)
        assert rate == 16000
        assert torch.equal(samples, torch.from_numpy(CLIP).float()), hex(total)
        assert audio_info(path).num_samples == -1
    for kind, where in (("AU", b".snd"), ("AIFF", b"SSND")):
        content = bytearray(by_soundfile(CLIP, format=kind, subtype="PCM_16"))
        at = content.index(where) + (8 if kind == "AU" else 4)
        content[at : at + 4] = struct.pack(">I", size)
        path.write_bytes(content)
        assert torch.equal(read_audio(path)[0], torch.from_numpy(CLIP).float())


def test_sizes_that_are_no_placeholders(tmp_path):
    path = tmp_path / "a.wav"
    for size in (64000 * 3, 10**8 + 2, 1_234_567_890, 0x7FFFFFFF - 10**6):
        path.write_bytes(wav(pcm_format(), size=size + 36) + b"data" + struct.pack("<I", size) + PCM)
        with pytest.raises(AudioFileError, match=f"promises {size} bytes of samples, {len(PCM)} are there"):
            read_audio(path)
    path.write_bytes(wav(pcm_format(), (b"data", b""), (b"LIST", b"INFO" + bytes(40))))
    with pytest.raises(AudioFileError, match="holds no samples"):
        read_audio(path)
    assert audio_info(path).num_samples == 0


def test_odd_wav_files(tmp_path):
    expected = torch.from_numpy(CLIP).float()
    swapped = np.frombuffer(PCM, "<i2").astype(">i2").tobytes()
    long = struct.pack("<IQQQI", 28, 0, len(PCM), len(CLIP), 0)
    rf64 = b"\xff" * 4 + b"WAVEds64" + long + wav(pcm_format())[12:] + b"data" + b"\xff" * 4 + PCM
    files = dict(
        list_before=wav(pcm_format(), (b"LIST", b"INFO."), (b"junk", b"abc"), (b"data", PCM)),
        list_behind=wav(pcm_format(), (b"data", PCM), (b"LIST", b"INFO.")),
        garbage_behind=wav(pcm_format(), (b"data", PCM)) + b"\xff\0\x80junk" * 9,
        big_endian=wav(pcm_format(order=">"), (b"data", swapped), magic=b"RIFX", order=">"),
        rf64=b"RF64" + rf64,
        bw64=b"BW64" + rf64,
    )
    for name, content in files.items():
        path = write(tmp_path, name, content)
        assert torch.equal(read_audio(path)[0], expected), name
        assert audio_info(path).num_samples == len(CLIP), name
    odd = write(tmp_path, "odd", wav(pcm_format(), (b"data", PCM[:-1])))
    assert len(read_audio(odd)[0]) == audio_info(odd).num_samples == len(CLIP) - 1
    for name in ("rf64", "bw64"):
        path = write(tmp_path, name, files[name][:9000])
        with pytest.raises(AudioFileError, match=f"cut short: its header promises {len(PCM)} bytes"):
            read_audio(path)
    several = write(tmp_path, "several", wav(pcm_format(), (b"data", PCM[:100]), (b"data", PCM)))
    for function in (read_audio, audio_info):
        with pytest.raises(AudioFileError, match="several data chunks"):
            function(several)


@pytest.mark.parametrize("kind", ["WAV", "AIFF", "AU"])
def test_a_file_behind_a_file(tmp_path, kind):
    path = write(tmp_path, "a.x", 2 * by_soundfile(CLIP, format=kind, subtype="PCM_16"))
    for function in (read_audio, audio_info):
        with pytest.raises(AudioFileError, match="another file follows behind its end"):
            function(path)
    assert torch.equal(leniently(path)[: len(CLIP)], torch.from_numpy(CLIP).float())


def test_a_stream_behind_a_stream(tmp_path):
    """Headers with placeholders: all that is there is sound, but for another file's header."""
    streamed = {
        "a.wav": wav(pcm_format()) + b"data\xff\xff\xff\xff" + PCM,
        "a.au": by_soundfile(CLIP, format="AU", subtype="PCM_16"),
    }
    streamed["a.au"] = streamed["a.au"][:8] + b"\xff\xff\xff\xff" + streamed["a.au"][12:]
    for name, content in streamed.items():
        assert torch.equal(read_audio(write(tmp_path, name, content))[0], torch.from_numpy(CLIP).float())
        path = write(tmp_path, name, 2 * content)
        for function in (read_audio, audio_info):
            with pytest.raises(AudioFileError, match=f"another file follows behind its end, at byte {len(content)}"):
                function(path)


def flac(samples, total=None):
    content = bytearray(by_soundfile(samples, format="FLAC", subtype="PCM_16"))
    if total is not None:
        content[21] &= 0xF0
        content[22:26] = struct.pack(">I", total)
    return bytes(content)


def test_flac_of_unknown_and_of_wrong_length(tmp_path):
    path = write(tmp_path, "a.flac", flac(CLIP, total=0))
    assert torch.equal(read_audio(path)[0], torch.from_numpy(CLIP).float())
    assert audio_info(path).num_samples == -1
    write(tmp_path, "a.flac", flac(CLIP, total=8000))
    for function in (read_audio, audio_info):
        with pytest.raises(AudioFileError, match="promises 8000 samples, its last frame ends at 16000"):
            function(path)
    write(tmp_path, "a.flac", flac(CLIP, total=32000))
    with pytest.raises(AudioFileError, match="promises 32000 samples, 16000 can be read"):
        read_audio(path)
    assert torch.equal(leniently(path), torch.from_numpy(CLIP).float())


def id3(size):
    return b"ID3\x03\0\0" + bytes(size >> shift & 127 for shift in (21, 14, 7, 0)) + bytes(size)


ID3V1 = b"TAG" + bytes(125)
APE = b"APETAGEX" + struct.pack("<IIIQ", 2000, 32, 0, 0) + b"\0" * 4


@pytest.mark.parametrize("kind", ["FLAC", "MP3", "OGG", "OPUS"])
def test_chained_files(tmp_path, kind):
    """Parts of other and of the same lengths, with tags and at other rates: all of them."""
    settings = dict(format="OGG", subtype="OPUS") if kind == "OPUS" else dict(format=kind)
    # Of the same length, too, and of one byte a frame: nothing in numbers of samples or bytes gives the second away.
    clips = [CLIP[:9000], CLIP[:9000], np.zeros(9000), CLIP[:5000]]
    parts = [by_soundfile(clip, **settings) for clip in clips]
    whole = [read_audio(write(tmp_path, "part", part))[0] for part in parts]
    between = [b""] if kind in ("OGG", "OPUS") else [b"", id3(300)] if kind == "FLAC" else [b"", ID3V1 + APE + id3(300)]
    for tags in between:
        path = write(tmp_path, "a", tags.join(parts))
        assert torch.equal(read_audio(path)[0], torch.cat(whole)), tags
        assert audio_info(path).num_samples == sum(map(len, whole))
    twice = write(tmp_path, "b", parts[0] * 2)
    assert torch.equal(read_audio(twice)[0], torch.cat([whole[0]] * 2))
    assert audio_info(twice).num_samples == 18000
    faster = by_soundfile(CLIP, 48000, **settings)
    alone, _ = read_audio(write(tmp_path, "part", faster), sampling_rate=16000)
    both = write(tmp_path, "c", parts[0] + faster)
    assert torch.equal(read_audio(both)[0], torch.cat([whole[0], alone]))
    assert audio_info(both).num_samples == -1
    write(tmp_path, "a", b"".join(parts)[: -len(parts[-1]) // 2])
    with pytest.raises(AudioFileError):
        read_audio(tmp_path / "a")
    assert len(leniently(tmp_path / "a")) >= 27000 - 4096


def test_ogg_pages(tmp_path):
    whole = by_soundfile(RNG.standard_normal(160000) * 0.1, format="OGG")
    pages = [b"OggS" + page for page in whole.split(b"OggS")[1:]]
    path = write(tmp_path, "a.ogg", b"".join(pages[:-1]))  # cut between pages, where every page is whole
    for function in (read_audio, audio_info):
        with pytest.raises(AudioFileError, match="no page is marked as the last"):
            function(path)
    assert len(leniently(path)) > 100000
    write(tmp_path, "a.ogg", b"".join(pages[:5] + pages[6:]))
    with pytest.raises(AudioFileError, match="pages before byte"):
        read_audio(path)
    broken = bytearray(whole)
    broken[len(whole) // 2] ^= 255
    write(tmp_path, "a.ogg", bytes(broken))
    with pytest.raises(AudioFileError, match="promises 160000 samples"):  # the page's checksum is wrong: it is skipped
        read_audio(path)


def test_mp3_without_a_count_of_frames(tmp_path):
    need("av")
    loud_first = (RNG.standard_normal(8 * 16000) * np.repeat([0.3, 0], 4 * 16000)).astype(np.float32)
    for clip in (loud_first, loud_first[::-1]):
        path = by_av(tmp_path / "a.mp3", "libmp3lame", clip, write_xing="0")
        content = path.read_bytes()
        for before, behind in ((b"", b""), (id3(3000), APE + ID3V1)):
            path.write_bytes(before + content + behind)
            samples, rate = read_audio(path)
            assert rate == 16000
            assert len(clip) <= len(samples) < len(clip) + 3 * 1152
            assert audio_info(path).num_samples == -1
            if not before:
                assert np.corrcoef(samples[1105 : 1105 + len(clip)].numpy(), clip[: len(samples) - 1105])[0, 1] > 0.7


FILMS = [
    ("a.m4a", "aac", {}),
    ("a.m4a", "aac", dict(movflags="faststart")),
    ("a.m4a", "alac", dict(movflags="faststart")),
    ("a.mp4", "aac", dict(movflags="frag_keyframe+empty_moov", frag_duration="500000")),
    ("a.mka", "aac", {}),
    ("a.mka", "pcm_s16le", {}),
    ("a.webm", "libopus", {}),
    ("a.aac", "aac", {}),
    ("a.avi", "pcm_s16le", {}),
    ("a.flv", "aac", {}),
    ("a.ts", "aac", {}),
    ("a.tta", "tta", dict(sample_format="s16")),
    ("a.wv", "wavpack", dict(sample_format="s16p")),
    ("a.ogg", "flac", {}),
    ("a.caf", "alac", {}),
]


@pytest.mark.parametrize(("name", "codec", "options"), FILMS)
def test_what_pyav_reads(tmp_path, name, codec, options):
    need("av")
    rate = 48000 if codec == "libopus" else 16000
    clip = 0.3 * np.sin(np.arange(4 * rate) * 0.05) + RNG.standard_normal(4 * rate) * 0.02
    path = by_av(tmp_path / name, codec, clip, rate, **options)
    whole = path.read_bytes()
    samples, got_rate = read_audio(path)
    assert got_rate == rate
    assert len(clip) <= len(samples) <= len(clip) + 3 * 1024
    info = audio_info(path)
    assert info.sampling_rate == rate
    assert info.num_samples == -1 or abs(info.num_samples - len(samples)) <= 2 * 1024
    if codec in ("alac", "pcm_s16le", "tta", "wavpack", "flac"):
        np.testing.assert_allclose(samples[: len(clip)].numpy(), clip, atol=2**-15)
    for share in (0.4, 0.8):
        # Odd: between two packets of a transport stream nothing shows a cut.
        path.write_bytes(whole[: int(len(whole) * share) | 1])
        with pytest.raises(AudioFileError):
            read_audio(path)
        if name in ("a.caf", "a.wv") or (name == "a.m4a" and not options):
            continue  # what says where the samples are stood at the end; a block of WavPack is longer than this clip
        assert abs(len(leniently(path)) - share * len(clip)) < 0.15 * len(clip)


def test_flac_damaged_in_the_middle(tmp_path):
    """What a decoder skips in silence is a loss: neither is believed."""
    noise = RNG.standard_normal(160000) * 0.1
    for total in (None, 0):
        content = bytearray(flac(noise, total))
        content[len(content) // 2] ^= 255
        path = write(tmp_path, "a.flac", bytes(content))
        with pytest.raises(AudioFileError):
            read_audio(path)
        assert len(leniently(path)) >= 150000
