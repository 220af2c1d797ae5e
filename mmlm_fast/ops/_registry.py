"""The one place that talks to torch.library.

The PyTorch dispatcher is our only dispatch table: CPU tensors go to an op's portable path, CUDA tensors to its kernel.
"""

import re
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from mmlm_fast.ops.paths import KERNEL, forced_path

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_LIB = torch.library.Library("mmlm_fast", "FRAGMENT")


def looked_at(x: Tensor) -> Tensor:
    """The values themselves, of all samples where torch.vmap shows one: what may decide about an error."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x


def plain_float(number: float) -> float:
    """A constant in graphs with dynamic shapes too, where Dynamo makes symbols of floats."""
    return number if type(number) is float else number.__float__()


BY_STEM = "the launcher of the op's name, in the kernels of its module's"


def register_op(
    name: str,
    *,
    fake: Callable,
    native: Callable | None = None,
    portable: Callable | None = None,
    mutates: Sequence[str] = (),
    kernel: str | None = BY_STEM,
    kernel_takes: Callable[..., bool] | None = None,
) -> Callable[..., Any]:
    """Register one op: CPU tensors go to `native` or `portable`, CUDA tensors to `kernel`.

    Args:
        name: Under ``torch.ops.mmlm_fast``. Its schema is the annotated signature of `native` or `portable`.
        fake: Output shapes and dtypes only, for torch.compile.
        native: Implementation in the native core, which takes addresses: for CPU tensors alone.
        portable: Implementation in PyTorch, for any device; in place of `native`.
        mutates: Names of the arguments that are written.
        kernel: ``"module:function"`` of the launcher, imported on the first CUDA call, so that a machine without
            Triton can import the package. Where Triton is missing, CUDA tensors take `portable`, with one warning;
            without it they are an error. None where `portable` is made of ops that are dispatched themselves.
        kernel_takes: Given the op's arguments, whether the kernel is for them; other CUDA tensors take `portable`.

    Returns:
        The callable ``torch.ops.mmlm_fast.<name>.default``.
    """
    implementation = native or portable
    assert implementation is not None, f"{name} has no implementation"
    if kernel is BY_STEM:
        kernel = f"mmlm_kernels.{implementation.__module__.rpartition('.')[2].strip('_')}:{name}"
    _LIB.define(name + _schema(implementation, mutates))
    on_cpu = on_cuda = implementation
    if kernel is not None:
        on_cuda = _lazy(name, kernel, portable, kernel_takes)
        if kernel.startswith("mmlm_kernels"):
            on_cpu = _unless_forced(kernel, on_cpu, kernel_takes)
    _LIB.impl(name, on_cpu, "CPU")
    _LIB.impl(name, on_cuda, "CUDA")
    torch.library.register_fake(f"mmlm_fast::{name}", fake, lib=_LIB)
    return getattr(torch.ops.mmlm_fast, name).default


def _schema(implementation: Callable, mutates: Sequence[str]) -> str:
    """``(Tensor x, int n) -> Tensor`` from annotations. Single integers are numbers, lists of them sizes of a graph."""
    schema = torch.library.infer_schema(implementation, mutates_args=mutates).replace("SymInt ", "int ")
    names = iter("abcdefgh")
    return re.sub(r"\(a\d+!\)", lambda _: f"({next(names)}!)", schema)


def on_device(index: int) -> AbstractContextManager:
    """CUDA device `index` as the current one; where it is that already, as it always is with one GPU, nothing."""
    return nullcontext() if torch.cuda.current_device() == index else torch.cuda.device(index)


def device_index_of(name: str, args: Sequence[Any]) -> int:
    """The CUDA device of all tensors among an op's arguments, lists of tensors too.

    Raises:
        ValueError: for tensors of several devices: a kernel would read another device's memory, or the host's, by its
            address.
    """
    index = -1
    for arg in args:
        for tensor in arg if isinstance(arg, list) else (arg,):
            if not isinstance(tensor, Tensor):
                continue
            if index < 0:
                index = tensor.get_device()
            if tensor.get_device() != index or index < 0:
                raise ValueError(f"{name}: tensors must be on one CUDA device, got {', '.join(_devices(args))}")
    return index


def _devices(args: Sequence[Any]) -> list[str]:
    tensors = [t for arg in args for t in (arg if isinstance(arg, list) else (arg,)) if isinstance(t, Tensor)]
    return sorted({str(t.device) for t in tensors})


def _lazy(name: str, kernel: str, portable: Callable | None, kernel_takes: Callable[..., bool] | None) -> Callable:
    module, _, function = kernel.partition(":")
    resolved: list[Callable] = []

    def call(*args):
        index = device_index_of(name, args)
        if portable is not None and kernel_takes is not None and not kernel_takes(*args):
            return portable(*args)
        if not resolved:
            if module.startswith("mmlm_kernels") and find_spec("triton") is None:
                if portable is None:
                    raise RuntimeError(
                        f"mmlm_fast::{name} needs Triton for CUDA tensors, and it is not installed; the public "
                        "function runs the PyTorch formula there"
                    )
                warnings.warn(f"mmlm_fast.{name}: Triton is not installed, using the portable path", stacklevel=2)
                resolved.append(portable)
            else:
                resolved.append(getattr(import_module(module), function))
        # The dispatcher sets no device for an implementation in Python, and a launch goes to the current device's
        # stream: with a model spread over GPUs that is not where the tensors are.
        with on_device(index):
            return resolved[0](*args)

    return call


def _unless_forced(kernel: str, on_cpu: Callable, kernel_takes: Callable[..., bool] | None) -> Callable:
    """What CPU tensors take; the launcher, in Triton's interpreter, where `forced(Path.KERNEL)` asks for it."""
    module, _, function = kernel.partition(":")

    def call(*args):
        if forced_path() != KERNEL or not (kernel_takes is None or kernel_takes(*args)):
            return on_cpu(*args)
        return getattr(import_module(module), function)(*args)

    return call


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Cast floating-point tensors to autocast's dtype where autocast is on, as torch's own linear does."""
    device = "cpu"
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            device = tensor.device.type
        elif tensor is not None:
            raise ValueError(f"tensors expected, got {type(tensor).__name__}")
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t is not None and t.is_floating_point() else t for t in tensors)


def check_floating(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOATING:
        raise ValueError(f"{name} must be float32, float16, bfloat16 or float64, got {tensor.dtype}")


def check_like(name: str, tensor: Tensor, like: Tensor, shape: tuple[int, ...]) -> None:
    """`tensor` has `shape` and the dtype and device of `like`, or ValueError."""
    check_floating(name, tensor)
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.dtype != like.dtype or tensor.device != like.device:
        raise ValueError(f"{name} must be {like.dtype} on {like.device}, got {tensor.dtype} on {tensor.device}")


def num_tokens(inputs: Sequence[Tensor]) -> int:
    """Of inputs ``[*batch, T or 1, K_i]``. Not the largest: beside no tokens at all a broadcast input still has one."""
    for x in inputs:  # Dynamo of torch 2.8 traces no next() with a default
        if x.shape[-2] != 1:
            return x.shape[-2]
    return 1


def check_tokens(name: str, features: list[Tensor]) -> int:
    """Inputs ``[*batch, T or 1, K_i]`` agree in dtype, device and batch; returns T."""
    if not features:
        raise ValueError(f"{name} must hold at least one tensor, got none")
    for tensor in features:
        check_floating(f"{name}[i]", tensor)
        if tensor.dim() < 2:
            raise ValueError(f"{name} must be [*batch, tokens, size], got shape {tuple(tensor.shape)}")
        if tensor.shape[-1] == 0:
            raise ValueError(f"{name} must have a last size of at least 1, got shape {tuple(tensor.shape)}")
    first = features[0]
    tokens = num_tokens(features)
    batches = {tuple(x.shape[:-2]) for x in features}
    if len(batches) > 1 or any(x.shape[-2] not in (1, tokens) for x in features):
        raise ValueError(
            f"{name} must share their batch shape and have the same number of tokens or 1, "
            f"got {[tuple(x.shape) for x in features]}"
        )
    if any(x.dtype != first.dtype or x.device != first.device for x in features):
        raise ValueError(f"{name} must share dtype and device, got {[(str(x.dtype), str(x.device)) for x in features]}")
    return tokens
