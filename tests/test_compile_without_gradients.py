"""Every op in one compiled graph, with gradients and without, at every number of modalities.

Where nothing needs a gradient Dynamo runs an autograd function's forward itself, and takes it for one without a context
where the numbers of arguments happen to fit.
"""

import ast
from pathlib import Path

import pytest
import torch
from test_derivatives import CASES as OPS
from test_derivatives import close, draw, loss_of

import mmlm_fast
from mmlm_fast import ops
from mmlm_fast.masks import IntervalMask


def features(count, size=32):
    return [torch.randn(2, 20 if i == 0 else 1, size) for i in range(count)]


def pictures(count, size=512):
    ids = torch.randint(10, 50, (2, 400))
    for i in range(count):
        ids[:, 5 + 20 * i : 10 + 20 * i] = i
    return ids, {i: torch.randn(2, 5, size) for i in range(count)}


def concat(count):
    weight, inputs = torch.randn(24, 32 * count), features(count)
    return lambda bias: ops.concat_linear(inputs, weight, bias, activation="gelu"), torch.randn(24)


def fuse(mode, count):
    inputs = [x.expand(2, 20, -1).contiguous() for x in features(count)]
    weight = {"mean": None, "weighted": torch.randn(count), "attention": torch.randn(32)}[mode]
    return lambda first: ops.fuse_modalities([first, *inputs[1:]], mode, weight=weight), inputs[0]


def merge(count):
    ids, rows = pictures(count)
    return lambda table: ops.merge_embeddings(ids, table, rows), torch.randn(50, 512)


def scatter(count):
    ids, rows = pictures(count, 512)
    return lambda embeds: ops.scatter_features(embeds, ids, rows, add=True), torch.randn(2, 400, 512)


def cross_entropy(count):
    weight, target = torch.randn(5000, 64), torch.randint(0, 5000, (256,))
    bias = torch.randn(5000) if count > 1 else None
    return lambda hidden: ops.linear_cross_entropy(hidden, weight, target, bias), torch.randn(256, 64)


CASES = [
    pytest.param(make, count, id=f"{make.__name__}-{count}", marks=() if count in (1, 2, 5) else pytest.mark.slow)
    for make in (concat, merge, scatter)
    for count in (1, 2, 3, 4, 5)
]
CASES += [pytest.param(cross_entropy, count, id=f"cross_entropy-{count}") for count in (1, 2)]
CASES += [
    pytest.param(lambda count, mode=mode: fuse(mode, count), count, id=f"fuse {mode}-{count}")
    for mode, counts in (("mean", (1, 2, 3, 4, 5)), ("weighted", (2,)), ("attention", (3,)))
    for count in counts
]


@pytest.mark.parametrize(("make", "count"), CASES)
def test_one_graph_without_gradients(make, count):
    """Nor with those of one input, the others frozen."""
    call, argument = make(count)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(compiled(argument), call(argument))
    argument = argument.clone().requires_grad_()
    got, expected = compiled(argument), call(argument)
    torch.testing.assert_close(got, expected)
    grads = [torch.autograd.grad(out.sin().sum(), argument)[0] for out in (got, expected)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


AUDIO = {"log_mel", "mfcc", "resample", "standardize"}  # compiled in their own tests


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in OPS if name not in AUDIO])
def test_one_graph_of_dynamic_shapes(name):
    """All inputs with gradients; the first frozen; none."""
    _, function, shapes = OPS[name]
    inputs, loss = draw(shapes), loss_of(function)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for frozen in (0, 1) if len(inputs) > 1 else (0,):
        given = [x.detach() if i < frozen else x for i, x in enumerate(inputs)]
        wanted = dict(inputs=given[frozen:], allow_unused=True, materialize_grads=True)
        close(torch.autograd.grad(compiled(*given), **wanted), torch.autograd.grad(loss(*given), **wanted))
    with torch.inference_mode():
        close([compiled(*inputs)], [loss(*inputs)])


IDS = torch.tensor([[50, 3, 51]])
SAME = {
    "add_norm": (lambda x: ops.add_norm(x, x)[0], (4, 8)),
    "clip_loss": (lambda x: ops.clip_loss(x, x, 3.0), (4, 8)),
    "concat_linear": (lambda x: ops.concat_linear([x, x], torch.ones(4, 16)), (4, 8)),
    "fuse_modalities": (lambda x: ops.fuse_modalities([x, x, x], "mean"), (4, 8)),
    "gated": (lambda x: ops.fuse_modalities([x, x], "gated", weight=torch.ones(8, 16)), (4, 8)),
    "gated_add": (lambda x: ops.gated_add(x, x, torch.ones(1)), (4, 8)),
    "glu": (lambda x: ops.glu(x, x), (4, 8)),
    "interval_attention": (lambda x: ops.interval_attention(x, x, x, IntervalMask.causal(4)), (1, 2, 4, 8)),
    "merge_embeddings": (lambda x: ops.merge_embeddings(IDS, torch.ones(9, 8), {50: x, 51: x}), (1, 8)),
    "qk_norm_rope": (lambda x: ops.qk_norm_rope(x, x, torch.ones(4, 4), torch.ones(4, 4))[0], (1, 2, 4, 8)),
    "siglip_loss": (lambda x: ops.siglip_loss(x, x, 3.0, 1.0), (4, 8)),
}


@pytest.mark.parametrize("name", SAME)
def test_one_tensor_in_two_places(name):
    """Which Dynamo takes into no autograd function."""
    call, shape = SAME[name]
    x = torch.randn(shape, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    close(torch.autograd.grad(compiled(x).sin().sum(), x), torch.autograd.grad(call(x).sin().sum(), x))


@pytest.mark.parametrize("name", ["concat_linear", "glu", "linear_cross_entropy", "merge_embeddings"])
def test_transforms_inside_a_graph(name):
    """torch.func in a compiled function; first gradients of a compiled one under ``create_graph=True``."""
    _, function, shapes = OPS[name]
    inputs, loss = draw(shapes), loss_of(function)
    plain = [x.detach() for x in inputs]
    torch._dynamo.reset()
    gradient = torch.func.grad(loss, tuple(range(len(inputs))))
    close(torch.compile(gradient, fullgraph=True, backend="aot_eager")(*plain), gradient(*plain))
    compiled = torch.compile(loss, backend="aot_eager")
    first = torch.autograd.grad(compiled(*inputs), inputs, create_graph=True)
    close([g.detach() for g in first], gradient(*plain))


def test_nothing_that_dynamo_of_torch_2_8_cannot_trace():
    """The oldest torch we take: no next() with a default, no isinstance of a union."""
    folder, found = Path(mmlm_fast.__file__).parent, []
    for path in [*sorted(folder.glob("ops/*.py")), folder / "masks.py", folder / "positions.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) == 2:
                name, second = node.func.id, node.args[1]
                if name == "next" or (name == "isinstance" and isinstance(second, ast.BinOp)):
                    found.append(f"{path.name}:{node.lineno}: {ast.unparse(node)}")
    assert not found
