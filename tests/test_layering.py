"""The arrows of CONTRIBUTING.md, checked, and the traps of the folder layout."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = ("mmlm_fast", "mmlm_kernels", "mmlm_benchmarks")
# Folder or file -> what of ours, and which big third parties, it may import.
MAY_IMPORT = {
    "kernels": {"torch", "triton", "mmlm_kernels"},
    "mmlm_fast/masks.py": {"torch"},
    "mmlm_fast/positions.py": {"torch"},
    "mmlm_fast/ops": {"torch", "mmlm_fast._C", "mmlm_fast.ops", "mmlm_fast.masks"},
    "mmlm_fast/distributed.py": {"torch", "mmlm_fast.ops"},
    "mmlm_fast/testing.py": {"torch"},
    "mmlm_fast/nn": {
        "torch",
        "mmlm_fast.ops",
        "mmlm_fast.masks",
        "mmlm_fast.positions",
        "mmlm_fast.distributed",
        "mmlm_fast.nn",
    },
    "mmlm_fast/audio": {
        "torch",
        "numpy",
        "transformers",
        "soundfile",
        "av",
        "tqdm",
        "mmlm_fast._C",
        "mmlm_fast.ops",
        "mmlm_fast.audio",
    },
    "mmlm_fast/hf": {
        "torch",
        "numpy",
        "transformers",
        "mmlm_fast.audio",
        "mmlm_fast.nn",
        "mmlm_fast.ops",
        "mmlm_fast.masks",
        "mmlm_fast.testing",
        "mmlm_fast.hf",
    },
    "mmlm_fast/models": {
        "torch",
        "numpy",
        "transformers",
        "tokenizers",
        "PIL",
        "mmlm_fast.masks",
        "mmlm_fast.ops",
        "mmlm_fast.nn",
        "mmlm_fast.audio",
        "mmlm_fast.models",
    },
    "mmlm_fast/training": {
        "torch",
        "numpy",
        "transformers",
        "huggingface_hub",
        "accelerate",
        "safetensors",
        "tqdm",
        "PIL",
        "av",
        "yaml",
        "sklearn",
        "scipy",
        "jiwer",
        "sacrebleu",
        "faiss",
        "mmlm_fast.audio",
        "mmlm_fast.data",
        "mmlm_fast.models",
        "mmlm_fast.training",
    },
}


def imported(path: Path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files(folder: str):
    path = ROOT / folder
    return [path] if path.suffix else sorted(path.rglob("*.py"))


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_follow_the_arrows(folder):
    assert files(folder)
    for path in files(folder):
        for name in imported(path):
            if name.partition(".")[0] in sys.stdlib_module_names:
                continue
            allowed = any(name == a or name.startswith(f"{a}.") for a in MAY_IMPORT[folder])
            assert allowed, f"{path.relative_to(ROOT)} imports {name}"


def test_nothing_imports_upwards():
    """Only the benchmarks and the tests import the benchmarks; only the registry names a kernel module."""
    for path in files("mmlm_fast"):
        for name in imported(path):
            assert not name.startswith(("mmlm_benchmarks", "mmlm_kernels")), f"{path.name} imports {name}"


def test_csrc_is_torch_free_and_python_stays_in_the_bindings():
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".inl")]
    assert len(sources) > 10
    for path in sources:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"#include <(torch|ATen|c10)/", text), path
        assert path.name == "bindings.cpp" or not re.search(r"#include <(pybind11|Python)", text), path


def test_kernels_is_not_a_package():
    """As a regular package on the path it would hide Hugging Face's `kernels`, which transformers imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    spec = importlib.util.find_spec("mmlm_kernels")
    assert spec.origin is None
    assert str(ROOT / "kernels") in spec.submodule_search_locations
    found = importlib.util.find_spec("kernels")
    assert found is None or str(ROOT) not in str(found.origin)


def test_importing_does_no_work():
    """Neither Triton nor transformers is imported, no CUDA context is made, no thread started."""
    code = """
import sys, threading
import mmlm_fast, mmlm_fast.audio, mmlm_fast.nn, mmlm_fast.ops
import torch
bad = {"triton", "transformers", "mmlm_kernels", "matplotlib", "soundfile"} & set(sys.modules)
assert not bad, bad
assert not torch.cuda.is_initialized()
assert threading.active_count() == 1
"""
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


def test_every_op_has_its_files():
    """One stem everywhere."""
    from mmlm_benchmarks.ops import OPS

    for op in OPS:
        for place in (f"mmlm_fast/ops/{op}.py", f"kernels/{op}.py", f"tests/test_{op}.py", f"benchmarks/ops/{op}.py"):
            assert (ROOT / place).exists(), place
    assert sorted([*OPS, "formed", "tiles"]) == sorted(p.stem for p in (ROOT / "kernels").glob("*.py"))


def test_nothing_committed_names_this_machine():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if path.suffix in (".py", ".md", ".toml", ".txt", ".json", ".cpp", ".h", ".cu", "") and path.exists():
            text = path.read_text(encoding="utf-8", errors="ignore")
            assert not re.search(r"/wor[k]/|/opt/(wheels|pypi)|files\.python[h]osted|pypi\.or[g]", text), name
