"""Audio features without torch: what an import brings in, and that arrays get what tensors get."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import mmlm_fast.audio.np as anp
from mmlm_fast import audio
from support.speech import WAVEFORMS

# Calls by text, so that a process without torch can make them too. `x` is mono, `two` has channels, `s` is a stream.
CALLS = {
    "log_mel": "f.log_mel(x)",
    "log_mel, 128 bins, padded": "f.log_mel(x, num_mel_bins=128, num_samples=480000)",
    "log_mel, float64": "f.log_mel(x, dtype='float64')",
    "log_mel, clips": "f.log_mel([x, x[:9000]])",
    "log_mel, integers": "f.log_mel(integers)",
    "log_mel, channels resampled": "f.log_mel(two, channel_dim=0, orig_freq=22050)",
    "log_mel, below a constant": "f.log_mel(x, log_mel_max=1.5)",
    "kaldi_fbank": "f.kaldi_fbank(x, num_mel_bins=80)",
    "kaldi_fbank, mirrored": "f.kaldi_fbank(x, snip_edges=False, use_energy=True, window_type='hamming')",
    "kaldi_fbank, warped": "f.kaldi_fbank(x, vtln_warp=1.1)",
    "kaldi_mfcc": "f.kaldi_mfcc(x)",
    "mel_spectrogram": "f.mel_spectrogram(x)",
    "mel_spectrogram, librosa": "f.mel_spectrogram(x, convention='librosa', log='dB', top_db=80.0)",
    "mel_spectrogram, a window": "f.mel_spectrogram(x, window_fn=np.hanning, pad=30)",
    "spectrogram": "f.spectrogram(x, n_fft=405, window_fn='blackman')",
    "mel_mfcc": "f.mel_mfcc(x)",
    "mel_mfcc, log": "f.mel_mfcc(x, log_mels=True, convention='librosa', lifter=22.0)",
    "nemo_log_mel": "f.nemo_log_mel(x)",
    "resample": "f.resample(x, 44100, 16000)",
    "resample, Kaiser": "f.resample(two, 16000, 22050, resampling_method='sinc_interp_kaiser', channel_dim=0)",
    "standardize": "f.standardize(f.log_mel(x), per='clip')",
    "StreamingFbank": "pieces(f.StreamingFbank(num_mel_bins=40))",
    "StreamingMfcc": "pieces(f.StreamingMfcc(orig_freq=8000))",
    "StreamingLogMel": "pieces(f.StreamingLogMel())",
    "StreamingResample": "pieces(f.StreamingResample(48000, 16000))",
}
PRELUDE = """
import numpy as np

def pieces(stream):
    time = 1 if type(stream).__name__ == "StreamingLogMel" else 0
    return np.concatenate([*(stream.accept(x[i:i + 3001]) for i in range(0, len(x), 3001)), stream.flush()], time)

def signals(mono):
    return dict(x=mono, two=np.stack([mono, mono[::-1]]), integers=(mono * 32767).astype(np.int16))
"""
SPEECH = WAVEFORMS[0][20000:52000].copy()
# What differs without torch: cosines and exponentials of tables that torchaudio computes in float32, in their last bit.
LAST_BIT = {
    *("kaldi_fbank, warped", "kaldi_mfcc", "StreamingMfcc"),
    *("spectrogram", "mel_spectrogram", "mel_spectrogram, a window", "mel_mfcc"),
}
# What is computed in another order for tensors: sums of a clip.
ANOTHER_ORDER = {"standardize"}


def assert_near(ours, theirs):
    """Up to roundings: measured 0.24 of 2^-20 of the largest value at most (mel_mfcc), in float64 7e-15 (log_mel)."""
    bound = 2**-45 if theirs.dtype == np.float64 else 2**-21
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=bound * np.abs(theirs).max())


def evaluated(call, functions, mono):
    names = {"f": functions}
    exec(PRELUDE, names)
    names |= names["signals"](mono)
    return eval(call, names)


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory):
    """Results of a process in which torch, transformers and triton cannot be imported, and the modules it has."""
    folder = tmp_path_factory.mktemp("numpy")
    np.save(folder / "speech.npy", SPEECH)
    code = f"""
import sys
for name in ("torch", "transformers", "triton", "scipy"):
    sys.modules[name] = None
import mmlm_fast.audio.np as f
{PRELUDE}
import json
x = np.load({str(folder / "speech.npy")!r})
globals().update(signals(x))
calls = json.loads({json.dumps(json.dumps(CALLS))})
np.savez({str(folder / "results.npz")!r}, **{{name: eval(call) for name, call in calls.items()}})
dtype = "bfloat16"
for bad in ("f.kaldi_fbank(x, dither=1.0)", "f.log_mel('a.wav')", "f.log_mel([[1.0]])", "f.log_mel(x, dtype=dtype)"):
    try:
        eval(bad)
        print("no error")
    except ValueError as error:
        print(error)
print(f.log_mel([], num_samples=16000).shape, f.log_mel(np.zeros((0, 16000))).shape)
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    with np.load(folder / "results.npz") as results:
        return dict(results), done.stdout.splitlines()


@pytest.mark.parametrize("name", CALLS)
def test_arrays_alone_give_the_same(name, without_torch):
    ours, theirs = without_torch[0][name], evaluated(CALLS[name], audio, SPEECH)
    assert type(theirs) is np.ndarray
    assert ours.dtype == theirs.dtype
    if name in LAST_BIT or ours.dtype == np.float64:
        assert_near(ours, theirs)
    else:
        assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("name", CALLS)
def test_tensors_give_the_same(name):
    ours = evaluated(CALLS[name], anp, SPEECH)
    names = {"f": audio}
    exec(PRELUDE, names)
    names |= {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in names["signals"](SPEECH).items()}
    theirs = eval(CALLS[name], names)
    theirs = np.asarray(theirs)
    if name in ANOTHER_ORDER:
        assert_near(ours, theirs)
    else:
        assert np.array_equal(ours, theirs)


def test_errors_without_torch(without_torch):
    dither, path, lists, dtype, shapes = without_torch[1]
    assert dither == "dither draws from torch's generator: import torch first, or pass dither=0, got 1.0"
    assert path == "waveform must be a tensor or array of samples, or a sequence of them, got str"
    assert lists.startswith("clip 0 must be a 1-D tensor or array of samples, got list")
    assert dtype.startswith("numpy has no bfloat16")
    assert shapes == "(0, 80, 100) (0, 80, 100)"


def test_importing_brings_in_numpy_alone():
    code = (
        "import sys; import mmlm_fast.audio.np, mmlm_fast, mmlm_fast.audio; "
        "heavy = {'torch', 'transformers', 'triton', 'soundfile', 'av', 'scipy'}; "
        "print(sorted(heavy & set(sys.modules)), hasattr(mmlm_fast, 'audio'))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] True"


def test_everything_else_is_there_with_torch():
    """Names, and ops for graphs of other processes, in whatever order the two are imported."""
    code = (
        "import {}, {}; import mmlm_fast.audio; mmlm_fast.audio.log_mel(torch.zeros(16000)); "
        "print(mmlm_fast.ops.glu.__name__, mmlm_fast.masks.IntervalMask.__name__, mmlm_fast.reference.__name__, "
        "torch.ops.mmlm_fast.spectral_features.default, torch.ops.mmlm_fast.resample.default)"
    )
    for order in (("torch", "mmlm_fast"), ("mmlm_fast", "torch")):
        done = subprocess.run([sys.executable, "-P", "-c", code.format(*order)], capture_output=True, text=True)
        assert done.stdout.split()[:3] == ["glu", "IntervalMask", "reference"], done.stderr


def test_doctor_without_torch():
    code = "import sys; sys.modules['torch'] = None; import mmlm_fast; print(mmlm_fast.doctor())"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert "instruction set" in done.stdout
    assert done.stdout.endswith("ops need torch; mmlm_fast.audio.np, audio features of numpy arrays, does not\n")


def test_a_graph_of_another_process(tmp_path):
    """Exported, saved, loaded where only the package was imported: with tables of one's own in the text of its spec."""

    class Features(torch.nn.Module):
        def forward(self, x):
            return audio.mel_spectrogram(audio.resample(x, 22050, 16000), window_fn=torch.hamming_window, n_mels=40)

    x = torch.from_numpy(SPEECH)
    program = torch.export.export(Features(), (x,))
    torch.export.save(program, tmp_path / "features.pt2")
    np.save(tmp_path / "expected.npy", Features()(x).numpy())
    np.save(tmp_path / "speech.npy", SPEECH)
    code = (
        "import sys; from pathlib import Path; import numpy as np; import {}; import {}; folder = Path(sys.argv[1]); "
        "import torch; program = torch.export.load(folder / 'features.pt2').module(); "
        "out = program(torch.from_numpy(np.load(folder / 'speech.npy'))); "
        "print(np.array_equal(out.detach().numpy(), np.load(folder / 'expected.npy')))"
    )
    for order in (("torch", "mmlm_fast.audio"), ("mmlm_fast.audio", "torch"), ("mmlm_fast.audio.np", "torch")):
        command = [sys.executable, "-P", "-c", code.format(*order), str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.stdout.strip() == "True", done.stderr


ARRAYS_IN_GRAPHS = {
    "log_mel": audio.log_mel,
    "kaldi_fbank": lambda x: audio.kaldi_fbank(x, subtract_mean=True),
    "mel_spectrogram": lambda x: audio.mel_spectrogram(x, pad=7, orig_freq=44100),
    "mel_spectrogram, a window": lambda x: audio.mel_spectrogram(x, window_fn=np.hanning),
    "mel_mfcc": audio.mel_mfcc,
    "nemo_log_mel": audio.nemo_log_mel,
    "resample": lambda x: audio.resample(x, 16000, 8000),
}


@pytest.mark.parametrize("name", ARRAYS_IN_GRAPHS)
def test_arrays_in_a_graph(name):
    torch._dynamo.reset()
    call = ARRAYS_IN_GRAPHS[name]
    out = torch.compile(call, fullgraph=True, backend="eager")(SPEECH)
    assert type(out) is np.ndarray
    # In a graph features are standardised by PyTorch's formula, in float32: 4.8e-7 apart, measured, up to 3.8.
    np.testing.assert_allclose(out, call(SPEECH), rtol=0, atol=2e-6 if name == "nemo_log_mel" else 0)


def test_torch_is_imported_as_without_us():
    code = (
        "import mmlm_fast.audio.np, sys; before = len(sys.meta_path); from mmlm_fast import reference; import torch; "
        "print(len(sys.meta_path) < before, type(torch.__spec__.loader).__name__, type(torch.__loader__).__name__, "
        "torch.ops.mmlm_fast.glu_fwd.default, torch.ops.mmlm_fast.resample.default, mmlm_fast.doctor().count('audio.'))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    is_gone, *loaders, glu, resample, functions = done.stdout.split()
    assert (is_gone, loaders) == ("True", ["SourceFileLoader"] * 2), done.stderr
    assert (glu, resample) == ("mmlm_fast.glu_fwd.default", "mmlm_fast.resample.default")
    assert int(functions) >= 6


FIRST = [
    "from mmlm_fast.audio import WhisperFeatureExtractor",
    "import mmlm_fast.audio.resample_op",
    "import mmlm_fast.nn",
]
OTHERS = [
    *(
        "from mmlm_fast.audio import read_audio",
        "import mmlm_fast; mmlm_fast.accelerate",
        "import mmlm_fast; mmlm_fast.nn",
    ),
    *("import mmlm_fast.audio.plain", "import mmlm_fast.audio.cuda", "import mmlm_fast.audio.extractors"),
    *("from mmlm_fast.ops import glu", "import mmlm_fast.masks", "import mmlm_fast.models", "import mmlm_fast.cli"),
    *("import mmlm_fast.audio.elementary_torch", "import mmlm_fast.audio.spectral", "import mmlm_fast.testing"),
    "import mmlm_fast.audio; mmlm_fast.doctor()",
]


@pytest.mark.parametrize("first", [*FIRST, *(pytest.param(o, marks=pytest.mark.slow) for o in OTHERS)])
def test_any_module_may_be_the_first(first):
    """Whatever brings torch in, with arrays before it and without."""
    rest = (
        "; import torch, mmlm_fast, mmlm_fast.audio as audio; x = torch.zeros(16000); "
        "print(audio.log_mel(x).shape, audio.resample(x, 2, 1).shape, mmlm_fast.doctor().count('audio.log_mel'))"
    )
    for before in ("", "import mmlm_fast.audio.np; "):
        done = subprocess.run([sys.executable, "-P", "-c", before + first + rest], capture_output=True, text=True)
        assert done.stdout.split() == ["torch.Size([80,", "100])", "torch.Size([8000])", "1"], done.stderr


def test_arrays_before_torch_leave_no_tables_behind():
    """Bits do not depend on what was called before torch came: tables are torch's as soon as it is there."""
    code = (
        "import sys; import numpy as np, mmlm_fast.audio.np as anp; "
        "x = np.sin(np.arange(16000.0) ** 1.5).astype('f4'); "
        "early = sys.argv[1] == 'early'; early and (anp.mel_spectrogram(x), anp.mfcc(x), anp.mel_mfcc(x)); "
        "import torch, hashlib, mmlm_fast.audio as audio; t = torch.from_numpy(x); "
        "outs = [f(v) for f in (audio.mel_spectrogram, audio.mfcc, audio.mel_mfcc) for v in (t, x)]; "
        "outs.append(audio.StreamingMfcc().accept(x)); "
        "print(hashlib.sha1(b''.join(np.ascontiguousarray(o).tobytes() for o in outs)).hexdigest())"
    )
    found = [
        subprocess.run([sys.executable, "-P", "-c", code, when], capture_output=True, text=True, check=True).stdout
        for when in ("early", "late")
    ]
    assert found[0] == found[1]


def test_all_names_are_the_same_functions():
    for name in anp.__all__:
        assert getattr(anp, name) is getattr(audio, name)
    assert audio.kaldi_mfcc is audio.mfcc


def test_threads_without_torch():
    code = "import sys; sys.modules['torch'] = None; from mmlm_fast.audio.spec import num_threads; print(num_threads())"
    for given, expected in (("3", "3"), ("1,2", "1"), ("many", None), ("", None)):
        env = {"OMP_NUM_THREADS": given, "PATH": ""}
        done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, env=env)
        assert done.stdout.strip() == (expected or str(len(os.sched_getaffinity(0)))), done.stderr
