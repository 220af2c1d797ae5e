import math

import pytest
import torch
import torch.nn.functional as F

from mmlm_fast import testing
from mmlm_fast.ops import clip_loss, contrastive
from mmlm_fast.ops.clip_loss import clip_loss_ref
from mmlm_fast.ops.contrastive import IDS, WEIGHTS, Positives
from support.kernel_path import PATHS, PATHS_AND_DTYPES
from support.losses import assert_loss_close
from support.peers import open_clip_losses

POSITIVES = ["diagonal", "offset", "ids", "targets"]


def features(num: int, size: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    return F.normalize(torch.randn(num, size, device=device), dim=1).to(dtype)


def positives(kind: str, num_rows: int, num_columns: int, device: str) -> tuple[dict, Positives]:
    """Keywords of the public function, and what the reference takes."""
    if kind == "offset":
        return {"offset": 7}, Positives(offset=7)
    if kind == "ids":
        a = torch.randint(0, 9, (num_rows,), device=device) + 2**40
        b = torch.randint(0, 12, (num_columns,), device=device) + 2**40
        return {"positive_ids": (a, b)}, Positives(IDS, row_ids=a, column_ids=b)
    if kind == "targets":
        weights = torch.rand(num_columns, num_rows, device=device).T  # columns are not dense
        weights = weights * (torch.rand_like(weights) < 0.3)
        weights[2] = 0
        return {"targets": weights}, Positives(WEIGHTS, weights=weights)
    return {}, Positives()


@pytest.mark.parametrize(("path", "dtype"), PATHS_AND_DTYPES)
@pytest.mark.parametrize("kind", POSITIVES)
def test_close_to_reference(path, dtype, kind, monkeypatch, take, device):
    """Several tiles, the last ones with a rest, rows and columns in different numbers."""
    take(path)
    num_rows, num_columns = (15, 15) if kind == "diagonal" else (15, 21)
    keywords, p = positives(kind, num_rows, num_columns, device)

    def draw():
        scale = torch.tensor(math.exp(torch.rand(()).item() * 3), device=device)
        return features(num_rows, 20, dtype, device), features(num_columns, 20, dtype, device), scale

    # one tile, and several; the kernels know nothing of rows_only
    for tile, rows_only in ((12, False), (1024, False), (12, True)) if path == "native" else ((12, False),):
        monkeypatch.setitem(contrastive.TILE, device, tile)
        assert_loss_close(
            lambda *a, only=rows_only: clip_loss(*a, rows_only=only, **keywords),
            lambda *a, only=rows_only: clip_loss_ref(*a, p, only),
            draw,
            draws=8 if path == "native" else 2,
        )


@pytest.mark.parametrize("kind", POSITIVES)
def test_large_tiles(kind, take):
    """Tiles of the shipped size, sums over more than a block, one thread and two."""
    take("native")
    keywords, p = positives(kind, 1100, 2100, "cpu")
    x, y = features(1100, 16, torch.float32, "cpu"), features(2100, 16, torch.float32, "cpu")
    scale = torch.tensor(20.0)
    assert_loss_close(
        lambda *a: clip_loss(*a, **keywords), lambda *a: clip_loss_ref(*a, p), lambda: (x, y, scale), draws=1
    )
    results = []
    threads = torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(testing.gradients(lambda *a: clip_loss(*a, **keywords), (x, y, scale), torch.ones(())))
    torch.set_num_threads(threads)
    torch.testing.assert_close(*results)


def tiny_dual_encoder(kind: str):
    """transformers' CLIPModel or SiglipModel, and what it returns for a batch with its own loss."""
    import transformers

    text = dict(
        vocab_size=99, hidden_size=32, intermediate_size=37, num_hidden_layers=1, num_attention_heads=4,
        projection_size=32, eos_token_id=98, pad_token_id=0, bos_token_id=1,
    )  # fmt: skip
    vision = dict(
        image_size=16, patch_size=8, hidden_size=32, intermediate_size=37, num_hidden_layers=1, num_attention_heads=4
    )
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=vision)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    ids = torch.randint(2, 98, (6, 9))
    ids[:, -1] = 98
    with torch.no_grad():
        return model, model(input_ids=ids, pixel_values=torch.randn(6, 3, 16, 16), return_loss=True)


def test_of_transformers_itself():
    model, out = tiny_dual_encoder("CLIP")
    torch.testing.assert_close(clip_loss(out.image_embeds, out.text_embeds, model.logit_scale.detach().exp()), out.loss)


def test_formulas_of_open_clip():
    x, y, scale = features(40, 32, torch.float64, "cpu"), features(40, 32, torch.float64, "cpu"), torch.tensor(14.3)
    logits = scale.double() * x @ y.T
    labels = torch.arange(40)
    both = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    torch.testing.assert_close(clip_loss(x, y, scale), both)
    # its local_loss: rank 1 of 4, rows against all
    local = slice(10, 20)
    halves = [clip_loss(a[local], b, scale, offset=10, rows_only=True) for a, b in ((x, y), (y, x))]
    expected = F.cross_entropy(logits[local], labels[local]) + F.cross_entropy(logits.T[local], labels[local])
    torch.testing.assert_close(sum(halves), expected)
    # soft targets: cross-entropy with probabilities
    targets = torch.rand(40, 40, dtype=torch.float64).softmax(1)
    soft = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets.T)) / 2
    torch.testing.assert_close(clip_loss(x, y, scale, targets=targets), soft)


def test_of_open_clip_itself():
    open_clip = open_clip_losses()
    x, y = features(64, 32, torch.float32, "cpu"), features(64, 32, torch.float32, "cpu")
    scale = torch.tensor(14.3)
    torch.testing.assert_close(clip_loss(x, y, scale), open_clip.ClipLoss()(x, y, scale))


@pytest.mark.parametrize("path", PATHS)
def test_bad_and_odd_input(path, take, device):
    take(path)
    scale = torch.tensor(10.0, device=device)
    one = features(1, 8, torch.float32, device).requires_grad_()
    loss = clip_loss(one, one.detach(), scale)
    assert loss == 0
    assert (torch.autograd.grad(loss, one)[0] == 0).all()
    assert clip_loss(one[:0], one[:0], scale) == 0
    # no row has a positive
    x, y = features(6, 8, torch.float32, device).requires_grad_(), features(6, 8, torch.float32, device)
    ids = torch.arange(6, device=device)
    loss = clip_loss(x, y, scale, positive_ids=(ids, ids + 6))
    assert loss == 0
    assert (torch.autograd.grad(loss, x)[0] == 0).all()
    # a large temperature stays exact, an infinite one does not pass silently
    x = x.detach()
    big = clip_loss(x, y, torch.tensor(1e30, device=device))
    torch.testing.assert_close(big, clip_loss_ref(x.double(), y.double(), torch.tensor(1e30)).float())
    assert clip_loss(x, y, torch.tensor(torch.inf, device=device)).isnan()
    assert clip_loss(x, y, torch.tensor(torch.nan, device=device)).isnan()


@pytest.mark.parametrize("path", PATHS)
def test_nan_goes_where_the_formula_takes_it(path, take, device):
    take(path)
    x, y = features(6, 8, torch.float32, device), features(6, 8, torch.float32, device)
    x[2] = torch.nan
    assert clip_loss(x, y, torch.tensor(10.0, device=device)).isnan()
    # along rows alone, row 2's loss is NaN and no other row's gradient is
    leaf = x.clone().requires_grad_()
    loss = clip_loss(leaf, y, torch.tensor(10.0, device=device), rows_only=True)
    assert loss.isnan()
    grad = torch.autograd.grad(loss, leaf)[0]
    assert grad[2].isnan().all()
    assert grad[[0, 1, 3, 4, 5]].isfinite().all()
    # a positive's weight beside a NaN: only its own row
    targets = torch.eye(6, device=device)
    loss = clip_loss(leaf, y, torch.tensor(10.0, device=device), rows_only=True, targets=targets)
    assert torch.autograd.grad(loss, leaf)[0].isfinite().sum() == 40


def test_memory_is_linear(monkeypatch, take):
    """Tensors alive at once beyond the inputs and gradients: one tile, whatever the batch."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in torch.utils._pytree.tree_leaves(out):
                if isinstance(t, torch.Tensor):
                    self.numbers = max(self.numbers, t.numel())
            return out

    monkeypatch.setitem(contrastive.TILE, "cpu", 64)
    take("native")
    module = __import__("sys").modules["mmlm_fast.ops.clip_loss"]
    monkeypatch.setattr(module, "_fwd", module._fwd_over_all)
    for num in (256, 1024):
        x, y = features(num, 8, torch.float32, "cpu").requires_grad_(), features(num, 8, torch.float32, "cpu")
        with Largest() as largest:
            torch.autograd.grad(clip_loss(x, y, torch.tensor(5.0)), x)
        assert largest.numbers <= max(64 * (64 + contrastive.PADDING), 8 * num)


def test_a_number_is_a_scale_and_autocast_casts():
    x, y = features(5, 8, torch.float32, "cpu"), features(5, 8, torch.float32, "cpu")
    torch.testing.assert_close(clip_loss(x, y, 3), clip_loss(x, y, torch.tensor(3.0)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = clip_loss(x, y, 3.0)
    torch.testing.assert_close(loss, clip_loss(x.bfloat16(), y.bfloat16(), 3.0))
    assert loss.dtype == torch.float32


def test_backward_twice_and_scaled(take):
    take("native")
    x, y = features(9, 8, torch.float32, "cpu").requires_grad_(), features(9, 8, torch.float32, "cpu")
    loss = clip_loss(x, y, 4.0)
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (tripled,) = torch.autograd.grad(3 * loss, x, retain_graph=True)
    (again,) = torch.autograd.grad(loss, x)
    assert first.equal(again)
    torch.testing.assert_close(tripled, 3 * first)


def test_registration_gradcheck_compile(monkeypatch):
    x, y, scale = features(12, 8, torch.float32, "cpu"), features(12, 8, torch.float32, "cpu"), torch.tensor(7.0)
    ids = torch.arange(12) % 5
    op = torch.ops.mmlm_fast
    torch.library.opcheck(op.clip_loss_fwd.default, (x, y, scale, 0, 0, None, None, None, False, [True] * 3))
    torch.library.opcheck(op.clip_loss_fwd.default, (x, y, scale, 1, 0, ids, ids, None, True, [True, False, False]))
    running = [torch.zeros(4, 12) for _ in range(2)]
    torch.library.opcheck(op.clip_loss_statistics.default, (x @ y.T, scale, *running, 0, 0, None, None, None))
    sides, sums = [torch.rand(3, 12) for _ in range(2)], torch.zeros(2, dtype=torch.float64)
    torch.library.opcheck(op.clip_loss_gradients.default, (x @ y.T, scale, *sides, sums, 1, 0, ids, ids, None))
    args = [t.double().requires_grad_() for t in (x, y, scale)]
    for keywords in ({}, {"positive_ids": ids}, {"targets": torch.rand(12, 12)}, {"rows_only": True}):
        assert torch.autograd.gradcheck(lambda *a, k=keywords: clip_loss(*a, **k), args)
    leaves = [t.clone().requires_grad_() for t in (x, y, scale)]
    compiled = torch.compile(clip_loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for keywords in ({}, {"positive_ids": ids}):
        found, expected = compiled(*leaves, **keywords), clip_loss(*leaves, **keywords)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(*(torch.autograd.grad(2 * t, leaves) for t in (found, expected)))


def test_errors():
    x = torch.zeros(4, 3)
    with pytest.raises(ValueError, match=r"image_features must be \[N, D\].*got shape \(3,\)"):
        clip_loss(x[0], x, 1.0)
    with pytest.raises(ValueError, match="must share D, dtype and device"):
        clip_loss(x, torch.zeros(4, 2), 1.0)
    with pytest.raises(ValueError, match="must share D, dtype and device"):
        clip_loss(x, x.double(), 1.0)
    with pytest.raises(ValueError, match="logit_scale must be one floating-point number"):
        clip_loss(x, x, torch.ones(2))
    with pytest.raises(ValueError, match="logit_scale must be a number or a tensor of one, got NoneType"):
        clip_loss(x, x, None)
    with pytest.raises(ValueError, match=r"positive_ids must be int64 \[4\]"):
        clip_loss(x, x, 1.0, positive_ids=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"targets must be \[4, 4\]"):
        clip_loss(x, x, 1.0, targets=torch.zeros(4, 3))
    with pytest.raises(ValueError, match="pass one"):
        clip_loss(x, x, 1.0, targets=torch.zeros(4, 4), positive_ids=torch.arange(4))
    with pytest.raises(ValueError, match="offset shifts the diagonal"):
        clip_loss(x, x, 1.0, positive_ids=torch.arange(4), offset=1)
