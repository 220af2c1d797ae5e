"""Logits that wait: whatever reads, changes, hooks or differentiates them gets what a plain head gives."""

import copy
import functools
import gc
import io
import pickle
import threading
import warnings
import weakref

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint

import mmlm_fast
from mmlm_fast.nn import LazyLinear, LazyLogits, on_demand
from mmlm_fast.nn import lazy_logits as module
from mmlm_fast.nn.lazy_logits import logits_on_demand
from mmlm_fast.ops.paths import Path, forced

V, H = 300, 8


pytestmark = pytest.mark.usefixtures("native")


@pytest.fixture
def short_ways(monkeypatch):
    """How often a loss did without logits."""
    counts = [0]
    loss = module.linear_cross_entropy

    def counting(*args, **kwargs):
        counts[0] += 1
        return loss(*args, **kwargs)

    monkeypatch.setattr(module, "linear_cross_entropy", counting)
    return counts


def make(dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    head = LazyLinear(H, V, bias=bias).to(dtype)
    x = torch.randn(2, 5, H).to(dtype).requires_grad_()
    y = torch.randint(0, V, (2, 5))
    y[0, 1] = -100
    return head, x, y


def logits_of(head, x, fast):
    if not fast:
        return F.linear(x, head.weight, head.bias)
    with logits_on_demand(few_rows=True):
        z = head(x)
    assert type(z) is LazyLogits
    return z


def ce(z, y, **options):
    return F.cross_entropy(z.view(-1, V), y.view(-1), **options)


def read_without_gradients(z, y):
    loss = ce(z, y)
    with torch.no_grad():
        z.argmax(-1)
    return loss + z.softmax(-1).square().sum()


def read_in_inference_mode(z, y):
    with torch.inference_mode():
        z.argmax(-1), z[:, :-1].reshape(-1, V).argmax(-1)
    return ce(z, y) + z.softmax(-1).square().sum()


def read_under_autocast(z, y):
    with torch.autocast("cpu", torch.bfloat16):
        z.argmax(-1)
    return z.square().sum()


def change_view(z, y):
    z.view(-1, V)[:, 100:] = -9.0
    return ce(z, y.clamp(max=99))


def change_slice(z, y):
    z[..., 3:] = 0.0
    return z.square().sum() + ce(z, y)


def change_after_loss(z, y):
    loss = ce(z, y)
    z.mul_(3.0)
    return loss + z.square().sum()


def change_after_inference(z, y):
    with torch.inference_mode():
        z.argmax(-1)
    z[..., 3:] = 0.0
    return z.square().sum() + (z.view(-1, V) * torch.ones(V, requires_grad=True)).sum()


def change_after_derived(z, y):
    scaled = z * 2.0
    z[..., 3:] = 0.0
    return ce(scaled, y) + z.sum()


def change_derived_after_loss(z, y):
    scaled = z * 2.0
    loss = ce(scaled, y)
    scaled.zero_()
    return loss + scaled.sum() + z.square().sum()


def change_shape_in_place(z, y):
    z.unsqueeze_(0)
    assert z.shape == (1, 2, 5, V)
    return ce(z[0], y) + z.square().sum()


def take_gradient(z, y):
    loss = ce(z * 0.5, y)
    (grad,) = torch.autograd.grad(loss, z, retain_graph=True)
    return loss + (grad * z).sum()


def hook_that_changes(z, y):
    z.register_hook(lambda grad: grad * 0.5)
    return ce(z, y)


def hook_on_scaled(z, y):
    """What it multiplies by is not what undoes the scale."""
    scaled = z * 0.5
    scaled.register_hook(lambda grad: grad * 0.3)
    return ce(scaled, y)


def hook_on_slice(z, y):
    seen, part = [], z[:, :-1]
    part.register_hook(lambda grad: seen.append(torch.ops.aten.slice_backward(grad, z.shape, 1, 1, 5, 1)))
    loss = F.cross_entropy(part.reshape(-1, V), y[:, 1:].reshape(-1))
    torch.autograd.grad(loss, z, retain_graph=True)
    return (seen[0] * z).sum()


def gradient_of_smoothed(z, y):
    (grad,) = torch.autograd.grad(ce(z.float(), y, label_smoothing=0.3, reduction="sum"), z, retain_graph=True)
    return (grad * z).sum()


def hook_that_looks(z, y):
    seen = []
    z.register_hook(lambda grad: seen.append(grad.sum(-1)))
    loss = ce(z, y)
    torch.autograd.grad(loss, z, retain_graph=True)
    assert len(seen) == 1
    assert seen[0].shape == (2, 5)
    return loss + z.sum()


def retain_gradient(z, y):
    z.retain_grad()
    loss = ce(z.float(), y)
    loss.backward(retain_graph=True)
    return loss + (z.grad * z).sum()


def hessian(z, y):
    (grad,) = torch.autograd.grad(ce(torch.tanh(z / 2) * 3, y, label_smoothing=0.1), z, create_graph=True)
    return grad.square().sum()


def twice(z, y):
    return ce(z, y) + ce(z * 2, y) + ce(z[:1].repeat(2, 1, 1), y)


class Exponential(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z.exp()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].exp()


class InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        ctx.mark_dirty(z)
        return z.mul_(2)

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


@torch.jit.script
def scripted(z: torch.Tensor) -> torch.Tensor:
    return (z.softmax(-1) * z).sum()


def script(z, y):
    return scripted(z) + scripted(z) + scripted(z)  # the third run is of the optimised graph


def compiled(z, y):
    return torch.compile(lambda z: z.softmax(-1).square().sum(), backend="aot_eager")(z)


def saved(z, y):
    file = io.BytesIO()
    torch.save(z.detach(), file)
    file.seek(0)
    return torch.load(file).sum()


def reentrant(z, y):
    return checkpoint(lambda z: z.softmax(-1).square().sum(), z, use_reentrant=True)


def checkpointed(z, y):
    return checkpoint(lambda z: z.float().softmax(-1).square().sum() + ce(z.float(), y), z, use_reentrant=False)


def in_a_thread(z, y):
    found = []
    thread = threading.Thread(target=lambda: found.append(z.logsumexp(-1).sum()))
    thread.start()
    thread.join()
    return found[0] + ce(z, y)


def hooks_on_saved_tensors(z, y):
    with torch.autograd.graph.save_on_cpu():
        return z.float().exp().sum() + ce(z, y)


HEAD = ["language-model head"]
LOSSES = {
    "mean": lambda z, y: ce(z, y),
    "sum": lambda z, y: ce(z, y, reduction="sum"),
    "none": lambda z, y: (ce(z, y, reduction="none") * torch.arange(10.0)).sum(),
    "ignored": lambda z, y: ce(z, y, ignore_index=int(y[0, 0]) if y[0, 0] >= 0 else 7) if (y >= 0).all() else ce(z, y),
    "all_ignored": lambda z, y: ce(z, torch.full_like(y, -100)).nan_to_num(),
    "smoothing": lambda z, y: ce(z, y, label_smoothing=0.2),
    "float": lambda z, y: ce(z.float(), y),
    "to": lambda z, y: ce(z.to(torch.float32).contiguous(), y),
    "shift": lambda z, y: F.cross_entropy(z[:, :-1].reshape(-1, V).float(), y[:, 1:].reshape(-1)),
    "shift_contiguous": lambda z, y: F.cross_entropy(z[..., :-1, :].contiguous().view(-1, V), y[:, 1:].reshape(-1)),
    "later_rows": lambda z, y: F.cross_entropy(z[:, 1:].reshape(-1, V), y[:, 1:].reshape(-1)),
    "every_second": lambda z, y: F.cross_entropy(z[:, ::2].reshape(-1, V), y[:, ::2].reshape(-1)),
    "flatten": lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten()),
    "cap": lambda z, y: ce(torch.tanh(z / 3.0) * 3.0, y),
    "scale": lambda z, y: ce(z * 0.3 / 2, y),
    "bias": lambda z, y: ce(z + torch.linspace(0, 1, V, dtype=z.dtype)[None], y),
    "module": lambda z, y: nn.CrossEntropyLoss()(z.view(-1, V), y.view(-1)),
    "detached": lambda z, y: ce(z.detach(), y),
}
OTHERS = {
    "class_weights": lambda z, y: ce(z, y, weight=torch.linspace(0, 1, V)),
    "probabilities": lambda z, y: F.cross_entropy(z.view(-1, V), torch.arange(10.0 * V).view(10, V).softmax(-1)),
    "channels_second": lambda z, y: F.cross_entropy(z.transpose(1, 2), y),
    "negative_cap": lambda z, y: ce(torch.tanh(z) * -2, y),
    "learned_bias": lambda z, y: ce(z + torch.linspace(0, 1, V).requires_grad_(), y),
    "double": lambda z, y: ce(z.double(), y),
    "rows_by_mask": lambda z, y: F.cross_entropy(z[y > 100], y[y > 100]),
    "last_token": lambda z, y: F.cross_entropy(z[:, -1], y[:, -1]),
    "one_sample": lambda z, y: F.cross_entropy(z[1], y[1]),
    "transposed_batch": lambda z, y: F.cross_entropy(z.transpose(0, 1).reshape(-1, V), y.T.reshape(-1)),
    "rows_across_rows": lambda z, y: F.cross_entropy(z.view(-1)[7 : 7 + 8 * V].view(8, V), y.view(-1)[:8]),
    "bias_behind_scale": lambda z, y: ce(z * 0.5 + torch.linspace(0, 1, V), y),
    "some_classes": lambda z, y: F.cross_entropy(z[..., :200].reshape(-1, 200), y.clamp(max=199).reshape(-1)),
    "expanded": lambda z, y: F.cross_entropy(z[:, :1].expand(2, 5, V).reshape(-1, V), y.reshape(-1)),
    "z_loss": lambda z, y: ce(z.float(), y) + 0.1 * z.float().logsumexp(-1).square().mean(),
    "log_probs": lambda z, y: -z.log_softmax(-1).gather(2, y.clamp(min=0)[..., None]).sum(),
    "kl": lambda z, y: F.kl_div(z.log_softmax(-1), torch.full_like(z, 1 / V), reduction="sum"),
    "cat": lambda z, y: torch.cat([z, z]).square().sum(),
    "stack_of_views": lambda z, y: torch.stack(z.unbind(0)).square().sum() + sum(p.sum() for p in z.split(2, 1)),
    "data": lambda z, y: z.data.square().sum() + 0 * z.sum(),
    "numpy": lambda z, y: torch.from_numpy(z.detach().numpy()).sum() + z.sum(),
    "tolist": lambda z, y: torch.tensor(z.tolist()).sum() + z.sum(),
    "item": lambda z, y: z[0, 0, 0] * z[1, 2, 3].item(),
    "deepcopy": lambda z, y: copy.deepcopy(z.detach()).sum(),
    "pickle": lambda z, y: pickle.loads(pickle.dumps(z.detach())).sum(),
    "repr": lambda z, y: torch.tensor(float(len(repr(z.detach())))),
    "vmap": lambda z, y: torch.func.vmap(lambda row: row.softmax(-1).square())(z).sum(),
    "functional_gradient": lambda z, y: torch.func.grad(lambda t: t.square().sum())(z.detach()).sum(),
    "function": lambda z, y: Exponential.apply(z).sum(),
    "function_of_view": lambda z, y: Exponential.apply(z[:, :-1].reshape(-1, V)).sum(),
    "function_in_place": lambda z, y: InPlace.apply(z).square().sum(),
} | {f.__name__: f for f in (
    read_without_gradients, read_in_inference_mode, read_under_autocast, change_view, change_slice, change_after_loss,
    change_after_inference, change_after_derived, change_derived_after_loss, change_shape_in_place, take_gradient,
    hook_that_changes, hook_on_scaled, hook_on_slice, gradient_of_smoothed,
    hook_that_looks, retain_gradient, hessian, twice, script, compiled, saved, reentrant, checkpointed, in_a_thread,
    hooks_on_saved_tensors,
)}  # fmt: skip


def value_and_gradients(function, fast, dtype=torch.float32, bias=True):
    head, x, y = make(dtype, bias)
    value = function(logits_of(head, x, fast), y)
    inputs = [t for t in (x, head.weight, head.bias) if t is not None]
    for t in inputs:
        t.grad = None
    if value.requires_grad:
        value.float().backward()
    return [value.detach(), *(t.grad for t in inputs)]


def assert_same(function, dtype=torch.float32, bias=True):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, theirs = (value_and_gradients(function, fast, dtype, bias) for fast in (True, False))
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert type(a) is torch.Tensor
            if dtype == torch.float32:
                torch.testing.assert_close(a, b)
            else:  # our logits are not rounded to half precision before the loss
                torch.testing.assert_close(a, b, rtol=0, atol=4 * torch.finfo(dtype).eps * max(1.0, b.abs().max()))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_that_need_no_logits(name, bias, short_ways, monkeypatch):
    read = []
    monkeypatch.setattr(module.OnDemand, "read", lambda self: read.append(self))
    assert_same(LOSSES[name], bias=bias)
    assert short_ways[0] == 1
    assert not read


@pytest.mark.parametrize("name", ["mean", "float", "shift", "cap", "bias", "none"])
def test_losses_in_half_precision(name, short_ways):
    assert_same(LOSSES[name], torch.bfloat16)
    assert short_ways[0] == 1


@pytest.mark.parametrize("name", OTHERS)
def test_whatever_else_is_done_with_logits(name):
    assert_same(OTHERS[name])


@pytest.mark.parametrize("name", ["last_token", "one_sample", "transposed_batch"])
def test_no_gradients_are_formed_in_vain(name, short_ways):
    """Where a gradient could not wait on its way back through a view, the loss takes logits from the start."""
    assert_same(OTHERS[name])
    assert short_ways[0] == 0


@pytest.mark.parametrize("name", OTHERS)
def test_views_share_and_products_are_not_repeated(name, monkeypatch):
    """The head's product is computed at most once, however often and through whatever views logits are read."""
    products, linear = [0], F.linear

    def counting(x, weight, bias=None):
        products[0] += weight.shape[0] == V
        return linear(x, weight, bias)

    head, x, y = make()
    z = logits_of(head, x, fast=True)
    monkeypatch.setattr(F, "linear", counting)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = OTHERS[name](z, y)
        if value.requires_grad:
            value.backward()
    changed = "change" in name  # the loss of logits that are overwritten then computes them again in its backward pass
    assert products[0] <= 1 + changed


def test_numbers_read_in_inference_mode_serve_training():
    head, x, _ = make()
    z = logits_of(head, x, fast=True)
    with torch.inference_mode():
        z.argmax(-1)
    (z.logits() * torch.ones(V, requires_grad=True)).sum().backward()


COPIES = {
    "reshape": lambda z: z[:, :-1].reshape(-1, V),
    "contiguous": lambda z: z[:, :-1].contiguous(),
    "flatten": lambda z: z[:, 1:].flatten(0, 1),
    "ravel": lambda z: z[:, 1:].ravel(),
    "reshape_as": lambda z: z.reshape_as(torch.empty(10, V)),
    "movedim": lambda z: z.movedim(0, 1).reshape(10, V),
    "narrow": lambda z: z.narrow(1, 1, 3).reshape(-1, V),
    "expand": lambda z: z[:1].expand(3, 5, V).reshape(-1, V),
    "unflatten": lambda z: z.unflatten(-1, (3, V // 3)).reshape(2, -1),
    "einsum": lambda z: torch.einsum("btv->tbv", z),
    "swapaxes": lambda z: z.swapaxes(0, 1).contiguous(),
    "float": lambda z: z.float(),
    "double": lambda z: z.double(),
    "to": lambda z: z.to(torch.float64, copy=True),
    "type": lambda z: z.type(torch.float64),
    "half": lambda z: z.half(),
    "cpu": lambda z: z.cpu(),
    "shift": lambda z: z[:, :-1].contiguous().view(-1, V).argmax(-1),
    "bits": lambda z: z.detach().view(torch.int16 if z.dtype == torch.bfloat16 else torch.int32).double(),
    "complex": lambda z: torch.view_as_complex(z.detach().float().view(2, 5, V // 2, 2)).abs(),
    "likes": lambda z: torch.zeros_like(z) + torch.ones_like(z).sum() + z.new_full((2,), 3).sum(),
    "numbers": lambda z: torch.tensor([z.detach()[0, 0, 3], z.detach()[0, 0, 7]]),
    "chunk": lambda z: torch.cat(z.chunk(2, -1), -1),
    "cross_entropy": lambda z: F.cross_entropy(z[:, :-1].reshape(-1, V), torch.arange(8)),
    "cross_entropy_rows": lambda z: F.cross_entropy(input=z.view(-1, V), target=torch.arange(10), reduction="none"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", COPIES)
def test_copies_in_every_mode(name, mode, dtype):
    head, x, _ = make(dtype)
    z, plain = logits_of(head, x, fast=True), logits_of(head, x, fast=False)
    with mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, theirs = COPIES[name](z), COPIES[name](plain)
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        assert ours.device == theirs.device
        if name.startswith("cross_entropy"):
            tolerance = 4 * torch.finfo(dtype).eps
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
        else:
            assert torch.equal(ours + 0, theirs)


@pytest.mark.parametrize("change", ["transpose_", "squeeze_", "swapaxes_", "t_"])
@pytest.mark.parametrize("derived", [False, True])
def test_shapes_changed_in_place(change, derived):
    head, x, _ = make()
    x = (x[:1, :1] if change == "squeeze_" else x[0, :5] if change == "t_" else x).detach().requires_grad_()
    arguments = {"transpose_": (0, 1), "squeeze_": (0,), "swapaxes_": (0, 2), "t_": ()}[change]
    found = []
    for fast in (True, False):
        z = logits_of(head, x, fast)
        z = z * 2 if derived else z
        later = z * 3
        getattr(z, change)(*arguments)
        found.append([z.detach() + 0, later.detach() + 0, *torch.autograd.grad((z.square() * 2).sum(), x)])
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)


def test_memory_and_data_written_directly():
    def numpy(z):
        scaled = z * 2
        z.detach().numpy()[...] = 0
        return scaled.sum() + z.sum()

    def data(z):
        z.data = torch.full((2, 5, V), 2.0)
        return z.square().sum()

    def elements(z):
        z.detach().apply_(lambda value: value + 1)
        return z.sum()

    for function in (numpy, data, elements):
        assert_same(lambda z, y, function=function: function(z))
    head, x, _ = make()
    with pytest.raises(RuntimeError, match=r"can only become a tensor of \(2, 5, 300\), .* got \(3,\)"):
        logits_of(head, x, fast=True).data = torch.zeros(3)


def test_copies_share_what_the_originals_share():
    head, x, _ = make()
    z = logits_of(head, x, fast=True).detach()
    both = copy.deepcopy({"a": z, "b": z[0]})
    both["a"].zero_()
    assert (both["b"] == 0).all()
    assert z.abs().sum() > 0


def test_threads_read_the_same_memory():
    head, x, _ = make()
    for _ in range(20):
        on_demand._HABITS.clear()
        z, found = logits_of(head, x, fast=True), []
        read = functools.partial(lambda z, found: found.append(z.logits().data_ptr()), z, found)
        threads = [threading.Thread(target=read) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found[0] == found[1]


def test_a_batch_of_gradients():
    head, x, y = make()
    found = []
    for fast in (True, False):
        z = logits_of(head, x, fast)
        loss = ce(z, y.clamp(min=0), reduction="none")
        found.append(torch.autograd.grad(loss, z, torch.eye(10), is_grads_batched=True)[0])
    torch.testing.assert_close(*found)


def test_a_loss_that_is_kept_keeps_no_more():
    """Lists of losses, running sums: after the backward pass nothing of the step hangs on them."""
    head, x, y = make()
    hidden = x * 1
    with torch.autocast("cpu", torch.bfloat16):
        z = logits_of(head, hidden, fast=True)
        loss = ce(z.float(), y)
    seen = [weakref.ref(z._stage.head), weakref.ref(z)]
    del z, hidden
    loss.backward()
    assert [ref() for ref in seen] == [None, None]
    assert loss.isfinite()


def test_frozen_body_steps_between_two_backward_passes():
    head, x, y = make()
    x = x.detach()
    loss = ce(logits_of(head, x, fast=True), y)
    loss.backward(retain_graph=True)
    torch.optim.SGD(head.parameters(), lr=0.1).step()
    before = head.weight.grad.clone()
    loss.backward()
    torch.testing.assert_close(head.weight.grad, 2 * before)


def test_few_rows_have_logits():
    """A loss without logits holds the weight's gradient from the forward pass on: more than a few rows of logits."""
    head = LazyLinear(64, V)
    for rows, kind in ((31, torch.Tensor), (32, LazyLogits)):
        with logits_on_demand():
            assert type(head(torch.randn(rows, 64))) is kind
            head.weight.requires_grad_(False)
            assert type(head(torch.randn(rows, 64))) is LazyLogits
            head.weight.requires_grad_(True)
    with logits_on_demand():
        assert type(head.bfloat16()(torch.randn(63, 64).bfloat16())) is torch.Tensor


def test_classes_ruled_out():
    """Minus infinity for a class, as padded vocabularies have it."""
    row = torch.zeros(V)
    row[-8:] = -torch.inf
    for path in (Path.NATIVE, None):  # in chunks, and by the reference
        with forced(path):
            assert_same(lambda z, y: ce(z + row, y.clamp(max=V - 9)))
            assert_same(lambda z, y: ce(z + row, y.clamp(max=V - 9), reduction="sum"))
        head, x, y = make()
        with torch.no_grad():
            head.bias += row
        loss = mmlm_fast.ops.linear_cross_entropy(x, head.weight, y.clamp(max=V - 9), head.bias)
        assert loss.isfinite()
        assert torch.autograd.grad(loss, x)[0].isfinite().all()


def test_a_copy_of_logits_in_the_graph_is_refused_as_torch_refuses_it():
    head, x, _ = make()
    for fast in (True, False):
        with pytest.raises(RuntimeError, match="Only Tensors created explicitly by the user"):
            copy.deepcopy(logits_of(head, x, fast))
        with pytest.raises(RuntimeError, match="requires grad"):
            logits_of(head, x, fast).numpy()


def sgd_on_data(head):
    for p in head.parameters():
        p.data.sub_(0.1 * p.grad)


@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("change", [lambda w: w.data.mul_(0.5), lambda w: w.data[-1:].add_(1e-3)])
def test_weights_written_past_their_version(change, odd):
    """Averages swapped in, a row that learns: before any backward pass of these logits."""
    head, x, _ = make()
    if odd:
        head, x = LazyLinear(7, V), x[..., :7].detach().requires_grad_()
    z = logits_of(head, x, fast=True)
    change(head.weight)
    with pytest.raises(RuntimeError, match="have changed or gone since"):
        z.sum()


@pytest.mark.parametrize("step", [torch.optim.SGD, torch.optim.AdamW, sgd_on_data])
def test_logits_of_before_the_step(step):
    """Read before it they are there; after it they would be another model's."""
    for read_before in (True, False):
        head, x, y = make()
        z = logits_of(head, x, fast=True)
        expected = F.linear(x, head.weight, head.bias)
        ce(z, y).backward()
        if read_before:
            z.argmax(-1)
        step(head) if step is sgd_on_data else step(head.parameters(), lr=0.1).step()
        if read_before:
            torch.testing.assert_close(z.detach() + 0, expected.detach(), rtol=0, atol=0)
        else:
            with pytest.raises(RuntimeError, match=r"read outputs.logits before optimizer.step\(\)"):
                z.sum()


@pytest.mark.parametrize("part", ["hidden", "weight", "bias"])
def test_parts_changed_in_place(part):
    """Before any loss or backward pass: logits of the forward pass, or an error."""
    for read_before in (True, False):
        head, x, _ = make()
        z = logits_of(head, hidden := x * 1, fast=True)
        expected = F.linear(hidden, head.weight, head.bias).detach().clone()
        if read_before:
            z.argmax(-1)
        with torch.no_grad():
            {"hidden": hidden, "weight": head.weight, "bias": head.bias}[part].mul_(2)
        if read_before:
            assert torch.equal(z.detach() + 0, expected)
        else:
            with pytest.raises(RuntimeError, match="have changed or gone since"):
                z.sum()


@pytest.mark.parametrize("end", ["dropped", "backward", "gradient", "read"])
def test_nothing_is_kept(end):
    """No cycle: what a step made is freed when its last name goes, without the garbage collector."""

    def step():
        head, x, y = make()
        z = logits_of(head, x * 1, fast=True)
        loss = ce(z.float() * 2, y)
        seen = [weakref.ref(t) for t in (z, loss, loss.grad_fn.leaves[1])]
        if end == "read":
            z.sum()
        if end == "gradient":
            torch.autograd.grad(loss, z)
        elif end != "dropped":
            loss.backward()
        return seen

    step()
    gc.disable()
    try:
        assert [ref() for ref in step()] == [None] * 3
    finally:
        gc.enable()


def test_a_gradient_kept_is_of_before_the_step():
    head, x, y = make()
    kept = []
    for fast in (True, False):
        z = logits_of(head, x, fast)
        z.retain_grad()
        ce(z, y).backward()
        kept.append(z)
    torch.optim.SGD(head.parameters(), lr=1.0).step()
    torch.testing.assert_close(kept[0].grad, kept[1].grad)


def test_when_the_head_is_plain():
    head, x, _ = make()

    def kind(**where):
        with logits_on_demand():
            return type(head(x, **where))

    assert kind() is LazyLogits
    assert type(head(x)) is torch.Tensor  # no loss follows
    for context in (torch.no_grad(), mmlm_fast.reference(), torch.autograd.graph.save_on_cpu()):
        with context:
            assert kind() is torch.Tensor
    for register in (
        head.register_forward_hook, head.register_forward_pre_hook, head.register_full_backward_hook,
        head.register_full_backward_pre_hook,
    ):  # fmt: skip
        handle = register(lambda *_: None)
        assert kind() is torch.Tensor
        handle.remove()
    torch.nn.utils.parametrize.register_parametrization(head, "weight", nn.Identity())
    assert kind() is torch.Tensor
    torch.nn.utils.parametrize.remove_parametrizations(head, "weight")
    assert kind() is LazyLogits
    compiled = torch.compile(lambda x: head(x).sum(), backend="aot_eager", fullgraph=True)
    with logits_on_demand():
        torch.testing.assert_close(compiled(x), F.linear(x, head.weight, head.bias).sum())
        torch.testing.assert_close(
            torch.func.grad(lambda x: head(x).square().sum())(x.detach()),
            torch.func.grad(lambda x: F.linear(x, head.weight, head.bias).square().sum())(x.detach()),
        )
        with pytest.raises(RuntimeError, match="dtype"):  # as the original
            head(x.bfloat16())
    assert type(head.eval()) is nn.Linear


def test_a_head_whose_logits_are_read_becomes_plain():
    """Beside the loss they cost a product more: after two steps the head computes them at once, and says so."""
    head, x, y = make()
    for _ in range(2):
        z = logits_of(head, x, fast=True)
        ce(z, y).backward()
        z.argmax(-1)
    with logits_on_demand(), pytest.warns(UserWarning, match="logits are read beside its loss"):
        assert type(head(x)) is torch.Tensor
    occasional, x, y = make()
    for step in range(20):
        z = logits_of(occasional, x, fast=True)
        ce(z, y).backward()
        if step % 5 == 4:
            z.argmax(-1)


# Models


def model(fast, cls=transformers.LlamaForCausalLM, **options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, **options
    )
    built = transformers.LlamaForCausalLM(config).train()
    if fast:
        mmlm_fast.accelerate(built, only=HEAD)
    return built


IDS = torch.randint(3, V, (2, 12), generator=torch.Generator().manual_seed(1))


def gradients(wrapped):
    return [p.grad for p in wrapped.parameters()]


def test_without_labels_a_model_is_the_original(monkeypatch):
    fast, plain = model(True), model(False)
    out = fast(input_ids=IDS)
    assert type(out.logits) is torch.Tensor
    assert torch.equal(out.logits, plain(input_ids=IDS).logits)
    hidden = fast.model(input_ids=IDS).last_hidden_state
    assert type(checkpoint(fast.lm_head, hidden, use_reentrant=True)) is torch.Tensor
    assert type(fast(IDS, labels=IDS).logits) is LazyLogits
    assert type(fast(IDS, None, None, None, None, IDS).logits) is LazyLogits  # labels by position
    assert type(fast(IDS).logits) is torch.Tensor
    with pytest.raises(TypeError):
        fast(IDS, labels=IDS, unknown_to=1, input_ids=IDS)
    assert type(fast(IDS).logits) is torch.Tensor  # a failed call leaves nothing behind


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("option", ["none", "find_unused_parameters", "static_graph", "gradient_as_bucket_view"])
def test_distributed_data_parallel(option, labels, group):
    """A fresh model's first steps: with its own loss, with one outside, with a z-loss beside it."""
    found = []
    for fast in (True, False):
        wrapped = nn.parallel.DistributedDataParallel(model(fast), **({} if option == "none" else {option: True}))
        for _ in range(2):
            if labels:
                out = wrapped(input_ids=IDS, labels=IDS)
                loss = out.loss
            else:
                out = wrapped(input_ids=IDS)
                loss = F.cross_entropy(out.logits[:, :-1].reshape(-1, V), IDS[:, 1:].reshape(-1))
            if labels and option == "static_graph":
                loss = loss + 0.1 * out.logits.logsumexp(-1).square().mean()
            loss.backward()
        found.append([loss.detach(), *gradients(wrapped)])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("units", ["head", "model", "layers"])
@pytest.mark.parametrize("reshard", [True, False])
def test_fully_sharded(units, reshard, group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    found = []
    for fast in (True, False):
        sharded, mesh = model(fast), init_device_mesh("cpu", (1,))
        parts = {"head": [sharded.lm_head], "model": [], "layers": list(sharded.model.layers)}[units]
        for part in (*parts, sharded):
            fully_shard(part, mesh=mesh, reshard_after_forward=reshard)
        out = sharded(input_ids=IDS, labels=IDS)
        out.loss.backward()
        out.logits.argmax(-1)  # a metric afterwards
        found.append([out.loss.detach(), *(g.full_tensor() for g in gradients(sharded))])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_whole_model_checkpointed(reentrant):
    found = []
    for fast in (True, False):
        m = model(fast)
        embeds = m.get_input_embeddings()(IDS)
        for _ in range(2):  # the first call of a fresh model, and the next
            loss = checkpoint(lambda e, m=m: m(inputs_embeds=e, labels=IDS).loss, embeds, use_reentrant=reentrant)
            loss.backward(retain_graph=True)
        found.append([loss.detach(), *gradients(m)])
    torch.testing.assert_close(*found)


def test_checkpointing_survives_a_head_that_becomes_plain():
    m = model(True)
    embeds = m.get_input_embeddings()(IDS).detach().requires_grad_()

    def loss_and_entropy(e):
        out = m(inputs_embeds=e, labels=IDS)
        return out.loss + out.logits.logsumexp(-1).mean()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(4):
            checkpoint(loss_and_entropy, embeds, use_reentrant=False).backward()


def test_hessian_vector_product_of_a_model():
    products = []
    for fast in (True, False):
        m = model(fast, attn_implementation="eager")
        parameters = list(m.parameters())
        grads = torch.autograd.grad(m(input_ids=IDS, labels=IDS).loss, parameters, create_graph=True)
        torch.manual_seed(1)
        product = sum((g * torch.randn_like(g)).sum() for g in grads)
        products.append(torch.autograd.grad(product, parameters, materialize_grads=True))
    torch.testing.assert_close(*products, rtol=1e-4, atol=1e-5)


def test_frozen_head_and_frozen_body():
    for frozen in ("lm_head", "model"):
        found = []
        for fast in (True, False):
            m = model(fast)
            getattr(m, frozen).requires_grad_(False)
            out = m(input_ids=IDS, labels=IDS)
            out.loss.backward()
            found.append(gradients(m))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b) if b is not None else None
            assert (a is None) == (b is None)


def test_class_pickle_copy_and_save(tmp_path):
    m = model(True)
    assert type(m).__name__ == "LlamaForCausalLM"
    assert isinstance(m, transformers.LlamaForCausalLM)
    for twin in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert type(twin) is type(m)
        assert type(twin(input_ids=IDS, labels=IDS).logits) is LazyLogits
    m.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is transformers.LlamaForCausalLM
    assert type(again.lm_head) is nn.Linear
    assert again.config.architectures == ["LlamaForCausalLM"]
    assert type(m.eval().lm_head) is nn.Linear
    assert type(m.train()(input_ids=IDS, labels=IDS).logits) is LazyLogits


@pytest.mark.parametrize("change", ["nothing", "parametrized", "sharded", "resized", "evaluated", "peft"])
def test_undo(change, request):
    m = model(False)
    done = mmlm_fast.accelerate(m)
    if change == "parametrized":
        torch.nn.utils.parametrize.register_parametrization(m.lm_head, "weight", nn.Identity())
    if change == "sharded":
        request.getfixturevalue("group")
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard

        for part in (m.lm_head, m):
            fully_shard(part, mesh=init_device_mesh("cpu", (1,)))
    if change == "resized":
        m.resize_token_embeddings(V + 8, mean_resizing=False)
        assert type(m.lm_head) is LazyLinear
    if change == "evaluated":
        m.eval().train()
    inner = m
    if change == "peft":
        from peft import LoraConfig, get_peft_model

        m = get_peft_model(m, LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    done.undo()
    assert not any(isinstance(part, LazyLinear) for part in m.modules())
    assert not hasattr(inner, "computes_loss_without_logits")
    if change == "sharded":
        assert isinstance(m, FSDPModule)
        assert isinstance(m.lm_head, FSDPModule)
    elif change == "parametrized":
        assert torch.nn.utils.parametrize.is_parametrized(m.lm_head, "weight")
        torch.nn.utils.parametrize.remove_parametrizations(m.lm_head, "weight")
        assert type(m.lm_head) is nn.Linear
    out = m(input_ids=IDS, labels=IDS)
    assert type(out.logits) is torch.Tensor
    out.loss.backward()
    if change in ("nothing", "evaluated"):
        plain = model(False)
        plain(input_ids=IDS, labels=IDS).loss.backward()
        assert type(m) is transformers.LlamaForCausalLM
        assert type(m.lm_head) is nn.Linear
        assert all(torch.equal(a, b) for a, b in zip(gradients(m), gradients(plain), strict=True))


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]])
def test_adapters(order, targets):
    from peft import LoraConfig, get_peft_model

    found, kinds = [], []
    for fast in (True, False):
        m = model(fast and order == "before")
        torch.manual_seed(2)
        tuned = get_peft_model(m, LoraConfig(r=2, target_modules=targets, init_lora_weights=False)).train()
        if fast and order == "after":
            report = mmlm_fast.accelerate(tuned, only=HEAD, strict=False)
            assert bool(report.replaced) == (targets == ["q_proj"])
        out = tuned(input_ids=IDS, labels=IDS)
        kinds.append(type(out.logits))
        out.loss.backward()
        found.append([out.loss.detach(), *(g for g in gradients(tuned) if g is not None)])
        merged = tuned.eval().merge_and_unload()
        with torch.no_grad():
            torch.testing.assert_close(merged(input_ids=IDS).logits, out.logits.detach() + 0, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*found)
    assert kinds[0] is (LazyLogits if targets == ["q_proj"] else torch.Tensor)


@pytest.mark.parametrize("inplace", [True, False])
def test_quantisers_find_the_head(inplace):
    m = model(True).eval()
    quantised = torch.ao.quantization.quantize_dynamic(m, {nn.Linear}, dtype=torch.qint8, inplace=inplace)
    assert "quantized" in type(quantised.lm_head).__module__


def test_undo_below_a_forward_that_someone_kept():
    """Accelerate stores a model's forward, wrapped, on the instance."""
    m = model(False)
    done = mmlm_fast.accelerate(m)
    kept = m.forward
    m.forward = lambda *args, **kwargs: kept(*args, **kwargs)
    assert type(m(input_ids=IDS, labels=IDS).logits) is LazyLogits
    done.undo()
    assert type(m(input_ids=IDS, labels=IDS).logits) is torch.Tensor
    assert type(m.lm_head) is nn.Linear


def test_report_of_wrapped_and_of_compiled_models():
    assert "replaced module.lm_head" in str(mmlm_fast.accelerate(nn.DataParallel(model(False))))

    class Task(nn.Module):
        def __init__(self):
            super().__init__()
            self.reward = nn.Linear(3, 3)
            self.policy = model(False)

    assert "replaced policy.lm_head" in str(mmlm_fast.accelerate(Task()))
    compiled = torch.compile(model(False), backend="aot_eager")
    assert "in compiled code the head is the original's" in str(mmlm_fast.accelerate(compiled))
    torch.testing.assert_close(compiled(input_ids=IDS, labels=IDS).loss, model(False)(input_ids=IDS, labels=IDS).loss)
    with pytest.raises(ValueError, match="nothing to replace was found"):
        mmlm_fast.accelerate(nn.Linear(2, 2))
