from importlib import import_module

import pytest
import torch
from torch import nn

from mmlm_fast import reference
from mmlm_fast.ops import concat_linear
from mmlm_fast.ops.concat_linear import ACTIVATIONS, concat_linear_ref
from mmlm_fast.testing import assert_close_to_reference, assert_gradients_close_to_reference
from support.kernel_path import saved_numbers

module = import_module("mmlm_fast.ops.concat_linear")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# batch shape, tokens, sizes (a "p" size is a pooled input with one token), outputs:
# Sizes are large enough for error norms to be averages, not luck.
# empty, one element, one input, over one block in every direction, primes, several pooled, more than four inputs.
CASES = {
    "no_tokens": ((2,), 0, [4, 3], 5),
    "no_batch": ((0,), 3, [4, 3], 5),
    "one": ((), 1, [1], 1),
    "one_input": ((2,), 5, [16], 8),
    "pooled": ((3,), 7, [16, "p8"], 24),
    "blocks": ((2,), 40, [33, 65], 70),
    "primes": ((3, 2), 13, [17, "p19", 11, "p13"], 131),
    "five": ((2,), 3, [4, 4, 4, 4, 4], 6),
    "all_pooled": ((2,), 1, ["p4", "p5"], 6),
}


def make_inputs(case, dtype, device="cpu"):
    batch, tokens, sizes, num_out = CASES[case]
    inputs = []
    for size in sizes:
        pooled = isinstance(size, str)
        size = int(size[1:]) if pooled else size
        inputs.append(torch.randn(*batch, 1 if pooled else tokens, size, dtype=dtype, device=device))
    total = sum(x.shape[-1] for x in inputs)
    weight = torch.randn(num_out, total, dtype=dtype, device=device) * total**-0.5
    return inputs, weight, torch.randn(num_out, dtype=dtype, device=device)


def whole(inputs, weight, bias):
    """Numbers whose sums are exact in every dtype and never 0: else rounding decides on which side of relu's kink a sum
    lies, and how many of them lie on another side than the reference's is luck."""
    signs = [x.sign() * (x.abs() > 0.7) for x in inputs]
    return signs, weight.sign(), bias.sign() * 0.5


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_portable(case, dtype, activation):
    inputs, weight, bias = make_inputs(case, dtype)
    if activation == "relu":
        inputs, weight, bias = whole(inputs, weight, bias)

    def ref(*args):
        return concat_linear_ref(*args, activation=activation)

    def fast(*args):
        return concat_linear(*args, activation=activation)

    assert_close_to_reference(fast(inputs, weight, bias), ref, inputs, weight, bias)
    assert_gradients_close_to_reference(fast, ref, inputs, weight, bias)


@pytest.mark.parametrize(
    ("case", "activation"), [*((case, "none") for case in CASES), *(("pooled", a) for a in ACTIVATIONS)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
def test_kernel(case, dtype, activation, with_bias, device):
    """What the kernel keeps is what the gradients are made of."""
    from mmlm_kernels.concat_linear import concat_linear_fwd

    inputs, weight, bias = make_inputs(case, dtype, device)
    bias = bias if with_bias else None
    out, z = concat_linear_fwd(inputs, weight, bias, activation, True)
    assert_close_to_reference(out, lambda *a: concat_linear_ref(*a, activation=activation), inputs, weight, bias)

    class Fast(torch.autograd.Function):
        @staticmethod
        def forward(ctx, weight, bias, *inputs):
            ctx.save_for_backward(weight, *inputs)
            return out.clone()

        @staticmethod
        def backward(ctx, grad):
            weight, *inputs = ctx.saved_tensors
            needed = list(ctx.needs_input_grad)
            grads = module._portable_bwd(grad, inputs, weight, z, activation, needed)
            return tuple(g if needs else None for g, needs in zip(grads, needed, strict=True))

    def fast(inputs, weight, bias):
        return Fast.apply(weight, bias, *inputs)

    def ref(*args):
        return concat_linear_ref(*args, activation=activation)

    assert_gradients_close_to_reference(fast, ref, inputs, weight, bias)


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_kernel_with_huge_activations(activation, device):
    """Zero on the left, the number itself on the right, up to the largest number there is."""
    from mmlm_kernels.concat_linear import concat_linear_fwd

    z = torch.tensor([[v] for size in (2e3, 1e10, 1e15, 1e20, 3e38) for v in (-size, size)], device=device)
    out, _ = concat_linear_fwd([z], torch.ones(1, 1, device=device), None, activation, True)
    assert torch.equal(out, z.clamp(min=0))


@pytest.mark.parametrize(
    ("sizes", "num_out", "expected"),
    [
        ([(512, 1024), (1, 768)], 1024, True),  # the few rows of a pooled input, and no pass over the output
        ([(512, 3584), (1, 1152)], 32768, False),  # cuBLAS gains more
        ([(512, 1024), (512, 768)], 1024, False),  # a concatenation costs less than cuBLAS gains
        ([(512, 1024)], 1024, False),  # a linear layer
    ],
)
def test_which_product_is_the_kernels(sizes, num_out, expected):
    inputs = [torch.empty(2, *size, device="meta") for size in sizes]
    weight = torch.empty(num_out, sum(size for _, size in sizes), device="meta")
    assert module._kernel_takes(inputs, weight, None, "none", False) is expected


def test_strided_inputs(device):
    wide = torch.randn(2, 10, 12, device=device)
    inputs = [wide[:, ::2, ::3], wide.transpose(1, 2)[:, :5, :]]
    weight = torch.randn(14, 6, device=device).T
    assert_close_to_reference(concat_linear(inputs, weight), concat_linear_ref, inputs, weight)
    from mmlm_kernels.concat_linear import concat_linear_fwd

    assert_close_to_reference(
        concat_linear_fwd(inputs, weight, None, "none", False)[0], concat_linear_ref, inputs, weight
    )


def test_same_as_linear_of_the_concatenation():
    """Against torch itself, not our reference: a layer's state dict fits."""
    layer = nn.Linear(7, 4)
    a, b = torch.randn(2, 5, 4), torch.randn(2, 1, 3)
    expected = layer(torch.cat([a, b.expand(2, 5, 3)], -1))
    torch.testing.assert_close(concat_linear([a, b], layer.weight, layer.bias), expected)


def test_only_wanted_gradients():
    inputs, weight, bias = make_inputs("pooled", torch.float32)
    inputs[1].requires_grad_()
    out = concat_linear(inputs, weight, bias, activation="gelu")
    (grad,) = torch.autograd.grad(out.sum(), [inputs[1]])
    expected = torch.autograd.grad(concat_linear_ref(inputs, weight, bias, "gelu").sum(), [inputs[1]])[0]
    torch.testing.assert_close(grad, expected)


def test_saves_one_activation_at_most():
    """Backward keeps the preactivation where there is an activation, and never a concatenation."""
    inputs, weight, bias = make_inputs("blocks", torch.float32)
    weight.requires_grad_()
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
        out = concat_linear(inputs, weight, bias, activation="gelu")
    extra = sum(sizes) - sum(x.numel() for x in inputs) - weight.numel()
    assert extra == out.numel()


def test_registration():
    for case in ("pooled", "no_batch"):
        inputs, weight, bias = make_inputs(case, torch.float32)
        torch.library.opcheck(torch.ops.mmlm_fast.concat_linear_fwd.default, (inputs, weight, bias, "gelu", True))
        out, z = torch.ops.mmlm_fast.concat_linear_fwd(inputs, weight, bias, "gelu", True)
        needed = [True, False, *(True for _ in inputs)]
        torch.library.opcheck(
            torch.ops.mmlm_fast.concat_linear_bwd.default, (torch.ones_like(out), inputs, weight, z, "gelu", needed)
        )


def test_gradcheck():
    inputs, weight, bias = make_inputs("pooled", torch.float64)
    tensors = [t.requires_grad_() for t in (*inputs, weight, bias)]
    assert torch.autograd.gradcheck(lambda a, b, w, c: concat_linear([a, b], w, c, activation="silu"), tensors)


def test_compiles_in_one_graph_with_dynamic_shapes():
    compiled = torch.compile(lambda xs, w, b: concat_linear(xs, w, b, activation="gelu"), fullgraph=True, dynamic=True,
                             backend="aot_eager")  # fmt: skip
    for tokens in (5, 9):
        inputs = [torch.randn(2, tokens, 6, requires_grad=True), torch.randn(2, 1, 4, requires_grad=True)]
        weight, bias = torch.randn(3, 10, requires_grad=True), torch.randn(3)
        out = compiled(inputs, weight, bias)
        expected = concat_linear_ref(inputs, weight, bias, "gelu")
        torch.testing.assert_close(out, expected)
        leaves = [*inputs, weight]
        torch.testing.assert_close(
            torch.autograd.grad(out.square().sum(), leaves), torch.autograd.grad(expected.square().sum(), leaves)
        )


def test_checkpointing_and_autocast():
    inputs, weight, bias = make_inputs("pooled", torch.float32)
    weight.requires_grad_()
    out = torch.utils.checkpoint.checkpoint(concat_linear, inputs, weight, bias, use_reentrant=False)
    out.sum().backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = concat_linear(inputs, weight, bias)
        expected = concat_linear_ref(inputs, weight, bias)
    assert low.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(low, expected, rtol=2e-2, atol=2e-2)


def test_reference_switch_is_per_thread():
    inputs, weight, bias = make_inputs("pooled", torch.float32)
    with reference():
        assert torch.equal(concat_linear(inputs, weight, bias), concat_linear_ref(inputs, weight, bias))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(activation="swish"), "activation must be one of none, relu"),
        (dict(inputs=torch.zeros(2, 3)), "sequence of tensors, got one tensor"),
        (dict(inputs=[]), "at least one tensor"),
        (dict(inputs=[torch.zeros(3)]), r"\[\*batch, tokens, size\], got shape \(3,\)"),
        (dict(inputs=[torch.zeros(2, 3, 4), torch.zeros(2, 2, 4)]), "same number of tokens or 1"),
        (dict(inputs=[torch.zeros(2, 3, 4), torch.zeros(3, 3, 4)]), "share their batch shape"),
        (dict(inputs=[torch.zeros(2, 3, 4), torch.zeros(2, 3, 4).half()]), "share dtype and device"),
        (dict(inputs=[torch.zeros(2, 3, 8, dtype=torch.int64)]), "got torch.int64"),
        (dict(weight=torch.zeros(5, 9)), r"weight must have shape \(5, 8\), got \(5, 9\)"),
        (dict(weight=torch.zeros(8)), "weight must be"),
        (dict(weight=torch.zeros(5, 8).half()), "weight must be torch.float32"),
        (
            dict(weight=torch.zeros(5, 8, device="meta")),
            "weight must be torch.float32 on cpu, got torch.float32 on meta",
        ),
        (dict(inputs=[[0.0, 1.0]]), "tensors expected, got list"),
        (dict(weight=None), "weight must be"),
        (dict(bias=torch.zeros(4)), r"bias must have shape \(5,\), got \(4,\)"),
    ],
)
def test_errors(change, message):
    good = dict(inputs=[torch.zeros(2, 3, 4), torch.zeros(2, 1, 4)], weight=torch.zeros(5, 8), bias=torch.zeros(5))
    with pytest.raises(ValueError, match=message):
        concat_linear(**(good | change))


@pytest.mark.parametrize("activation", ["none", "silu"])
def test_keeps_its_inputs_not_their_concatenation(activation):
    inputs = [torch.randn(2, 64, 24, requires_grad=True), torch.randn(2, 1, 40, requires_grad=True)]
    weight = torch.randn(16, 64, requires_grad=True)
    kept = saved_numbers(lambda: concat_linear(inputs, weight, activation=activation))
    preactivation = 0 if activation == "none" else 2 * 64 * 16
    assert kept == 4 * (2 * 64 * 24 + 2 * 40 + 16 * 64 + preactivation)
    eager = saved_numbers(lambda: concat_linear_ref(inputs, weight, None, activation))
    assert eager == kept + 4 * (2 * 64 * 40 - 2 * 40)
