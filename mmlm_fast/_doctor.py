"""What is installed, and which path each op takes on this machine."""

import os
import platform
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from mmlm_fast._version import __version__

if TYPE_CHECKING:
    from mmlm_fast.ops.parts import Op
    from mmlm_fast.ops.paths import Path

PACKAGES = ("torch", "triton", "transformers", "numpy")
# Oldest Linux driver of each CUDA major version's minor-version compatibility (NVIDIA's release notes).
DRIVER_FLOOR = {11: "450.80.02", 12: "525.60.13", 13: "580.65.06"}


def doctor(op: str | None = None, *, dtype: Any = None, size: int | None = None, device: str = "cpu") -> str:
    """Describe this installation: versions, instruction set, CUDA, and which path each op takes here and why.

    Args:
        op: Public name of one op, such as ``"glu"`` or ``"audio.log_mel"``: what it alone takes, and why.
        dtype: Of its tensors, a ``torch.dtype`` or the name of one; by default all that have a path of their own.
        size: Of its tensors, in what the op counts: numbers of the input, scores of attention, logits or pairs of a
            loss. By default every size at which another path begins.
        device: Of its tensors, ``"cpu"`` or ``"cuda"``.

    Returns:
        Lines of plain text, as `mmlm-fast doctor` prints them.

    Raises:
        ValueError: for an op, a dtype or a device that is none, a negative size, and options without an op.
    """
    if op is not None:
        return "\n".join(_explained(op, dtype, size, device))
    if dtype is not None or size is not None or device != "cpu":
        raise ValueError("dtype, size and device are of an op: doctor('glu', dtype='bfloat16', size=2**20)")
    lines = _installed()
    if not _has_torch():
        return "\n".join([*lines, "ops need torch; mmlm_fast.audio.np, audio features of numpy arrays, does not"])
    return "\n".join([*lines, *_torch_devices(), *_paths("cpu"), *_paths("cuda")])


def _has_torch() -> bool:
    try:
        import_module("torch")
    except ImportError:
        return False
    return True


def _installed() -> list[str]:
    from mmlm_fast import core
    from mmlm_fast.audio.spec import num_threads

    build, cuda = core.build_info(), core.cuda_status()
    lines = [f"mmlm-fast {__version__}, Python {platform.python_version()}, {sys.platform} {platform.machine()}"]
    for name in PACKAGES:
        try:
            lines.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            lines.append(f"{name} not installed")
    lines.append(f"native core: built by {build['compiler']}")
    cap = os.environ.get("MMLM_FAST_ISA")
    capped = f", capped by MMLM_FAST_ISA={cap}" if cap else ""
    isa = f"{core.active_isa()} (this CPU has {core.best_isa()}){capped}"
    lines.append(f"  instruction set {isa}; {num_threads()} threads")
    if build["cuda"]:
        floor = DRIVER_FLOOR.get(int(build["nvcc"].split(".")[0]), "unknown")
        lines.append(
            f"  CUDA {build['nvcc']} for sm_{', sm_'.join(build['cuda_archs'])}; needs driver {floor} or newer"
        )
        lines.append(f"  CUDA runtime: {cuda['message']}, {cuda['num_devices']} devices")
    if build["reason"]:
        lines.append(f"  without CUDA code: {build['reason']}" if not build["cuda"] else f"  note: {build['reason']}")
    return lines


def _torch_devices() -> list[str]:
    import torch

    gpu = torch.cuda.is_available()
    found = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())) if gpu else ""
    reason = (
        found if gpu else "none: " + ("a CPU build of torch" if torch.version.cuda is None else "no device or driver")
    )
    return [f"torch's CUDA devices: {reason}"]


def _paths(device: str) -> list[str]:
    """What each op takes on a device, by path and by public name."""
    import torch

    from mmlm_fast.ops.paths import Path

    if device == "cuda" and not torch.cuda.is_available():
        return ["ops on CUDA tensors: no device here"]
    named: dict[Path, list[str]] = {path: [] for path in (Path.NATIVE, Path.KERNEL, Path.TORCH, Path.REFERENCE)}
    for name, op in _ops().items():
        path, why = op.on(device, _why_no_core(device))
        named[path].append(f"    {name}: {why}")
    lines = [f"ops on {device.upper()} tensors, by path:"]
    for path, ops in named.items():
        lines += [f"  {path.value}:", *sorted(ops)] if ops else []
    return lines


def _explained(name: str, dtype: Any, size: int | None, device: str) -> Iterator[str]:
    import torch

    ops = _ops()
    if name not in ops:
        raise ValueError(f"op must be one of {', '.join(sorted(ops))}, got {name!r}")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {device!r}")
    if size is not None and size < 0:
        raise ValueError(f"size must not be negative, got {size}")
    op = ops[name]
    wanted = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not isinstance(wanted, torch.dtype):
        raise ValueError(f"dtype must be a torch.dtype or the name of one, got {dtype!r}")
    for kind in (None,) if isinstance(op.smallest, int) else op.smallest:
        least = op.least(kind)
        for one in [wanted] if wanted else sorted({*op.native, *op.kernel}, key=str):
            found: dict[tuple[Path, str], int] = {}  # what is found again for another size is told once
            for count in [size] if size is not None else sorted({max(least - 1, 0), least}):
                found.setdefault(op.explain(device, one, count, kind, _why_no_core(device)), count)
            told = f"{name}{f' ({kind})' if kind else ''}, {str(one).removeprefix('torch.')} on {device.upper()}"
            for (path, why), count in found.items():
                counted = f"{count:,} {op.counts}" if size is not None or len(found) > 1 else f"any {op.counts}"
                yield f"{told}, {counted}: {path.value}: {why}"


def _ops() -> dict[str, "Op"]:
    """Public name -> record."""
    from mmlm_fast.ops.parts import RECORDS

    import_module("mmlm_fast.audio.spectral")  # an op is known when its module has been imported
    import_module("mmlm_fast.ops")
    return {name: op for op in RECORDS.values() for name in op.functions or (op.name,)}


def _why_no_core(device: str) -> str:
    """Why the native core's CUDA code does not run on a device that is here; empty where it does, or there is none."""
    import torch

    from mmlm_fast.audio.cuda import why_plain

    if device != "cuda" or not torch.cuda.is_available():
        return ""
    return next(filter(None, map(why_plain, range(torch.cuda.device_count()))), "")
