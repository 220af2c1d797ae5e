"""The CUDA kernel's own code, run on the host thread by thread, and on a GPU where there is one."""

import numpy as np
import pytest
import torch

import mmlm_fast.audio as audio
from mmlm_fast import _C
from mmlm_fast.audio import log_mel, mel_spectrogram
from mmlm_fast.audio.conventions import spectrogram_spec
from mmlm_fast.audio.cuda import is_covered
from mmlm_fast.audio.kaldi import kaldi_spec
from mmlm_fast.audio.log_mel import log_mel_spec
from mmlm_fast.audio.reference import spectral_ref
from mmlm_fast.audio.spec import prepared
from support.speech import WAVEFORMS

SPEECH = [torch.from_numpy(w) for w in WAVEFORMS]


def whisper_spec(num_mel_bins=80, log_mel_max=None, dtype="float32"):
    return log_mel_spec(num_mel_bins=num_mel_bins, log_mel_max=log_mel_max, dtype=dtype)


def mel_spec(function=mel_spectrogram, **given):
    settings = function.__kwdefaults__ | given
    of_clips = ("pad", "orig_freq", "channel_dim")
    own = {name: value for name, value in settings.items() if name not in of_clips}
    return spectrogram_spec(**own, has_filters=function is mel_spectrogram)


SPECS = {
    "whisper": lambda: whisper_spec(),
    "whisper128": lambda: whisper_spec(128),
    "voxtral": lambda: whisper_spec(128, 1.5),
    "fbank": lambda: kaldi_spec(num_mel_bins=80, scale=32768.0),
    "fbank_mirrored": lambda: kaldi_spec(snip_edges=False, use_energy=True, scale=32768.0),
    "fbank_energy_last": lambda: kaldi_spec(
        use_energy=True, htk_compat=True, raw_energy=False, scale=32768.0, use_power=False
    ),
    "mfcc": lambda: kaldi_spec(num_ceps=13, cepstral_lifter=22.0, scale=32768.0),
    "mfcc_energy": lambda: kaldi_spec(num_ceps=13, use_energy=True, htk_compat=True, scale=32768.0),
    "mel_1024": lambda: mel_spec(n_fft=1024, hop_length=256, log="dB", top_db=80.0),
    "mel_2048": lambda: mel_spec(n_fft=2048, hop_length=512, power=1.0, pad_mode="constant"),
    "mel_8192": lambda: mel_spec(n_fft=8192, hop_length=2048, n_mels=256),
    "mel_odd": lambda: mel_spec(n_fft=405, hop_length=100, center=False, log="log"),
    "mel_prime": lambda: mel_spec(n_fft=2 * 37, hop_length=20, n_mels=8, power=1.5),
    "spectrogram": lambda: mel_spec(audio.spectrogram, n_fft=480),
}


def on_host(spec, clips, num_samples):
    """The kernel's phases on the host, as `mmlm_fast.audio.cuda.spectral_features` would launch them."""
    layout, plan = prepared(spec).layout, prepared(spec).device_plan
    tables = [np.array(t) for t in plan.device_tables()]
    frames = [layout.num_frames(n) for n in num_samples]
    outs = [torch.full(layout.shape(f), torch.nan) for f in frames]
    for clip, n, f, out in zip(clips, num_samples, frames, outs, strict=True):
        plan.run_device(
            [t.ctypes.data for t in tables],
            [clip.data_ptr()],
            [clip.shape[0]],
            [n],
            [f],
            [out.data_ptr()],
            clip.stride(0),
            clip.dtype == torch.int16,
            0,
            out.shape[1],
            0,
            0,
            0,
            True,
        )
    return outs


@pytest.mark.parametrize("name", SPECS)
def test_kernel_on_the_host(name):
    spec = SPECS[name]()
    assert is_covered(spec)
    clips = [SPEECH[0][20000:36000], SPEECH[1][:4321], SPEECH[2][9000:10500]]
    lengths = [16000, 6000, 1500]  # the second is padded with zeros
    for clip, n, out in zip(clips, lengths, on_host(spec, clips, lengths), strict=True):
        padded = torch.nn.functional.pad(clip, (0, n - len(clip)))
        frames = prepared(spec).layout.num_frames(n)
        exact = spectral_ref(spec, padded.double(), frames)
        reference = spectral_ref(spec, padded, frames)
        error, allowed = ((x.double() - exact).norm() for x in (out, reference))
        assert error <= max(2 * allowed, 2e-7 * exact.norm()), (error, allowed)


def test_blocks_of_every_kind():
    """Frames of a warp and of two to eight warps; the two transforms that are laid out in advance, and others."""
    lengths = {name: spec().n_fft for name, spec in SPECS.items()}
    per_frame = {name: prepared(spec()).device_plan.device_bytes() for name, spec in SPECS.items()}
    assert {400, 512, 1024, 2048, 8192, 405} <= set(lengths.values())
    assert per_frame["mel_8192"] > 48 * 1024 > per_frame["mel_2048"]


def test_kernel_on_the_host_reads_int16_and_strides():
    spec = SPECS["whisper"]()
    samples = (SPEECH[0][:16000] * 32767).round().to(torch.int16)
    (out,) = on_host(spec, [samples], [16000])
    torch.testing.assert_close(out, log_mel(samples), rtol=0, atol=3e-5)
    strided = torch.stack([samples, samples * 0], 1)[:, 0]
    assert torch.equal(on_host(spec, [strided], [16000])[0], out)


def test_long_transforms_are_left_to_pytorch():
    assert not is_covered(mel_spec(n_fft=32768, hop_length=4096))
    assert not is_covered(whisper_spec(dtype="float64"))
    assert is_covered(whisper_spec(dtype="bfloat16"))


def test_without_a_device_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    plan = prepared(SPECS["whisper"]()).device_plan
    with pytest.raises(RuntimeError, match="on CUDA: "):
        plan.run_device([0] * 9, [0], [0], [400], [1], [0], 1, False, 0, 1, 0, 0, 0, False)
    with pytest.raises(ValueError, match="not a plan for CUDA"):
        _C.SpectralPlan(_C.SpectralOptions(), np.ones(400)).device_bytes()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", SPECS)
def test_kernel_on_the_device(name, dtype):
    from mmlm_fast.audio.features import features_of
    from mmlm_fast.audio.waveforms import clips_of

    spec = SPECS[name]()
    clips = [SPEECH[0][20000:36000], SPEECH[1][:4321], SPEECH[2][9000:10500]]
    outs = features_of(spec, clips_of([c.cuda() for c in clips]))
    for clip, out in zip(clips, outs, strict=True):
        frames = prepared(spec).layout.num_frames(len(clip))
        exact = spectral_ref(spec, clip.double(), frames)
        error, allowed = (
            (x.double() - exact).norm() for x in (out.cpu(), spectral_ref(spec, clip.cuda(), frames).cpu())
        )
        assert error <= max(2 * allowed, 2e-7 * exact.norm())


@pytest.mark.gpu
def test_ragged_batch_on_the_device():
    clips = [SPEECH[i % 3][1000 * i : 1000 * i + 9000 + 777 * i] for i in range(70)]  # more than one launch
    out = log_mel([c.cuda() for c in clips]).cpu()
    torch.testing.assert_close(out, log_mel(clips), rtol=0, atol=5e-5)
    assert out.abs().max() < 2
    rounding = 2**-8  # of bfloat16 below 2, half a unit in its last place; and what the device differs by, as above
    integers = [(c * 32767).to(torch.int16) for c in clips]  # in pauses their rounding is heard
    half = log_mel([c.cuda() for c in integers], dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float().cpu(), log_mel(integers), rtol=0, atol=rounding + 5e-5)


@pytest.mark.gpu
def test_no_synchronisation_and_graphs():
    clips = [s.cuda() for s in SPEECH]
    # The first call of a function copies its tables to the device, and waits.
    expected = log_mel(clips)
    audio.kaldi_fbank(clips[0], num_mel_bins=80)
    torch.cuda.set_sync_debug_mode("error")
    try:
        log_mel(clips)
        audio.kaldi_fbank(clips[0], num_mel_bins=80)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = log_mel(clips)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)
