"""The first training step of a fresh, accelerated model, in every user's loop: loss and gradients of the original."""

from functools import cache

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import mmlm_fast
import mmlm_fast.hf  # registers the attention
from mmlm_fast.nn import LazyLogits, lazy_logits
from mmlm_fast.testing import difference
from support import tiny_models

FAMILIES = ["llava", "gemma3", "paligemma", "qwen2_5_vl", "qwen3_vl", "mllama", "whisper"]
WAYS = [
    "plain", "after no_grad", "after evaluation", "checkpointed layers", "reentrant checkpointed layers",
    "checkpointed model", "reentrant checkpointed model", "find_unused_parameters", "static_graph", "autocast",
    "loss outside", "logits read",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch, native):
    monkeypatch.setattr(lazy_logits, "_is_few", lambda *_: False)
    with tiny_models.quiet():
        yield


@pytest.fixture(scope="module", autouse=True)
def _group(tmp_path_factory):
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def first_step(model, tiny, way):
    """Loss, and all gradients as one vector, of the first step of a model that nobody has called yet."""
    dtype = next(model.parameters()).dtype
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tiny.inputs.items()}
    labels = inputs.get("input_ids", inputs.get("decoder_input_ids")).clone()
    labels[:, :3] = -100
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    call = model
    if way in ("after no_grad", "after evaluation"):
        with torch.no_grad():
            model.train(way == "after no_grad")(**inputs, labels=labels).logits.argmax(-1)
        model.train()
    if way.endswith("checkpointed layers"):
        model.gradient_checkpointing_enable({"use_reentrant": way.startswith("reentrant")})
        model.enable_input_require_grads()
    if way in ("find_unused_parameters", "static_graph"):
        call = DistributedDataParallel(model, **{way: True})

    def loss_of(**inputs):
        if way == "loss outside":
            logits = call(**inputs).logits.float()
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.clamp(min=0).flatten())
        out = call(**inputs, labels=labels)
        return out.loss + 0.1 * out.logits.float().logsumexp(-1).square().mean() if way == "logits read" else out.loss

    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast" and dtype != torch.float64):
        if way.endswith("checkpointed model"):
            anchor = torch.ones((), requires_grad=True)  # reentrant ones look for an input with gradient
            reentrant = way.startswith("reentrant")
            loss = checkpoint(lambda a: loss_of(**inputs) * a, anchor, use_reentrant=reentrant)
        else:
            loss = loss_of(**inputs)
    loss.backward()
    return [loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])]


@cache
def expected(name, way):
    tiny = tiny_models.MODELS[name]()
    return tiny, first_step(tiny.build("eager"), tiny, way), first_step(tiny.build("sdpa", torch.float64), tiny, way)


@pytest.mark.parametrize(
    ("name", "way"),
    [
        pytest.param(n, w, marks=pytest.mark.slow if w.startswith("reentrant") and n not in FAMILIES[2:4] else ())
        for n in FAMILIES
        for w in WAYS
    ],
)
def test_first_step(name, way, monkeypatch):
    read, logits = [], LazyLogits.logits
    monkeypatch.setattr(LazyLogits, "logits", lambda self: read.append(self) or logits(self))
    tiny, twin, exact = expected(name, way)
    model = tiny.build("mmlm_fast")
    assert mmlm_fast.accelerate(model).replaced
    step = first_step(model, tiny, way)
    assert [t.dtype for t in step] == [t.dtype for t in twin]
    if way == "autocast":  # a single number's rounding in half precision is luck: with the gradients
        step, twin, exact = ([torch.cat([loss[None], grads])] for loss, grads in (step, twin, exact))
    for ours, theirs, truth in zip(step, twin, exact, strict=True):
        found = difference(ours, theirs, truth)
        assert found.ok, f"error {found.error:.2e}, allowed {found.allowed:.2e}"
    assert bool(read) == (way == "logits read")
