"""Reading files, whole, cut short and corrupted."""

import struct
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmlm_fast.audio import AudioFileError, audio_info, log_mel, read_audio, read_audio_files, resample
from support.peers import need
from support.speech import WAVEFORMS

soundfile = pytest.importorskip("soundfile")
SPEECH = WAVEFORMS[0][:32000]
FORMATS = {"wav": "PCM_16", "flac": "PCM_16", "ogg": "VORBIS", "mp3": "MPEG_LAYER_III"}


def write(folder, extension, samples=SPEECH, rate=16000, subtype=None):
    path = folder / f"clip.{extension}"
    soundfile.write(path, samples, rate, subtype=subtype or FORMATS.get(extension))
    return path


@pytest.mark.parametrize("extension", FORMATS)
def test_formats(tmp_path, extension):
    path = write(tmp_path, extension)
    samples, rate = read_audio(path)
    expected, _ = soundfile.read(path, dtype="float32")
    assert rate == 16000
    assert samples.dtype == torch.float32
    np.testing.assert_allclose(samples.numpy(), expected, atol=1e-7)
    info = audio_info(path)
    assert (info.sampling_rate, info.num_channels, info.num_samples) == (16000, 1, len(expected))
    if extension != "mp3":
        assert len(samples) == len(SPEECH)


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT", "DOUBLE", "PCM_U8", "ULAW"])
def test_stereo_and_resampling(tmp_path, subtype):
    stereo = np.stack([SPEECH, SPEECH[::-1]], 1)
    path = write(tmp_path, "wav", stereo, 44100, subtype)
    raw, _ = soundfile.read(path, dtype="float32")
    mono, rate = read_audio(path, sampling_rate=16000)
    assert rate == 16000
    expected = resample(torch.from_numpy(raw.mean(1)), 44100, 16000)
    torch.testing.assert_close(mono, expected, rtol=0, atol=1e-6)
    both, rate = read_audio(path, mono=False)
    assert rate == 44100
    np.testing.assert_allclose(both.numpy(), raw.T, atol=1e-7)


def test_pyav_reads_the_rest(tmp_path):
    av = need("av")
    path = tmp_path / "clip.m4a"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(SPEECH[None], format="fltp", layout="mono")
        frame.sample_rate = 16000
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    samples, rate = read_audio(path)
    assert rate == 16000
    assert abs(len(samples) - len(SPEECH)) < 3000
    assert np.corrcoef(samples[2000:30000].numpy(), SPEECH[2000:30000])[0, 1] > 0.9 or len(samples) > len(SPEECH)
    assert audio_info(path).sampling_rate == 16000


def test_cut_short_is_an_error_of_that_file(tmp_path):
    for extension in ("wav", "flac", "ogg"):
        path = write(tmp_path, extension)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(AudioFileError, match=rf"clip\.{extension}: "):
            read_audio(path)
    path = write(tmp_path, "wav")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cut short: its header promises 64000 bytes of samples, 31978 are there"):
        read_audio(path)
    with pytest.warns(UserWarning, match="cut short"):
        samples, _ = read_audio(path, strict=False)
    assert len(samples) == 15989


def test_lying_headers(tmp_path):
    path = write(tmp_path, "wav")
    whole = bytearray(path.read_bytes())
    at = whole.index(b"data") + 4
    whole[at : at + 4] = struct.pack("<I", 10**9)
    path.write_bytes(whole)
    with pytest.raises(AudioFileError, match="promises 1000000000 bytes"):
        read_audio(path)
    whole[at : at + 4] = struct.pack("<I", 0xFFFFFFFF)  # what a pipe writes: not a lie
    path.write_bytes(whole)
    assert len(read_audio(path)[0]) == len(SPEECH)
    path.write_bytes(whole[: at - 4])
    with pytest.raises(AudioFileError):
        read_audio(path)


def test_other_files(tmp_path):
    with pytest.raises(AudioFileError, match="no such file"):
        read_audio(tmp_path / "nothing.wav")
    with pytest.raises(AudioFileError, match="not a file"):
        read_audio(tmp_path)
    (tmp_path / "empty.wav").touch()
    with pytest.raises(AudioFileError, match="an empty file"):
        read_audio(tmp_path / "empty.wav")
    (tmp_path / "text.wav").write_text("not audio at all, but long enough to look at" * 9)
    with pytest.raises(AudioFileError, match=r"text\.wav: "):
        read_audio(tmp_path / "text.wav")
    with pytest.raises(AudioFileError, match="holds no samples"):
        read_audio(write(tmp_path, "wav", SPEECH[:0]))
    bad = SPEECH.copy()
    bad[5] = np.nan
    with pytest.raises(AudioFileError, match="NaN or infinite"):
        read_audio(write(tmp_path, "wav", bad, subtype="FLOAT"))
    with pytest.raises(ValueError, match="sampling_rate must be a positive whole number"):
        read_audio(write(tmp_path, "wav"), sampling_rate=0)


def test_one_bad_file_does_not_end_the_batch(tmp_path):
    paths = []
    for i in range(12):
        path = tmp_path / f"{i}.flac"
        soundfile.write(path, SPEECH[: 8000 + 100 * i], 16000)
        paths.append(path)
    paths[3].write_bytes(b"junk" * 100)
    paths[7].unlink()
    result = read_audio_files(paths, sampling_rate=8000, num_workers=3)
    assert [w is None for w in result.waveforms] == [i in (3, 7) for i in range(12)]
    assert [error.path for error in result.failures] == [str(paths[3]), str(paths[7])]
    assert len(result.waveforms[2]) == 4100
    assert log_mel([w for w in result.waveforms if w is not None]).shape[0] == 10


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_corrupted_files_never_crash(tmp_path, data):
    """Flipped, cut and inserted bytes: samples that are finite, or AudioFileError."""
    extension = data.draw(st.sampled_from(sorted(FORMATS)))
    path = tmp_path / f"fuzz.{extension}"
    soundfile.write(path, SPEECH[:4000], 16000, subtype=FORMATS[extension])
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, min(len(content) - 1, data.draw(st.sampled_from([60, 10**6])))))
        action = data.draw(st.sampled_from(["flip", "cut", "insert"]))
        if action == "flip":
            content[at] ^= data.draw(st.integers(1, 255))
        elif action == "cut":
            del content[at : at + data.draw(st.integers(1, 200))]
        else:
            content[at:at] = data.draw(st.binary(min_size=1, max_size=20))
        if len(content) < 2:
            break
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            samples, rate = read_audio(path)
        except AudioFileError:
            return
    assert samples.isfinite().all()
    assert rate > 0
