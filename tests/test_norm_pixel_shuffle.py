from importlib import import_module

import pytest
import torch

from mmlm_fast import testing
from mmlm_fast.ops import norm_pixel_shuffle, patch_merge
from mmlm_fast.ops.norm_pixel_shuffle import gather_ref, grid_index, norm_pixel_shuffle_ref
from support.kernel_path import PATHS, PATHS_AND_DTYPES, saved_numbers

NORMS = [(None, "before"), ("layer", "before"), ("rms", "before"), ("layer", "after"), ("rms", "after")]


@pytest.mark.parametrize(("path", "dtype"), PATHS_AND_DTYPES)
@pytest.mark.parametrize("channels_first", [False, True], ids=["channels last", "channels first"])
@pytest.mark.parametrize(("norm", "norm_at"), NORMS)
def test_close_to_reference(norm, norm_at, path, dtype, channels_first, take, device):
    take(path)
    for shape, factor in (((1, 4, 2, 66), 2), ((1, 3, 3, 67), 3), ((0, 2, 2, 64), 2), ((1, 2, 1, 65), 1)):
        x = torch.randn(shape, dtype=dtype, device=device)
        width = shape[-1] * (factor**2 if norm_at == "after" else 1)
        parameters = [] if norm is None else [torch.randn(width, dtype=dtype, device=device) for _ in range(2)]

        def fast(x, *parameters, factor=factor):
            named = dict(zip(("weight", "bias"), parameters, strict=False))
            options = {"norm": norm, "norm_at": norm_at, "channels_first": channels_first}
            return norm_pixel_shuffle(x, factor, **named, **options)

        def ref(x, *parameters, factor=factor):
            return norm_pixel_shuffle_ref(x, factor, *(parameters or (None, None)), norm, norm_at, channels_first)

        testing.assert_close_to_reference(fast(x, *parameters), ref, x, *parameters)
        testing.assert_gradients_close_to_reference(fast, ref, x, *parameters)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("norm", "norm_at"), NORMS)
def test_packed_pictures(norm, norm_at, path, monkeypatch, take, device):
    """Every picture as by itself; more tokens than a part of the weight's gradient."""
    take(path)
    if path == "kernel":
        monkeypatch.setattr(import_module("mmlm_kernels.norm_pixel_shuffle"), "MAX_PROGRAMS", 3)
    sizes = [(2, 4), (6, 2), (4, 10)]
    x = torch.randn(sum(h * w for h, w in sizes), 64, device=device)
    weight = None if norm is None else torch.randn(256 if norm_at == "after" else 64, device=device)

    def fast(x, weight):
        return patch_merge(x, 2, sizes, weight=weight, norm=norm, norm_at=norm_at)

    def ref(x, weight):
        pictures = [p.view(1, *s, 64) for p, s in zip(x.split([h * w for h, w in sizes]), sizes, strict=True)]
        return torch.cat([norm_pixel_shuffle_ref(p, 2, weight, None, norm, norm_at)[0] for p in pictures])

    testing.assert_close_to_reference(fast(x, weight), ref, x, weight)
    testing.assert_gradients_close_to_reference(fast, ref, x, weight)
    assert patch_merge(x, 2).equal(x.view(-1, 256))
    assert patch_merge(x, 2, torch.tensor(sizes)).equal(patch_merge(x, 2, sizes))
    assert patch_merge(x[:0], 2, []).shape == (0, 256)


def test_index_is_a_permutation():
    index = grid_index(6, 4, 2, torch.device("cpu"))
    assert index.flatten().sort().values.equal(torch.arange(24))
    assert index[0].tolist() == [0, 1, 4, 5]


def test_strides(take):
    take("native")
    x = torch.randn(2, 10, 4, 4).permute(0, 2, 3, 1)  # channels first in memory
    assert norm_pixel_shuffle(x, 2).equal(norm_pixel_shuffle_ref(x, 2))


def test_keeps_nothing_without_a_norm(take):
    take("native")
    x = torch.randn(1, 8, 8, 64, requires_grad=True)
    assert saved_numbers(lambda: norm_pixel_shuffle(x, 2)) == 64 * 8  # the index
    weight = torch.ones(64)
    kept = saved_numbers(lambda: norm_pixel_shuffle(x, 2, weight=weight, norm="rms"))
    assert kept == 64 * 8 + x.numel() * 4 + 64 * 4


def test_registration():
    x, index, weight = torch.randn(8, 5), torch.arange(8).view(2, 4).flip(0), torch.randn(20)
    ops = torch.ops.mmlm_fast
    for at, w in (("none", None), ("after", weight)):
        torch.library.opcheck(ops.norm_pixel_shuffle_fwd.default, (x, index, w, w, at, True, True, 1e-6))
        dtype = None if w is None else torch.float32
        grad = torch.randn(2, 20)
        kept = None if w is None else x
        torch.library.opcheck(ops.norm_pixel_shuffle_bwd.default, (grad, kept, index, w, dtype, at, True, True, 1e-6))


def test_gradcheck():
    x, weight, bias = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((1, 2, 4, 3), (12,), (12,)))
    assert torch.autograd.gradcheck(
        lambda x, w, b: norm_pixel_shuffle(x, 2, weight=w, bias=b, norm="layer", norm_at="after"), (x, weight, bias)
    )


def test_compiles_in_one_graph_with_dynamic_shapes():
    def step(x, weight):
        return norm_pixel_shuffle(x, 2, weight=weight, norm="rms")

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for side in (4, 8):
        x, weight = torch.randn(2, side, side, 6, requires_grad=True), torch.randn(6)
        out, expected = compiled(x, weight), norm_pixel_shuffle_ref(x, 2, weight, None, "rms")
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(*(torch.autograd.grad(o.square().sum(), x)[0] for o in (out, expected)))


def test_errors():
    x = torch.zeros(1, 4, 6, 8)
    with pytest.raises(ValueError, match="divisible by factor 4, got"):
        norm_pixel_shuffle(x, 4)
    with pytest.raises(ValueError, match="norm must be layer, rms or None, got 'batch'"):
        norm_pixel_shuffle(x, 2, norm="batch")
    with pytest.raises(ValueError, match="weight and bias belong to a norm"):
        norm_pixel_shuffle(x, 2, weight=torch.zeros(8))
    with pytest.raises(ValueError, match=r"weight must have shape \(32,\)"):
        norm_pixel_shuffle(x, 2, weight=torch.zeros(8), norm="rms", norm_at="after")
    with pytest.raises(ValueError, match="hold 24 patches together"):
        patch_merge(x.view(24, 8), 2, [(2, 2)])
    with pytest.raises(ValueError, match="N divisible by 4"):
        patch_merge(x.view(24, 8)[:3], 2)


def test_reference_of_rows_agrees_with_that_of_grids():
    x = torch.randn(1, 4, 4, 3)
    index = grid_index(4, 4, 2, torch.device("cpu"))
    assert gather_ref(x.view(16, 3), index).equal(norm_pixel_shuffle_ref(x, 2)[0])
