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
    """Calls of the native core and of launchers, by name."""
    import mmlm_kernels.glu as kernels
    from mmlm_fast import _C

    seen = []
    for module, name in ((_C, "glu_forward"), (kernels, "glu_fwd")):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, f=original, n=name: seen.append(n) or f(*args))
    return seen


@pytest.mark.parametrize(
    ("path", "expected"),
    [(None, []), (Path.REFERENCE, []), (Path.NATIVE, ["glu_forward"]), (Path.KERNEL, ["glu_fwd"]), (Path.TORCH, [])],
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
    assert launched == ["glu_forward"] * 2


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
    assert launched == (
        [] if path is Path.REFERENCE else ["glu_forward"]
    )  # compiled, the native core is always worth it


def test_a_dynamic_graph_knows_no_least_size(monkeypatch):
    """One graph for inputs of any size: what decides eagerly must not become a guard."""
    torch.compiler.reset()
    monkeypatch.setattr(torch._dynamo.config, "error_on_recompile", True)
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
    assert op.on_cuda() == "the PyTorch formula: Triton is not installed"
    assert op.on_cpu() == "the native core for float32, bfloat16 from 10 or 20 numbers on, else the PyTorch formula"


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
