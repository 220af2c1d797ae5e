"""Which attention kernel a call on CUDA takes: plain facts crossed, without a GPU."""

import importlib
import itertools
import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mmlm_fast.masks import IntervalMask
from mmlm_fast.ops import _torch_attention as module
from mmlm_fast.ops import interval_attention
from mmlm_fast.ops._torch_attention import Call, torch_kernel
from mmlm_fast.ops.interval_attention import _sdpa_is_best, interval_attention_ref

op_module = importlib.import_module("mmlm_fast.ops.interval_attention")  # the package exports a function of this name

HALF, FLOAT, DOUBLE = torch.bfloat16, torch.float32, torch.float64
LONG = Call("cuda", 9, HALF, "full", False, 4096, 4096, 128, 128, 2**30)


def path(call: Call) -> str:
    return torch_kernel(call) if _sdpa_is_best(call) else "ours"


@pytest.fixture
def hopper(monkeypatch):
    """A GPU as torch would describe it, and the shapes of this thread forgotten."""
    monkeypatch.setattr(module, "_capability", lambda index: 9)
    monkeypatch.setattr(module, "_flash_allowed", lambda: True)
    monkeypatch.setattr(module, "_shapes", module._Shapes())


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "cudnn"),
        ({"grouped": True}, "cudnn"),
        ({"kind": "causal"}, "cudnn"),
        ({"kind": "causal", "kv_len": 5000}, "sdpa"),  # no flash for it: the memory-efficient kernel
        ({"kind": "causal", "kv_len": 5000, "grouped": True}, "ours"),
        ({"cudnn_allowed": False}, "flash"),
        ({"q_len": 1}, "flash"),  # decoding
        ({"q_len": 511}, "flash"),
        ({"q_len": 512}, "cudnn"),
        ({"capability": 10}, "flash"),
        ({"capability": 12}, "sdpa"),
        ({"capability": 8}, "sdpa"),
        ({"capability": 8, "grouped": True}, "sdpa"),
        ({"capability": 7}, "sdpa"),
        ({"capability": 7, "grouped": True}, "packed"),
        ({"capability": 7, "grouped": True, "kind": "causal"}, "repeated"),
        ({"is_compiling": True}, "sdpa"),
        ({"is_compiling": True, "q_len": 1}, "flash"),
        ({"flash_allowed": False}, "sdpa"),
        ({"flash_allowed": False, "grouped": True}, "ours"),
        ({"size": 84, "value_size": 84}, "sdpa"),  # torch pads
        ({"scores": 0, "q_len": 0}, "sdpa"),
        ({"kv_len": 0}, "ours"),
        ({"kind": None}, "ours"),
        ({"size": 512, "value_size": 512}, "sdpa"),
        ({"size": 512, "value_size": 512, "grouped": True}, "ours"),
        ({"size": 576, "value_size": 576, "grouped": True}, "packed"),
        ({"size": 576, "value_size": 576, "grouped": True, "kind": "causal"}, "repeated"),
        ({"size": 512, "value_size": 512, "grouped": True, "has_triton": False}, "packed"),
        ({"value_size": 64}, "sdpa"),
        ({"value_size": 64, "grouped": True}, "ours"),
        ({"dtype": FLOAT}, "sdpa"),
        ({"dtype": FLOAT, "grouped": True}, "ours"),
        ({"dtype": FLOAT, "grouped": True, "size": 256, "value_size": 256}, "packed"),
        ({"dtype": FLOAT, "grouped": True, "size": 256, "value_size": 256, "kind": "causal"}, "repeated"),
        ({"dtype": DOUBLE}, "sdpa"),
        ({"device": "cpu", "capability": 0}, "sdpa"),
        ({"device": "cpu", "capability": 0, "grouped": True, "size": 512}, "sdpa"),
        ({"device": "cpu", "capability": 0, "kind": "causal"}, "ours"),
        ({"device": "cpu", "capability": 0, "kind": "causal", "scores": 100}, "sdpa"),
        ({"device": "mps", "capability": 0}, "sdpa"),
    ],
    ids=str,
)
def test_path(changes, expected):
    assert path(LONG._replace(**changes)) == expected


CROSSED = [
    LONG._replace(capability=c, dtype=d, kind=k, grouped=g, q_len=q, size=s, value_size=v, is_compiling=i)._replace(
        has_triton=t, flash_allowed=f, cudnn_allowed=u and not i
    )
    for c, d, k, g, q, (s, v), i, t, f, u in itertools.product(
        (7, 8, 9, 10, 12), (HALF, FLOAT, DOUBLE), ("full", "causal", None), (False, True), (1, 16, 4096),
        ((64, 64), (72, 72), (128, 64), (256, 256), (512, 512), (640, 640)), *[(False, True)] * 4,
    )
]  # fmt: skip


def test_no_call_takes_the_math_path_where_another_kernel_does():
    """Flash takes grouped heads, the memory-efficient kernel does not; of float64 there is only the math path."""
    for call in CROSSED:
        chosen = path(call)
        if chosen == "sdpa" and call.dtype != DOUBLE:
            assert not call.grouped or module.has_flash(call), call
            assert module.has_flash(call) or module.has_efficient(call), call
        if chosen in ("flash", "cudnn"):
            assert module.has_flash(call), call
        if chosen == "packed":
            assert call.kind == "full", call


def test_cudnn_only_where_it_wins():
    """Hopper, eager, long queries, allowed; never while decoding, nor where torch alone would choose it."""
    for call in CROSSED:
        chosen = path(call)
        if chosen == "cudnn":
            assert call.capability == 9, call
            assert call.q_len >= 512, call
            assert call.cudnn_allowed, call
            assert not call.is_compiling, call
        # Since 2.11 scaled_dot_product_attention itself prefers cuDNN on capability 9 and 10, in 16 bits.
        if chosen == "sdpa" and call.capability in (9, 10) and module.has_flash(call):
            assert call.is_compiling, call
            assert call.q_len != 1, call


@pytest.mark.parametrize("kernel", ["packed", "repeated"])
@pytest.mark.parametrize("shape", [(2, 6, 2, 5, 9), (1, 4, 1, 1, 7), (2, 4, 2, 0, 3), (0, 4, 2, 3, 3)], ids=str)
def test_grouped_heads_without_a_kernel_of_their_own(monkeypatch, kernel, shape):
    batch, heads, kv_heads, q_len, kv_len = shape
    mask = None
    if kernel == "repeated":
        kv_len, mask = q_len, IntervalMask.causal(q_len)
    q = torch.randn(batch, heads, q_len, 16, dtype=DOUBLE, requires_grad=True)
    k, v = (torch.randn(batch, kv_heads, kv_len, n, dtype=DOUBLE, requires_grad=True) for n in (16, 24))
    monkeypatch.setattr(module, "torch_kernel", lambda call: kernel)
    monkeypatch.setattr(op_module, "_sdpa_is_best", lambda call: True)
    out, expected = interval_attention(q, k, v, mask), interval_attention_ref(q, k, v, mask)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    torch.testing.assert_close(*(torch.autograd.grad(x, [q, k, v], grad) for x in (out, expected)))


def fakes(*shape, grouped=False, kv_len=None):
    batch, heads, q_len, size = shape
    with FakeTensorMode():
        q = torch.empty(*shape, dtype=HALF, device="cuda:0")
        k = torch.empty(batch, heads // (1 + grouped), kv_len or q_len, size, dtype=HALF, device="cuda:0")
    return q, k, k


class Ops(torch.utils._python_dispatch.TorchDispatchMode):
    """Names of the operators called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "aten":
            self.names.append(function._schema.name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("q_len", [1, 600])
def test_flash_is_called_by_its_name(hopper, grouped, q_len):
    q, k, v = fakes(2, 8, q_len, 64, grouped=grouped)
    with Ops() as ops:
        out = interval_attention(q, k, v)
    assert out.shape == q.shape
    assert ops.names == ["aten::_scaled_dot_product_flash_attention"]


def calls_until_planned(key, limit=1000):
    return next((n for n in range(1, limit + 1) if module._comes_again(key)), None)


def test_a_plan_only_for_shapes_that_come_again(hopper):
    assert calls_until_planned("a shape") == module.CUDNN_CALLS
    assert module._comes_again("a shape")
    assert not any(module._comes_again(n) for n in range(400))
    assert module._comes_again("a shape")
    seen = []
    other = threading.Thread(target=lambda: seen.append(calls_until_planned("a shape")))
    other.start()
    other.join()
    assert seen == [module.CUDNN_CALLS], "torch keeps cuDNN's plans by thread"
    planned = sum(calls_until_planned((n,), limit=200) is not None for n in range(100))
    assert planned + 1 == len(module._shapes.planned) == module.PLANNED_SHAPES
    assert len(module._shapes.counts) <= module.COUNTED_SHAPES


def test_cudnn_when_a_shape_has_come_often(hopper, monkeypatch):
    plain = torch.empty(1, 8, 600, 64, dtype=HALF)
    asked = []
    monkeypatch.setattr(module, "CUDNN_CALLS", 3)
    monkeypatch.setattr(torch.backends.cuda, "SDPAParams", lambda *args: args)
    monkeypatch.setattr(torch.backends.cuda, "can_use_cudnn_attention", lambda p: asked.append(p) or True)
    monkeypatch.setattr(module, "on_device", lambda index: torch.no_grad())
    takes = [module._cudnn_takes(plain, plain, plain, False, False) for _ in range(4)]
    assert takes == [False, False, True, True]
    assert len(asked) == 2
    assert not module._cudnn_takes(plain, plain, plain, False, True), "a backward pass has a plan of its own"
    strided = plain.transpose(1, 2).contiguous().transpose(1, 2)
    assert not module._cudnn_takes(strided, plain, plain, False, False)


def test_cudnns_switch_is_heeded(hopper, monkeypatch):
    real = torch.empty(1, 8, 600, 64)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    assert module.facts(real, real, real, None).cudnn_allowed
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        assert not module.facts(real, real, real, None).cudnn_allowed
    assert not module.facts(*fakes(1, 8, 600, 64), None).cudnn_allowed


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_decoding_gets_no_plan(hopper, dynamic):
    """A graph for all lengths would have one for each: flash attention, decided while tracing, in one graph."""
    graphs = []
    compiled = torch.compile(
        interval_attention, fullgraph=True, dynamic=dynamic, backend=lambda graph, _: graphs.append(graph) or graph
    )
    for length in (300, 301):
        assert compiled(*fakes(1, 8, 1, 64, grouped=True, kv_len=length)).shape == (1, 8, 1, 64)
    assert len(graphs) == (1 if dynamic else 2)
    for graph in graphs:
        called = [str(n.target) for n in graph.graph.nodes if "attention" in str(n.target)]
        assert called == ["aten._scaled_dot_product_flash_attention"]
