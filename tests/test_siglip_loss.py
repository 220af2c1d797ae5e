import pytest
import torch
import torch.nn.functional as F
from test_clip_loss import POSITIVES, features, positives, tiny_dual_encoder

from mmlm_fast.ops import contrastive, siglip_loss
from mmlm_fast.ops.siglip_loss import siglip_loss_ref
from support.kernel_path import PATHS, PATHS_AND_DTYPES
from support.losses import assert_loss_close
from support.peers import open_clip_losses


@pytest.mark.parametrize(("path", "dtype"), PATHS_AND_DTYPES)
@pytest.mark.parametrize("kind", POSITIVES)
def test_close_to_reference(path, dtype, kind, monkeypatch, take, device):
    take(path)
    monkeypatch.setitem(contrastive.TILE, device, 12)
    num_rows, num_columns = (15, 15) if kind == "diagonal" else (15, 21)
    keywords, p = positives(kind, num_rows, num_columns, device)

    def draw():
        scale, bias = (torch.tensor(v, device=device) * (1 + torch.rand(()).item()) for v in (6.0, -3.0))
        return features(num_rows, 20, dtype, device), features(num_columns, 20, dtype, device), scale, bias

    assert_loss_close(
        lambda *a: siglip_loss(*a, **keywords),
        lambda *a: siglip_loss_ref(*a, p),
        draw,
        draws=8 if path == "native" else 2,
    )


@pytest.mark.parametrize("path", PATHS)
def test_extreme_logits(path, take, device):
    """Losses of a trained model: far below one unit in the last place of 1 + exp."""
    take(path)

    def draw():
        x = features(24, 64, torch.float32, device)
        return x, x + 0.01 * torch.randn_like(x), torch.tensor(60.0, device=device), torch.tensor(-40.0, device=device)

    assert_loss_close(siglip_loss, siglip_loss_ref, draw, draws=2)


@pytest.mark.parametrize("kind", POSITIVES)
def test_large_tiles(kind, take):
    take("native")
    keywords, p = positives(kind, 1100, 2100, "cpu")
    inputs = (
        features(1100, 16, torch.float32, "cpu"),
        features(2100, 16, torch.float32, "cpu"),
        torch.tensor(8.0),
        torch.tensor(-4.0),
    )
    assert_loss_close(lambda *a: siglip_loss(*a, **keywords), lambda *a: siglip_loss_ref(*a, p), lambda: inputs, 1)


def test_of_transformers_itself():
    model, out = tiny_dual_encoder("Siglip")
    scale, bias = model.logit_scale.detach().exp(), model.logit_bias.detach()
    torch.testing.assert_close(siglip_loss(out.image_embeds, out.text_embeds, scale, bias), out.loss)


def test_of_open_clip_itself():
    open_clip = open_clip_losses()
    x, y = features(64, 32, torch.float32, "cpu"), features(64, 32, torch.float32, "cpu")
    scale, bias = torch.tensor(10.0), torch.tensor(-10.0)
    torch.testing.assert_close(siglip_loss(x, y, scale, bias), open_clip.SigLipLoss()(x, y, scale, bias))


@pytest.mark.parametrize("path", PATHS)
def test_bad_and_odd_input(path, take, device):
    take(path)
    x = features(6, 8, torch.float32, device)
    one = x[:1]
    torch.testing.assert_close(siglip_loss(one, one, 10.0, -10.0), torch.tensor(0.6931472, device=device))
    assert siglip_loss(x[:0], x[:0], 10.0, -10.0) == 0
    # all negative: a block of other processes' columns
    far = siglip_loss(x, x, 10.0, -10.0, offset=100)
    torch.testing.assert_close(far, F.softplus(10 * x @ x.T - 10).sum() / 6)
    big = siglip_loss(x, x, 1e30, -10.0)
    torch.testing.assert_close(big, siglip_loss_ref(x, x, torch.tensor(1e30), torch.tensor(-10.0)))
    assert siglip_loss(x, x, float("nan"), -10.0).isnan()
    x[2] = torch.nan
    leaf = x.clone().requires_grad_()
    loss = siglip_loss(leaf, features(6, 8, torch.float32, device), 10.0, -10.0)
    assert loss.isnan()
    grad = torch.autograd.grad(loss, leaf)[0]
    assert grad[2].isnan().all()
    assert grad[[0, 1, 3, 4, 5]].isfinite().all()


def test_registration_gradcheck_compile():
    x, y = features(12, 8, torch.float32, "cpu"), features(12, 8, torch.float32, "cpu")
    scale, bias, ids = torch.tensor(7.0), torch.tensor(-5.0), torch.arange(12) % 5
    op = torch.ops.mmlm_fast
    torch.library.opcheck(op.siglip_loss_fwd.default, (x, y, scale, bias, 0, 0, None, None, None, [True] * 4))
    sums = torch.zeros(3, dtype=torch.float64)
    torch.library.opcheck(op.siglip_loss_pairs.default, (x @ y.T, scale, bias, True, sums, 1, 0, ids, ids, None))
    args = [t.double().requires_grad_() for t in (x, y, scale, bias)]
    for keywords in ({}, {"positive_ids": ids}, {"targets": torch.rand(12, 12)}):
        assert torch.autograd.gradcheck(lambda *a, k=keywords: siglip_loss(*a, **k), args)
    leaves = [t.clone().requires_grad_() for t in (x, y, scale, bias)]
    compiled = torch.compile(siglip_loss, fullgraph=True, dynamic=True, backend="aot_eager")
    found, expected = compiled(*leaves), siglip_loss(*leaves)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(2 * t, leaves) for t in (found, expected)))


def test_errors():
    x = torch.zeros(4, 3)
    with pytest.raises(ValueError, match="logit_bias must be a number or a tensor of one, got NoneType"):
        siglip_loss(x, x, 1.0, None)
    with pytest.raises(ValueError, match="must share D, dtype and device"):
        siglip_loss(x, torch.zeros(4, 2), 1.0, 0.0)
    with pytest.raises(ValueError, match="offset must be an int, got float"):
        siglip_loss(x, x, 1.0, 0.0, offset=1.5)
