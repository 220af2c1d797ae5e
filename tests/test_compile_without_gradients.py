"""Compiled inference: every op in one graph where nothing needs a gradient, at every number of modalities.

Dynamo runs an autograd function's forward itself there, and takes it for one without a context where the numbers of
arguments happen to fit.
"""

import pytest
import torch

from mmlm_fast import ops


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
    inputs = [x.expand(2, 20, -1).contiguous() for x in features(count, 8192)]
    weight = {"mean": None, "weighted": torch.randn(count), "attention": torch.randn(8192)}[mode]
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
    pytest.param(make, count, id=f"{make.__name__}-{count}")
    for make in (concat, merge, scatter)
    for count in (1, 2, 3, 4)
]
CASES += [pytest.param(cross_entropy, count, id=f"cross_entropy-{count}") for count in (1, 2)]
CASES += [
    pytest.param(lambda count, mode=mode: fuse(mode, count), count, id=f"fuse {mode}-{count}")
    for mode in ("mean", "weighted", "attention")
    for count in (1, 2, 3, 4)
]


@pytest.mark.parametrize(("make", "count"), CASES)
def test_one_graph_without_gradients(make, count):
    call, argument = make(count)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(argument), call(argument))
    argument = argument.clone().requires_grad_()
    torch.testing.assert_close(compiled(argument), call(argument))
