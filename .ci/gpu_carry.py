#!/usr/bin/env python3
"""Fill .whl with what benchmarks/gpu_suite.sh needs on the GPU machine: mmlm-fast's wheel and packages it lacks.

Beside the wheels lie `commit`, which the facts will name, `csrc.sha256`, of what the native core was built from, and
`tree.sha256`, of what that commit held.
"""

import json
import shutil
import subprocess
import sys

from bootstrap import run, say
from versions import ROOT, Environment

FOLDER = ROOT / ".whl"
GPU = Environment("gpu")
LACKING = ["soundfile==0.14.0", "cffi==2.1.1", "pycparser==3.12"]
MACHINE = ["--python-version", "3.12", "--implementation", "cp"]
MACHINE += [part for n in ("_2_28", "_2_17", "2014") for part in ("--platform", f"manylinux{n}_x86_64")]
PEERS = ["liger-kernel"]  # compared with where it is to be had
LARGEST_MIB = 60  # what may be carried, working tree included, is 64


def output(*command: str) -> str:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def main() -> None:
    """Fill the folder anew."""
    holds = output(str(GPU.python), "-P", "-c", "from mmlm_fast import _C; print(_C.build_info_json())")
    built = json.loads(holds)
    if not built["cuda"] or not any(arch.startswith("90") for arch in built["cuda_archs"]):
        sys.exit(f"the native core holds no CUDA code for sm_90, which the GPU machine needs: {holds}")
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    for wheel in GPU.wheels.glob("*.whl"):
        shutil.copy(wheel, FOLDER)
    download = [GPU.python, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", FOLDER, *MACHINE]
    run(*download, *LACKING)
    for name in PEERS:
        if subprocess.run([str(part) for part in (*download, name)], check=False).returncode:
            say(f"not carried: {name}")
    commit = output("git", "describe", "--always", "--dirty", "--exclude=*")
    (FOLDER / "commit").write_text(commit + "\n")
    core, tree = output("bash", "benchmarks/gpu_suite.sh", "digest").split()
    (FOLDER / "csrc.sha256").write_text(core + "\n")
    (FOLDER / "tree.sha256").write_text(tree + "\n")
    files = sorted(FOLDER.iterdir())
    size = sum(path.stat().st_size for path in files) / 2**20
    assert size < LARGEST_MIB, f"{size:.1f} MiB in {FOLDER}, more than {LARGEST_MIB}"
    say(f"{FOLDER.name}: {', '.join(path.name for path in files)}; {size:.1f} MiB")


if __name__ == "__main__":
    main()
