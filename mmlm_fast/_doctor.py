"""What is installed, and which path each op takes on this machine."""

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

from mmlm_fast._version import __version__

PACKAGES = ("torch", "triton", "transformers", "numpy")
# Oldest Linux driver of each CUDA major version's minor-version compatibility (NVIDIA's release notes).
DRIVER_FLOOR = {11: "450.80.02", 12: "525.60.13", 13: "580.65.06"}


def doctor() -> str:
    """Describe this installation: versions, instruction set, CUDA, and which path each op takes here and why.

    Returns:
        Lines of plain text, as `mmlm-fast doctor` prints them.
    """
    import torch

    from mmlm_fast import core
    from mmlm_fast.audio.cuda import why_plain

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
    lines.append(f"  instruction set {isa}; {torch.get_num_threads()} threads")
    if build["cuda"]:
        floor = DRIVER_FLOOR.get(int(build["nvcc"].split(".")[0]), "unknown")
        lines.append(
            f"  CUDA {build['nvcc']} for sm_{', sm_'.join(build['cuda_archs'])}; needs driver {floor} or newer"
        )
        lines.append(f"  CUDA runtime: {cuda['message']}, {cuda['num_devices']} devices")
    if build["reason"]:
        lines.append(f"  without CUDA code: {build['reason']}" if not build["cuda"] else f"  note: {build['reason']}")
    gpu = torch.cuda.is_available()
    found = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())) if gpu else ""
    reason = (
        found if gpu else "none: " + ("a CPU build of torch" if torch.version.cuda is None else "no device or driver")
    )
    lines.append(f"torch's CUDA devices: {reason}")
    lines.append("ops:")
    reasons = [why_plain(i) for i in range(torch.cuda.device_count())] if gpu else []
    lines += [f"  {name}: {path}" for name, path in op_paths(gpu, next(filter(None, reasons), "")).items()]
    return "\n".join(lines)


def op_paths(gpu: bool, why_plain: str) -> dict[str, str]:
    """Public name -> the paths its tensors take on this machine; `why_plain`: why the core's CUDA code does not run."""
    from mmlm_fast.ops.parts import RECORDS

    paths = {}
    for op in RECORDS.values():
        on_cuda = op.on_cuda(why_plain) if gpu else "unused, no device"
        for name in op.functions or (op.name,):
            paths[name] = f"CPU {op.on_cpu()}; CUDA {on_cuda}"
    return dict(sorted(paths.items()))
