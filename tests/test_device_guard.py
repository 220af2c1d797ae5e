"""Ops on a GPU that is not the current one. No GPU needed: tensors are fakes, the driver is two functions."""

import sys
from types import ModuleType

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mmlm_fast.ops import _registry


class Driver:
    """The current device, and how often it was changed."""

    def __init__(self) -> None:
        self.current, self.changes = 0, 0

    def exchange(self, index: int) -> int:
        before, self.current = self.current, index
        self.changes += before != index
        return before


@pytest.fixture
def driver(monkeypatch):
    fake = Driver()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: fake.current)
    monkeypatch.setattr(torch.cuda, "_exchange_device", fake.exchange)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", fake.exchange)
    return fake


@pytest.fixture
def launched(driver, monkeypatch):
    """The devices that were current when the kernel of the op `call` was launched."""
    seen = []
    module = ModuleType("launcher_of_the_test")
    module.launch = lambda *args: seen.append(driver.current)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return seen


def op(**options):
    return _registry._lazy("op_of_the_test", "launcher_of_the_test:launch", lambda *args: "portable", **options)


def on(device, *shape):
    with FakeTensorMode():
        return torch.empty(shape or (2, 3), device=device)


def test_launches_on_the_device_of_the_tensors(driver, launched):
    call = op(kernel_takes=None)
    call(on("cuda:1"), None, 0.5)
    assert launched == [1]
    assert driver.current == 0
    call([on("cuda:2"), on("cuda:2")], on("cuda:2"), "mode")
    assert launched == [1, 2]
    assert driver.current == 0


def test_one_gpu_changes_nothing(driver, launched):
    call = op(kernel_takes=None)
    call(on("cuda:0"), [on("cuda:0")])
    assert launched == [0]
    assert driver.changes == 0


def test_the_device_comes_back_after_an_error(driver, launched, monkeypatch):
    def fails(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(sys.modules["launcher_of_the_test"], "launch", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        op(kernel_takes=None)(on("cuda:1"))
    assert driver.current == 0


@pytest.mark.parametrize("takes", [None, lambda *args: False])
@pytest.mark.parametrize(
    "devices", [("cuda:0", "cuda:1"), ("cuda:1", "cuda:0"), ("cuda:0", "cpu"), ("cpu", "cuda:0")], ids=str
)
def test_tensors_of_two_devices_are_an_error(launched, devices, takes):
    first, second = (on(d) for d in devices)
    message = f"op_of_the_test: tensors must be on one CUDA device, got {', '.join(sorted(devices))}"
    for args in ((first, second), ([first, second],), (first, None, [second], 1.0)):
        with pytest.raises(ValueError, match=message):
            op(kernel_takes=takes)(*args)
    assert launched == []


def test_without_triton_addresses_of_a_device_never_reach_the_core(launched, monkeypatch):
    """Through torch.ops or an exported graph; the public functions never get here."""
    monkeypatch.setattr(_registry, "find_spec", lambda name: None)
    call = _registry._lazy("op_of_the_test", "mmlm_kernels.glu:glu_fwd", None, None)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="mmlm_fast::op_of_the_test needs Triton for CUDA tensors"):
            call(on("cuda:0"))
    call = _registry._lazy("op_of_the_test", "mmlm_kernels.glu:glu_fwd", lambda *args: "portable", None)
    with pytest.warns(UserWarning, match="using the portable path"):
        assert call(on("cuda:0")) == "portable"
    assert launched == []
