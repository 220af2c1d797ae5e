"""The ways a call of an op can take, and how to force one: for debugging, reports and tests."""

import enum
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.autograd import forward_ad


class Path(enum.Enum):
    """What computes a call of an op."""

    REFERENCE = "the PyTorch formula"
    TORCH = "torch's own kernel for it"
    NATIVE = "the native core"
    KERNEL = "a Triton kernel"


# Names, for what runs in a graph: Dynamo of torch 2.11 has no guard for an enumeration's members.
REFERENCE, TORCH, NATIVE, KERNEL = (path.name for path in Path)

_functorch_is_active = torch._C._are_functorch_transforms_active


class _Switch(threading.local):
    path: str | None = None


_switch = _Switch()
FORCED: list[
    None
] = []  # one for each `forced` under way, of any thread: where it is empty, no thread's own need be read


@contextmanager
def forced(path: Path | None) -> Iterator[None]:
    """Let every op of this thread take `path` where it has one for its tensors, however small they are.

    None: each op's own choice, where another call forces one. Ops that have no such path, or not for these tensors, go
    on as they would. Without a CUDA device the kernels run in Triton's interpreter, on CPU tensors.

    Raises:
        ValueError: for kernels without a CUDA device and without ``TRITON_INTERPRET=1`` in the environment.

    Example::

        with mmlm_fast.ops.paths.forced(Path.NATIVE):
            out = mmlm_fast.ops.glu(gate, up)
    """
    if path is not None and not isinstance(path, Path):
        raise ValueError(f"path must be one of {', '.join(map(str, Path))} or None, got {path!r}")
    if path is Path.KERNEL and not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("kernels need a CUDA device, or TRITON_INTERPRET=1 in the environment before Triton's import")
    before = _switch.path
    FORCED.append(None)
    _switch.path = None if path is None else path.name
    try:
        yield
    finally:
        _switch.path = before
        FORCED.pop()


@contextmanager
def reference() -> Iterator[None]:
    """Run every op of this thread as its plain PyTorch reference, for debugging, reports and tests.

    Example::

        with mmlm_fast.reference():
            expected = model(**inputs)
    """
    with forced(Path.REFERENCE):
        yield


def forced_path() -> str | None:
    """The name of the path that `forced` asks for in this thread, or None."""
    return _switch.path


def using_reference() -> bool:
    """Whether ops are to run as plain PyTorch: where `reference()` says so, or derivatives are asked for that see
    through PyTorch's own operators alone.
    """
    return _switch.path == REFERENCE or is_transformed()


def is_transformed() -> bool:
    """Whether a transform of torch.func or a level of forward-mode differentiation is at work."""
    return _functorch_is_active() or forward_ad._current_level >= 0
