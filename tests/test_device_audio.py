"""Audio on a GPU: tables copied once, and what runs where the core's CUDA code cannot. No GPU needed."""

import json
import threading
import warnings

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import mmlm_fast
from mmlm_fast import _C, doctor
from mmlm_fast.audio import cuda, device_tables, kaldi_fbank, log_mel, mfcc, resample
from mmlm_fast.audio.log_mel import WHISPER

SECOND = torch.randn(16000)
CALLS = {
    "log_mel": log_mel,
    "kaldi": lambda x: kaldi_fbank(x, num_mel_bins=40, dither=0.0),
    "mfcc": lambda x: mfcc(x, num_ceps=13),
    "resample": lambda x: resample(x, 16000, 11025),
    "resampled": lambda x: log_mel(x, orig_freq=8000),
}


@pytest.fixture(autouse=True)
def _nothing_kept(monkeypatch):
    monkeypatch.setattr(device_tables, "_kept", {})
    monkeypatch.setattr(device_tables, "_kept_bytes", 0)


@pytest.fixture
def copies(monkeypatch):
    """Arrays that were copied to a device."""
    made, tensor = [], torch.tensor

    def counted(data, *args, **kwargs):
        if isinstance(data, np.ndarray):
            made.append(data.shape)
        return tensor(data, *args, **kwargs)

    monkeypatch.setattr(torch, "tensor", counted)
    return made


@pytest.mark.parametrize("name", CALLS)
def test_tables_are_copied_once(name, copies):
    """Of the plain PyTorch path, and of every backward pass: on a GPU each copy waits for it."""
    with mmlm_fast.reference():
        first = CALLS[name](SECOND)
        before = len(copies)
        assert before > 0
        assert torch.equal(CALLS[name](SECOND), first)
    for _ in range(2):
        x = SECOND.clone().requires_grad_()
        CALLS[name](x).sum().backward()
        assert x.grad.abs().sum() > 0
    assert len(copies) == before
    with mmlm_fast.reference():
        CALLS[name](SECOND.double())
    assert len(copies) == before + (before if name == "resample" else 0), "a dtype of its own"


@pytest.mark.parametrize("first", ["inference_mode", "fake tensors", "func.grad"])
def test_what_was_made_first_elsewhere_is_not_kept(first):
    """A table of an inference tensor, of a fake one or of a transform would fail every later call that trains."""
    call, expected = CALLS["resampled"], torch.autograd.functional.jacobian(CALLS["resample"], SECOND[:64])
    with mmlm_fast.reference():
        plain = call(SECOND)
        device_tables._kept.clear()
        if first == "inference_mode":
            with torch.inference_mode():
                call(SECOND)
        elif first == "fake tensors":
            with FakeTensorMode():
                assert call(torch.empty(16000)).shape == plain.shape
        else:
            torch.func.grad(lambda x: call(x).sum())(SECOND)
        x = SECOND.clone().requires_grad_()
        out = call(x)
        out.sum().backward()
        assert torch.equal(out.detach(), plain)
        assert x.grad.isfinite().all()
        with FakeTensorMode():  # nor may what is real meet what is not
            assert call(torch.empty(16000)).shape == plain.shape
    torch.testing.assert_close(torch.autograd.functional.jacobian(CALLS["resample"], SECOND[:64]), expected)


@pytest.mark.parametrize("within", ["FakeTensorMode", "grad", "functionalize"])
def test_what_a_mode_or_transform_finds_is_plain(within):
    def ask(x):
        return device_tables.kept_tables("key", lambda: [np.ones(3)], torch.float32, SECOND)[0].sum() * x.sum()

    if within == "FakeTensorMode":
        with FakeTensorMode(allow_non_fake_inputs=True):
            ask(SECOND)
    else:
        getattr(torch.func, within)(ask)(SECOND)
    ((table,),) = device_tables._kept.values()
    assert type(table) is torch.Tensor
    assert not torch._C._functorch.is_functorch_wrapped_tensor(table)
    assert not table.is_inference()
    assert torch.equal(table, torch.ones(3))


def test_what_is_kept_is_bounded_and_never_let_go(monkeypatch):
    """A captured CUDA graph holds the addresses of tables: a full store takes nothing more."""
    monkeypatch.setattr(device_tables, "MAX_BYTES", 100_000)
    with mmlm_fast.reference():
        first = log_mel(SECOND)
        kept = dict(device_tables._kept)
        assert kept
        for rate in range(40, 100):
            resample(SECOND[:100], rate + 1, rate)
        assert torch.equal(log_mel(SECOND), first)
    assert all(device_tables._kept[place] is kept[place] for place in kept)
    total = sum(t.nbytes for held in device_tables._kept.values() for t in held)
    assert total == device_tables._kept_bytes <= device_tables.MAX_BYTES


def test_threads_share_what_is_kept():
    barrier, seen = threading.Barrier(8), []

    def ask():
        barrier.wait()
        seen.append(device_tables.kept_tables("key", lambda: [np.ones(1000)], torch.float32, SECOND)[0])

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(t) for t in seen}) == 1
    assert device_tables._kept_bytes == 4000


def test_a_first_call_while_a_graph_is_captured_says_what_to_do(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(
        RuntimeError, match=r"cannot capture the first call of an audio function on cuda:0.*once before"
    ):
        device_tables._make(("key", None, torch.device("cuda:0")), lambda: [np.ones(3)])
    assert not device_tables._kept


# ---- where the core's CUDA code cannot run -----------------------------------------------------------------------

BUILD = json.loads(_C.build_info_json()) | {"cuda": True, "nvcc": "13.0", "cuda_archs": ["80", "90", "120+PTX"]}
FINE = {"compiled": True, "num_devices": 1, "message": "ok", "error": 0}
OLD_DRIVER = FINE | {"num_devices": 0, "message": "CUDA driver version is insufficient for CUDA runtime version"}


@pytest.fixture
def core(monkeypatch):
    """The core as another machine would have it."""

    def has(status, capability=(9, 0)):
        cuda.why_plain.cache_clear()
        cuda._has_kernel.cache_clear()
        monkeypatch.setattr(_C, "cuda_status", lambda: status)
        monkeypatch.setattr(_C, "build_info_json", lambda: json.dumps(BUILD))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)

    yield has
    cuda.why_plain.cache_clear()
    cuda._has_kernel.cache_clear()


@pytest.mark.parametrize(
    ("status", "capability", "reason"),
    [
        (FINE, (9, 0), ""),
        (FINE, (8, 6), ""),
        (FINE, (12, 1), ""),
        (FINE, (13, 0), ""),  # by its PTX
        (FINE, (7, 5), "core built for sm_80, sm_90, sm_120+PTX, this device is sm_75"),
        (FINE, (10, 0), "this device is sm_100"),
        (FINE | {"compiled": False}, (9, 0), "core built without nvcc"),
        (OLD_DRIVER, (9, 0), "driver version is insufficient"),
    ],
)
def test_why_plain_pytorch(core, status, capability, reason):
    core(status, capability)
    assert reason in cuda.why_plain(0)
    assert bool(reason) == bool(cuda.why_plain(0))


def test_code_of_one_architecture_only():
    assert cuda.covers(["90a"], (9, 0))
    assert not cuda.covers(["90a"], (9, 1))
    assert not cuda.covers(["90"], (8, 9))
    assert not cuda.covers([], (9, 0))


def test_a_driver_too_old_is_said_once_and_plain_pytorch_runs(core, monkeypatch):
    """torch of CUDA 12 runs on drivers that the core's CUDA 13 does not: it was a RuntimeError of the first launch."""
    core(OLD_DRIVER)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):  # on the CPU for the GPU
            out = cuda.spectral_features([SECOND], WHISPER.key, [16000], 0)
    with mmlm_fast.reference():
        assert torch.equal(out.view(80, 100), log_mel(SECOND))
    assert [str(w.message) for w in said] == [
        f"mmlm_fast: audio features on cuda:{SECOND.device.index} run in plain PyTorch: {OLD_DRIVER['message']} "
        f"(CUDA 13.0)"
    ]


@pytest.mark.parametrize(("status", "path"), [(FINE, "its CUDA kernel"), (OLD_DRIVER, "driver version")])
def test_doctor_says_so(core, monkeypatch, status, path):
    core(status | {"driver_version": 12080, "runtime_version": 13000})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a GPU")
    on_cuda = doctor().partition("ops on CUDA tensors")[2]
    line = next(x for x in on_cuda.splitlines() if x.startswith("    audio.log_mel:"))
    assert path in line
    assert ("kernel" in line) == (status is FINE)
