"""The first call of a fresh model is any call: checkpointed, compiled, without gradients, under autocast.

What a model learns or keeps in its first call must not depend on how that is made; the accuracy rule against eager.
"""

from contextlib import ExitStack
from functools import cache

import pytest
import torch

import mmlm_fast.hf  # noqa: F401  registers the implementation
from mmlm_fast.testing import difference
from support import tiny_models

WAYS = ["checkpoint", "reentrant checkpoint", "no_grad", "inference_mode", "autocast"]


@pytest.fixture(autouse=True)
def _quiet():
    with tiny_models.quiet():
        yield


def run(model, tiny, way):
    """Output where it means something, and the gradients of all parameters where the way leaves some."""
    dtype = next(model.parameters()).dtype
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tiny.inputs.items()}
    trains, call = way in ("compile", "checkpoint", "reentrant checkpoint"), model
    with ExitStack() as stack:
        if way in ("no_grad", "inference_mode"):
            stack.enter_context(getattr(torch, way)())
        if way == "autocast" and dtype != torch.float64:
            stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        if way.endswith("checkpoint"):
            model.train()
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
            model.gradient_checkpointing_enable({"use_reentrant": way.startswith("reentrant")})
            model.enable_input_require_grads()  # what reentrant ones need to see a gradient at all
        if way == "compile":
            torch._dynamo.reset()
            call = torch.compile(model, backend="eager")
        out = tiny_models.output_of(call, inputs)
    if tiny.valid is not None and out.dim() == 3 and out.shape[:2] == tiny.valid.shape:
        out = out[tiny.valid]
    if not trains:
        return [out.detach()]
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    return [out.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])]


@cache
def expected(name, way):
    """From eager attention, and exactly; compiled code is to give what plain code does."""
    tiny = tiny_models.MODELS[name]()
    way = "checkpoint" if way == "compile" else way
    return tiny, run(tiny.build("eager"), tiny, way), run(tiny.build("sdpa", torch.float64), tiny, way)


def check(name, way):
    tiny, twin, exact = expected(name, way)
    model = tiny.build("mmlm_fast")
    for a, t, e in zip(run(model, tiny, way), twin, exact, strict=True):
        found = difference(a, t, e)
        assert found.ok, f"error {found.error:.2e}, allowed {found.allowed:.2e}"
    if way in ("no_grad", "inference_mode"):  # what was kept then serves training
        tiny, twin, exact = expected(name, "checkpoint")
        for a, t, e in zip(run(model, tiny, "checkpoint"), twin, exact, strict=True):
            assert difference(a, t, e).ok


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", tiny_models.MODELS)
def test_first_call(name, way):
    check(name, way)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "bert" else pytest.mark.slow) for n in tiny_models.MODELS]
)
def test_first_call_compiled(name):
    check(name, "compile")
