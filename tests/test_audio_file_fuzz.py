"""Files of every kind cut, damaged and put together: finite samples, no more than promised, or AudioFileError."""

import os
import resource
import time
import warnings

import numpy as np
import pytest

from mmlm_fast.audio import AudioFileError, audio_info, read_audio
from support.audio_files import by_av, by_soundfile

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("av")
DRAWS = int(os.environ.get("MMLM_FAST_FUZZ", 40))
CLIP = np.random.default_rng(0).standard_normal(6000) * 0.1
BY_SOUNDFILE = dict(
    wav=dict(format="WAV", subtype="PCM_16"), float=dict(format="WAVEX", subtype="FLOAT"), aiff=dict(format="AIFF"),
    adpcm=dict(format="WAV", subtype="MS_ADPCM"), au=dict(format="AU"), w64=dict(format="W64"), caf=dict(format="CAF"),
    rf64=dict(format="RF64"), flac=dict(format="FLAC"), ogg=dict(format="OGG"), mp3=dict(format="MP3"),
    voc=dict(format="VOC"), opus=dict(format="OGG", subtype="OPUS"), nist=dict(format="NIST"),
    mat=dict(format="MAT5"), gsm=dict(format="WAV", subtype="GSM610"),
)  # fmt: skip
BY_AV = dict(m4a="aac", mka="flac", webm="libopus", aac="aac", ts="aac", avi="pcm_s16le", flv="aac", mp3="libmp3lame")


def damaged(content, rng):
    """Cut, a few bytes flipped (of the header or anywhere), a piece left out, doubled, or junk put in."""
    content = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        if len(content) < 8:
            break
        area = len(content) if rng.random() < 0.5 else min(len(content), 120)
        at = int(rng.integers(area))
        size = int(rng.integers(1, 300))
        match rng.integers(5):
            case 0:
                del content[at:]
            case 1:
                for i in range(at, min(at + int(rng.integers(1, 5)), len(content))):
                    content[i] = int(rng.integers(256))
            case 2:
                del content[at : at + size]
            case 3:
                content[at:at] = content[at : at + size]
            case 4:
                content[at:at] = rng.bytes(size)
    return bytes(content)


@pytest.mark.parametrize("kind", [*BY_SOUNDFILE, *(f"av {kind}" for kind in BY_AV)])
def test_damaged_files(tmp_path, kind):
    if kind in BY_SOUNDFILE:
        whole = by_soundfile(CLIP, 8000 if kind == "gsm" else 16000, **BY_SOUNDFILE[kind])
    else:
        extension = kind[3:]
        rate = 48000 if extension == "webm" else 16000
        whole = by_av(tmp_path / f"whole.{extension}", BY_AV[extension], CLIP, rate).read_bytes()
    rng = np.random.default_rng(sum(map(ord, kind)))
    path = tmp_path / f"fuzz.{kind.split()[-1]}"
    path.write_bytes(whole)
    assert len(read_audio(path)[0]) >= len(CLIP)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i in range(DRAWS):
        content = damaged(whole, rng)
        path.write_bytes(content)
        started = time.process_time()
        try:
            info = audio_info(path)
        except AudioFileError:
            info = None
        try:
            samples, rate = read_audio(path)
        except AudioFileError:
            pass
        else:
            assert info is not None, i
            assert rate == info.sampling_rate > 0, i
            assert samples.isfinite().all(), i
            # Lossy codecs end on a frame of theirs.
            assert info.num_samples == -1 or abs(len(samples) - info.num_samples) <= 2048, i
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                samples, _ = read_audio(path, strict=False, mono=False)
            except AudioFileError:
                assert not [w for w in caught if w.filename == __file__], i
            else:
                assert samples.isfinite().all(), i
                assert samples.shape[1], i
        assert time.process_time() - started < 5, i
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used < 1 << 19, "half a gigabyte for a file of 20 KB"
