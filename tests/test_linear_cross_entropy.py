from importlib import import_module

import pytest
import torch
import torch.nn.functional as F

from mmlm_fast import testing
from mmlm_fast.ops import linear_cross_entropy
from mmlm_fast.ops.linear_cross_entropy import chunks_of, linear_cross_entropy_ref
from support.kernel_path import PATHS, PATHS_AND_DTYPES, saved_numbers
from support.losses import assert_loss_close

OPTIONS = {
    "plain": {},
    "cap": dict(softcap=3.0, logit_scale=0.7),
    "smooth": dict(label_smoothing=0.1, z_loss=1e-2),
    "all": dict(softcap=4.0, logit_scale=1.5, label_smoothing=0.2, z_loss=3e-3, reduction="sum"),
    "none ignored": dict(ignore_index=None),
    "items": dict(num_items_in_batch=17),
}


def draw_rows(dtype: torch.dtype, device: str, num: int = 37, size: int = 24, vocab: int = 203, bias: bool = True):
    x, w = (torch.randn(n, size, device=device).to(dtype) for n in (num, vocab))
    return x, w, torch.randn(vocab, device=device).to(dtype) if bias else None


def targets(num: int, vocab: int, ignored: bool, device: str) -> torch.Tensor:
    y = torch.randint(0, vocab, (num,), device=device)
    if ignored:
        y[::3] = -100
    return y


@pytest.mark.parametrize(("path", "dtype"), PATHS_AND_DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_close_to_reference(path, dtype, name, take, device):
    """Several chunks of 16 rows, the last with a rest."""
    take(path)
    y, options = targets(37, 203, name != "none ignored", device), OPTIONS[name]
    draws = 8 if path == "native" else 1
    assert_loss_close(
        lambda x, w, b: linear_cross_entropy(x, w, y, b, chunk_mib=0.01, **options),
        lambda x, w, b: linear_cross_entropy_ref(x, w, y, b, **options),
        lambda: draw_rows(dtype, device),
        draws,
    )


@pytest.mark.parametrize(("path", "dtype"), PATHS_AND_DTYPES)
def test_a_loss_for_each_row(path, dtype, take, device):
    take(path)
    y = targets(37, 203, True, device).view(1, 37)
    x, w, b = draw_rows(dtype, device)

    def fast(x, w, b):
        return linear_cross_entropy(x[None], w, y, b, reduction="none", chunk_mib=0.01)[0]

    def reference(x, w, b):
        return linear_cross_entropy_ref(x, w, y[0], b, reduction="none")

    testing.assert_close_to_reference(fast(x, w, b), reference, x, w, b)
    testing.assert_gradients_close_to_reference(fast, reference, x, w, b)
    assert (fast(x, w, b)[::3] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_large_vocabulary(dtype, take):
    """Sums over more than a block, more than one part of the vocabulary, without bias; one thread and two agree."""
    take("native")
    y = targets(70, 9001, True, "cpu")
    x, w, _ = draw_rows(dtype, "cpu", 70, 32, 9001, bias=False)
    for options in (OPTIONS["plain"], OPTIONS["all"]):
        assert_loss_close(
            lambda x, w, o=options: linear_cross_entropy(x, w, y, chunk_mib=1, **o),
            lambda x, w, o=options: linear_cross_entropy_ref(x, w, y, **o),
            lambda: (x, w),
            draws=1,
        )
    threads, results = torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(testing.gradients(lambda x, w: linear_cross_entropy(x, w, y), (x, w), torch.ones(())))
    torch.set_num_threads(threads)
    torch.testing.assert_close(*results)


def test_of_transformers_itself(take):
    """ForCausalLMLoss on the logits, with its shift, labels to ignore and num_items_in_batch."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    take("native")
    x, w = torch.randn(3, 11, 16), torch.randn(50, 16)
    labels = torch.randint(0, 50, (3, 11))
    labels[0, :4] = -100
    for items in (None, 20, torch.tensor(20)):
        theirs = ForCausalLMLoss(F.linear(x, w), labels, 50, num_items_in_batch=items)
        ours = linear_cross_entropy(x, w, labels, shift=True, num_items_in_batch=items)
        torch.testing.assert_close(ours, theirs)
    smooth = F.cross_entropy(F.linear(x, w).flatten(0, 1), labels.flatten(), label_smoothing=0.3)
    torch.testing.assert_close(linear_cross_entropy(x, w, labels, label_smoothing=0.3), smooth)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rows", [0, 5])
@pytest.mark.parametrize(
    ("reduction", "items"), [("mean", None), ("sum", None), ("none", None), ("sum", 0), ("mean", torch.tensor([0]))]
)
def test_all_ignored(path, reduction, items, rows, take, device):
    take(path)
    x, w, b = (t.requires_grad_() for t in draw_rows(torch.float32, device, rows))
    target = torch.full((rows,), -100, device=device)
    loss = linear_cross_entropy(x, w, target, b, reduction=reduction, num_items_in_batch=items).sum()
    assert loss == 0
    assert all((g == 0).all() for g in torch.autograd.grad(loss, (x, w, b)))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_nan_stays_where_it_is(path, reduction, take, device):
    """In a row that is ignored it is nowhere; in one that counts, in the loss and this row's gradient."""
    take(path)
    x, w, _ = draw_rows(torch.float32, device, 6, bias=False)
    y = torch.tensor([3, -100, 5, 7, -100, 9], device=device)
    x[1] = torch.nan
    x, w = x.requires_grad_(), w.requires_grad_()
    loss = linear_cross_entropy(x, w, y, reduction=reduction).sum()
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (x, w)))
    with torch.no_grad():
        x[2] = torch.nan
    losses = linear_cross_entropy(x, w, y, reduction=reduction)
    assert losses.isnan().sum() == 1
    (grad,) = torch.autograd.grad(losses.sum(), x)
    assert grad[2].isnan().all()
    assert grad[[0, 1, 3, 4, 5]].isfinite().all()


@pytest.mark.parametrize("path", PATHS)
def test_infinite_logits(path, take, device):
    """A class masked with -inf through the bias."""
    take(path)
    x, w, b = draw_rows(torch.float32, device, 9, vocab=40)
    b[7] = -torch.inf
    y = torch.arange(9, device=device) + 10
    torch.testing.assert_close(linear_cross_entropy(x, w, y, b), F.cross_entropy(F.linear(x, w, b), y))


def test_what_is_kept(take):
    """Nothing of the size of the logits: one gradient an input, formed already."""
    take("native")
    x, w, _ = draw_rows(torch.float32, "cpu", 64, 8, 512, bias=False)
    x, w, y = x.requires_grad_(), w.requires_grad_(), targets(64, 512, False, "cpu")
    assert saved_numbers(lambda: linear_cross_entropy(x, w, y)) == 4 * (64 * 8 + 512 * 8)
    assert saved_numbers(lambda: linear_cross_entropy(x.detach(), w, y)) == 4 * 512 * 8
    with torch.no_grad():
        assert saved_numbers(lambda: linear_cross_entropy(x, w, y)) == 0


def test_the_largest_gradient_is_not_copied(take):
    take("native")
    x, w, _ = draw_rows(torch.float32, "cpu", bias=False)
    w.requires_grad_()
    y = targets(37, 203, False, "cpu")
    for factor in (1.0, 0.5):
        loss = linear_cross_entropy(x, w, y)
        formed = loss.grad_fn.saved_tensors[1].data_ptr()
        w.grad = None
        (factor * loss).backward()
        assert w.grad.data_ptr() == formed
        torch.testing.assert_close(w.grad, factor * torch.autograd.grad(F.cross_entropy(F.linear(x, w), y), w)[0])


def test_backward_twice_and_float16(take):
    """A kept graph is not scaled in place; float16's gradients survive until a loss scaler's factor reaches them."""
    take("native")
    x, w, _ = draw_rows(torch.float32, "cpu", bias=False)
    x.requires_grad_()
    y = targets(37, 203, False, "cpu")
    loss = linear_cross_entropy(x, w, y)
    grads = [torch.autograd.grad(k * loss, x, retain_graph=True)[0] / k for k in (1, 3, 1)]
    torch.testing.assert_close(grads[1], grads[0])
    assert grads[2].equal(grads[0])
    half, weight = (1e-4 * x).detach().half().requires_grad_(), (1e-3 * w).half()
    loss = linear_cross_entropy(half, weight, y, num_items_in_batch=2**20) * 2.0**16
    (grad,) = torch.autograd.grad(loss, half)
    exact = half.detach().float().requires_grad_()
    expected = torch.autograd.grad(F.cross_entropy(F.linear(exact, weight.float()), y, reduction="sum") / 16, exact)[0]
    half = torch.finfo(torch.float16)  # the weight's own rounding is in both: one of the gradient is left
    torch.testing.assert_close(grad.float(), expected, rtol=half.eps, atol=half.smallest_normal * half.eps)


@pytest.mark.parametrize("vocab", [50_000, 152_064, 10**9])
def test_chunks_fit_the_budget(vocab):
    for rows in (1, 100, 2048, 10**6):
        step = chunks_of(rows, 4 * vocab, 96 * 2**20)
        assert step % 16 == 0
        assert step == 16 or step * 4 * vocab <= 96 * 2**20


def test_rows_of_a_chunk_on_a_gpu():
    """All rows where their logits are no more than a sum of the weight's gradients would be; else half of that sum."""
    rows_of = import_module("mmlm_kernels.linear_cross_entropy")._rows_of_chunk
    vocab, size = 152_064, 3584

    def rows(count, dtype=torch.bfloat16, summed=True, budget=0):
        return rows_of(torch.empty(count, size, dtype=dtype, device="meta"), vocab, summed, budget)

    assert rows(0) == 1
    assert rows(8192) == 8192  # 2.5 GB of logits for a sum of 2.2 GB that is not needed
    assert rows(16384) * vocab * 2 <= 2 * vocab * size
    assert rows(16384) > 2048
    assert rows(8192, torch.float32) < 8192  # there the sum is the gradient itself
    assert rows(8192, summed=False) * vocab * 2 <= 2**29
    assert rows(8192, budget=2**26) * vocab * 2 <= 2**26


def test_registration_gradcheck_compile():
    x, w, b = draw_rows(torch.float32, "cpu", 12, 8, 21)
    y, ignored = targets(12, 21, False, "cpu"), torch.arange(12) % 4 == 0
    one, numbers = torch.ones(()), [1.0, 0.0, 0.1, 0.01]
    op = torch.ops.mmlm_fast.linear_cross_entropy_fwd.default
    torch.library.opcheck(op, (x, w, b, y, ignored, None, one, numbers, [True] * 3, 2**10))
    torch.library.opcheck(op, (x, w, None, y, None, torch.rand(12), one, numbers, [True, False, False], 2**10))
    y[::4] = -100
    args = [t.double().requires_grad_() for t in (x, w, b)]
    for options in OPTIONS.values():
        labels = y.clamp(min=0) if options.get("ignore_index", 0) is None else y
        assert torch.autograd.gradcheck(
            lambda x, w, b, o=options, y=labels: linear_cross_entropy(x, w, y, b, **o), args
        )
    leaves = [t.clone().requires_grad_() for t in (x, w, b)]
    for options in (OPTIONS["plain"], OPTIONS["all"], {"reduction": "none"}):

        def function(x, w, b, options=options):
            return linear_cross_entropy(x, w, y, b, **options).sum()

        compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
        found, expected = compiled(*leaves), function(*leaves)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(*(torch.autograd.grad(2 * t, leaves) for t in (found, expected)))


def test_autocast_and_checkpointing(take):
    take("native")
    x, w, _ = draw_rows(torch.float32, "cpu", bias=False)
    x, w, y = x.requires_grad_(), w.requires_grad_(), targets(37, 203, True, "cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(x, w, y)
    expected = linear_cross_entropy(x.bfloat16(), w.bfloat16(), y)
    torch.testing.assert_close(*(torch.autograd.grad(t, (x, w)) for t in (loss, expected)))
    again = torch.utils.checkpoint.checkpoint(linear_cross_entropy, x, w, y, use_reentrant=False)
    plain = linear_cross_entropy(x, w, y)
    torch.testing.assert_close(*(torch.autograd.grad(t, (x, w)) for t in (again, plain)))


def test_labels_out_of_range_and_other_errors():
    x, w, y = torch.zeros(4, 3), torch.zeros(7, 3), torch.tensor([0, 6, 7, -1])
    with pytest.raises(ValueError, match=r"target must be in \[0, 7\) or -100, got 7 \(2 out of range\)"):
        linear_cross_entropy(x, w, y)
    with pytest.raises(ValueError, match=r"target must be in \[0, 7\), got -100"):
        linear_cross_entropy(x, w, torch.full((4,), -100), ignore_index=None)
    with pytest.raises(RuntimeError, match="target must be in"):  # as on CUDA: an assertion in the graph
        torch.compile(linear_cross_entropy, backend="aot_eager")(x, w, y)
    y = y.clamp(0, 6)
    with pytest.raises(ValueError, match=r"weight must have shape \(7, 3\), got \(7, 2\)"):
        linear_cross_entropy(x, w[:, :2], y)
    with pytest.raises(ValueError, match=r"target must be an int64 tensor, got torch\.int32"):
        linear_cross_entropy(x, w, y.int())
    with pytest.raises(ValueError, match=r"target must be \(4,\) on cpu, got \(3,\)"):
        linear_cross_entropy(x, w, y[:3])
    with pytest.raises(ValueError, match="reduction must be one of mean, sum, none, got 'average'"):
        linear_cross_entropy(x, w, y, reduction="average")
    with pytest.raises(ValueError, match="label_smoothing must be in"):
        linear_cross_entropy(x, w, y, label_smoothing=1.0)
    with pytest.raises(ValueError, match="softcap must be positive or None, got 0"):
        linear_cross_entropy(x, w, y, softcap=0)
    with pytest.raises(ValueError, match="ignore_index must be an int, got None"):
        linear_cross_entropy(x, w, y, shift=True, ignore_index=None)
    with pytest.raises(ValueError, match="num_items_in_batch divides a sum"):
        linear_cross_entropy(x, w, y, reduction="none", num_items_in_batch=3)
    with pytest.raises(ValueError, match="chunk_mib must be positive"):
        linear_cross_entropy(x, w, y, chunk_mib=0)
    empty = linear_cross_entropy(x[:0], w, y[:0])
    assert empty == 0
