"""What grows with the number of calls on a GPU: cuDNN plans, waits for the device, tables and masks that are kept.

No GPU needed: operators that only a GPU has are counted and answered with empty tensors.
"""

import importlib

import pytest
import torch

from mmlm_fast.masks import IntervalMask
from mmlm_fast.ops import interval_attention

module = importlib.import_module("mmlm_fast.ops.interval_attention")  # the package exports a function of this name


class OnHopper(torch.utils._python_dispatch.TorchDispatchMode):
    """The attention operators of a GPU: shapes that cuDNN gets, each a plan, and what else is called."""

    def __init__(self) -> None:
        super().__init__()
        self.plans: set[tuple] = set()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        if name.startswith("_scaled_dot_product") and "cpu" not in name:
            self.names.append(name)
            if "cudnn" in name:
                self.plans.add(tuple((*x.shape, *x.stride()) for x in args[:3]) + tuple(args[4:7]))
            out = args[0].new_empty(*args[0].shape[:3], args[2].shape[3])
            rest = [out.new_empty(0)] * 3 + [0, 0] + [out.new_empty(0)] * 3
            return out, *rest
        return function(*args, **(kwargs or {}))


@pytest.fixture
def hopper(monkeypatch):
    facts = module._facts

    def on_hopper(*args):
        changes = {"device": "cuda", "capability": 9, "cudnn_allowed": True, "flash_allowed": True}
        return facts(*args)._replace(**changes)

    monkeypatch.setattr(module, "_facts", on_hopper)
    monkeypatch.setattr(module, "_shapes", module._Shapes())
    monkeypatch.setattr(module, "on_device", lambda index: torch.no_grad())
    monkeypatch.setattr(torch.backends.cuda, "SDPAParams", lambda *args: args)
    monkeypatch.setattr(torch.backends.cuda, "can_use_cudnn_attention", lambda parameters: True)
    with OnHopper() as mode:
        yield mode


LAYERS = 4


def attend(q_len, kv_len, mask=None, layers=LAYERS):
    q = torch.empty(1, 4, q_len, 64, dtype=torch.bfloat16)
    k, v = (torch.empty(1, 2, kv_len, 64, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(layers):
        interval_attention(q, k, v, mask)


def test_a_growing_cache_gets_no_plan(hopper):
    for length in range(1, 301):
        attend(1, length)
    assert hopper.plans == set()
    assert hopper.names == ["_scaled_dot_product_flash_attention"] * 300 * LAYERS
    assert module._shapes.counts == {}


def test_prompts_of_400_lengths_get_no_plan(hopper):
    """A pass calls a shape once a layer, 80 here: not to be taken for a shape that comes again."""
    for length in range(600, 1000):
        attend(length, length, IntervalMask.causal(length), layers=80)
    assert hopper.plans == set()
    assert len(module._shapes.counts) == module.COUNTED_SHAPES


def test_training_gets_its_plan(hopper):
    for step in range(100):
        attend(1024, 1024, layers=32)
        assert bool(hopper.plans) == (step >= 128 // 32 - 1)
    assert len(hopper.plans) == 1
    assert set(hopper.names[128:]) == {"_scaled_dot_product_cudnn_attention"}


def test_plans_are_bounded(hopper):
    """Shapes that come often, and then other ones, for ever."""
    for length in range(600, 1000):
        attend(length, length, layers=200)
    assert 0 < len(hopper.plans) <= module.PLANNED_SHAPES
