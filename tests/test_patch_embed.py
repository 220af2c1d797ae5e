import pytest
import torch
import torch.nn.functional as F

from mmlm_fast import testing
from mmlm_fast.ops import patch_embed, patchify
from mmlm_fast.ops.patch_embed import patch_embed_ref, patchify_ref
from support.kernel_path import PATHS, PATHS_AND_DTYPES

MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]


def scaled(dtype):
    mean, std = (torch.tensor(t, dtype=dtype) for t in (MEAN, STD))
    return 1 / 255 / std, -mean / std


@pytest.mark.parametrize(("path", "dtype"), PATHS_AND_DTYPES)
@pytest.mark.parametrize("layout", ["channels first", "channels last", "strided"])
def test_patchify(path, dtype, layout, take, device):
    take(path)
    pixels = torch.randint(0, 256, (2, 3, 24, 36), dtype=torch.uint8, device=device)
    given = pixels
    if layout == "channels last":
        given = pixels.permute(0, 2, 3, 1).contiguous()
    elif layout == "strided":
        given = torch.empty(2, 3, 24, 72, dtype=torch.uint8, device=device)[..., ::2].copy_(pixels)
    for patch, merge, repeats in ((4, 1, 1), (6, 2, 2), (12, 1, 1)):
        out = patchify(
            given, patch, mean=MEAN, std=STD, merge_size=merge, temporal_patch_size=repeats,
            channels_last=layout == "channels last", dtype=dtype,
        )  # fmt: skip
        exact = patchify_ref(pixels, patch, *(t.to(device) for t in scaled(torch.float64)), merge, repeats)
        twin = patchify_ref(pixels, patch, *(t.to(device) for t in scaled(torch.float32)), merge, repeats).to(dtype)
        d = testing.difference(out, twin, exact)
        assert d.ok, d


def test_patchify_is_what_a_convolution_sees():
    """Every patch in its place: the product with a convolution's weight is the convolution."""
    pixels = torch.randint(0, 256, (1, 3, 8, 12), dtype=torch.uint8)
    weight = torch.randn(5, 3, 4, 4, dtype=torch.float64)
    patches = patchify(pixels, 4, mean=[0.0] * 3, std=[1.0] * 3, rescale=1.0, dtype=torch.float64)
    expected = F.conv2d(pixels.double(), weight, stride=4).flatten(2).transpose(1, 2)
    torch.testing.assert_close(patches @ weight.flatten(1).T, expected)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(patches.flip(1) @ weight.flatten(1).T, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("frames", [0, 2])
@pytest.mark.parametrize("path", PATHS)
def test_patch_embed(path, frames, dtype, take, device):
    take(path)
    pixels = torch.randint(0, 256, (2, 3, 12, 8), dtype=torch.uint8, device=device)
    weight = 0.2 * torch.randn((6, 3, 2, 4, 4) if frames else (6, 3, 4, 4), dtype=dtype, device=device)
    bias = torch.randn(6, dtype=dtype, device=device)

    def fast(weight, bias):
        return patch_embed(pixels, weight, bias, mean=MEAN, std=STD)

    def ref(weight, bias):
        return patch_embed_ref(pixels, weight, bias, MEAN, STD, 1 / 255)

    testing.assert_close_to_reference(fast(weight, bias), ref, weight, bias)
    testing.assert_gradients_close_to_reference(fast, ref, weight, bias)


def test_patch_embed_of_channels_last():
    pixels = torch.randint(0, 256, (1, 3, 8, 12), dtype=torch.uint8)
    for shape in ((5, 3, 4, 4), (5, 3, 2, 4, 4)):
        weight = torch.randn(shape)
        out = patch_embed(pixels.permute(0, 2, 3, 1), weight, mean=MEAN, std=STD, channels_last=True)
        torch.testing.assert_close(out, patch_embed(pixels, weight, mean=MEAN, std=STD))


def test_registration_and_compile():
    pixels = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8)
    args = (pixels, [1.0] * 3, [0.0] * 3, 4, 1, 2, torch.float32)
    torch.library.opcheck(torch.ops.mmlm_fast.patchify.default, args)
    compiled = torch.compile(
        lambda p: patchify(p, 4, mean=MEAN, std=STD), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(pixels), patchify(pixels, 4, mean=MEAN, std=STD))


def test_empty():
    assert patchify(torch.empty(0, 3, 8, 8, dtype=torch.uint8), 4, mean=MEAN, std=STD).shape == (0, 4, 48)


def test_errors():
    pixels = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"pixels must be uint8 \[B, C, height, width\], got torch.float32"):
        patchify(pixels.float(), 4, mean=MEAN, std=STD)
    with pytest.raises(ValueError, match="divisible by patch_size·merge_size = 3, got 8 × 8"):
        patchify(pixels, 3, mean=MEAN, std=STD)
    with pytest.raises(ValueError, match="mean and std must be 3 numbers"):
        patchify(pixels, 4, mean=[0.0], std=[1.0])
    with pytest.raises(ValueError, match="std must not be 0"):
        patchify(pixels, 4, mean=MEAN, std=[0.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="pixels must have 4 channels"):
        patch_embed(pixels, torch.zeros(2, 4, 4, 4), mean=MEAN, std=STD)
    with pytest.raises(ValueError, match="divisible by patch_size·merge_size = 3, got 8 × 8"):
        patch_embed(pixels, torch.zeros(2, 3, 3, 3), mean=MEAN, std=STD)
    with pytest.raises(ValueError, match="must be at least 1, got 4, 1, 0"):
        patchify(pixels, 4, mean=MEAN, std=STD, temporal_patch_size=0)
    with pytest.raises(ValueError, match=r"weight must be \[E, C, P, P\]"):
        patch_embed(pixels, torch.zeros(2, 48), mean=MEAN, std=STD)
