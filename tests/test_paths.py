"""Which path a call takes, and how to force one."""

import threading

import pytest
import torch

import mmlm_fast
from mmlm_fast import ops
from mmlm_fast.masks import IntervalMask
from mmlm_fast.ops import paths
from mmlm_fast.ops._op import RECORDS, Op
from mmlm_fast.ops.paths import Path, forced, reference

X = torch.randn(3, 8)


@pytest.fixture
def launched(monkeypatch):
    """Which of the native core and the launcher was called, in turn."""
    import mmlm_kernels.glu as kernels
    from mmlm_fast import _C

    seen = []
    for module, name in ((_C, "core"), (kernels, "kernel")):
        original = module.glu_fwd
        monkeypatch.setattr(module, "glu_fwd", lambda *args, f=original, n=name: seen.append(n) or f(*args))
    return seen


@pytest.mark.parametrize(
    ("path", "expected"),
    [(None, []), (Path.REFERENCE, []), (Path.NATIVE, ["core"]), (Path.KERNEL, ["kernel"]), (Path.TORCH, [])],
)
def test_small_inputs_take_what_is_forced(path, expected, launched):
    with forced(path):
        out = ops.glu(X, X)
    assert launched == expected
    torch.testing.assert_close(out, ops.glu(X, X))
    assert launched == expected, "afterwards a small input takes the formula again"


def test_large_inputs_take_the_native_core_unless_forced(launched):
    x = torch.randn(2, 2**18)
    ops.glu(x, x)
    with reference():
        ops.glu(x, x)
        with forced(None):
            ops.glu(x, x)
        ops.glu(x, x)
    assert launched == ["core"] * 2


def test_what_has_no_such_path_goes_on(launched):
    with forced(Path.NATIVE):
        out = ops.glu(X.double(), X.double())
    assert out.dtype == torch.float64
    assert not launched


def test_other_threads_choose_for_themselves(launched):
    with forced(Path.NATIVE):
        thread = threading.Thread(target=lambda: ops.glu(X, X))
        thread.start()
        thread.join()
    assert not launched


def test_an_exception_ends_it(launched):
    with pytest.raises(KeyError), forced(Path.NATIVE):
        raise KeyError
    ops.glu(X, X)
    assert not launched


def test_attention_by_each_path():
    q, mask = torch.randn(1, 2, 5, 8), IntervalMask.causal(5)
    with reference():
        expected = ops.interval_attention(q, q, q, mask)
    for path in (None, *Path):
        with forced(path):
            torch.testing.assert_close(ops.interval_attention(q, q, q, mask), expected)


@pytest.mark.parametrize("path", [Path.NATIVE, Path.REFERENCE, None])
def test_a_compiled_graph_is_made_anew_for_another_path(path, launched):
    compiled = torch.compile(ops.glu, fullgraph=True, backend="aot_eager")
    compiled(X, X)
    launched.clear()
    with forced(path):
        compiled(X, X)
    assert launched == ([] if path is Path.REFERENCE else ["core"])  # compiled, the native core is always worth it


@torch._dynamo.config.patch(error_on_recompile=True)
def test_a_dynamic_graph_knows_no_least_size():
    """One graph for inputs of any size: what decides eagerly must not become a guard."""
    torch.compiler.reset()
    compiled = torch.compile(ops.glu, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 2**15):  # 24 and 2**18 numbers
        x = torch.randn(rows, 8)
        torch.testing.assert_close(compiled(x, x), ops.glu(x, x))


@pytest.mark.parametrize("path", ["native", 1, Path])
def test_what_is_no_path(path):
    with pytest.raises(ValueError, match=r"path must be one of Path.REFERENCE, .* or None, got"), forced(path):
        pass


def test_kernels_need_a_device_or_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="kernels need a CUDA device, or TRITON_INTERPRET=1"), forced(Path.KERNEL):
        pass


def test_the_path_of_a_tensor(monkeypatch):
    """What each device, dtype and size takes, without the device."""

    class On:
        """As much of a tensor as decides."""

        def __init__(self, device, dtype, numbers=1):
            self.device, self.dtype, self.numbers = torch.device(device), dtype, numbers

        def numel(self):
            return self.numbers

    monkeypatch.setitem(RECORDS, "toy", None)  # taken away again
    op = Op("toy", smallest={"a": 10, "b": 20})
    assert op.path(On("cpu", torch.float32, 10), kind="a") == paths.NATIVE
    assert op.path(On("cpu", torch.float32, 10), kind="b") == paths.REFERENCE
    assert op.path(On("cpu", torch.float32), 20, kind="b") == paths.NATIVE
    assert op.path(On("cpu", torch.float16, 99), kind="a") == paths.REFERENCE
    assert op.path(On("cpu", torch.float32, 99), kind="a", fits=False) == paths.REFERENCE
    for dtype, path in ((torch.float16, paths.KERNEL), (torch.float64, paths.REFERENCE)):
        assert op.path(On("cuda", dtype), kind="a") == path
        with forced(Path.NATIVE):
            assert op.path(On("cuda", dtype), kind="a") == path
    assert op.path(On("meta", torch.float32, 99), kind="a") == paths.REFERENCE
    monkeypatch.setattr("mmlm_fast.ops._op.HAS_TRITON", False)
    assert op.path(On("cuda", torch.float16), kind="a") == paths.REFERENCE
    assert op.on("cuda") == (Path.REFERENCE, "Triton is not installed")
    assert op.on("cpu") == (Path.NATIVE, "float32, bfloat16 from 10 (a), 20 (b) numbers on, else the PyTorch formula")


def test_what_is_explained_is_what_is_taken(launched):
    """doctor's words come from the record by which calls are decided, forced ones too."""
    told = [mmlm_fast.doctor("glu", dtype="bfloat16", size=size) for size in (2**18 - 1, 2**18)]
    assert told == [
        "glu, bfloat16 on CPU, 262,143 numbers: the PyTorch formula: "
        "for fewer than 262,144 numbers a call of the native core costs more than it saves",
        "glu, bfloat16 on CPU, 262,144 numbers: the native core: from 262,144 numbers on it is the faster one",
    ]
    for numbers, taken in ((2**18 - 1, []), (2**18, ["core"])):
        launched.clear()
        x = torch.zeros(numbers, dtype=torch.bfloat16)
        ops.glu(x, x)
        assert launched == taken
    assert mmlm_fast.doctor("glu", dtype=torch.float64).endswith(
        "any numbers: the PyTorch formula: the native core takes float32, bfloat16"
    )
    for path, why in ((Path.REFERENCE, "the PyTorch formula: it is forced"), (Path.NATIVE, "the native core: ")):
        with forced(path):
            assert why in mmlm_fast.doctor("glu", dtype="float32", size=1)
    assert "from 524,288 numbers" in mmlm_fast.doctor("add_norm", dtype="float32", size=2**19)
    assert "a Triton kernel: it takes float32, float16, bfloat16" in mmlm_fast.doctor("glu", device="cuda")
    assert "audio.log_mel, int16" in mmlm_fast.doctor("audio.log_mel")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"op": "gul"}, "op must be one of add_norm, .*, got 'gul'"),
        ({"op": "glu", "dtype": "wide"}, "dtype must be a torch.dtype or the name of one, got 'wide'"),
        ({"op": "glu", "device": "tpu"}, "device must be cpu or cuda, got 'tpu'"),
        ({"op": "glu", "size": -1}, "size must not be negative, got -1"),
        ({"size": 1}, "are of an op"),
    ],
)
def test_doctor_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        mmlm_fast.doctor(**options)


def test_every_op_has_a_record():
    import mmlm_fast.audio
    from mmlm_benchmarks.ops import OPS

    assert set(RECORDS) == {*OPS, "spectral_features", "resample"}
    named = [name for op in RECORDS.values() for name in op.functions or (op.name,)]
    assert {n for n in named if "." not in n} == set(ops.__all__) - {"rope_tables"}
    for name in named:
        assert callable(getattr(mmlm_fast.audio, name.removeprefix("audio."), None) or getattr(ops, name))


def test_the_package_names_the_switch():
    assert mmlm_fast.reference is paths.reference
