"""Build mmlm_fast._C with ninja. csrc/ includes no torch header, so one binary serves every torch version.

Environment:
  MMLM_FAST_CUDA=auto|0|1            auto (default): CUDA when nvcc is found; 1: fail without nvcc; 0: CPU only
  MMLM_FAST_CUDA_ARCHS=80;90+PTX     SASS for each, PTX too where marked; default below
  MMLM_FAST_WIDE=1                   with the ISA `wide`, for tests: AVX-512's vectors on any machine (a third larger)
  MMLM_FAST_DEBUG=1                  -O0 -g
  CXX, CXXFLAGS, LDFLAGS, CUDACXX, CUDA_HOME, MAX_JOBS
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
DEFAULT_CUDA_ARCHS = "80;90;100;120+PTX"
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
ISA_FLAGS = {
    "_avx2": "-mavx2 -mfma",
    "_avx512": "-mavx512f -mavx512vl -mavx512dq -mavx512bw -mavx2 -mfma -mprefer-vector-width=512",
    "_wide": ("-mavx2 -mfma " if IS_X86 else "") + "-DMMLM_VECTOR_BYTES=64 -Wno-psabi",
}
WITH_WIDE = os.environ.get("MMLM_FAST_WIDE") == "1"
# No -ffast-math: NaN must stay NaN. Contraction to FMA is wanted and deterministic for one ISA.
CXX_FLAGS = (
    "-std=c++17 -fPIC -fvisibility=hidden -fvisibility-inlines-hidden -ffunction-sections -fdata-sections "
    "-fno-math-errno -ffp-contract=fast -Wall -Wextra"
)


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    candidates = [
        os.environ.get("CUDACXX"),
        home and os.path.join(home, "bin/nvcc"),
        shutil.which("nvcc"),
        "/usr/local/cuda/bin/nvcc",
    ]
    return next((c for c in candidates if c and Path(c).exists()), None)


def output_of(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def cuda_library_folder(nvcc: str) -> Path:
    # A wrapper on PATH may exec the real nvcc elsewhere: ask it where it lives.
    top = re.search(r"^#\$ TOP=(.*)$", output_of(nvcc, "-v", "-E", "-x", "cu", os.devnull, "-o", os.devnull), re.M)
    home = Path(top.group(1).strip()).resolve() if top else Path(nvcc).resolve().parents[1]
    for name in ("lib64", "lib", f"targets/{platform.machine()}-linux/lib"):
        if (home / name / "libcudart_static.a").exists():
            return home / name
    raise SystemExit(f"no libcudart_static.a under {home}: install the CUDA runtime's development files")


def gencode_flags(nvcc: str) -> tuple[list[str], list[str], list[str]]:
    """Compiler flags, the architectures they cover, and the wanted ones this nvcc does not know."""
    known = output_of(nvcc, "--list-gpu-code").split()
    flags, kept, unknown = [], [], []
    wanted = os.environ.get("MMLM_FAST_CUDA_ARCHS", DEFAULT_CUDA_ARCHS).replace(" ", ";").replace(",", ";")
    for entry in filter(None, wanted.split(";")):
        arch = entry.removesuffix("+PTX")
        if f"sm_{arch}" not in known:
            unknown.append(entry)
            continue
        kept.append(entry)
        flags.append(f"-gencode=arch=compute_{arch},code=sm_{arch}")
        if entry.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{arch},code=compute_{arch}")
    if not kept:
        raise SystemExit(f"MMLM_FAST_CUDA_ARCHS={wanted}: this nvcc knows none of them, only {' '.join(known)}")
    return flags, kept, unknown


class NinjaBuild(build_ext):
    """One ninja file for g++ and nvcc; incremental between runs."""

    def build_extension(self, ext: Extension) -> None:
        wanted = os.environ.get("MMLM_FAST_CUDA", "auto")
        if wanted not in ("auto", "0", "1"):
            raise SystemExit(f"MMLM_FAST_CUDA must be auto, 0 or 1, got {wanted!r}")
        nvcc = None if wanted == "0" else find_nvcc()
        if wanted == "1" and nvcc is None:
            raise SystemExit("MMLM_FAST_CUDA=1 but no nvcc found: set CUDACXX or CUDA_HOME, or MMLM_FAST_CUDA=0")

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(self.build_temp).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        info = {"cuda": nvcc is not None, "reason": "", "cuda_archs": [], "nvcc": "", "compiler": ""}
        info["compiler"] = output_of(os.environ.get("CXX", "g++"), "--version").splitlines()[0]
        if nvcc is None:
            info["reason"] = "MMLM_FAST_CUDA=0" if wanted == "0" else "no nvcc on the build machine"
        (folder / "build.ninja").write_text(self.ninja_file(nvcc, target, folder, info))
        subprocess.check_call([ninja_path(), "-C", str(folder), *jobs()])
        told = (
            f"CUDA {info['nvcc']} for {', '.join(info['cuda_archs'])}"
            if info["cuda"]
            else f"CPU only ({info['reason']}); the Triton kernels do not need nvcc"
        )
        print(f"mmlm_fast._C: {told}", file=sys.stderr, flush=True)

    def ninja_file(self, nvcc: str | None, target: Path, folder: Path, info: dict) -> str:
        import pybind11

        optimise = "-O0 -g" if os.environ.get("MMLM_FAST_DEBUG") == "1" else "-O3"
        include = f"-I{CSRC} -isystem {pybind11.get_include()} -isystem {sysconfig.get_paths()['include']}"
        link = f"-shared -Wl,--gc-sections -Wl,--version-script={CSRC}/exports.map {os.environ.get('LDFLAGS', '')}"
        link += "" if "-g" in optimise else " -s"
        options = f"{optimise} -DMMLM_WIDE" if WITH_WIDE else optimise
        lines = [
            f"cxx = {os.environ.get('CXX', 'g++')}",
            f"cxxflags = {CXX_FLAGS} {options} {include} {os.environ.get('CXXFLAGS', '')}",
            "rule cxx",
            "  command = $cxx -MMD -MF $out.d $cxxflags $isa -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
        ]
        libraries = "-lpthread -ldl"
        cuda_sources: list[Path] = []
        if nvcc is not None:
            gencode, info["cuda_archs"], unknown = gencode_flags(nvcc)
            info["nvcc"] = re.search(r"release ([\d.]+)", output_of(nvcc, "--version")).group(1)
            info["reason"] = f"nvcc {info['nvcc']} does not know sm_{', sm_'.join(unknown)}" if unknown else ""
            lines += [
                f"nvcc = {nvcc}",
                f"nvccflags = -std=c++17 {optimise.split()[0]} -cudart static -Xcompiler=-fPIC,-fvisibility=hidden "
                f"{' '.join(gencode)} -I{CSRC}",
                "rule cu",
                "  command = $nvcc -MD -MF $out.d $nvccflags -c $in -o $out",
                "  depfile = $out.d",
                "  deps = gcc",
            ]
            cuda_sources = sorted(CSRC.rglob("*.cu"))
            libraries = f"-L{cuda_library_folder(nvcc)} -lcudart_static -lrt -ldl -lpthread"
        lines += ["rule link", f"  command = $cxx $in {link} {libraries} -o $out"]

        objects = []
        for source in [*cxx_sources(nvcc is not None), write_build_info(folder, info)]:
            objects.append(f"{object_name(source)}.o")
            flags = next((f for suffix, f in ISA_FLAGS.items() if source.stem.endswith(suffix)), "")
            lines += [f"build {objects[-1]}: cxx {source}", f"  isa = {flags}"]
        for source in cuda_sources:
            objects.append(f"{object_name(source)}.cu.o")
            lines.append(f"build {objects[-1]}: cu {source}")
        return "\n".join([*lines, f"build {target}: link {' '.join(objects)}", f"default {target}", ""])


def object_name(source: Path) -> str:
    """Of the folder too: files of one name lie in several."""
    return "_".join(source.relative_to(CSRC).with_suffix("").parts) if source.is_relative_to(CSRC) else source.stem


def cxx_sources(with_cuda: bool) -> list[Path]:
    def wanted(path: Path) -> bool:
        if path.stem == "cuda_stub":
            return not with_cuda
        if path.stem.endswith("_wide"):
            return WITH_WIDE
        return IS_X86 or not path.stem.endswith(tuple(ISA_FLAGS))

    return [path for path in sorted(CSRC.rglob("*.cpp")) if wanted(path)]


def write_build_info(folder: Path, info: dict) -> Path:
    # Inside the binary, where neither an editable install nor a copied file can disagree with it.
    path = folder / "build_info.cpp"
    text = f'namespace mmlm {{ const char* build_info_json() {{ return R"J({json.dumps(info)})J"; }} }}\n'
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
    return path


def ninja_path() -> str:
    try:
        import ninja

        return os.path.join(ninja.BIN_DIR, "ninja")
    except ImportError:
        return shutil.which("ninja") or sys.exit("ninja not found: pip install ninja")


def jobs() -> list[str]:
    return ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []


# Folders without a package name of their own: `kernels` in site-packages would hide Hugging Face's package of that
# name from transformers, and `benchmarks` is anybody's.
RENAMED = {"mmlm_kernels": "kernels", "mmlm_benchmarks": "benchmarks"}


def packages() -> list[str]:
    found = find_packages(include=["mmlm_fast", "mmlm_fast.*"])
    for name, folder in RENAMED.items():
        found.append(name)
        found += [f"{name}.{sub.name}" for sub in sorted((ROOT / folder).iterdir()) if any(sub.glob("*.py"))]
    return found


setup(
    packages=packages(),
    package_dir=RENAMED,
    package_data={
        "mmlm_fast": ["data/*", "py.typed", "training/configs/*.toml"],
        "mmlm_benchmarks": ["results/*.json", "results/baselines/*.json"],
    },
    ext_modules=[Extension("mmlm_fast._C", sources=[])],
    cmdclass={"build_ext": NinjaBuild},
)
