import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from mmlm_fast import testing
from mmlm_fast.ops import add_norm
from mmlm_fast.ops.add_norm import add_norm_ref
from support.kernel_path import PATHS, PATHS_AND_DTYPES, saved_numbers

DTYPES = [torch.float32, torch.bfloat16]
# Empty, one number, a prime, one block and one more, more rows than a part of the sums over rows.
SHAPES = [(0, 5), (2, 3, 67), (3, 65), (2, 2049), (300, 64)]


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize(("path", "dtype"), PATHS_AND_DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_close_to_reference(shape, path, dtype, kind, take, device):
    take(path)
    x, residual = (torch.randn(shape, dtype=dtype, device=device) for _ in range(2))
    weight, bias = (torch.randn(shape[-1], dtype=dtype, device=device) for _ in range(2))

    def fast(*args):
        return add_norm(*args, kind=kind, offset=0.5)

    def ref(*args):
        return add_norm_ref(*args, kind=kind, offset=0.5)

    testing.assert_close_to_reference(fast(x, residual, weight, bias), ref, x, residual, weight, bias)
    testing.assert_gradients_close_to_reference(fast, ref, x, residual, weight, bias)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("parameters", ["none", "weight", "float32 weight"])
def test_without_residual_and_parameters(path, kind, parameters, take, device):
    take(path)
    x = torch.randn(5, 40, dtype=torch.bfloat16, device=device)
    dtype = torch.float32 if parameters == "float32 weight" else torch.bfloat16
    weight = None if parameters == "none" else torch.randn(40, dtype=dtype, device=device)

    def fast(x, weight):
        return add_norm(x, None, weight, kind=kind)[0]

    def ref(x, weight):
        return add_norm_ref(x, None, weight, None, kind)[0]

    testing.assert_close_to_reference(fast(x, weight), ref, x, weight)
    testing.assert_gradients_close_to_reference(fast, ref, x, weight)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("used", ["norm", "sum"])
def test_one_output_used(path, used, take, device):
    take(path)
    x, residual = (torch.randn(4, 24, device=device) for _ in range(2))
    weight = torch.randn(24, device=device)
    index = 0 if used == "norm" else 1

    def fast(*args):
        return add_norm(*args)[index]

    def ref(*args):
        return add_norm_ref(*args)[index]

    testing.assert_gradients_close_to_reference(fast, ref, x, residual, weight)


def test_formulas():
    """Against the formulas of the docstring, written out, and torch's own layer norm."""
    x, residual, weight, bias = torch.randn(6, 10), torch.randn(6, 10), torch.randn(10), torch.randn(10)
    r = x + residual
    out, total = add_norm(x, residual, weight, offset=1.0, eps=1e-3)
    torch.testing.assert_close(total, r)
    torch.testing.assert_close(out, r / (r.square().mean(-1, keepdim=True) + 1e-3).sqrt() * (1 + weight))
    out, _ = add_norm(x, residual, weight, bias, kind="layer", eps=1e-5)
    torch.testing.assert_close(out, F.layer_norm(r, (10,), weight, bias, 1e-5))


def test_mixed_dtypes_are_promoted():
    out, total = add_norm(torch.randn(2, 4, dtype=torch.bfloat16), torch.randn(2, 4), torch.ones(4))
    assert out.dtype == total.dtype == torch.float32


@pytest.mark.parametrize("path", PATHS)
def test_strides_and_inputs_kept(path, take, device):
    take(path)
    wide = torch.randn(6, 4, 30, device=device)
    x, residual = wide[::2, :, 3:17], wide.transpose(0, 1)[:, 1::2, 3:17].transpose(0, 1)
    before = wide.clone()
    weight = torch.randn(28, device=device)[::2]
    testing.assert_close_to_reference(add_norm(x, residual, weight), add_norm_ref, x, residual, weight)
    assert wide.equal(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_sum_has_the_bits_of_torchs(dtype, take):
    """Rounded to nearest even, and NaN, infinities and the largest numbers as they are."""
    take("native")
    x, residual = torch.randn(7, 515).to(dtype), 3 * torch.randn(7, 515).to(dtype)
    x[0, :4] = torch.tensor([torch.nan, torch.inf, -torch.inf, torch.finfo(dtype).max])
    residual[0, 3] = torch.finfo(dtype).max
    x[1, 9] = torch.tensor(0x7FFF, dtype=torch.int16).view(torch.bfloat16).to(dtype)  # a NaN of all ones
    total, expected = add_norm(x, residual)[1], x + residual
    assert total.nan_to_num(7.0).equal(expected.nan_to_num(7.0))
    assert total.isnan().equal(expected.isnan())


def test_keeps_the_sum_and_the_weight(take):
    take("native")
    x, residual = torch.randn(64, 256, requires_grad=True), torch.randn(64, 256, requires_grad=True)
    weight = torch.randn(256, requires_grad=True)
    kept = saved_numbers(lambda: add_norm(x, residual, weight))
    assert kept == (64 * 256 + 256) * 4


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "wide"])
def test_every_instruction_set(isa, take):
    from mmlm_fast import _C

    take("native")
    before = _C.active_isa()
    try:
        if _C.set_isa(isa) != isa:
            pytest.skip(f"this CPU has no {isa}")
        for dtype in DTYPES:
            args = [torch.randn(9, 77, dtype=dtype), torch.randn(9, 77, dtype=dtype), torch.randn(77, dtype=dtype)]
            testing.assert_close_to_reference(add_norm(*args), add_norm_ref, *args)
            testing.assert_gradients_close_to_reference(add_norm, add_norm_ref, *args)
    finally:
        _C.set_isa(before)


def test_bits_do_not_depend_on_threads(take):
    """And large outputs, which are written past the caches, are the same."""
    take("native")
    x, residual, weight = torch.randn(1500, 1999), torch.randn(1500, 1999), torch.randn(1999, requires_grad=True)
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            out, total = add_norm(x, residual, weight)
            found.append((out, total, *torch.autograd.grad(out.sum(), weight)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(a.equal(b) for a, b in zip(found[0], other, strict=True))
    rows = add_norm(x[:8], residual[:8], weight)
    assert rows[0].equal(found[0][0][:8])


def test_forked_before_the_first_call():
    """torch has used its OpenMP threads, ours were never called: the child has neither and must not wait for them."""
    script = """
import os, torch
torch.set_num_threads(2)
torch.randn(1 << 21).exp().sum()
from mmlm_fast import _C
x = torch.randn(2048, 1024)
out = torch.empty_like(x)
pid = os.fork()
if pid == 0:
    rows = [(x.data_ptr(), 1024), (0, 0), (0, 0), (out.data_ptr(), 1024)]
    _C.add_norm_fwd(0, 2048, 1024, False, 0, 0, 1e-6, *rows, 2)
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-P", "-c", script], check=True, timeout=60)


def test_forked_with_threads_of_our_own():
    """Without OpenMP in the process the core has a pool; in the child its threads are not there: not to be waited for,
    nor to be counted on.
    """
    from mmlm_fast import _C

    script = """
import importlib.util, os, sys
import numpy as np
spec = importlib.util.spec_from_file_location("_C", sys.argv[1])
core = importlib.util.module_from_spec(spec)
spec.loader.exec_module(core)
x = np.ones((2048, 1024), np.float32)
def call():
    out = np.zeros_like(x)
    rows = [(x.ctypes.data, 1024), (0, 0), (0, 0), (out.ctypes.data, 1024)]
    core.add_norm_fwd(0, 2048, 1024, False, 0, 0, 0.0, *rows, 2)
    assert (out == 1).all()
call()
assert "torch" not in sys.modules
pid = os.fork()
if pid == 0:
    assert len(os.listdir("/proc/self/task")) == 1
    call()
    os._exit(0 if len(os.listdir("/proc/self/task")) == 2 else 3)
assert os.waitpid(pid, 0)[1] == 0
call()
"""
    subprocess.run([sys.executable, "-P", "-c", script, _C.__file__], check=True, timeout=60)


def test_registration(monkeypatch):
    x, weight = torch.randn(3, 8), torch.randn(8)
    ops = torch.ops.mmlm_fast
    torch.library.opcheck(ops.add_norm_fwd.default, (x, x.clone(), weight, weight, True, 1e-6, 0.0))
    torch.library.opcheck(ops.add_norm_fwd.default, (x, None, None, None, False, 1e-6, 0.0))
    torch.library.opcheck(ops.add_norm_bwd.default, (x, x, x, weight, torch.float32, True, 1e-6, 0.0))
    torch.library.opcheck(ops.add_norm_bwd.default, (x, None, x, None, None, False, 1e-6, 0.0))


def test_gradcheck():
    args = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 5), (3, 5), (5,), (5,))]
    for kind in ("rms", "layer"):
        assert torch.autograd.gradcheck(lambda *a, kind=kind: add_norm(*a, kind=kind), args)


def test_compiles_in_one_graph_with_dynamic_shapes():
    def step(x, residual, weight):
        out, total = add_norm(x, residual, weight)
        return out * 2, total

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 7):
        x, residual, weight = torch.randn(2, rows, 8, requires_grad=True), torch.randn(2, rows, 8), torch.randn(8)
        expected, found = step(x, residual, weight), compiled(x, residual, weight)
        torch.testing.assert_close(found, expected)
        grads = [torch.autograd.grad(out[0].square().sum() + out[1].sum(), x) for out in (found, expected)]
        torch.testing.assert_close(*grads)


def test_autocast_and_checkpointing(take):
    take("native")
    x, residual, weight = (torch.randn(4, 8, requires_grad=True) for _ in range(3))
    weight = torch.randn(8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert add_norm(x, residual, weight)[0].dtype == torch.float32  # a norm keeps its precision, as torch's
    plain = torch.autograd.grad(add_norm(x, residual, weight)[0].square().sum(), [x, weight])
    again = torch.utils.checkpoint.checkpoint(lambda: add_norm(x, residual, weight)[0], use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(again.square().sum(), [x, weight]), plain)


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        (((2, 4), (2, 4)), dict(kind="batch"), "kind must be one of rms, layer, got 'batch'"),
        (((2, 4), (2, 5)), {}, r"residual must have shape \(2, 4\)"),
        (((2, 4), (2, 4), (5,)), {}, r"weight must have shape \(4,\)"),
        (((2, 4), (2, 4), (4,), (1, 4)), {}, r"bias must have shape \(4,\)"),
        (((2, 0), (2, 0)), {}, "H of at least 1"),
    ],
)
def test_errors(args, options, message):
    with pytest.raises(ValueError, match=message):
        add_norm(*(torch.zeros(s) for s in args), **options)
    with pytest.raises(ValueError, match="float32"):
        add_norm(torch.zeros(2, 4), None, torch.zeros(4, dtype=torch.float64))
    with pytest.raises(ValueError, match="must be a tensor, got list"):
        add_norm([1.0], None)
