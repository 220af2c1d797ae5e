"""Kernels in float32 keep their accuracy where arithmetic rounds as a GPU's does: support/gpu_rounding.py.

fuse_modalities is not among them: its cases of one token compare what three exponentials weigh, which is luck.
"""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU rounds as it does")

FEW = "chunked or latest_image or causal"
FILES = ("interval_attention", "add_norm", "qk_norm_rope", "siglip_loss")
MORE = ("clip_loss", "linear_cross_entropy", "glu", "gated_add", "norm_pixel_shuffle", "concat_linear")


def number_passed(files, words):
    """How many passed; all must."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", "-k", words]
        + [f"tests/test_{name}.py" for name in files],
        capture_output=True, text=True, check=False, env=os.environ | {"MMLM_FAST_GPU_ROUNDING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    return int(done.stdout.rsplit(" passed", 1)[0].split()[-1])


def test_is_another_rounding(tmp_path):
    """Three tf32 products are less than a float32 one, and more than one of tf32: else the mode would prove nothing."""
    script = tmp_path / "test_rounding.py"
    script.write_text("""
import torch, triton, triton.language as tl

@triton.jit
def product(a, b, out, PRECISION: tl.constexpr):
    i = tl.arange(0, 32)
    at = i[:, None] * 32 + i[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at), input_precision=PRECISION))

def test():
    a, b = torch.randn(2, 32, 32)
    errors = []
    for precision in ("ieee", "tf32x3", "tf32"):
        out = torch.empty(32, 32)
        product[(1,)](a, b, out, PRECISION=precision)
        errors.append((out - a.double() @ b.double()).norm().item())
    assert 1.2 * errors[0] < errors[1] < errors[2] / 100, errors
""")
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", "pyproject.toml", "--rootdir", ".",
         "-p", "conftest", script],
        capture_output=True, text=True, check=False,
        env=os.environ | {"MMLM_FAST_GPU_ROUNDING": "1", "PYTHONPATH": "tests"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]


def test_accuracy():
    words = f"kernel and float32 and not compile and (not interval_attention or {FEW})"
    assert number_passed(FILES, words) >= 18


@pytest.mark.slow
def test_accuracy_everywhere():
    assert number_passed([*FILES, *MORE], "kernel and float32") >= 100
