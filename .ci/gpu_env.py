#!/usr/bin/env python3
"""Make .venv-gpu: the versions of the GPU machine (.ci/gpu-machine.txt) with mmlm-fast as it gets there, as a wheel.

    python .ci/gpu_env.py             make it; quick the second time
    python .ci/gpu_env.py test …      make it, then compile every kernel for sm_90 and run the tests there, on the CPU;
                                      what follows goes to pytest in place of the files listed below

No GPU is needed. git is out of sight of the tests, as on that machine.

PYTHON312                a Python 3.12 to take; else python3.12, then pyenv's, then this Python
MMLM_FAST_TORCH_INDEX    index to take torch from, such as PyTorch's index of CPU wheels
MMLM_FAST_CUDA_ARCHS     what the wheel's CUDA is compiled for (default 90)
MMLM_FAST_GPU_VENV       where to make the environment (default .venv-gpu)
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bootstrap import can, create_venv, pip_of, run, say

ROOT = Path(__file__).resolve().parents[1]
VENV = Path(os.environ.get("MMLM_FAST_GPU_VENV", ROOT / ".venv-gpu")).absolute()
PYTHON = VENV / "bin/python"
PINS = ROOT / ".ci/gpu-machine.txt"
WHEELS = VENV / "wheel"  # holds the one that is installed
PACKAGED = ["pyproject.toml", "setup.py", "csrc", "kernels", "mmlm_fast", "benchmarks"]
COMPILED = {".so", ".pyc"}

# What the suite runs on the GPU, and what depends on the versions and on what that machine lacks.
TESTS = """
interval_attention concat_linear fuse_modalities add_norm glu gated_add qk_norm_rope merge_embeddings norm_pixel_shuffle
patch_embed linear_cross_entropy clip_loss siglip_loss audio_log_mel audio_cuda models
audio_extractors audio_files audio_kaldi audio_mel_spectrogram audio_nemo audio_resample audio_robust audio_streaming
audio_whisper cli hf_accelerate hf_attention hf_loss masks nn_attention nn_layers nn_losses objectives positions towers
"""


def digest_of(*paths: Path, also: str = "") -> str:
    digest = hashlib.sha256(also.encode())
    for top in paths:
        for path in sorted(p for p in top.rglob("*") if p.is_file()) if top.is_dir() else [top]:
            if path.suffix not in COMPILED:
                digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()


def python_312() -> str:
    """A Python 3.12 that runs: a shim of pyenv's may be on PATH for a version that is not switched on."""
    wanted = [os.environ.get("PYTHON312"), shutil.which("python3.12")]
    wanted += [str(p) for p in sorted(Path.home().glob(".pyenv/versions/3.12*/bin/python"))]
    for python in filter(None, wanted):
        if can(python, "import sys, venv; assert sys.version_info[:2] == (3, 12)"):
            return python
    say(f"no Python 3.12 found, the GPU machine's: taking {sys.executable}, {sys.version.split()[0]}")
    return sys.executable


class Stamp:
    """What a step was done for; it is done again when that changes."""

    def __init__(self, name: str, wanted: str) -> None:
        self.path, self.wanted = VENV / f".mmlm_fast_{name}", wanted

    def fits(self) -> bool:
        return self.path.exists() and self.path.read_text() == self.wanted

    def set(self) -> None:
        self.path.write_text(self.wanted)


@contextmanager
def locked(how: int) -> Iterator[None]:
    """No wheel is installed while tests run from another: Triton's interpreter reads the sources as it goes."""
    VENV.mkdir(parents=True, exist_ok=True)
    with (VENV / ".mmlm_fast_lock").open("w") as file:
        try:
            fcntl.flock(file, how | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another process that uses {VENV}")
            fcntl.flock(file, how)
        yield


def install_pins(pip: list[object]) -> None:
    index = os.environ.get("MMLM_FAST_TORCH_INDEX")
    if index and not can(PYTHON, "import torch"):
        torch = next(line for line in PINS.read_text().splitlines() if line.startswith("torch=="))
        run(*pip, "install", torch, "--index-url", index)
    run(*pip, "install", "-q", "-r", PINS)


def install_wheel(pip: list[object]) -> None:
    # setuptools keeps what it once copied: a module that is gone would stay in the wheel.
    for stale in (ROOT / "build").glob(f"lib*{tag()}"):
        shutil.rmtree(stale)
    shutil.rmtree(WHEELS, ignore_errors=True)
    os.environ.setdefault("MMLM_FAST_CUDA_ARCHS", "90")
    run(*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", WHEELS, ROOT)
    run(*pip, "install", "-q", "--no-deps", "--force-reinstall", *WHEELS.glob("*.whl"))


def tag() -> str:
    code = "import sys; print(sys.implementation.cache_tag)"
    return subprocess.check_output([PYTHON, "-c", code], text=True).strip()


def make() -> None:
    arches = os.environ.get("MMLM_FAST_CUDA_ARCHS", "90")
    pins = Stamp("pins", digest_of(PINS, Path(__file__)))
    built = f"{pins.wanted} {ROOT} {arches} {os.environ.get('MMLM_FAST_CUDA')}"
    package = Stamp("package", digest_of(*(ROOT / name for name in PACKAGED), also=built))
    if pins.fits() and package.fits():
        return
    with locked(fcntl.LOCK_EX):
        _make(pins, package)


def _make(pins: Stamp, package: Stamp) -> None:
    if not PYTHON.exists():
        say(f"virtual environment in {VENV}")
        create_venv(VENV, python_312())
    pip = pip_of(PYTHON)
    if not pins.fits():
        say("the GPU machine's packages: gigabytes the first time")
        install_pins(pip)
        pins.set()
    say("mmlm-fast: compiling csrc, installing the wheel")
    install_wheel(pip)
    package.set()
    say(f"ready: {VENV}")


def path_without_git(folder: Path) -> str:
    """PATH with everything it has but git: folders that hold git are replaced by links to the rest of them."""
    parts = []
    for i, part in enumerate(os.environ.get("PATH", os.defpath).split(os.pathsep)):
        if not Path(part, "git").exists():
            parts.append(part)
            continue
        mirror = folder / str(i)
        mirror.mkdir()
        for program in Path(part).iterdir():
            if not program.name.startswith("git"):
                (mirror / program.name).symlink_to(program)
        parts.append(str(mirror))
    return os.pathsep.join(parts)


def test(arguments: list[str]) -> int:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    environment |= {"OMP_WAIT_POLICY": "passive", "PYTHONSAFEPATH": "1"}
    wanted = arguments or [f"tests/test_{name}.py" for name in TESTS.split()]
    spread = [] if arguments else ["-n", "2", "--dist", "loadscope", "--no-loadscope-reorder"]
    commands = {
        "kernels for sm_90": [PYTHON, "-P", "tests/aot.py", "90"],
        "tests": [PYTHON, "-P", "-m", "pytest", "-q", "-m", "not slow and not aot", *spread, *wanted],
    }
    if arguments:
        del commands["kernels for sm_90"]
    failed = []
    with locked(fcntl.LOCK_SH), tempfile.TemporaryDirectory() as folder:
        environment["PATH"] = path_without_git(Path(folder))
        assert shutil.which("git", path=environment["PATH"]) is None
        for name, command in commands.items():
            say(f"{name}, with the GPU machine's versions")
            if subprocess.run([str(part) for part in command], cwd=ROOT, env=environment, check=False).returncode:
                failed.append(name)
    if failed:
        say(f"failed: {', '.join(failed)}")
    return len(failed) > 0


if __name__ == "__main__":
    make()
    if sys.argv[1:2] == ["test"]:
        sys.exit(test(sys.argv[2:]))
