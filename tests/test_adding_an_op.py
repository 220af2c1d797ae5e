"""Adding an op as CONTRIBUTING says: four files and a line; with a CPU kernel one file and two lines more.

In a copy of the tree, whose own tests then find the op wherever ops are looked for: sweeps of derivatives, of
instruction sets, schemas, doctor, the report's cases, compilation for GPUs and the GPU suite.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from support.mutations import Copy

TOY = Path(__file__).with_name("toy_op")
# Name in toy_op -> where CONTRIBUTING wants it.
FILES = {
    "ops.py": "mmlm_fast/ops/blend.py",
    "kernels.py": "kernels/blend.py",
    "tests.py": "tests/test_blend.py",
    "benchmarks.py": "benchmarks/ops/blend.py",
}
LINES = {"mmlm_fast/ops/__init__.py": ["from mmlm_fast.ops.blend import blend as blend\n"]}
# The line before which each goes.
BEFORE = {
    "mmlm_fast/ops/__init__.py": "from mmlm_fast.ops.clip_loss",
    "csrc/glue/ops.h": '#include "glue/fuse_modalities.inl"',
    "csrc/python/glue.cpp": '  bind(m, "fuse_modalities_fwd"',
}
CORE = {"blend.inl": "csrc/glue/blend.inl"}
CORE_LINES = {
    "csrc/glue/ops.h": ['#include "glue/blend.inl"\n'],
    "csrc/python/glue.cpp": ['  bind(m, "blend_fwd", &blend_fwd);\n'],
}
PLACES = [
    "tests/test_blend.py",
    "tests/test_layering.py::test_every_op_has_its_files",
    "tests/test_layering.py::test_imports_follow_the_arrows",
    "tests/test_layering.py::test_underscores_stay_in_their_package",
    "tests/test_paths.py::test_every_op_has_a_record",
]
SWEEPS = [
    *PLACES,
    "tests/test_schemas.py",
    "tests/test_derivatives.py::test_second_derivatives[small-blend-torch.float32]",
    "tests/test_gpu_suite.py::test_the_plan_names_what_there_is",
]


def add(copy: Copy, files: dict[str, str], lines: dict[str, list[str]]) -> None:
    for source, target in files.items():
        assert not (copy.tree / target).exists()
        (copy.tree / target).write_text((TOY / source).read_text(encoding="utf-8"), encoding="utf-8")
    for target, new in lines.items():
        text = (copy.tree / target).read_text(encoding="utf-8")
        assert text.count(f"\n{BEFORE[target]}") == 1
        text = text.replace(f"\n{BEFORE[target]}", "\n" + "".join(new) + BEFORE[target])
        (copy.tree / target).write_text(text, encoding="utf-8")


def run(copy: Copy, *command: str, **environment: str) -> str:
    environment = copy.environment | environment
    command = [sys.executable, "-P", *command]
    done = subprocess.run(command, cwd=copy.tree, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


@pytest.mark.parametrize("where", [PLACES, pytest.param(SWEEPS, marks=pytest.mark.slow)], ids=["places", "sweeps"])
def test_four_files_and_a_line(tmp_path, where):
    """Without a kernel for CPUs: the record says so, and PyTorch is what runs there."""
    copy = Copy(tmp_path)
    add(copy, FILES, LINES)
    op = copy.tree / "mmlm_fast/ops/blend.py"
    text = op.read_text().replace('Op("blend", smallest=2**18)', 'Op("blend", native=())')
    start, end = text.index("def _native_fwd"), text.index("def _native_bwd")
    portable = "def _native_fwd(x: Tensor, y: Tensor, t: float) -> Tensor:\n    return blend_ref(x, y, t)\n\n\n"
    text = text[:start] + portable + text[end:]
    text = text.replace("native=_native_fwd", "portable=_native_fwd")
    op.write_text(text.replace("from mmlm_fast.ops._native import as_rows, core, num_rows, number_type, rows\n", ""))
    if where is SWEEPS:
        assert "mmlm_fast::blend_fwd(Tensor x, Tensor y, float t) -> Tensor" in run(copy, "tests/test_schemas.py")
    run(copy, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *where)
    if where is PLACES:
        return
    told = run(copy, "-m", "mmlm_fast.cli", "doctor", "blend", "--dtype", "float32")
    assert told == "blend, float32 on CPU, any numbers: the PyTorch formula: the native core has none for a CPU\n"
    compiled = run(copy, "tests/support/aot.py", "90", "blend")
    assert "blend bfloat16 _fwd_kernel" in compiled
    assert "blend float32 _bwd_kernel" in compiled


@pytest.mark.slow
def test_and_a_kernel_for_cpus(tmp_path):
    copy = Copy(tmp_path)
    add(copy, FILES | CORE, LINES | CORE_LINES)
    assert sum(map(len, CORE_LINES.values())) <= 3
    copy.build()
    run(copy, "tests/test_schemas.py")
    run(copy, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *SWEEPS, "tests/test_isas.py::test_ops")
    told = run(copy, "-m", "mmlm_fast.cli", "doctor", "blend", "--dtype", "float32", "--size", str(2**18))
    assert (
        told
        == "blend, float32 on CPU, 262,144 numbers: the native core: from 262,144 numbers on it is the faster one\n"
    )
