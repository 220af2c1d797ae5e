"""What is known of an op before it is called: one record, from which its path and what doctor says of it follow."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec

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

    def on_cpu(self) -> str:
        """What a CPU tensor takes, in words."""
        other = Path[self.otherwise].value
        if not self.native:
            return other
        sizes = [self.smallest] if isinstance(self.smallest, int) else sorted(set(self.smallest.values()))
        floor = f" from {' or '.join(f'{n:,}' for n in sizes)} {self.counts} on" if sizes[-1] else ""
        return f"{Path.NATIVE.value} for {_names(self.native)}{floor}, else {other}{self._torch()}"

    def on_cuda(self, why_no_core: str = "") -> str:
        """What a CUDA tensor takes, in words; `why_no_core`: why the native core's CUDA code does not run."""
        if self.has_cuda_core:
            return f"{Path[self.otherwise].value}: {why_no_core}" if why_no_core else "a CUDA kernel of the native core"
        if not self.kernel:
            return Path[self.otherwise].value
        if not HAS_TRITON:
            return f"{Path[self.otherwise].value}: Triton is not installed"
        where = f" {self.kernel_where}" if self.kernel_where else ""
        return f"{Path.KERNEL.value} for {_names(self.kernel)}{where}, else {Path[self.otherwise].value}{self._torch()}"

    def _torch(self) -> str:
        return f"; {Path.TORCH.value} {self.torch_where}" if self.torch_where else ""


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
