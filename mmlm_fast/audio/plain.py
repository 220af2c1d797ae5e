"""What goes to the native core, whatever surrounds the call: plain tensors, by addresses that were looked at.

A default device, modes of torch and transforms of torch.func change what torch's functions return; the core would write
through a null pointer, and a table made once for all calls would stay as the first of them found the world. So tables
and outputs are made in `plain_torch()`. A default dtype is one of the whole process, which nobody may change for a
moment: whatever is made here names its dtype.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import wraps
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

F = TypeVar("F", bound=Callable)


def is_plain() -> bool:
    """Whether there is no mode or transform in this thread."""
    return not (
        torch._C._is_torch_function_mode_enabled()
        or torch._C._len_torch_dispatch_stack()
        or torch.is_inference_mode_enabled()
        or torch.is_autocast_enabled("cpu")
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


@contextmanager
def plain_torch() -> Iterator[None]:
    """Torch without a default device, modes (fake tensors, inference, autocast, anybody's own) and transforms."""
    if is_plain():
        yield
        return
    with ExitStack() as stack:
        stack.enter_context(torch._C.DisableTorchFunction())
        if torch._C._len_torch_dispatch_stack():
            from torch.utils._python_dispatch import _disable_current_modes

            stack.enter_context(_disable_current_modes())
        if torch._C._functorch.peek_interpreter_stack() is not None:
            from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

            stack.enter_context(temporarily_clear_interpreter_stack())
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        if torch.is_autocast_enabled("cpu"):
            stack.enter_context(torch.autocast("cpu", enabled=False))
        yield


def in_plain_torch(function: F) -> F:
    """Decorate a function to run in `plain_torch()`."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if is_plain():  # no context manager: a frame of a stream takes 30 µs
            return function(*args, **kwargs)
        with plain_torch():
            return function(*args, **kwargs)

    return call  # type: ignore[return-value]


def without_autocast(x: Tensor) -> AbstractContextManager:
    """For features of `x`, which are computed in their own dtype: products of autocast's would have 8 bits."""
    kind = x.device.type
    if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


@contextmanager
def autograd_within_an_op() -> Iterator[None]:
    """For an op that differentiates inside: below a dispatch mode, a counter of flops say, autograd is off."""
    kept = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradOther", "ADInplaceOrView"):
        kept = kept.remove(getattr(torch._C.DispatchKey, key))
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), kept), torch.enable_grad():
        yield


def has_memory(x: Tensor) -> bool:
    """Whether the tensor's numbers lie at its address: not those of fake tensors, transforms or other subclasses."""
    is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor(x) or torch._is_functional_tensor(x)
    return type(x) in (Tensor, torch.nn.Parameter) and not is_wrapped


def address_of(
    x: Tensor | np.ndarray, dtype: torch.dtype | None = None, numbers: int = 0, device: str | torch.device = "cpu"
) -> int:
    """The address of a tensor or array for the native core.

    Args:
        dtype: For what is read or written as dense numbers of this type; None for what is read by its strides.
        numbers: How many, at least.
        device: Where they must be.

    Raises:
        ValueError: for anything else, and for what has no memory: fake and meta tensors.
    """
    if isinstance(x, np.ndarray):
        address, place = x.__array_interface__["data"][0], "cpu"
        is_dense, size, own = x.flags.c_contiguous, x.size, None if dtype is None else _NUMPY.get(dtype)
        is_right = dtype is None or (x.dtype == own and is_dense and size >= numbers)
    else:
        address, place = x.data_ptr(), str(x.device)
        size = x.numel()
        is_right = dtype is None or (x.dtype == dtype and x.is_contiguous() and size >= numbers)
        is_right = is_right and not torch._is_functional_tensor(x)
    if not is_right or place != str(device) or (size and not address):
        raise ValueError(
            f"the core needs {numbers} dense numbers of {dtype or 'a known type'} in the memory of {device}, got "
            f"{type(x).__name__} of {x.dtype}, shape {tuple(x.shape)}, on {place}"
        )
    return address


_NUMPY = {torch.float32: np.dtype(np.float32), torch.float64: np.dtype(np.float64), torch.int16: np.dtype(np.int16)}


def samples_in_memory(waveform: Tensor) -> np.ndarray:
    """Return the samples of a CPU tensor as an array; float16 and bfloat16 ones as float32.

    Raises:
        ValueError: for samples that need a derivative, which an array gives none, or that a mode hides.
    """
    if not has_memory(waveform):
        raise ValueError(
            f"a stream takes samples, got a {type(waveform).__name__} within a transform or a mode that hides them"
        )
    has_tangent = forward_ad._current_level >= 0 and forward_ad.unpack_dual(waveform).tangent is not None
    if has_tangent or (waveform.requires_grad and torch.is_grad_enabled()):
        raise ValueError("a stream gives no derivatives: pass waveform.detach()")
    return _as_array(waveform)


@in_plain_torch
def _as_array(waveform: Tensor) -> Any:
    if waveform.device.type != "cpu":
        return waveform  # the caller refuses it
    waveform = waveform.detach()
    return (waveform.float() if waveform.dtype in (torch.float16, torch.bfloat16) else waveform).numpy()


@in_plain_torch
def as_plain_tensor(array: np.ndarray) -> Tensor:
    """Return a tensor on an array's memory, whatever modes there are."""
    return torch.from_numpy(array)
