#!/usr/bin/env python3
"""Make and test environments of other versions than the development environment's, with mmlm-fast as a wheel.

    python .ci/versions.py make NAME…                  make them; quick the second time
    python .ci/versions.py test [NAME…] [-- ARGUMENT…] make them and run the tests that depend on versions, on the CPU;
                                                       what follows -- goes to pytest in place of the files listed below

NAME is a file of .ci/versions: `floor` (what pyproject.toml admits), `gpu` (the GPU machine's; every kernel is compiled
for sm_90 too), `newest`; by default all. An environment lies in .venv-NAME. No GPU is needed, and git is out of sight
of the tests, as on the GPU machine. What was tested, and what came of it, is written to tests/versions.md, unless
arguments pick tests.

PYTHON312                a Python 3.12 to take (PYTHON311, …); else python3.12, then pyenv's, then this Python
MMLM_FAST_TORCH_INDEX    index to take torch from, such as PyTorch's index of CPU wheels
MMLM_FAST_CUDA_ARCHS     what the wheel's CUDA is compiled for (default 90)
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from bootstrap import can, create_venv, pip_of, run, say

ROOT = Path(__file__).resolve().parents[1]
PINS = ROOT / ".ci/versions"
TABLE = ROOT / "tests/versions.md"
PACKAGED = ["pyproject.toml", "setup.py", "csrc", "kernels", "mmlm_fast", "benchmarks"]
COMPILED = {".so", ".pyc"}
SHOWN = ("torch", "triton", "transformers", "numpy")
OPTIONAL = ("librosa", "soundfile", "av", "scipy", "scikit-learn", "jiwer", "torchvision")

# What the suite runs on the GPU, and what depends on versions and on what a machine lacks.
TESTS = f"""
{" ".join(sorted(path.stem for path in (ROOT / "benchmarks/ops").glob("[a-z]*.py")))}
audio_log_mel audio_cuda models
audio_extractors audio_files audio_kaldi audio_mel_spectrogram audio_nemo audio_resample audio_robust audio_streaming
audio_whisper audio_file_blocks audio_file_decoders audio_file_ends audio_file_lengths
cli hf_accelerate hf_attention hf_loss hf_training_loops hf_whole_models
launch masks nn_attention nn_layers nn_losses objectives positions towers
first_step lazy_logits nn_adapters packed_towers second_turn
"""


def digest_of(*paths: Path, also: str = "") -> str:
    digest = hashlib.sha256(also.encode())
    for top in paths:
        for path in sorted(p for p in top.rglob("*") if p.is_file()) if top.is_dir() else [top]:
            if path.suffix not in COMPILED:
                digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()


def python_of(version: str) -> str:
    """A Python of this version that runs: a shim of pyenv's may be on PATH for a version that is not switched on."""
    wanted = [os.environ.get(f"PYTHON{version.replace('.', '')}"), shutil.which(f"python{version}")]
    wanted += [str(p) for p in sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))]
    for python in filter(None, wanted):
        if can(python, f"import sys, venv; assert sys.version_info[:2] == tuple(map(int, '{version}'.split('.')))"):
            return python
    say(f"no Python {version} found: taking {sys.executable}, {sys.version.split()[0]}")
    return sys.executable


def floors() -> list[str]:
    """What pyproject.toml admits, at its oldest."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [*project["dependencies"], *project["optional-dependencies"]["triton"]]
    return [needed_one.split(";")[0].replace(">=", "==") for needed_one in needed if ">=" in needed_one]


@dataclass(frozen=True)
class Environment:
    """One of `.ci/versions`: its virtual environment, and the steps that make it."""

    name: str

    @property
    def venv(self) -> Path:
        return ROOT / f".venv-{self.name}"

    @property
    def python(self) -> Path:
        return self.venv / "bin/python"

    @property
    def pins(self) -> Path:
        return PINS / f"{self.name}.txt"

    @property
    def wheels(self) -> Path:
        return self.venv / "wheel"  # holds the one that is installed

    @property
    def is_gpu(self) -> bool:
        return self.name == "gpu"

    def requirements(self) -> list[str]:
        lines = (line.split("#")[0].strip() for line in self.pins.read_text().splitlines())
        return [*(floors() if self.name == "floor" else []), *filter(None, lines)]

    def python_version(self) -> str:
        found = re.search(r"Python (3\.\d+)", self.pins.read_text())
        assert found, f"{self.pins} must say its Python in a comment"
        return found[1]

    def fits(self, step: str, wanted: str) -> bool:
        """Whether a step was done for this; it is done again when that changes."""
        stamp = self.venv / f".mmlm_fast_{step}"
        return stamp.exists() and stamp.read_text() == wanted

    def make(self) -> None:
        pins = digest_of(self.pins, Path(__file__), also=" ".join(self.requirements()))
        arches = os.environ.get("MMLM_FAST_CUDA_ARCHS", "90")
        built = f"{pins} {ROOT} {arches} {os.environ.get('MMLM_FAST_CUDA')}"
        package = digest_of(*(ROOT / name for name in PACKAGED), also=built)
        if self.fits("pins", pins) and self.fits("package", package):
            return
        with self.locked(fcntl.LOCK_EX):
            if not self.python.exists():
                say(f"virtual environment in {self.venv}")
                create_venv(self.venv, python_of(self.python_version()))
            if not self.fits("pins", pins):
                say(f"{self.name}: packages, gigabytes the first time")
                self.install_packages()
                (self.venv / ".mmlm_fast_pins").write_text(pins)
            say(f"{self.name}: compiling csrc, installing the wheel")
            self.install_wheel(arches)
            (self.venv / ".mmlm_fast_package").write_text(package)
            say(f"ready: {self.venv}")

    def install_packages(self) -> None:
        pip, wanted, index = pip_of(self.python), self.requirements(), os.environ.get("MMLM_FAST_TORCH_INDEX")
        if index and not can(self.python, "import torch"):
            run(*pip, "install", next(line for line in wanted if line.startswith("torch==")), "--index-url", index)
        run(*pip, "install", "-q", *wanted)

    def install_wheel(self, arches: str) -> None:
        pip, tag = pip_of(self.python), self.output("import sys; print(sys.implementation.cache_tag)")
        # setuptools keeps what it once copied: a module that is gone would stay in the wheel.
        for stale in (ROOT / "build").glob(f"lib*{tag}"):
            shutil.rmtree(stale)
        shutil.rmtree(self.wheels, ignore_errors=True)
        environment = os.environ | ({"MMLM_FAST_CUDA_ARCHS": arches} if self.is_gpu else {"MMLM_FAST_CUDA": "0"})
        command = [*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", self.wheels, ROOT]
        subprocess.run([str(part) for part in command], env=environment, check=True)
        run(*pip, "install", "-q", "--no-deps", "--force-reinstall", *self.wheels.glob("*.whl"))

    def output(self, code: str) -> str:
        return subprocess.check_output([self.python, "-P", "-c", code], text=True).strip()

    @contextmanager
    def locked(self, how: int) -> Iterator[None]:
        """No wheel is installed while tests run from another: Triton's interpreter reads the sources as it goes."""
        self.venv.mkdir(parents=True, exist_ok=True)
        with (self.venv / ".mmlm_fast_lock").open("w") as file:
            try:
                fcntl.flock(file, how | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"waiting for another process that uses {self.venv}")
                fcntl.flock(file, how)
            yield

    def test(self, arguments: list[str]) -> bool:
        """Whether all was well; without `arguments`, the row of the table is written."""
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
        environment |= {"OMP_WAIT_POLICY": "passive", "PYTHONSAFEPATH": "1"}
        wanted = arguments or [f"tests/test_{name}.py" for name in TESTS.split()]
        spread = [] if arguments else ["-n", "2", "--dist", "loadscope", "--no-loadscope-reorder"]
        failed = []
        with self.locked(fcntl.LOCK_SH), tempfile.TemporaryDirectory() as folder:
            environment["PATH"] = path_without_git(Path(folder))
            assert shutil.which("git", path=environment["PATH"]) is None
            report = Path(folder, "tests.xml")
            commands: dict[str, list[object]] = {}
            if self.is_gpu and not arguments:
                commands["kernels for sm_90"] = [self.python, "-P", "tests/support/aot.py", "90"]
            commands["tests"] = [self.python, "-P", "-m", "pytest", "-q", "-m", "not slow and not aot"]
            commands["tests"] += [f"--junitxml={report}", *spread, *wanted]
            for what, command in commands.items():
                say(f"{self.name}: {what}")
                if subprocess.run([str(part) for part in command], cwd=ROOT, env=environment, check=False).returncode:
                    failed.append(what)
            if not arguments and report.exists():
                write_row(self.row(report, failed))
        if failed:
            say(f"{self.name}: failed: {', '.join(failed)}")
        return not failed

    def row(self, report: Path, failed: list[str]) -> list[str]:
        code = "import json, platform; from importlib import metadata as m\nfound = {}\n"
        code += (
            f"for n in {(*SHOWN, *OPTIONAL)}:\n try: found[n] = m.version(n)\n except m.PackageNotFoundError: pass\n"
        )
        found = json.loads(self.output(code + "print(json.dumps({'python': platform.python_version()} | found))"))
        suite = ElementTree.parse(report).getroot()[0].attrib
        red = int(suite["failures"]) + int(suite["errors"])
        passed = int(suite["tests"]) - red - int(suite["skipped"])
        lacks = ", ".join(name for name in OPTIONAL if name not in found)
        broken = [what for what in failed if what != "tests"]
        return [
            self.name, found["python"], *(found.get(name, "–") for name in SHOWN), lacks or "–", f"{passed:,}",
            suite["skipped"], ", ".join([str(red), *broken]), f"{date.today()}, {commit()}",
        ]  # fmt: skip


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


def commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "no commit known"


HEAD = """\
What `make test-versions` found: the tests that depend on versions and on optional packages, on a CPU, with mmlm-fast as
a wheel. `floor` is the oldest that pyproject.toml admits, `gpu` what a GPU machine has, `newest` what PyPI had. The
whole suite runs with the versions of `constraints.txt` (CI). Skipped tests say why: most need a CUDA device, a package
that is not there, or a class that this transformers lacks.

| set | Python | torch | Triton | transformers | numpy | without | passed | skipped | failed | when |
| --- | --- | --- | --- | --- | --- | --- | ---: | ---: | ---: | --- |
"""


def write_row(row: list[str]) -> None:
    lines = TABLE.read_text().splitlines() if TABLE.exists() else []
    rows = {line.split("|")[1].strip(): line for line in lines if line.startswith("| ") and " Python " not in line}
    rows = {name: line for name, line in rows.items() if name in names()}
    rows[row[0]] = f"| {' | '.join(row)} |"
    TABLE.write_text(HEAD + "".join(f"{rows[name]}\n" for name in names() if name in rows))


def names() -> list[str]:
    return sorted(path.stem for path in PINS.glob("*.txt"))


def main(arguments: list[str]) -> int:
    what, *rest = arguments or ["help"]
    split = rest.index("--") if "--" in rest else len(rest)
    chosen = rest[:split] or names()
    unknown = sorted(set(chosen) - set(names()))
    if what not in ("make", "test") or unknown:
        print(__doc__ if not unknown else f"no such set: {', '.join(unknown)}; known: {', '.join(names())}")
        return 0 if what in ("help", "-h", "--help") else 2
    good = True
    for environment in map(Environment, chosen):
        environment.make()
        good &= what == "make" or environment.test(rest[split + 1 :])
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
