"""Every kernel compiles ahead of time for every shipped architecture; see aot.py, which runs in its own process."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


class Triton:
    """One class for each architecture, so that a suite in several processes compiles them side by side."""

    arch: int

    @pytest.mark.aot
    @pytest.mark.parametrize("configurations", ["quick", pytest.param("all", marks=pytest.mark.slow)])
    def test_triton_kernels_compile_without_spills(self, configurations, capsys):
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        command = [sys.executable, "-P", HERE / "aot.py", str(self.arch), *(["all"] if configurations == "all" else [])]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=3600)
        with capsys.disabled():
            print(f"\n{done.stdout}")
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        if self.arch == 90:
            assert "wgmma" in done.stdout


class TestSm80(Triton):
    arch = 80


class TestSm90(Triton):
    arch = 90


class TestSm100(Triton):
    arch = 100


@pytest.mark.aot
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("arch", [80, 90, 100, 120])
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
