import pytest
import torch

from mmlm_fast import testing
from mmlm_fast.ops import blend
from mmlm_fast.ops.blend import blend_ref
from support.kernel_path import PATHS_AND_DTYPES


@pytest.mark.parametrize(("path", "dtype"), PATHS_AND_DTYPES)
def test_close_to_reference(path, dtype, take, device):
    take(path)
    for shape in ((0, 4), (2, 2, 67), (1, 1030)):
        x, y = (torch.randn(shape, dtype=dtype, device=device) for _ in range(2))
        testing.assert_close_to_reference(blend(x, y, 0.3), lambda x, y: blend_ref(x, y, 0.3), x, y)
        testing.assert_gradients_close_to_reference(
            lambda x, y: blend(x, y, 0.3), lambda x, y: blend_ref(x, y, 0.3), x, y
        )


def test_errors():
    with pytest.raises(ValueError, match=r"y must have shape \(2, 4\), got \(1, 4\)"):
        blend(torch.zeros(2, 4), torch.zeros(1, 4), 0.5)
