import math

import pytest
import torch
import torch.nn.functional as F

from mmlm_fast import testing
from mmlm_fast.ops import bias_act, glu
from mmlm_fast.ops.glu import ACTIVATIONS, bias_act_ref, glu_ref
from support.kernel_path import PATHS, PATHS_AND_DTYPES, saved_numbers

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(0, 4), (2, 3, 67), (2, 1030)]


@pytest.mark.parametrize(("path", "dtype"), PATHS_AND_DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_close_to_reference(activation, path, dtype, take, device):
    take(path)
    for shape in SHAPES:
        gate, up = (3 * torch.randn(shape, dtype=dtype, device=device) for _ in range(2))
        packed, bias = torch.cat([gate, up], -1), torch.randn(shape[-1], dtype=dtype, device=device)
        for fast, ref, args in (
            (lambda *a: glu(*a, activation=activation), lambda *a: glu_ref(*a, activation), (gate, up)),
            (lambda a: glu(a, activation=activation), lambda a: glu_ref(a, None, activation), (packed,)),
            (lambda *a: bias_act(*a, activation=activation), lambda *a: bias_act_ref(*a, activation), (gate, bias)),
        ):
            testing.assert_close_to_reference(fast(*args), ref, *args)
            testing.assert_gradients_close_to_reference(fast, ref, *args)


@pytest.mark.parametrize("path", PATHS)
def test_many_rows_of_a_bias(path, take, device):
    """More rows than one program or part sums."""
    take(path)
    x, bias = torch.randn(150, 64, device=device), torch.randn(64, device=device)
    testing.assert_gradients_close_to_reference(bias_act, bias_act_ref, x, bias)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_extreme_numbers(path, activation, take, device):
    take(path)
    x = torch.tensor([[-200.0, -90.0, -20.0, -1e-3, 0.0, 1e-3, 20.0, 90.0, 200.0, float("nan"), float("inf")]]).to(
        device
    )
    out, expected = bias_act(x, activation=activation), bias_act_ref(x.double(), None, activation).float()
    if activation == "gelu":  # not torch's: on a CPU with AVX-512, oneDNN's F.gelu(inf) is NaN
        expected = torch.tensor([[v * 0.5 * math.erfc(-v / math.sqrt(2)) for v in x[0].tolist()]]).to(device)
    # Two units in the last place, the floor of the accuracy rule (1 measured); where the result is 0 or nearly,
    # 1e-13 (7e-15 measured).
    torch.testing.assert_close(out, expected, equal_nan=True, atol=1e-13, rtol=2 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize(("path", "dtype"), PATHS_AND_DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_huge_numbers(path, dtype, activation, take, device):
    """Zero on the left, the number itself on the right; slopes of 0 and 1, up to the largest number there is."""
    take(path)
    sizes = [v for v in (2e3, 65504.0, 1e5, 1e10, 1e19, 1e20, 1e30, 3e38) if v <= torch.finfo(dtype).max]
    x = torch.tensor([[sign * v for v in sizes for sign in (-1, 1)] * 5], dtype=dtype, device=device).requires_grad_()
    up = torch.full_like(x, 3.0)
    for out, scale in ((bias_act(x, activation=activation), 1), (glu(x, up, activation=activation), 3)):
        (slope,) = torch.autograd.grad(out.sum(dtype=torch.float64), x)
        expected = scale * x.detach().float().clamp(min=0)
        assert torch.equal(out, expected.to(dtype)), (activation, out)
        assert torch.equal(slope, torch.where(x > 0, scale, 0).to(dtype)), (activation, slope)


def test_formulas():
    gate, up = torch.randn(3, 8), torch.randn(3, 8)
    torch.testing.assert_close(glu(gate, up), gate / (1 + (-gate).exp()) * up)
    torch.testing.assert_close(glu(gate, up, activation="gelu"), F.gelu(gate) * up)
    torch.testing.assert_close(glu(gate, up, activation="gelu_tanh"), F.gelu(gate, approximate="tanh") * up)
    torch.testing.assert_close(
        bias_act(gate, up[0], activation="quick_gelu"), (v := gate + up[0]) * (1.702 * v).sigmoid()
    )


@pytest.mark.parametrize("path", PATHS)
def test_strides(path, take, device):
    take(path)
    wide = torch.randn(4, 3, 40, device=device)
    for args in ((wide[:, ::2, 2:12], wide[:, 1:, 12:22]), (wide.transpose(0, 1)[..., 4:24],), (wide[..., ::2],)):
        testing.assert_close_to_reference(glu(*args), glu_ref, *args)
        testing.assert_gradients_close_to_reference(glu, glu_ref, *args)


def test_keeps_its_inputs_alone(take):
    """One activation less than eager, which keeps act(gate) too."""
    take("native")
    gate, up = torch.randn(64, 128, requires_grad=True), torch.randn(64, 128, requires_grad=True)
    assert saved_numbers(lambda: glu(gate, up)) == 2 * 64 * 128 * 4
    assert saved_numbers(lambda: glu_ref(gate, up)) == 3 * 64 * 128 * 4
    packed = torch.randn(64, 256, requires_grad=True)
    assert saved_numbers(lambda: glu(packed)) == 2 * 64 * 128 * 4


def test_registration():
    x, bias = torch.randn(3, 8), torch.randn(8)
    ops = torch.ops.mmlm_fast
    torch.library.opcheck(ops.glu_fwd.default, (x, x.clone(), None, "silu"))
    torch.library.opcheck(ops.glu_fwd.default, (x, None, bias, "gelu"))
    torch.library.opcheck(ops.glu_bwd.default, (x, x, x, None, "silu", True))
    torch.library.opcheck(ops.glu_bwd.default, (x, x, None, bias, "gelu", False))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation):
    gate, up = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda a, b: glu(a, b, activation=activation), (gate, up))


def test_compiles_in_one_graph_with_dynamic_shapes():
    compiled = torch.compile(lambda x: glu(x) * 2, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 5):
        x = torch.randn(rows, 8, requires_grad=True)
        out, expected = compiled(x), glu_ref(x) * 2
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(*(torch.autograd.grad(o.square().sum(), x)[0] for o in (out, expected)))


def test_errors():
    x = torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"activation must be one of silu, .*, got 'tanh'"):
        glu(x, x, activation="tanh")
    with pytest.raises(ValueError, match=r"up must be \(2, 4\)"):
        glu(x, x[:1])
    with pytest.raises(ValueError, match=r"must be \[..., 2H\], got shape \(2, 3\)"):
        glu(x[:, :3])
    with pytest.raises(ValueError, match=r"bias must have shape \(4,\)"):
        bias_act(x, torch.zeros(2))
    with pytest.raises(ValueError, match="gate must be a tensor"):
        glu(None)
