import pytest
import torch

from mmlm_fast import testing
from mmlm_fast.ops import gated_add
from mmlm_fast.ops.gated_add import gated_add_ref
from support.kernel_path import PATHS, PATHS_AND_DTYPES, saved_numbers


@pytest.mark.parametrize(("path", "dtype"), PATHS_AND_DTYPES)
@pytest.mark.parametrize("kept", [False, True], ids=["all", "some"])
def test_close_to_reference(path, dtype, kept, take, device):
    take(path)
    for shape in ((0, 4), (2, 2, 67), (1, 1030)):
        x, residual = (torch.randn(shape, dtype=dtype, device=device) for _ in range(2))
        keep = torch.rand(shape[:-1], device=device) < 0.6 if kept else None
        for size in (1, shape[-1]):
            gate = torch.randn(size, dtype=dtype, device=device)

            def fast(x, residual, gate, keep=keep):
                return gated_add(x, residual, gate, keep=keep)

            def ref(x, residual, gate, keep=keep):
                return gated_add_ref(x, residual, gate, keep)

            testing.assert_close_to_reference(fast(x, residual, gate), ref, x, residual, gate)
            testing.assert_gradients_close_to_reference(fast, ref, x, residual, gate)


@pytest.mark.parametrize("path", PATHS)
def test_many_rows(path, take, device):
    """More rows than one program or part sums."""
    take(path)
    x, residual, gate = (torch.randn(s, device=device) for s in ((150, 64), (150, 64), (64,)))
    testing.assert_gradients_close_to_reference(gated_add, gated_add_ref, x, residual, gate)


@pytest.mark.parametrize("path", PATHS)
def test_what_is_not_kept_may_hold_anything(path, take, device):
    take(path)
    x = torch.full((3, 8), torch.nan, device=device).requires_grad_()
    residual, gate = torch.randn(3, 8, device=device), torch.ones(1, device=device, requires_grad=True)
    out = gated_add(x, residual, gate, keep=torch.zeros(3, dtype=torch.bool, device=device))
    assert out.equal(residual)
    assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), [x, gate]))


def test_formula_and_what_is_kept(take):
    take("native")
    x, residual, gate = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6), torch.tensor([0.3])
    torch.testing.assert_close(gated_add(x, residual, gate), residual + gate.tanh() * x)
    assert saved_numbers(lambda: gated_add(x, residual, gate)) == (4 * 6 + 1) * 4


def test_registration_gradcheck_compile():
    x, gate, keep = torch.randn(3, 8), torch.randn(1), torch.tensor([True, False, True])
    torch.library.opcheck(torch.ops.mmlm_fast.gated_add_fwd.default, (x, x.clone(), gate, keep))
    torch.library.opcheck(torch.ops.mmlm_fast.gated_add_bwd.default, (x, x.clone(), gate, None))
    args = [t.double().requires_grad_() for t in (x, x.clone(), gate)]
    assert torch.autograd.gradcheck(lambda *a: gated_add(*a, keep=keep), args)
    compiled = torch.compile(gated_add, fullgraph=True, dynamic=True, backend="aot_eager")
    x.requires_grad_()
    residual = torch.randn(3, 8)
    out, expected = compiled(x, residual, gate), gated_add_ref(x, residual, gate)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(*(torch.autograd.grad(o.square().sum(), x)[0] for o in (out, expected)))


def test_errors():
    x = torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"residual must be \(2, 4\), got \(1, 4\)"):
        gated_add(x, x[:1], torch.zeros(1))
    with pytest.raises(ValueError, match=r"gate must be \[1\] or \[4\]"):
        gated_add(x, x, torch.zeros(3))
    with pytest.raises(ValueError, match=r"keep must be bool \(2,\)"):
        gated_add(x, x, torch.zeros(1), keep=torch.ones(2))
    with pytest.raises(ValueError, match="gate must be a tensor"):
        gated_add(x, x, 0.5)
