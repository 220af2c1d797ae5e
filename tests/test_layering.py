"""The arrows of CONTRIBUTING.md, checked, and the traps of the folder layout."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.arrows import FOLDERS, ROOT, drawn, imported

# Folder or file -> what of ours, and which big third parties, it may import.
MAY_IMPORT = {
    "kernels": {"torch", "triton", "mmlm_kernels"},
    "mmlm_fast/masks.py": {"torch"},
    "mmlm_fast/positions.py": {"torch"},
    "mmlm_fast/core.py": {"mmlm_fast._C"},
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
        "mmlm_fast.positions",
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


def test_the_drawing_is_of_the_imports():
    """`make arrows` prints it."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert text.partition("```mermaid\n")[2].partition("\n```")[0] == drawn()


def test_nothing_imports_upwards():
    """Only the benchmarks and the tests import the benchmarks; only the registry names a kernel module."""
    for path in files("mmlm_fast"):
        for name in imported(path):
            assert not name.startswith(("mmlm_benchmarks", "mmlm_kernels")), f"{path.name} imports {name}"


def module_name(path: Path) -> tuple[str, ...]:
    folder, *parts = path.relative_to(ROOT).with_suffix("").parts
    return (FOLDERS[folder], *(part for part in parts if part != "__init__"))


def package(name: tuple[str, ...]) -> tuple[str, ...]:
    """Inside which underscores may be used: a folder or a file of mmlm_fast, all of the kernels, of the benchmarks."""
    return name[:2] if name[0] == "mmlm_fast" else name[:1]


def is_private(part: str) -> bool:
    return part.startswith("_") and not part.endswith("__")


def may_use(path: Path, name: tuple[str, ...]) -> bool:
    """Whether this file may name ``mmlm_fast.folder._thing`` of ours."""
    holder = name[: next((i for i, part in enumerate(name) if is_private(part)), 0)]
    if not holder:
        return True
    own = module_name(path)
    if name[:2] == ("mmlm_fast", "_C"):
        return own[:2] in (("mmlm_fast", "ops"), ("mmlm_fast", "audio"), ("mmlm_fast", "core"))
    if holder == ("mmlm_fast",):  # its own files, not its folders'
        return path.parent == ROOT / "mmlm_fast"
    return package(holder) == package(own)


def named(tree: ast.Module):
    """Dotted names of ours that a file imports, and those it reaches as attributes of what it imported."""
    bound = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
            bound |= {a.asname or a.name.partition(".")[0]: a.name if a.asname else "" for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            found = {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
            yield from found.values()
            bound |= found
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            first, _, rest = ast.unparse(node).partition(".")
            if first in bound and re.fullmatch(r"[\w.]+", rest):
                yield f"{bound[first] or first}.{rest}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_underscores_stay_in_their_package(folder):
    wrong = set()
    for path in files(folder):
        for name in named(ast.parse(path.read_text(encoding="utf-8"))):
            parts = tuple(name.split("."))
            if parts[0] in FOLDERS.values() and not may_use(path, parts):
                wrong.add(f"{path.relative_to(ROOT)}: {name}")
    assert not wrong, sorted(wrong)


def test_no_cycle_through_the_package_itself():
    """Nothing that `import mmlm_fast` or an attribute of it loads imports `mmlm_fast` in turn, in a function or not."""
    modules = {module_name(path): path for path in files("mmlm_fast")}
    top = ("mmlm_fast",)

    def edges(path: Path):
        for name in imported(path):
            parts = tuple(name.split("."))
            if parts[0] != "mmlm_fast" or parts[:2] == ("mmlm_fast", "_C"):
                continue
            while parts not in modules:
                parts = parts[:-1]
            yield from (parts[:size] for size in range(min(2, len(parts)), len(parts) + 1))

    waiting, seen = [top], set()
    while waiting:
        module = waiting.pop()
        for other in set(edges(modules[module])) - seen:
            assert other != top, f"mmlm_fast imports {'.'.join(module)}, which imports mmlm_fast"
            seen.add(other)
            waiting.append(other)
    assert ("mmlm_fast", "ops", "paths") in seen
    assert ("mmlm_fast", "hf", "acceleration") in seen


def test_no_module_hides_behind_a_name_of_its_package():
    """``import package.name`` and ``from package import name`` give the same; ops and audio say one name twice."""
    for folder in ("mmlm_fast", "benchmarks"):
        for path in (p for p in files(folder) if p.name == "__init__.py"):
            own = module_name(path)
            if own in (("mmlm_fast", "ops"), ("mmlm_fast", "audio")):
                continue
            tree = ast.parse(path.read_text(encoding="utf-8"))
            bound = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
            for node in ast.walk(tree):
                if isinstance(node, ast.ImportFrom) and tuple(node.module.split(".")) != own:
                    bound |= {alias.asname or alias.name for alias in node.names}
            beside = {p.stem for p in path.parent.iterdir() if p.is_dir() or p.suffix == ".py"}
            assert not bound & beside, (".".join(own), bound & beside)


def test_csrc_is_torch_free_and_python_stays_in_the_bindings():
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".inl")]
    assert len(sources) > 10
    for path in sources:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"#include <(torch|ATen|c10)/", text), path
        assert path.parent.name == "python" or not re.search(r"#include <(pybind11|Python)", text), path


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
    """One stem everywhere; an op's kernels may lie in several files, named by a part after the stem."""
    from mmlm_benchmarks.ops import OPS

    for op in OPS:
        for place in (f"mmlm_fast/ops/{op}.py", f"kernels/{op}.py", f"tests/test_{op}.py", f"benchmarks/ops/{op}.py"):
            assert (ROOT / place).exists(), place
    for path in (ROOT / "kernels").glob("*.py"):
        of_an_op = any(path.stem == op or path.stem.startswith(f"{op}_") for op in OPS)
        assert of_an_op or path.stem in ("formed", "launch", "tiles"), path.stem


def test_nothing_committed_names_this_machine():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if path.suffix in (".py", ".md", ".toml", ".txt", ".json", ".cpp", ".h", ".cu", "") and path.exists():
            text = path.read_text(encoding="utf-8", errors="ignore")
            assert not re.search(r"/wor[k]/|/opt/(wheels|pypi)|files\.python[h]osted|pypi\.or[g]", text), name
