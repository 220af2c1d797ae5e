"""What grows with the number of calls on a GPU: cuDNN plans, waits for the device, tables and masks that are kept.

No GPU needed: operators that only a GPU has are counted and answered with empty tensors.
"""

import importlib

import pytest
import torch
from test_device_masks import look, prompt, step

from mmlm_fast.hf import attention as attention_module
from mmlm_fast.hf import looks
from mmlm_fast.masks import IntervalMask
from mmlm_fast.ops import _torch_attention as module
from mmlm_fast.ops import interval_attention

op_module = importlib.import_module("mmlm_fast.ops.interval_attention")  # the package exports a function of this name


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
    facts = module.facts

    def on_hopper(*args):
        changes = {"device": "cuda", "capability": 9, "cudnn_allowed": True, "flash_allowed": True}
        return facts(*args)._replace(**changes)

    monkeypatch.setattr(op_module, "facts", on_hopper)
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
    for passed in range(1, 101):
        attend(1024, 1024, layers=32)
        assert bool(hopper.plans) == (32 * passed >= module.CUDNN_CALLS)
    assert len(hopper.plans) == 1
    assert set(hopper.names[128:]) == {"_scaled_dot_product_cudnn_attention"}


def test_plans_are_bounded(hopper):
    """Shapes that come often, and then other ones, for ever."""
    for length in range(600, 1000):
        attend(length, length, layers=200)
    assert 0 < len(hopper.plans) <= module.PLANNED_SHAPES


@pytest.fixture
def hf(monkeypatch):
    """Masks of transformers as on a GPU; everything that is kept forgotten."""
    monkeypatch.setattr(looks, "looking_is_free", lambda device: False)
    monkeypatch.setattr(looks, "_state", looks._State())
    monkeypatch.setattr(attention_module, "_masks", attention_module._Masks())
    attention_module._kept_causal.cache_clear()
    yield
    attention_module._kept_causal.cache_clear()


def test_300_tokens_are_one_look(hf):
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[0, :7] = False
    looked = look(**prompt(mask))[1]
    for _ in range(300):
        mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
        for _kind_of_layer in range(2):
            looked += look(**step(mask.clone()))[1]
    assert looked == 1
    assert len(looks._state.answers) == 0, "of tensors that are gone"


def test_400_prompts_keep_nothing(hf):
    """A look each; masks, cu_seqlens and what is known of them go with the tensors; 16 causal masks stay."""
    looked = 0
    ids = torch.full((1, 1000), -1)
    for length in range(600, 1000):
        mask = torch.ones(1, length, dtype=torch.bool)
        mask[0, : length % 5] = False
        for _kind_of_layer in range(2):
            looked += look(**prompt(mask))[1]
        attention_module._causal(length, length, torch.device("cpu"))
        attention_module._packed(torch.tensor([0, 9, length]), None, length, length, False)
        looks.Questions("cpu", 2)._remember(ids, (length,), (True,))
    assert looked == 400
    del mask
    assert len(looks._state.answers) == 1
    assert len(looks._state.answers[ids]) <= looks.MAX_ANSWERS
    assert len(attention_module._masks.packed) == 0
    assert attention_module._kept_causal.cache_info().currsize == 16
