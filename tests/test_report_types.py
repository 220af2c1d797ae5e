"""What writes and what reads results.json goes through the types of `mmlm_benchmarks.report.schema`."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TYPED = (
    "report", "learning/section.py", "models/accelerated.py", "models/own.py", "ops/__init__.py", "curves.py",
    "harness.py", "readme.py", "tables.py",
)  # fmt: skip


def test_results_are_typed(tmp_path):
    pytest.importorskip("mypy")
    package = tmp_path / "mmlm_benchmarks"  # mypy knows a package by the name of its folder
    package.symlink_to(ROOT / "benchmarks", target_is_directory=True)
    command = [sys.executable, "-P", "-m", "mypy", "--follow-imports=silent", f"--cache-dir={tmp_path / 'cache'}"]
    command += ["--config-file", str(ROOT / "pyproject.toml"), *(str(package / name) for name in TYPED)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
