"""One process of the suite: `python -m mmlm_benchmarks.gpu.job STAGE NAME`. Its surroundings come by environment."""

import argparse
import importlib.util
import os
import sys
import time
from typing import Any

from mmlm_benchmarks.gpu.plan import SYSTEMS

FACTS, DEVICE, STAND_IN, DEADLINE = (f"MMLM_GPU_{name}" for name in ("FACTS", "DEVICE", "STAND_IN", "DEADLINE"))
CASES = "MMLM_GPU_CASES"  # a regular expression: of what is timed, the cases whose names it is found in
TURN = "MMLM_GPU_TURN"  # the file whose lock is the right to use the device alone


def main(argv: list[str] | None = None) -> int:
    """Run a job; returns 0 if all it checked holds, 1 if something failed, 70 if the CUDA context was lost."""
    parser = argparse.ArgumentParser(prog="mmlm_benchmarks.gpu.job", description=__doc__)
    parser.add_argument("stage", choices=["probe", "check", "warm", "time", "candidates", "profile"])
    parser.add_argument("name")
    args = parser.parse_args(argv)
    # A rehearsal's file makes kernels run without a GPU; it must come before any of them is imported.
    stand_in = os.environ.get(STAND_IN, "")
    if stand_in:
        spec = importlib.util.spec_from_file_location("mmlm_gpu_stand_in", stand_in)
        module = sys.modules["mmlm_gpu_stand_in"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.stand_in(args.stage, args.name)

    from mmlm_benchmarks.gpu.device import Device
    from mmlm_benchmarks.gpu.facts import Facts

    device = Device(os.environ.get(DEVICE, "cuda"), bool(stand_in))
    facts = Facts(os.environ[FACTS], stage=args.stage, job=args.name, commit=os.environ.get("MMLM_COMMIT"))
    return run(args.stage, args.name, device, facts)


def run(stage: str, name: str, device: Any, facts: Any) -> int:
    """Import what the job needs, and no more: what cannot be imported costs its own jobs only."""
    from mmlm_benchmarks.gpu import correctness, running

    deadline = float(os.environ.get(DEADLINE, "inf"))

    def left() -> float:
        return deadline - time.time()

    try:
        if stage == "probe":
            from mmlm_benchmarks.gpu import probe

            good = probe.run(device, facts)
        elif stage == "check" and name in SYSTEMS:
            from mmlm_benchmarks.gpu import systems

            good = systems.JOBS[name](device, facts)
        elif stage == "check":
            good = correctness.run(name, device, facts)
        elif stage == "profile":
            good = correctness.run_one_step(name, device)
        elif stage == "candidates" or ":" in name:
            from mmlm_benchmarks.gpu import candidates

            good = candidates.run(name, device, facts, left)
        else:
            from mmlm_benchmarks.gpu import timing

            good = timing.run(name, device, facts, left, warm_only=stage == "warm")
    except correctness.ContextLostError as error:
        print(error)
        return running.POISONED
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
