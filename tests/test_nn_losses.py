"""The losses as layers."""

import math

import pytest
import torch
import torch.nn.functional as F

from mmlm_fast.nn import ClipLoss, LinearCrossEntropyLoss, SiglipLoss
from mmlm_fast.ops import clip_loss, linear_cross_entropy, siglip_loss


def features(num=6, size=8):
    return (F.normalize(torch.randn(num, size), dim=1) for _ in range(2))


def test_linear_cross_entropy():
    options = dict(
        ignore_index=3, reduction="sum", label_smoothing=0.1, z_loss=1e-3, softcap=5.0, logit_scale=0.5, shift=True
    )
    loss = LinearCrossEntropyLoss(**options, chunk_mib=1)
    x, w, b, y = torch.randn(2, 5, 8), torch.randn(20, 8), torch.randn(20), torch.randint(0, 20, (2, 5))
    expected = linear_cross_entropy(x, w, y, b, **options)
    torch.testing.assert_close(loss(x, w, y, b), expected)
    torch.testing.assert_close(loss(x, w, y, b, num_items_in_batch=4), expected / 4)
    for name, value in options.items():
        assert f"{name}={value!r}" in repr(loss)
    assert not loss.state_dict()


def test_clip_learns_its_temperature_and_clips_it():
    x, y = features()
    loss = ClipLoss()
    assert loss.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    value = loss(x, y)
    torch.testing.assert_close(value, clip_loss(x, y, torch.tensor(1 / 0.07)))
    (grad,) = torch.autograd.grad(value, loss.logit_scale)
    step = 1e-2
    scales = [math.exp(loss.logit_scale.item() + s) for s in (step, -step)]
    slope = (clip_loss(x.double(), y.double(), scales[0]) - clip_loss(x.double(), y.double(), scales[1])) / (2 * step)
    assert grad.item() == pytest.approx(slope.item(), rel=1e-3)  # the difference quotient errs by step squared
    with torch.no_grad():
        loss.logit_scale.fill_(10.0)
    torch.testing.assert_close(loss(x, y), clip_loss(x, y, 100.0))
    assert loss.logit_scale.item() == pytest.approx(math.log(100))
    with torch.no_grad():
        loss.logit_scale.fill_(10.0)
    torch.testing.assert_close(loss.eval()(x, y), clip_loss(x, y, math.exp(10.0)))  # inference changes no parameter
    assert ClipLoss(max_scale=None).scale().item() == pytest.approx(1 / 0.07)


def test_siglip_has_transformers_parameters():
    x, y = features()
    loss = SiglipLoss()
    assert list(loss.state_dict()) == ["logit_scale", "logit_bias"]
    assert [p.item() for p in loss.parameters()] == [pytest.approx(math.log(10)), -10.0]
    value = loss(x, y)
    torch.testing.assert_close(value, siglip_loss(x, y, 10.0, -10.0))
    grads = torch.autograd.grad(value, list(loss.parameters()))
    assert all(g.isfinite() and g != 0 for g in grads)


@pytest.mark.parametrize("cls", [ClipLoss, SiglipLoss])
def test_ids_half_precision_and_errors(cls):
    x, y = features()
    ids = torch.tensor([0, 0, 1, 1, 2, 2])
    function = clip_loss if cls is ClipLoss else siglip_loss
    scalars = (1 / 0.07,) if cls is ClipLoss else (10.0, -10.0)
    torch.testing.assert_close(cls()(x, y, ids), function(x, y, *scalars, positive_ids=ids))
    half = cls().bfloat16()(x.bfloat16(), y.bfloat16())
    assert half.dtype == torch.float32
    with pytest.raises(ValueError, match="init_scale must be positive and at most max_scale, got 0 and None"):
        cls(init_scale=0, max_scale=None)
    with pytest.raises(ValueError, match="at most max_scale, got 200 and 100"):
        cls(init_scale=200, max_scale=100)
    with pytest.raises(ValueError, match="exchange must be one of gather, ring, got 'star'"):
        cls(exchange="star")
