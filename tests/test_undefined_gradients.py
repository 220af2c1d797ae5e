"""Where nothing of an op's output is used no input gets a gradient, as with torch's operators.

The engine runs the backward pass of such an op where a node in front of it has other outputs that are used: DDP puts
one behind the model for `find_unused_parameters` and `static_graph`. Zeros in place of none make weights decay, and
moments move, that are left alone without us.
"""

import pytest
import torch

from mmlm_fast import audio
from mmlm_fast.audio import resample
from mmlm_fast.nn import LazyLinear, lazy_logits
from support.op_calls import calls

CALLS = [call for call in calls(16, torch.float32) if call.inputs]


class Sink(torch.autograd.Function):
    """What DDP puts behind a model: it hands on to every output the gradient it got, or none."""

    @staticmethod
    def forward(ctx, *outputs):
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx, *grads):
        return grads


def gradients(function, inputs):
    """Of the inputs, where another output of the node behind the op is used."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    other = torch.ones(3, requires_grad=True)
    outputs = function(*leaves)
    outputs = [t for t in (outputs if isinstance(outputs, tuple | list) else [outputs]) if t.requires_grad]
    assert outputs
    used, *_ = Sink.apply(other * 2, *outputs)
    used.sum().backward()
    assert torch.equal(other.grad, torch.full((3,), 2.0))
    return [x.grad for x in leaves]


@pytest.mark.parametrize("path", ["native", "torch"])
@pytest.mark.parametrize("call", CALLS, ids=lambda call: f"{call.op} {call.name}")
def test_ops(call, path, take):
    take(path)
    assert gradients(call.function, call.inputs) == [None] * len(call.inputs)


def test_queries_or_keys_alone(native):
    """One of an op's outputs is used: the other one's inputs get what torch's operators give them, none or zeros."""
    from mmlm_fast.ops import qk_norm_rope, rope_tables

    tables = rope_tables(torch.arange(5)[None], torch.ones(4))
    for weight in (None, torch.ones(8)):
        q, k = (torch.randn(1, 2, 5, 8, requires_grad=True) for _ in range(2))
        both = qk_norm_rope(q, k, *tables, query_weight=weight, key_weight=weight)
        for i, (used, unused) in enumerate(((q, k), (k, q))):
            alone = qk_norm_rope(used, None, *tables, query_weight=weight)[0]
            (expected,) = torch.autograd.grad(alone.square().sum(), used)
            found, nothing = torch.autograd.grad(
                both[i].square().sum(), (used, unused), allow_unused=True, retain_graph=True
            )
            assert torch.equal(found, expected)
            assert nothing is None or not nothing.any()


def test_audio():
    clip = [torch.randn(16000)]
    assert gradients(audio.log_mel, clip) == gradients(lambda x: resample(x, 16000, 8000), clip) == [None]


@pytest.mark.parametrize("has_loss", [False, True])
def test_lazy_logits(has_loss, monkeypatch):
    monkeypatch.setattr(lazy_logits, "_is_few", lambda *_: False)
    hidden = [torch.randn(6, 8)]
    head = LazyLinear(8, 50)
    target = torch.arange(6)

    def call(x):
        logits = head(x)
        return torch.nn.functional.cross_entropy(logits, target) if has_loss else logits

    assert gradients(call, hidden) == [None]
    assert head.weight.grad is None
    assert head.bias.grad is None
