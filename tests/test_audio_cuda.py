"""The CUDA kernel's own code, run on the host thread by thread, and on a GPU where there is one."""

import numpy as np
import pytest
import torch

import mmlm_fast.audio as audio
from mmlm_fast import _C
from mmlm_fast.audio import kaldi, log_mel, mel_spectrogram
from mmlm_fast.audio.cuda import device_plan, is_covered
from mmlm_fast.audio.log_mel import checked_key
from mmlm_fast.audio.mel_spectrogram import _key
from mmlm_fast.audio.spectral import spec_of, spectral_ref
from support.speech import WAVEFORMS

SPEECH = [torch.from_numpy(w) for w in WAVEFORMS]


def mel_key(**given):
    return _key("torchaudio", True, mel_spectrogram.__kwdefaults__ | given)


KEYS = {
    "whisper": lambda: checked_key(80, None, torch.float32),
    "whisper128": lambda: checked_key(128, None, torch.float32),
    "voxtral": lambda: checked_key(128, 1.5, torch.float32),
    "fbank": lambda: kaldi.checked_key(num_mel_bins=80, scale=32768.0),
    "fbank_mirrored": lambda: kaldi.checked_key(snip_edges=False, use_energy=True, scale=32768.0),
    "fbank_energy_last": lambda: kaldi.checked_key(
        use_energy=True, htk_compat=True, raw_energy=False, scale=32768.0, use_power=False
    ),
    "mfcc": lambda: kaldi.checked_key(num_ceps=13, cepstral_lifter=22.0, scale=32768.0),
    "mfcc_energy": lambda: kaldi.checked_key(num_ceps=13, use_energy=True, htk_compat=True, scale=32768.0),
    "mel_1024": lambda: mel_key(n_fft=1024, hop_length=256, log="dB", top_db=80.0),
    "mel_2048": lambda: mel_key(n_fft=2048, hop_length=512, power=1.0, pad_mode="constant"),
    "mel_8192": lambda: mel_key(n_fft=8192, hop_length=2048, n_mels=256),
    "mel_odd": lambda: mel_key(n_fft=405, hop_length=100, center=False, log="log"),
    "mel_prime": lambda: mel_key(n_fft=2 * 37, hop_length=20, n_mels=8, power=1.5),
    "spectrogram": lambda: _key("torchaudio", False, audio.spectrogram.__kwdefaults__ | dict(n_fft=480)),
}


def on_host(key, clips, num_samples):
    """The kernel's phases on the host, as `mmlm_fast.audio.cuda.spectral` would launch them."""
    spec, plan = spec_of(key), device_plan(key)
    tables = [np.array(t) for t in plan.device_tables()]
    frames = [spec.layout.num_frames(n) for n in num_samples]
    outs = [torch.full(spec.layout.shape(f), torch.nan) for f in frames]
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


@pytest.mark.parametrize("name", KEYS)
def test_kernel_on_the_host(name):
    key = KEYS[name]()
    spec = spec_of(key)
    assert is_covered(spec)
    clips = [SPEECH[0][20000:36000], SPEECH[1][:4321], SPEECH[2][9000:10500]]
    lengths = [16000, 6000, 1500]  # the second is padded with zeros
    for clip, n, out in zip(clips, lengths, on_host(key, clips, lengths), strict=True):
        padded = torch.nn.functional.pad(clip, (0, n - len(clip)))
        frames = spec.layout.num_frames(n)
        exact = spectral_ref(spec, padded.double(), frames)
        reference = spectral_ref(spec, padded, frames)
        error, allowed = ((x.double() - exact).norm() for x in (out, reference))
        assert error <= max(2 * allowed, 2e-7 * exact.norm()), (error, allowed)


def test_blocks_of_every_kind():
    """Frames of a warp and of two to eight warps; the two transforms that are laid out in advance, and others."""
    lengths = {name: spec_of(key()).n_fft for name, key in KEYS.items()}
    per_frame = {name: device_plan(key()).device_bytes() for name, key in KEYS.items()}
    assert {400, 512, 1024, 2048, 8192, 405} <= set(lengths.values())
    assert per_frame["mel_8192"] > 48 * 1024 > per_frame["mel_2048"]


def test_kernel_on_the_host_reads_int16_and_strides():
    key = KEYS["whisper"]()
    samples = (SPEECH[0][:16000] * 32767).round().to(torch.int16)
    (out,) = on_host(key, [samples], [16000])
    torch.testing.assert_close(out, log_mel(samples), rtol=0, atol=3e-5)
    strided = torch.stack([samples, samples * 0], 1)[:, 0]
    assert torch.equal(on_host(key, [strided], [16000])[0], out)


def test_long_transforms_are_left_to_pytorch():
    assert not is_covered(spec_of(mel_key(n_fft=32768, hop_length=4096)))
    assert not is_covered(spec_of(checked_key(80, None, torch.float64)))
    assert is_covered(spec_of(checked_key(80, None, torch.bfloat16)))


def test_without_a_device_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    plan = device_plan(KEYS["whisper"]())
    with pytest.raises(RuntimeError, match="on CUDA: "):
        plan.run_device([0] * 9, [0], [0], [400], [1], [0], 1, False, 0, 1, 0, 0, 0, False)
    with pytest.raises(ValueError, match="not a plan for CUDA"):
        _C.SpectralPlan({"frame_length": 400, "n_fft": 400}, np.ones(400)).device_bytes()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", KEYS)
def test_kernel_on_the_device(name, dtype):
    from mmlm_fast.audio.spectral import features_of
    from mmlm_fast.audio.waveforms import clips_of

    key = KEYS[name]()
    spec = spec_of(key)
    clips = [SPEECH[0][20000:36000], SPEECH[1][:4321], SPEECH[2][9000:10500]]
    outs = features_of(key, clips_of([c.cuda() for c in clips]))
    for clip, out in zip(clips, outs, strict=True):
        frames = spec.layout.num_frames(len(clip))
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
    kaldi.kaldi_fbank(clips[0], num_mel_bins=80)
    torch.cuda.set_sync_debug_mode("error")
    try:
        log_mel(clips)
        kaldi.kaldi_fbank(clips[0], num_mel_bins=80)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = log_mel(clips)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)
