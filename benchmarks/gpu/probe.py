"""Stage `probe`: what machine this is, and how fast memory and matrix products are there."""

import shutil
import subprocess
import sys
import time
from importlib.util import find_spec

from mmlm_benchmarks import harness
from mmlm_benchmarks.gpu.device import Device
from mmlm_benchmarks.gpu.facts import Facts

MODULES = ("triton", "transformers", "soundfile", "pytest", "xdist", "hypothesis", "matplotlib", "liger_kernel")
PROGRAMS = ("git", "nvcc", "ncu", "compute-sanitizer", "nvidia-smi")
SMI = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu,power.draw"


def run(device: Device, facts: Facts) -> bool:
    """Write facts about the machine; returns whether the native core loads there."""
    facts.write(
        "probe",
        stand_in=device.is_stand_in,
        python=sys.version.split()[0],
        modules={name: find_spec(name) is not None for name in MODULES},
        programs={name: shutil.which(name) is not None for name in PROGRAMS},
    )
    start = time.perf_counter()
    import torch

    if device.type == "cuda":
        facts.write("card", smi=output("nvidia-smi", f"--query-gpu={SMI}", "--format=csv"), torch=card(torch))
    facts.write("environment", **harness.environment(device.type))
    from mmlm_fast import core, doctor

    status = core.cuda_status()
    facts.write("native core", **status)
    machine = harness.measure_machine(device.type)
    facts.write(
        "machine", copy_gb_per_s=machine.bytes_per_second / 1e9, matmul_gflop_per_s=machine.flops_per_second / 1e9
    )
    import transformers  # noqa: F401  its pages are cold here and warm for everybody after

    facts.write("imports", seconds=time.perf_counter() - start)
    facts.write("doctor", text=doctor())
    return device.is_stand_in or (bool(status["compiled"]) and status["num_devices"] > 0)


def card(torch) -> dict[str, object]:
    found = torch.cuda.get_device_properties(0)
    names = ("name", "major", "minor", "total_memory", "multi_processor_count", "L2_cache_size")
    return {name: getattr(found, name) for name in names if hasattr(found, name)}


def output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}: {error}"
    return (done.stdout + done.stderr).strip()[-2000:]
