"""The interpreter that stands in for a GPU refuses what a GPU would not forgive."""

import os

import pytest
import torch

triton = pytest.importorskip("triton")
tl = triton.language

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="of the interpreter alone")


@triton.jit
def move_kernel(x_ptr, out_ptr, first, into, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + first + at, mask=at < n, other=0.0)
    tl.store(out_ptr + into + at, x, mask=at < n)


@triton.jit
def one_kernel(x_ptr, out_ptr, first):
    tl.store(out_ptr, tl.load(x_ptr + first))


def launch(first, into, n, x=None):
    memory = torch.arange(64.0)
    x = memory[16:32] if x is None else x
    move_kernel[(1,)](x, torch.zeros(64)[16:32], first, into, n, BLOCK=16)


def test_within_the_tensors():
    launch(0, 0, 16)
    launch(3, 5, 11)
    launch(1000, 1000, 0)
    launch(0, 0, 4, torch.zeros(4, 4)[:, 1])  # the numbers between are of the same memory
    one_kernel[(1,)](torch.zeros(4)[2:], torch.zeros(1), 1)


@pytest.mark.parametrize(("first", "into", "n", "what"), [
    (1, 0, 16, "load of 1 of 16 numbers"), (-1, 0, 16, "load of 1 of 16"), (0, 1, 16, "store of 1 of 16"),
    (0, -2, 5, "store of 2 of 5"), (2**20, 0, 1, "load of 1 of 1"),
])  # fmt: skip
def test_outside_the_tensors(first, into, n, what):
    """Memory of the same storage, too: a view is what the caller gave."""
    with pytest.raises(Exception, match=what):
        launch(first, into, n)


def test_of_a_single_number():
    with pytest.raises(Exception, match="load of 1 of 1"):
        one_kernel[(1,)](torch.zeros(4)[2:], torch.zeros(1), 2)


def test_without_numbers():
    """A launch for which every tensor is empty may touch nothing."""
    with pytest.raises(Exception, match="outside the tensors"):
        one_kernel[(1,)](torch.zeros(0), torch.zeros(0), 0)
