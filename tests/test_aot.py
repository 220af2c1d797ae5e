"""Every kernel compiles ahead of time for every shipped architecture; support/aot.py runs in a process of its own."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# The Triton that GPU machines have, beside the one that is installed; .ci/bootstrap.py puts it there.
SECOND_TRITON = Path(os.environ.get("MMLM_FAST_TRITON36", HERE.parent / ".venv/triton-3.6"))


def compile_all(*arguments: object, triton: Path | None = None, where: Path = HERE) -> tuple[int, str]:
    """Status of aot.py and what it says, in a process of its own: it must not see the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if triton is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(triton), environment.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    command = [sys.executable, "-P", where / "support/aot.py", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=3600)
    return done.returncode, done.stdout + (done.stderr[-4000:] if done.returncode else "")


class Triton:
    """One class for each architecture, so that a suite in several processes compiles them side by side."""

    arch: int

    @pytest.mark.aot
    @pytest.mark.parametrize("triton", ["installed", "second"])
    @pytest.mark.parametrize("configurations", ["quick", pytest.param("all", marks=pytest.mark.slow)])
    def test_triton_kernels_compile_without_spills(self, configurations, triton, capsys):
        """The quick set through tables: what changed is compiled. All of it really."""
        if triton == "second" and not (SECOND_TRITON / "triton").is_dir():
            pytest.skip(f"no second Triton in {SECOND_TRITON} (MMLM_FAST_TRITON36 names another place)")
        options = ["all" if configurations == "all" else "--table"]
        status, out = compile_all(self.arch, *options, triton=SECOND_TRITON if triton == "second" else None)
        with capsys.disabled():
            print(f"\n{out}")
        assert status == 0
        if triton == "second":
            assert "triton 3.6" in out
        if self.arch == 90:
            assert "wgmma" in out


class TestSm80(Triton):
    arch = 80


class TestSm90(Triton):
    arch = 90


class TestSm100(Triton):
    arch = 100


@pytest.mark.aot
def test_a_table_that_does_not_reproduce_is_noticed(tmp_path):
    """One number of the op that is compiled all the same is changed, in a copy."""
    table = f"triton-{importlib.metadata.version('triton')}-sm_90.json"
    if not (HERE / "aot_tables" / table).exists():
        pytest.skip(f"no {table}")
    tests = tmp_path / "tests"
    (tests / "aot_tables").mkdir(parents=True)
    (tests / "support").mkdir()
    (tmp_path / "kernels").symlink_to(HERE.parent / "kernels")
    shutil.copy(HERE / "support/aot.py", tests / "support")
    ops = json.loads((HERE / "aot_tables" / table).read_text())
    for registers in (0, 1):
        ops["gated_add"]["kernels"][0][1] += registers
        (tests / "aot_tables" / table).write_text(json.dumps(ops))
        status, out = compile_all(90, "--table", "gated_add", where=tests)
        assert status == registers, out
        assert ("does not give what is compiled here" in out) == bool(registers)


@pytest.mark.aot
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("arch", [90, *(pytest.param(arch, marks=pytest.mark.slow) for arch in (80, 100, 120))])
def test_cuda_sources_compile_without_spills(arch, tmp_path):
    for source in sorted((HERE.parent / "csrc").rglob("*.cu")):
        command = ["nvcc", "-std=c++17", "-O3", f"-I{HERE.parent / 'csrc'}", f"-arch=sm_{arch}", "-Xptxas", "-v", "-c"]
        done = subprocess.run([*command, source, "-o", tmp_path / "x.o"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        usage = [line.strip() for line in done.stderr.splitlines() if "spill" in line]
        assert usage
        assert all(line.startswith("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads") for line in usage)


def test_the_binary_says_what_it_holds():
    from mmlm_fast import _C

    info = json.loads(_C.build_info_json())
    assert info["cuda"] == _C.cuda_status()["compiled"]
    assert info["cuda"] or info["reason"]  # a CPU-only build says why
    if info["cuda"]:
        assert {"80", "90", "100"} <= {arch.removesuffix("+PTX") for arch in info["cuda_archs"]}
