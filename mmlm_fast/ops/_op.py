"""What is known of an op before it is called: one record, from which its path and what doctor says of it follow."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from mmlm_fast.ops.paths import KERNEL, NATIVE, REFERENCE, Path, _switch, is_transformed

CORE_TYPES = (torch.float32, torch.bfloat16)
LOSS_TYPES = (torch.float32, torch.bfloat16, torch.float16)
KERNEL_TYPES = (torch.float32, torch.float16, torch.bfloat16)
HAS_TRITON = find_spec("triton") is not None
RECORDS: dict[str, "Op"] = {}


@dataclass(frozen=True, eq=False)
class Op:
    """One op.

    Args:
        name: The stem: of its module, its kernels, its test and its benchmark.
        native: Dtypes for which it has a path in the native core, on a CPU.
        smallest: There a call of ours costs more than torch's: for fewer numbers than these the formula is faster
            (measured, see CONTRIBUTING). By the op's kind where that decides.
        counts: What `smallest` counts.
        kernel: Dtypes for which it has a Triton kernel, on CUDA.
        kernel_where: Where alone the kernel is preferred, in words; empty: wherever there is one.
        otherwise: Name of the path that is taken where none of these is.
        torch_where: Where torch's own kernel is preferred, in words; empty: nowhere.
        has_cuda_core: Whether the native core holds its CUDA kernel, in place of Triton.
        functions: Public names that are made of it; by default its own.
    """

    name: str
    native: tuple[torch.dtype, ...] = CORE_TYPES
    smallest: int | Mapping[str, int] = 0
    counts: str = "numbers"
    kernel: tuple[torch.dtype, ...] = KERNEL_TYPES
    kernel_where: str = ""
    otherwise: str = REFERENCE
    torch_where: str = ""
    has_cuda_core: bool = False
    functions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        RECORDS[self.name] = self

    def least(self, kind: str | None = None) -> int:
        """How many numbers the native core is worth while for."""
        return self.smallest if kind is None else self.smallest[kind]  # type: ignore[index, return-value]

    def path(self, x: Tensor, size: int | None = None, *, kind: str | None = None, fits: bool = True) -> str:
        """The name of the path of a call on tensors like `x`.

        Args:
            size: What `smallest` counts, if not the numbers of `x`.
            kind: Of the op, where `smallest` depends on it.
            fits: Whether everything else about the call is such as our paths take.
        """
        wanted = _switch.path
        if wanted == REFERENCE or not fits or is_transformed():
            return REFERENCE
        device = x.device.type
        if device == "cpu":
            if wanted == KERNEL:
                return KERNEL if x.dtype in self.kernel else self.otherwise
            if x.dtype not in self.native:
                return self.otherwise
            # A graph is for inputs of any size: asked first, or the comparison would be one of its guards.
            if wanted == NATIVE or torch.compiler.is_compiling():
                return NATIVE
            return NATIVE if (x.numel() if size is None else size) >= self.least(kind) else self.otherwise
        if device == "cuda" and HAS_TRITON and x.dtype in self.kernel:
            return KERNEL
        return self.otherwise

    def on(self, device: str, why_no_core: str = "") -> tuple[Path, str]:
        """The path that it is made for on "cpu" or "cuda" tensors, and which of them take it, in words.

        Args:
            why_no_core: Why the native core's CUDA code does not run, where it does not.
        """
        path, dtypes, why_not = self._made_for(device, why_no_core)
        if why_not:
            return path, why_not
        other = Path[self.otherwise].value
        if path is Path.NATIVE and device == "cuda":
            return path, f"its CUDA kernel, for {_names(dtypes)}"
        floor = self._floor() if path is Path.NATIVE else ""
        where = f" {self.kernel_where}" if path is Path.KERNEL and self.kernel_where else ""
        return path, f"{_names(dtypes)}{floor}{where}, else {other}{self._torch()}"

    def explain(
        self, device: str, dtype: torch.dtype, size: int, kind: str | None = None, why_no_core: str = ""
    ) -> tuple[Path, str]:
        """The path of `size` of what counts, in `dtype` on "cpu" or "cuda", and why that one, in words."""
        made_for, dtypes, why_not = self._made_for(device, why_no_core)
        if self.has_cuda_core and device == "cuda":  # chosen where the waveforms are read, not by `path`
            path = made_for if dtype in dtypes and _switch.path != REFERENCE else Path.REFERENCE
        else:
            path = Path[self.path(_Like(torch.device(device), dtype), size, kind=kind)]  # type: ignore[arg-type]
        floor = self.least(kind)
        if _switch.path == path.name:
            why = "it is forced"
        elif path is Path.NATIVE and device == "cpu" and floor:
            why = f"from {floor:,} {self.counts} on it is the faster one"
        elif path is made_for and not why_not:
            where = f", {self.kernel_where}; else {Path[self.otherwise].value}" if self.kernel_where else ""
            why = f"it takes {_names(dtypes)}{where}"
        elif why_not:
            why = why_not
        elif dtype not in dtypes:
            why = f"{made_for.value} takes {_names(dtypes)}"
        else:
            why = f"for fewer than {floor:,} {self.counts} a call of {made_for.value} costs more than it saves"
        return path, why + self._torch()

    def _made_for(self, device: str, why_no_core: str) -> tuple[Path, tuple[torch.dtype, ...], str]:
        """The path that it is made for on a device, its dtypes, and why there is none, in words."""
        other = Path[self.otherwise]
        if device == "cpu":
            return (Path.NATIVE, self.native, "") if self.native else (other, (), "the native core has none for a CPU")
        if self.has_cuda_core:
            return (other, (), why_no_core) if why_no_core else (Path.NATIVE, self.native, "")
        if not self.kernel:
            return other, (), "there is no kernel for CUDA"
        return (Path.KERNEL, self.kernel, "") if HAS_TRITON else (other, (), "Triton is not installed")

    def _floor(self) -> str:
        if isinstance(self.smallest, int):
            return f" from {self.smallest:,} {self.counts} on" if self.smallest else ""
        return " from " + ", ".join(f"{n:,} ({kind})" for kind, n in self.smallest.items()) + f" {self.counts} on"

    def _torch(self) -> str:
        return f"; {Path.TORCH.value} {self.torch_where}" if self.torch_where else ""


class _Like(NamedTuple):
    """As much of a tensor as decides about its path, beside its size."""

    device: torch.device
    dtype: torch.dtype


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
