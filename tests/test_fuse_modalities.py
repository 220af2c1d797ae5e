import pytest
import torch

from mmlm_fast.ops import fuse_modalities
from mmlm_fast.ops.fuse_modalities import MODES, fuse_modalities_ref
from mmlm_fast.testing import assert_close_to_reference, assert_gradients_close_to_reference
from support.kernel_path import saved_numbers

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# batch shape, tokens of each modality (1 broadcasts), hidden size: empty, one element, a prime, over one block of
# hidden size, over one chunk and one block of rows, four and five modalities.
CASES = {
    "no_tokens": ((2,), [0, 0], 8),
    "no_batch": ((0,), [3, 3], 8),
    "one": ((), [1, 1], 1),
    "prime": ((3,), [7, 7], 13),
    "broadcast": ((2,), [5, 1], 24),
    "wide": ((2,), [2, 2], 1030),
    "rows": ((70,), [3, 3], 64),
}
MORE_CASES = {"one_modality": ((4,), [6], 32), "three": ((2,), [9, 1, 1], 40), "five": ((2,), [4, 4, 1, 4, 4], 12)}


@pytest.fixture(autouse=True)
def small_inputs_take_the_native_core(take):
    take("native")


def make_inputs(shape, mode, dtype, device="cpu", missing=False):
    batch, tokens, size = shape
    features = [torch.randn(*batch, t, size, dtype=dtype, device=device) for t in tokens]
    num = len(features)
    parameters = {"mean": None, "weighted": (num,), "attention": (size,), "gated": (size, num * size)}
    weight = bias = present = None
    if parameters[mode] is not None:
        weight = torch.randn(parameters[mode], dtype=dtype, device=device)
    if mode == "gated":
        weight = weight / max(1, num * size) ** 0.5
        bias = torch.randn(size, dtype=dtype, device=device)
    if missing:
        present = torch.rand(*batch, max(tokens) if max(tokens) > 1 else min(tokens), num, device=device) < 0.6
    return features, weight, bias, present


def all_cases():
    for mode in MODES:
        for name, case in (CASES | MORE_CASES).items():
            if mode != "gated" or len(case[1]) == 2:
                yield pytest.param(mode, case, id=f"{mode}-{name}")


@pytest.mark.parametrize("missing", [False, True], ids=["complete", "missing"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("mode", "case"), all_cases())
def test_portable(mode, case, dtype, missing):
    features, weight, bias, present = make_inputs(case, mode, dtype, missing=missing)

    def fast(features, weight, bias):
        return fuse_modalities(features, mode, weight=weight, bias=bias, present=present)

    def ref(features, weight, bias):
        return fuse_modalities_ref(features, mode, weight, bias, present)[0]

    assert_close_to_reference(fast(features, weight, bias), ref, features, weight, bias)
    assert_gradients_close_to_reference(fast, ref, features, weight, bias)


def kernel_cases():
    """Two of six by default, all for the case of primes: dtypes differ in loads and stores alone."""
    for case in all_cases():
        for dtype in DTYPES:
            for missing in (False, True):
                usual = (dtype, missing) in ((torch.float32, False), (torch.bfloat16, True)) or "prime" in case.id
                name = f"{case.id}-{dtype}-{'missing' if missing else 'complete'}"
                marks = () if usual else pytest.mark.slow
                if case.values[0] != "gated":
                    yield pytest.param(*case.values, dtype, missing, id=name, marks=marks)


@pytest.mark.parametrize(("mode", "case", "dtype", "missing"), list(kernel_cases()))
def test_kernel(mode, case, dtype, missing, device):
    from mmlm_kernels.fuse_modalities import fuse_modalities_bwd, fuse_modalities_fwd

    features, weight, _, present = make_inputs(case, mode, dtype, device, missing)
    out, weights = fuse_modalities_fwd(features, mode, weight, present)

    def ref(features, weight):
        return fuse_modalities_ref(features, mode, weight, None, present)

    assert_close_to_reference((out, weights.to(dtype)), ref, features, weight)

    class Fast(torch.autograd.Function):
        @staticmethod
        def forward(ctx, weight, *features):
            return out.clone()

        @staticmethod
        def backward(ctx, grad):
            dweight, *dfeatures = fuse_modalities_bwd(grad, features, weight, weights, present, mode)
            return dweight if weight is not None else None, *dfeatures

    assert_gradients_close_to_reference(
        lambda features, weight: Fast.apply(weight, *features), lambda *a: ref(*a)[0], features, weight
    )


@pytest.mark.parametrize("missing", [False, True], ids=["complete", "missing"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_gated_mix_kernel(case, dtype, missing, device):
    from mmlm_fast.ops.fuse_modalities import _effective_gate
    from mmlm_kernels.fuse_modalities import gated_mix_bwd, gated_mix_fwd

    batch, tokens, size = CASES[case]
    num_tokens = max(tokens) if min(tokens) else 0
    first, second, logits = (torch.randn(*batch, num_tokens, size, dtype=dtype, device=device) for _ in range(3))
    present = torch.rand(*batch, num_tokens, 2, device=device) < 0.6 if missing else None

    def ref(first, second, logits):
        gate = _effective_gate(logits, present)
        return gate * first + (1 - gate) * second, gate

    out, gate = gated_mix_fwd(first, second, logits, present)
    assert_close_to_reference((out, gate), ref, first, second, logits)

    class Fast(torch.autograd.Function):
        @staticmethod
        def forward(ctx, first, second, logits):
            return out.clone()

        @staticmethod
        def backward(ctx, grad):
            return gated_mix_bwd(grad, first, second, logits, present)

    assert_gradients_close_to_reference(Fast.apply, lambda *a: ref(*a)[0], first, second, logits)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kernel", [False, True], ids=["portable", "kernel"])
def test_a_missing_modality_may_hold_anything(mode, kernel, take):
    """NaN in what is missing reaches neither the output nor any gradient; nothing present gives zeros."""
    if kernel:
        take("kernel")
    features, weight, bias, _ = make_inputs(((4,), [3, 3], 8), mode, torch.float32)
    present = torch.tensor([[True, True], [True, False], [False, True], [False, False]])[:, None, :]
    clean = [torch.where(present[..., i, None], x, 0) for i, x in enumerate(features)]
    dirty = [torch.where(present[..., i, None], x, torch.nan).requires_grad_() for i, x in enumerate(features)]
    parameters = [t.requires_grad_() for t in (weight, bias) if t is not None]

    out = fuse_modalities(dirty, mode, weight=weight, bias=bias, present=present)
    torch.testing.assert_close(out, fuse_modalities(clean, mode, weight=weight, bias=bias, present=present))
    assert (out[3] == 0).all()
    torch.testing.assert_close(out[1], features[0][1])
    torch.testing.assert_close(out[2], features[1][2])

    *dparameters, da, db = torch.autograd.grad(out.square().sum(), [*parameters, *dirty])
    assert all(g.isfinite().all() for g in (*dparameters, da, db))
    assert (da[2:] == 0).all()
    assert (db[[1, 3]] == 0).all()


@pytest.mark.parametrize("mode", MODES)
def test_keeps_features_and_weights(mode):
    """No stack of the modalities; the gate is computed again from its logits."""
    features, weight, bias, _ = make_inputs(((2,), [32, 32], 64), mode, torch.float32)
    features[0].requires_grad_()
    kept = saved_numbers(lambda: fuse_modalities(features, mode, weight=weight, bias=bias))
    rows = 2 * 32
    floats = 2 * rows * 64 + (rows * 64 + weight.numel() if mode == "gated" else rows * 2)
    floats += weight.numel() if mode in ("weighted", "attention") else 0
    assert kept == 4 * floats


def test_formulas():
    """Against the formulas of the table, written out."""
    a, b = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    torch.testing.assert_close(fuse_modalities([a, b], "mean"), (a + b) / 2)
    w = torch.tensor([0.3, -1.0])
    share = w.exp() / w.exp().sum()
    torch.testing.assert_close(fuse_modalities([a, b], "weighted", weight=w), share[0] * a + share[1] * b)
    q = torch.randn(4)
    scores = torch.stack([a @ q, b @ q]) / 2
    share = scores.softmax(0)[..., None]
    out, weights = fuse_modalities([a, b], "attention", weight=q, return_weights=True)
    torch.testing.assert_close(out, share[0] * a + share[1] * b)
    torch.testing.assert_close(weights, scores.softmax(0).permute(1, 2, 0))
    W, c = torch.randn(4, 8), torch.randn(4)
    g = torch.sigmoid(torch.cat([a, b], -1) @ W.T + c)
    out, gate = fuse_modalities([a, b], "gated", weight=W, bias=c, return_weights=True)
    torch.testing.assert_close(out, g * a + (1 - g) * b)
    torch.testing.assert_close(gate, g)
    assert not gate.requires_grad


def test_extreme_scores_do_not_overflow():
    a, b = torch.full((1, 1, 2), 300.0), torch.full((1, 1, 2), -300.0)
    out = fuse_modalities([a, b], "attention", weight=torch.full((2,), 100.0))
    assert torch.equal(out, a)


def test_strided_features(device):
    wide = torch.randn(2, 12, 10, device=device)
    features = [wide[:, ::3, 1:9], wide.transpose(1, 2)[:, :4, :8]]
    assert_close_to_reference(fuse_modalities(features, "mean"), lambda f: fuse_modalities_ref(f, "mean")[0], features)


@pytest.mark.parametrize("mode", MODES)
def test_registration(mode):
    features, weight, _, present = make_inputs(((2,), [3, 1], 8), mode, torch.float32, missing=True)
    ops = torch.ops.mmlm_fast
    if mode == "gated":
        a, b, logits = (torch.randn(2, 3, 8) for _ in range(3))
        torch.library.opcheck(ops.gated_mix_fwd.default, (a, b, logits, present))
        torch.library.opcheck(ops.gated_mix_bwd.default, (a, a, b, logits, present))
        return
    torch.library.opcheck(ops.fuse_modalities_fwd.default, (features, mode, weight, present))
    out, weights = ops.fuse_modalities_fwd(features, mode, weight, present)
    torch.library.opcheck(
        ops.fuse_modalities_bwd.default, (torch.ones_like(out), features, weight, weights, present, mode)
    )


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(mode):
    features, weight, bias, present = make_inputs(((2,), [3, 1], 4), mode, torch.float64, missing=True)
    tensors = [t.requires_grad_() for t in (*features, *(t for t in (weight, bias) if t is not None))]

    def function(a, b, weight=None, bias=None):
        return fuse_modalities([a, b], mode, weight=weight, bias=bias, present=present)

    assert torch.autograd.gradcheck(function, tensors)


@pytest.mark.parametrize("mode", MODES)
def test_compiles_in_one_graph_with_dynamic_shapes(mode):
    compiled = torch.compile(
        lambda f, w, b: fuse_modalities(f, mode, weight=w, bias=b), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for tokens in (5, 9):
        features, weight, bias, _ = make_inputs(((2,), [tokens, tokens], 8), mode, torch.float32)
        features[0].requires_grad_()
        out, expected = compiled(features, weight, bias), fuse_modalities_ref(features, mode, weight, bias)[0]
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(
            torch.autograd.grad(out.square().sum(), features[:1]),
            torch.autograd.grad(expected.square().sum(), features[:1]),
        )


@pytest.mark.parametrize(
    ("features", "mode", "kwargs", "message"),
    [
        ([(2, 3, 4)] * 2, "sum", {}, "mode must be one of mean, weighted, gated, attention, got 'sum'"),
        ([(2, 3, 4), (2, 3, 5)], "mean", {}, r"share their last size, got \[4, 5\]"),
        ([(2, 3, 4)] * 3, "gated", dict(weight=(4, 12)), "gated takes 2 features, got 3"),
        ([(2, 3, 4)] * 2, "weighted", {}, r"needs weight of shape \(2,\), got None"),
        ([(2, 3, 4)] * 2, "weighted", dict(weight=(3,)), r"weight must have shape \(2,\), got \(3,\)"),
        ([(2, 3, 4)] * 2, "attention", dict(weight=(2,)), r"weight must have shape \(4,\)"),
        ([(2, 3, 4)] * 2, "gated", dict(weight=(4, 4)), r"weight must have shape \(4, 8\)"),
        ([(2, 3, 4)] * 2, "mean", dict(weight=(2,)), "mean takes no weight"),
        ([(2, 3, 4)] * 2, "mean", dict(bias=(4,)), "mean takes no bias"),
        ([(2, 3, 4), (2, 2, 4)], "mean", {}, "same number of tokens or 1"),
        ([(2, 3, 0)] * 2, "mean", {}, r"last size of at least 1, got shape \(2, 3, 0\)"),
        ([(4,), (4,)], "mean", {}, r"\[\*batch, tokens, size\]"),
    ],
)
def test_errors(features, mode, kwargs, message):
    with pytest.raises(ValueError, match=message):
        fuse_modalities([torch.zeros(s) for s in features], mode, **{k: torch.zeros(s) for k, s in kwargs.items()})


def test_errors_of_present():
    features = [torch.zeros(2, 3, 4)] * 2
    with pytest.raises(ValueError, match="present must be a bool tensor"):
        fuse_modalities(features, "mean", present=torch.ones(2, 1, 2))
    with pytest.raises(ValueError, match=r"present must broadcast to \(2, 3, 2\), got \(2, 3, 3\)"):
        fuse_modalities(features, "mean", present=torch.ones(2, 3, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="present must be on cpu, got meta"):
        fuse_modalities(features, "mean", present=torch.ones(2, 3, 2, dtype=torch.bool, device="meta"))
    with pytest.raises(ValueError, match="must share dtype and device"):
        fuse_modalities([features[0], torch.zeros(2, 3, 4, device="meta")], "mean")
    with pytest.raises(ValueError, match="tensors expected, got float"):
        fuse_modalities([features[0], 1.0], "mean")
    with pytest.raises(ValueError, match="at least one tensor, got none"):
        fuse_modalities([], "mean")
    with pytest.raises(ValueError, match="got one tensor"):
        fuse_modalities(torch.zeros(2, 3, 4), "mean")
