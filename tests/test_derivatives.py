"""Derivatives of every public op beyond a first backward pass: second ones, forward mode, and torch.func's transforms.

Expected is what the op's plain PyTorch reference gives. Each case runs where inputs are small, which ops leave to their
reference anyway, and on the CPU's kernels.
"""

import importlib
import inspect
import pkgutil

import pytest
import torch
from torch.autograd import forward_ad

import mmlm_fast
from mmlm_benchmarks.ops import OPS, examples
from mmlm_fast import audio, ops
from mmlm_fast.masks import IntervalMask
from mmlm_fast.ops.qk_norm_rope import rope_tables

attention = importlib.import_module("mmlm_fast.ops.interval_attention")

IDS = torch.tensor([[7, 50, 50, 3], [50, 9, 3, 51]])
TABLES = rope_tables(torch.arange(6)[None], torch.tensor([1.0, 0.3, 0.1]))
TARGET = torch.tensor([3, -100, 0, 6, 2])
PRESENT = torch.tensor([[True, True, True], [False, True, True], [False, False, True], [False, False, False]])
PIXELS = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
NORMAL = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}


def features(a, b):
    return {50: a, 51: b}


# name: (autograd functions it is to reach, function of tensors, their shapes)
CASES = {
    "add_norm rms": ("_AddNorm", lambda x, r, w: ops.add_norm(x, r, w, offset=1.0), ((2, 5, 8), (2, 5, 8), (8,))),
    "add_norm layer": (
        "_AddNorm",
        lambda x, r, w, b: ops.add_norm(x, r, w, b, kind="layer"),
        ((5, 8), (5, 8), (8,), (8,)),
    ),
    "add_norm alone": ("_AddNorm", lambda x: ops.add_norm(x, None)[0], ((5, 8),)),
    "bias_act": ("_Glu", lambda x, b: ops.bias_act(x, b, activation="gelu_tanh"), ((5, 8), (8,))),
    "clip_loss": ("_FormedGradients", ops.clip_loss, ((5, 8), (5, 8), ())),
    "concat_linear": (
        "_ConcatLinear",
        lambda x, y, w, b: ops.concat_linear([x, y], w, b, activation="silu"),
        ((2, 4, 3), (2, 1, 5), (6, 8), (6,)),
    ),
    "concat_linear plain": ("_ConcatLinear", lambda x, w: ops.concat_linear([x], w), ((4, 3), (6, 3))),
    "fuse_modalities attention": (
        "_FuseModalities",
        lambda a, b, c, w: ops.fuse_modalities([a, b, c], "attention", weight=w, present=PRESENT),
        ((4, 8), (4, 8), (1, 8), (8,)),
    ),
    "fuse_modalities weighted": (
        "_FuseModalities",
        lambda a, b, w: ops.fuse_modalities([a, b], "weighted", weight=w),
        ((4, 8), (4, 8), (2,)),
    ),
    "fuse_modalities mean": ("_FuseModalities", lambda a: ops.fuse_modalities([a, a], "mean"), ((4, 8),)),
    "fuse_modalities gated": (
        "_GatedMix",
        lambda a, b, w, c: ops.fuse_modalities([a, b], "gated", weight=w, bias=c, present=PRESENT[:, :2]),
        ((4, 8), (4, 8), (8, 16), (8,)),
    ),
    "gated_add": (
        "_GatedAdd",
        lambda x, r, g: ops.gated_add(x, r, g, keep=PRESENT[:, 0]),
        ((4, 8), (4, 8), (1,)),
    ),
    "glu": ("_Glu", lambda g, u: ops.glu(g, u), ((5, 8), (5, 8))),
    "glu packed": ("_Glu", lambda g: ops.glu(g, activation="gelu"), ((5, 16),)),
    "interval_attention": (
        "_IntervalAttention",
        lambda q, k, v: ops.interval_attention(q, k, v, IntervalMask.sliding_window(6, window=3), return_lse=True),
        ((2, 4, 6, 8), (2, 2, 6, 8), (2, 2, 6, 4)),
    ),
    "interval_attention sinks": (
        "_IntervalAttention",
        lambda q, k, v, s: ops.interval_attention(q, k, v, softcap=2.0, sinks=s),
        ((1, 2, 6, 8), (1, 2, 6, 8), (1, 2, 6, 8), (2,)),
    ),
    "interval_attention_varlen": (
        "_IntervalAttention",
        lambda q, k, v: ops.interval_attention_varlen(q, k, v, torch.tensor([0, 2, 6], dtype=torch.int32)),
        ((6, 2, 8), (6, 2, 8), (6, 2, 8)),
    ),
    "linear_cross_entropy": (
        "_FormedGradients",
        lambda x, w, b: ops.linear_cross_entropy(x, w, TARGET, b, label_smoothing=0.1, z_loss=0.1, softcap=5.0),
        ((5, 8), (7, 8), (7,)),
    ),
    "linear_cross_entropy rows": (
        "_Rows",
        lambda x, w: ops.linear_cross_entropy(x, w, TARGET, reduction="none", softcap=5.0, logit_scale=0.5),
        ((5, 8), (7, 8)),
    ),
    "merge_embeddings": (
        "_MergeEmbeddings",
        lambda t, a, b: ops.merge_embeddings(IDS, t, features(a, b), scale=2.0, padding_idx=9),
        ((10, 8), (3, 8), (1, 8)),
    ),
    "norm_pixel_shuffle": (
        "_NormPixelShuffle",
        lambda x, w, b: ops.norm_pixel_shuffle(x, 2, weight=w, bias=b, norm="layer", channels_first=True),
        ((2, 4, 2, 8), (8,), (8,)),
    ),
    "norm_pixel_shuffle plain": ("_NormPixelShuffle", lambda x: ops.norm_pixel_shuffle(x, 2), ((2, 4, 2, 8),)),
    "patch_embed": (
        None,
        lambda w, b: ops.patch_embed(PIXELS, w, b, **NORMAL),
        ((5, 3, 2, 4, 4), (5,)),
    ),
    "patch_merge": (
        "_NormPixelShuffle",
        lambda x, w: ops.patch_merge(x, 2, [(4, 2), (2, 2)], weight=w, norm="rms", norm_at="after"),
        ((12, 4), (16,)),
    ),
    "qk_norm_rope": (
        "_QkNormRope",
        lambda q, k, u, w: ops.qk_norm_rope(q, k, *TABLES, query_weight=u, key_weight=w),
        ((2, 4, 6, 8), (2, 2, 6, 8), (8,), (8,)),
    ),
    "qk_norm_rope plain": (
        "_QkNormRope",
        lambda q: ops.qk_norm_rope(q, None, *TABLES, interleaved=True)[0],
        ((2, 4, 6, 8),),
    ),
    "rope_tables": (None, lambda f: ops.rope_tables(torch.arange(6)[None], f), ((4,),)),
    "scatter_features": (
        "_MergeEmbeddings",
        lambda x, a, b: ops.scatter_features(x, IDS, features(a, b)),
        ((2, 4, 8), (3, 8), (1, 8)),
    ),
    "scatter_features add": (
        "_MergeEmbeddings",
        lambda x, a, b: ops.scatter_features(x, IDS, features(a, b), add=True),
        ((2, 4, 8), (3, 8), (1, 8)),
    ),
    "siglip_loss": ("_FormedGradients", ops.siglip_loss, ((5, 8), (5, 8), (), ())),
    "log_mel": ("_SpectralFeatures", audio.log_mel, ((2, 800),)),
    "mfcc": ("_SpectralFeatures", lambda w: audio.mfcc(w, orig_freq=24_000, dither=0.0), ((1, 2400),)),
    "resample": ("_Resample", lambda w: audio.resample(w, 16_000, 8_000), ((2, 200),)),
    "standardize": (None, audio.standardize, ((2, 5, 4),)),
}


def of_cases(op, example):
    """An op for which nothing is written above: what is timed of it."""
    module = vars(importlib.import_module(f"mmlm_fast.ops.{op}"))
    functions = [n for n, x in module.items() if inspect.isclass(x) and issubclass(x, torch.autograd.Function)]
    call, floats = example.of_floats(torch.float32)
    return functions[0] if functions else None, call, tuple(tuple(x.shape) for x in floats)


NAMED = {name.split()[0] for name in CASES}
CASES |= {e.name: of_cases(op, e) for op in OPS if op not in NAMED for e in examples(op)}
NOT_DIFFERENTIABLE = {"patchify"}  # integers alone
FORMED = {name for name, (function, *_) in CASES.items() if function == "_FormedGradients"}
# Not of a public op of one process: below, in test_distributed.py, test_lazy_logits.py, and test_hf_contrastive.py.
ELSEWHERE = {"_Refusal", "_Gathered", "_ScatteredSum", "_LinearLayer", "_CrossEntropy", "_Similarity"}


def functions_of_the_package():
    found = set()
    for module in pkgutil.walk_packages(mmlm_fast.__path__, "mmlm_fast."):
        if module.name.startswith(("mmlm_fast.ops", "mmlm_fast.audio", "mmlm_fast.nn", "mmlm_fast.distributed")):
            for thing in vars(importlib.import_module(module.name)).values():
                is_function = inspect.isclass(thing) and issubclass(thing, torch.autograd.Function)
                if is_function and thing.__module__ == module.name and "forward" in vars(thing):
                    found.add(thing.__name__)
    return found


def test_every_op_and_autograd_function_is_swept():
    assert {name.split()[0] for name in CASES} >= set(ops.__all__) - NOT_DIFFERENTIABLE, "the name of a case begins so"
    assert functions_of_the_package() == {function for function, *_ in CASES.values() if function} | ELSEWHERE


@pytest.fixture(params=["small", "large"])
def size(request, take):
    """Small inputs, and these for large ones."""
    if request.param == "large":
        take("native")
    return request.param


def draw(shapes, dtype=torch.float32):
    return [torch.randn(shape).mul(0.7).to(dtype).requires_grad_() for shape in shapes]


def same(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def loss_of(function):
    """A scalar that bends in each output."""

    def loss(*inputs):
        out = function(*inputs)
        total = 0
        for x in out if isinstance(out, tuple) else (out,):
            x = x.float() if x.dtype != torch.float64 else x
            total = total + (x.sin() * torch.linspace(0.5, 1.5, x.numel(), dtype=x.dtype).view(x.shape)).sum()
        return total

    return loss


def nodes(tensor):
    seen, todo = set(), [tensor.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [following for following, _ in node.next_functions]
    return {node.name() for node in seen}


def first_and_second(loss, inputs):
    """Gradients with a graph, and the product of a vector with the matrix of second derivatives."""
    value = loss(*inputs)
    first = torch.autograd.grad(value, inputs, create_graph=True)
    torch.manual_seed(1)
    along = sum((g.float() * torch.randn(g.shape)).sum() for g in first)
    second = torch.autograd.grad(along, inputs, allow_unused=True, materialize_grads=True)
    return nodes(value), [g.detach() for g in first], second


def close(got, expected, dtype=torch.float32):
    tolerance = 3e-2 if dtype == torch.bfloat16 else 2e-5
    for g, e in zip(got, expected, strict=True):
        assert g.shape == e.shape
        assert (g.float() - e.float()).norm() <= tolerance * (1e-3 + e.float().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_second_derivatives(name, size, dtype):
    wanted, function, shapes = CASES[name]
    if name in ("log_mel", "mfcc", "resample", "standardize") and dtype != torch.float32:
        pytest.skip("a waveform is float32 or float64, and computed the same")
    inputs, loss = draw(shapes, dtype), loss_of(function)
    with mmlm_fast.reference():
        _, first, second = first_and_second(loss, inputs)
    if size == "large" and name in FORMED and dtype != torch.float64:
        close([g.detach() for g in torch.autograd.grad(loss(*inputs), inputs, create_graph=True)], first, dtype)
        for f in (loss, function):
            for gradient in torch.autograd.grad(f(*inputs), inputs, create_graph=True):
                # Also where other terms are there, and where zeros would be let pass.
                with pytest.raises(RuntimeError, match=r"second derivatives of .*: call it in mmlm_fast.reference\(\)"):
                    torch.autograd.grad(gradient.sum() + inputs[0].sum(), inputs, allow_unused=True, retain_graph=True)
        return
    reached, *got = first_and_second(loss, inputs)
    if size == "large" and dtype != torch.float64 and wanted:
        assert f"{wanted}Backward" in reached
    close(got[0], first, dtype)
    close(got[1], second, dtype)


@pytest.mark.parametrize("name", CASES)
def test_forward_mode(name, size):
    _, function, shapes = CASES[name]
    inputs, loss = [x.detach() for x in draw(shapes)], loss_of(function)
    leaves = [x.clone().requires_grad_() for x in inputs]
    with mmlm_fast.reference():
        gradients = torch.autograd.grad(loss(*leaves), leaves)
    tangents = [torch.rand_like(g) * g.sign() for g in gradients]  # terms of one sign: their sum errs no more than they
    if name == "merge_embeddings":
        tangents[0][9] = 0  # what is padding has no gradient, though the output depends on it
    expected = sum((g * t).sum() for g, t in zip(gradients, tangents, strict=True))
    with forward_ad.dual_level():
        out = loss(*map(forward_ad.make_dual, inputs, tangents))
        close([forward_ad.unpack_dual(out).tangent], [expected])
    close([torch.func.jvp(loss, tuple(inputs), tuple(tangents))[1]], [expected])


@pytest.mark.parametrize("name", CASES)
def test_func_transforms(name, size):
    """Gradients of each sample of a batch, and a Jacobian row by row."""
    _, function, shapes = CASES[name]
    inputs, loss = [x.detach() for x in draw(shapes)], loss_of(function)
    batches = [torch.stack([x, 0.5 * x, x.flip(0) if x.dim() else -x]) for x in inputs]
    argnums = tuple(range(len(inputs)))
    got = torch.vmap(torch.func.grad(loss, argnums))(*batches)
    for i in range(3):
        leaves = [x[i].clone().requires_grad_() for x in batches]
        with mmlm_fast.reference():
            close([g[i] for g in got], torch.autograd.grad(loss(*leaves), leaves))
    if sum(x.numel() for x in inputs) < 300:
        along = tuple(torch.randn_like(x) for x in inputs)
        forward_over_reverse = torch.func.jvp(torch.func.grad(loss, argnums), tuple(inputs), along)[1]
        (rows,) = torch.func.jacrev(torch.func.grad(loss, (0,)))(*inputs)
        with mmlm_fast.reference():
            products = torch.autograd.functional.hvp(loss, tuple(inputs), along)[1]
            close(forward_over_reverse, products)
            alone = torch.autograd.functional.hvp(lambda x: loss(x, *inputs[1:]), inputs[0], along[0])[1]
            close([torch.tensordot(rows, along[0], along[0].dim())], [alone])


@pytest.mark.parametrize("name", CASES)
def test_batched_gradients(name, size):
    """Rows of a Jacobian at once, as `torch.autograd.functional` and `gradcheck` take them."""
    _, function, shapes = CASES[name]
    inputs = draw(shapes)
    out = function(*inputs)
    out = torch.cat([x.flatten() for x in (out if isinstance(out, tuple) else (out,))])
    along = torch.randn(3, *out.shape)
    expected = [torch.autograd.grad(out, inputs, row, retain_graph=True) for row in along]
    got = torch.autograd.grad(out, inputs, along, is_grads_batched=True)
    for i in range(3):
        close([g[i] for g in got], expected[i])


@pytest.mark.parametrize("at", [0, 2])
def test_each_sample_has_its_own_targets_and_placeholders(size, at):
    """torch.vmap over integers too; a sample that is wrong is found."""
    x, w, y = torch.randn(3, 5, 8), torch.randn(7, 8), torch.tensor([[1, 2, 3, 4, 5], [0, 0, 6, 1, -100], [6] * 5])
    loss = torch.func.grad(ops.linear_cross_entropy)
    each = [torch.func.grad(ops.linear_cross_entropy)(a, w, b) for a, b in zip(x, y, strict=True)]
    close(torch.vmap(loss, (0, None, 0))(x, w, y), each)
    y[at, 1] = 7
    with pytest.raises(ValueError, match=r"target must be in \[0, 7\) or -100, got 7 \(1 out of range\)"):
        torch.vmap(loss, (0, None, 0))(x, w, y)

    def merged(table, ids, a, b):
        return loss_of(ops.merge_embeddings)(ids, table, features(a, b))

    ids = torch.stack([IDS, IDS.flip(0), IDS.flip(1)])
    table, a, b = torch.randn(10, 8), torch.randn(3, 3, 8), torch.randn(3, 1, 8)
    each = [torch.func.grad(merged)(table, *row) for row in zip(ids, a, b, strict=True)]
    close(torch.vmap(torch.func.grad(merged), (None, 0, 0, 0))(table, ids, a, b), each)
    ids[at, 0, 0] = 50
    with pytest.raises(ValueError, match="features of token 50: 3 rows for 4 placeholders"):
        torch.vmap(torch.func.grad(merged), (None, 0, 0, 0))(table, ids, a, b)


def test_second_derivatives_of_what_autocast_made(size):
    """The backward pass may be outside of autocast, and that of a call without it inside."""
    inputs = draw(((2, 4, 3), (2, 1, 5), (6, 8), (6,)))
    loss = loss_of(CASES["concat_linear"][1])
    exact = first_and_second(loss, inputs)[1:]
    value = loss(*inputs)
    with torch.autocast("cpu"):
        first = torch.autograd.grad(value, inputs, create_graph=True)
        close([g.detach() for g in first], exact[0])
        rounded = loss(*inputs)
    close(torch.autograd.grad(rounded, inputs, create_graph=True), exact[0], torch.bfloat16)


@pytest.mark.parametrize("name", [name for name in CASES if len(CASES[name][2]) > 1 and name not in FORMED])
def test_each_input_alone(name, size):
    """The others frozen, or left out of the gradients asked for."""
    _, function, shapes = CASES[name]
    inputs, loss = draw(shapes), loss_of(function)
    with mmlm_fast.reference():
        expected = first_and_second(loss, inputs)[1]
    for i in range(len(inputs)):
        frozen = [x if i == j else x.detach() for j, x in enumerate(inputs)]
        with mmlm_fast.reference():
            alone = first_and_second(lambda x, i=i: loss(*inputs[:i], x, *inputs[i + 1 :]), inputs[i : i + 1])
        for given in (frozen, inputs):
            got = first_and_second(lambda x, i=i, given=given: loss(*given[:i], x, *given[i + 1 :]), inputs[i : i + 1])
            close(got[1], expected[i : i + 1])
            close(got[2], alone[2])


def test_attention_by_a_kernel_of_torch(take):
    """A mask without holes is torch's: first gradients with a graph, forward mode, a refusal with its remedy."""
    take("torch")
    inputs = draw(((1, 2, 6, 8),) * 3)

    def loss(q, k, v):
        return ops.interval_attention(q, k, v, IntervalMask.full(6, 6)).sin().sum()

    with mmlm_fast.reference():
        _, first, second = first_and_second(loss, inputs)
    got = torch.autograd.grad(loss(*inputs), inputs, create_graph=True)
    close([g.detach() for g in got], first)
    with pytest.raises(RuntimeError, match=r"second derivatives of interval_attention.*mmlm_fast.reference\(\)"):
        got[1].sum().backward()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # which has them
        close(first_and_second(loss, inputs)[2], second)
    along = tuple(torch.randn_like(x) for x in inputs)
    plain = tuple(x.detach() for x in inputs)
    expected = sum((g * t).sum() for g, t in zip(first, along, strict=True))
    close([torch.func.jvp(loss, plain, along)[1]], [expected])


@pytest.mark.parametrize("name", sorted(CASES))
def test_gradients_are_the_callers_own(name, size):
    """Changed in place, they change nothing of a graph that is kept."""
    inputs = draw(CASES[name][2])
    loss = loss_of(CASES[name][1])(*inputs)
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    expected = [g.clone() for g in first]
    for gradient in first:
        if 0 not in gradient.stride():  # torch refuses to write into what is expanded
            gradient.mul_(0.5)
    same(torch.autograd.grad(loss, inputs, retain_graph=True), expected)
    loss.backward(retain_graph=True)
    for x in inputs:
        x.grad.zero_()
    loss.backward()
    same([x.grad for x in inputs], expected)


@pytest.mark.parametrize("name", sorted(FORMED))
def test_formed_gradients(name, size):
    """Twice the loss, twice the gradients; where none is wanted, none is formed."""
    _, function, shapes = CASES[name]
    inputs = draw(shapes)
    loss = function(*inputs)
    expected = torch.autograd.grad(loss, inputs, retain_graph=True)
    twice = torch.autograd.grad(2 * loss, inputs, create_graph=True, retain_graph=False)
    close([g.detach() for g in twice], [2 * g for g in expected])
    module = importlib.import_module(f"mmlm_fast.ops.{name}")
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        seen, fwd = [], module._fwd
        patch.setattr(
            module, "_fwd", lambda *args: seen.append([x for x in args if isinstance(x, list)][-1]) or fwd(*args)
        )
        function(*inputs)
    assert seen == ([[False] * len(seen[0])] if size == "large" else [])


MADE_OF_EACH_OTHER = {
    "add_norm": lambda x: ops.add_norm(x, x * x)[0],
    "concat_linear": lambda x: ops.concat_linear([x, x.sin()], torch.ones(4, 16), activation="gelu"),
    "fuse_modalities": lambda x: ops.fuse_modalities([x, x.sin()], "attention", weight=x[0]),
    "glu": lambda x: ops.glu(x, x * x),
    "interval_attention": lambda x: ops.interval_attention(*(t[None, None] for t in (x, x.sin(), x * x)), softcap=1.0),
}


@pytest.mark.parametrize("name", MADE_OF_EACH_OTHER)
def test_inputs_made_of_each_other(name, size):
    """What a gradient says of an input is not what flows through another one."""
    (x,), loss = draw(((5, 8),)), loss_of(MADE_OF_EACH_OTHER[name])
    with mmlm_fast.reference():
        _, first, second = first_and_second(loss, [x])
    got = first_and_second(loss, [x])
    close(got[1], first)
    close(got[2], second)
