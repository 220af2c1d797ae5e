"""Launches of Triton kernels at little cost to the host.

Triton binds a launch's arguments by name, looks at each of them, and makes text of what it finds to look the binary up:
for the 30 arguments of an attention kernel as long as the kernel runs in decoding. Here a launch is looked up by what
Triton specialises: types of the arguments, dtypes and alignment of tensors, the few integers a kernel is specialised
for, constants and options. The first launch of each kind is Triton's own; whatever is unusual (a profiler's hook,
integers beyond 32 bits, another backend than CUDA, a Triton not known here) is so every time.
"""

from collections.abc import Callable, Sequence
from functools import partial, reduce
from operator import attrgetter, or_
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
KNOWN = (3, 4) <= VERSION <= (3, 9)  # what a compiled kernel's `run` takes, and what is specialised
INT32 = 2**31
_dtype = attrgetter("dtype")


class _Form:
    """Launches of a kernel whose arguments are of these types and whose constants have these names."""

    def __init__(self, jit: JITFunction, types: tuple[type, ...], names: tuple[str, ...]) -> None:
        parameters = jit.params
        count = sum(not p.is_constexpr for p in parameters)
        constants = [p.name for p in parameters[count:]]
        is_tensor = [issubclass(t, Tensor) for t in types]
        self.num_tensors = sum(is_tensor)
        self.integers = [i for i, t in enumerate(types) if t is int]
        self.specialised = [i for i in self.integers if not parameters[i].do_not_specialize]
        self.tail = [names.index(name) for name in constants if name in names]
        self.found: dict[tuple, tuple] = {}
        self.is_quick = (
            KNOWN
            and len(types) == count
            and not any(p.is_constexpr for p in parameters[:count])
            and len(self.tail) == len(constants)
            and all(is_tensor[: self.num_tensors])
            and {*types[self.num_tensors :]} <= {int, float, bool}
            and triton.runtime.driver.active.get_current_target().backend == "cuda"
        )


class Kernel:
    """A Triton kernel, launched as Triton's own: ``kernel[grid](*arguments, **constants_and_options)``."""

    def __init__(self, jit: JITFunction) -> None:
        self.jit = jit
        self.fn = jit.fn
        self.forms: dict[tuple, _Form] = {}

    def __getitem__(self, grid: Sequence[int]) -> Callable[..., None]:
        return partial(self._launch, grid)

    def _launch(self, grid: Sequence[int], *arguments: Any, **options: Any) -> None:
        types, names = tuple(map(type, arguments)), tuple(options)
        form = self.forms.get((types, names))
        if form is None:
            form = self.forms[types, names] = _Form(self.jit, types, names)
        integers = [arguments[i] for i in form.integers]
        if not form.is_quick or _is_wide(integers) or _is_watched(self.jit):
            self.jit[grid](*arguments, **options)
            return
        tensors, values, active = arguments[: form.num_tensors], tuple(options.values()), triton.runtime.driver.active
        device = active.get_current_device()
        key = (
            device,
            values,
            tuple(map(_dtype, tensors)),
            tuple([t.data_ptr() % 16 == 0 for t in tensors]),
            tuple([(arguments[i] == 1, arguments[i] % 16 == 0) for i in form.specialised]),
        )
        found = form.found.get(key)
        if found is None:
            compiled = self.jit[grid](*arguments, **options)
            if isinstance(compiled, CompiledKernel):
                tail = tuple(values[i] for i in form.tail)
                form.found[key] = compiled.run, compiled.function, compiled.packed_metadata, tail, compiled
            return
        run, function, metadata, tail, _ = found
        x, y, z = (*grid, 1, 1)[:3]
        run(x, y, z, active.get_current_stream(device), function, metadata, None, None, None, *arguments, *tail)


def _is_wide(integers: list[int]) -> bool:
    return bool(integers) and (max(integers) >= INT32 or min(integers) < -INT32)


def _is_watched(jit: JITFunction) -> bool:
    """Whether somebody wants to be told of launches: a profiler, a hook."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave) or jit.pre_run_hooks)


def kernel(**options: Any) -> Callable[[Callable], Any]:
    """Make a Triton kernel of a function, as `triton.jit` does, with quick launches.

    Args:
        options: Those of `triton.jit`. ``do_not_specialize``: integers for which no variants are compiled, all that
            change from call to call.
    """

    def make(function: Callable) -> Any:
        jit = triton.jit(**options)(function)
        return Kernel(jit) if isinstance(jit, JITFunction) else jit  # the interpreter's has nothing to look up

    return make


def ceil_div(a: int, b: int) -> int:
    """Round a / b up: `triton.cdiv` is made for kernels too, which costs the host 3 µs."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Round n up to a power of two, which costs the host a tenth of `triton.next_power_of_2`."""
    return 1 << max(n - 1, 0).bit_length()


def row_strides(*tensors: Tensor) -> tuple[int, list[int]]:
    """UNIT, and in it the strides of all dimensions but the last of each tensor.

    UNIT is 8 where all strides are multiples of it: a kernel told so loads 16 bytes at once.
    """
    strides = [stride for x in tensors for stride in x.stride()[:-1]]
    unit = 1 if reduce(or_, strides) % 8 else 8
    return unit, [stride // unit for stride in strides]


def empty_heads_last(
    like: Tensor, batch: int, heads: int, length: int, size: int, dtype: torch.dtype | None = None
) -> Tensor:
    """``[B, H, S, D]`` whose memory is ``[B, S, H, D]``: what the linear layer after attention reads."""
    strides = (length * heads * size, size, heads * size, 1)
    return like.new_empty_strided((batch, heads, length, size), strides, dtype=dtype)
