"""What `--gpu-only` leaves of a file."""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def collected(*options):
    command = [sys.executable, "-P", "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *options]
    done = subprocess.run([*command, HERE / "test_glu.py"], capture_output=True, text=True, cwd=HERE.parent, check=True)
    *names, summary = [line for line in done.stdout.splitlines() if "::" in line or "collected" in line]
    return {name.split("::")[1] for name in names}, summary


def test_gpu_only_keeps_what_uses_the_device():
    kept, summary = collected("--gpu-only")
    assert any("test_close_to_reference" in name for name in kept)
    assert "def test_formulas(" in (HERE / "test_glu.py").read_text(encoding="utf-8")
    assert "test_formulas" not in kept
    assert "deselected" in summary
