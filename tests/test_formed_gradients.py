"""Gradients that wait for the incoming one, multiplied by it where they lie."""

import pytest
import torch

from mmlm_fast.ops import _formed

SIZES = [0, 1, 15, 4096, 4 * 4096, 4 * 4096 + 16, 9 * 4096 + 5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernel_gives_torchs_bits(dtype, device):
    from mmlm_kernels.formed import scale_gradient_

    torch.manual_seed(0)
    for size in SIZES:
        for factor in (1.0, 1 / 3, 0.0, -65504.0, float("inf"), float("nan")):
            x, factor = torch.randn(size, device=device).to(dtype), torch.tensor(factor, device=device)
            expected = x * factor
            scale_gradient_(x, factor)
            torch.testing.assert_close(x, expected, rtol=0, atol=0, equal_nan=True)


def test_what_lies_beside_stays(device):
    from mmlm_kernels.formed import scale_gradient_

    whole = torch.ones(3 * 4096, device=device)
    scale_gradient_(whole[4096:-4090], torch.tensor(2.0, device=device))
    assert whole.tolist() == [1.0] * 4096 + [2.0] * (2 * 4096 - 4090 + 0) + [1.0] * 4090


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_large_gradients_on_the_device(factor, monkeypatch):
    """One launch for a large one, none of torch's; and no wait for the incoming gradient."""
    large, small = torch.randn(_formed.SMALL + 16, device="cuda"), torch.randn(64, device="cuda")
    expected = [large * factor, small * factor]
    grad = torch.tensor(factor, device="cuda")
    monkeypatch.setattr(_formed, "graph_is_kept", lambda: False)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = _formed._scaled([large, small], grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found[0] is large
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_registration():
    torch.library.opcheck(torch.ops.mmlm_fast.scale_gradient_.default, (torch.ones(8), torch.tensor(2.0)))
