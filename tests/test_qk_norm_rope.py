from importlib import import_module

import pytest
import torch

from mmlm_fast import testing
from mmlm_fast.ops import qk_norm_rope, rope_tables
from mmlm_fast.ops.qk_norm_rope import qk_norm_rope_ref
from support.kernel_path import PATHS, PATHS_AND_DTYPES, saved_numbers

# head size, rotating pairs: all of a head, a head of 80, a part of one, less than a vector
SIZES = [(64, 32), (80, 40), (96, 16), (66, 3)]


def draw(size, half, dtype, device, batch=2, heads=3, kv_heads=1, length=3):
    query, key = (
        torch.randn(batch, length, h, size, dtype=dtype, device=device).transpose(1, 2) for h in (heads, kv_heads)
    )
    positions = torch.randint(0, 500, (batch, length), device=device)
    cos, sin = rope_tables(positions, 100 ** -(torch.arange(half, device=device) / half))
    # As the reference, which works in the inputs' dtype, reads them.
    return query, key, cos.to(dtype).float(), sin.to(dtype).float()


@pytest.mark.parametrize(("path", "dtype"), PATHS_AND_DTYPES)
@pytest.mark.parametrize("norm", [False, True], ids=["rope", "norm"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])
def test_close_to_reference(path, dtype, norm, interleaved, take, device):
    take(path)
    for size, half in SIZES:
        query, key, cos, sin = draw(size, half, dtype, device)
        weights = [torch.randn(size, dtype=dtype, device=device) for _ in range(2 if norm else 0)]

        def fast(query, key, *weights, cos=cos, sin=sin):
            named = dict(zip(("query_weight", "key_weight"), weights, strict=False))
            return qk_norm_rope(query, key, cos, sin, **named, offset=0.5, interleaved=interleaved)

        def ref(query, key, *weights, cos=cos, sin=sin):
            return qk_norm_rope_ref(query, key, cos, sin, *(weights or (None, None)), 1e-6, 0.5, interleaved)

        testing.assert_close_to_reference(fast(query, key, *weights), ref, query, key, *weights)
        testing.assert_gradients_close_to_reference(fast, ref, query, key, *weights)


@pytest.mark.parametrize("path", PATHS)
def test_packed_projection_and_many_tokens(path, monkeypatch, take, device):
    """Views of one packed projection; more tokens than a part of the weight's gradient; one table for all samples."""
    take(path)
    packed = torch.randn(2, 6, 5 * 64, device=device)
    if path == "kernel":
        monkeypatch.setattr(import_module("mmlm_kernels.qk_norm_rope"), "MAX_SPLITS", 5)
    weight = torch.randn(64, device=device)
    cos, sin = rope_tables(torch.arange(6, device=device)[None], torch.rand(30, device=device))

    def run(function):
        def call(packed, weight):
            query, key = (x.unflatten(-1, (-1, 64)).transpose(1, 2) for x in packed.split([192, 128], -1))
            return function(query, key, cos, sin, query_weight=weight, key_weight=weight)

        return call

    fast, ref = run(qk_norm_rope), run(qk_norm_rope_ref)
    out = fast(packed, weight)
    assert out[0].transpose(1, 2).is_contiguous()
    testing.assert_close_to_reference(out, ref, packed, weight)
    testing.assert_gradients_close_to_reference(fast, ref, packed, weight)


@pytest.mark.parametrize("path", PATHS)
def test_query_alone_and_empty(path, take, device):
    take(path)
    query, _, cos, sin = draw(8, 4, torch.float32, device)
    out, key = qk_norm_rope(query, None, cos, sin)
    assert key is None
    testing.assert_close_to_reference(out, lambda q: qk_norm_rope_ref(q, None, cos, sin)[0], query)
    empty, _ = qk_norm_rope(query[:, :, :0], None, cos[:, :0], sin[:, :0])
    assert empty.shape == (2, 3, 0, 8)


def test_rotation_keeps_lengths_and_depends_on_distance():
    """|Rx| = |x|, and ⟨R_m q, R_n k⟩ depends on m − n alone."""
    query, key = torch.randn(1, 1, 1, 16, dtype=torch.float64), torch.randn(1, 1, 1, 16, dtype=torch.float64)
    inv_freq = 50 ** -(torch.arange(8, dtype=torch.float64) / 8)

    def product(m, n):
        # Tables in float64: those of rope_tables have float32's rounding of the angle.
        rotated = [
            qk_norm_rope(x, None, (p * inv_freq).cos()[None], (p * inv_freq).sin()[None])[0]
            for x, p in ((query, m), (key, n))
        ]
        return rotated[0].norm(), (rotated[0] * rotated[1]).sum()

    (length, near), (_, far) = product(3, 5), product(103, 105)
    torch.testing.assert_close(length, query.norm())
    torch.testing.assert_close(near, far)


def test_tables_of_axes():
    inv_freq = torch.rand(6)
    positions = torch.randint(0, 50, (3, 2, 4))
    cos, sin = rope_tables(positions, inv_freq, sections=[3, 2, 1], scaling=2.0)
    owner = [0, 0, 0, 1, 1, 2]
    angles = torch.stack([positions[axis] * inv_freq[i] for i, axis in enumerate(owner)], -1)
    torch.testing.assert_close(cos, 2 * angles.cos())
    torch.testing.assert_close(sin, 2 * angles.sin())
    same = rope_tables(positions[:1].expand(3, -1, -1), inv_freq, sections=[2, 2, 2], interleaved_sections=True)
    torch.testing.assert_close(same, rope_tables(positions[0], inv_freq))


def test_keeps_inputs_only_for_a_norm(take):
    take("native")
    query, key, cos, sin = draw(32, 16, torch.float32, "cpu")
    query.requires_grad_()
    tables = 2 * cos.numel() * 4
    assert saved_numbers(lambda: qk_norm_rope(query, key, cos, sin)) == tables
    weight = torch.ones(32)
    kept = saved_numbers(lambda: qk_norm_rope(query, key, cos, sin, query_weight=weight, key_weight=weight))
    assert kept == tables + (query.numel() + key.numel() + 32) * 4


def test_registration():
    query, key, cos, sin = draw(8, 3, torch.float32, "cpu")
    weight = torch.ones(8)
    ops = torch.ops.mmlm_fast
    for w, k in ((None, None), (weight, key)):
        torch.library.opcheck(
            ops.qk_norm_rope_fwd.default, (query, k, cos, sin, w, None if k is None else w, 1e-6, 0.0, False)
        )
    torch.library.opcheck(
        ops.qk_norm_rope_bwd.default, (query, key, query, key, cos, sin, weight, weight, 1e-6, 0.0, True)
    )
    torch.library.opcheck(
        ops.qk_norm_rope_bwd.default, (query, None, None, None, cos, sin, None, None, 1e-6, 0.0, True)
    )


def test_gradcheck():
    query, key, cos, sin = draw(6, 2, torch.float64, "cpu")
    weights = [torch.randn(6, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def function(q, k, a, b):
        return qk_norm_rope(q, k, cos.double(), sin.double(), query_weight=a, key_weight=b)

    assert torch.autograd.gradcheck(function, (query.requires_grad_(), key.requires_grad_(), *weights))


def test_compiles_in_one_graph_with_dynamic_shapes():
    def step(query, positions, inv_freq):
        return qk_norm_rope(query, query * 2, *rope_tables(positions, inv_freq, sections=[2, 1, 1]))

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (3, 6):
        query = torch.randn(2, 4, length, 8, requires_grad=True)
        args = (query, torch.arange(length).expand(3, 2, length), torch.rand(4))
        out, expected = compiled(*args), step(*args)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(*(torch.autograd.grad(o[0].square().sum(), query)[0] for o in (out, expected)))


def test_errors():
    query, key, cos, sin = draw(8, 4, torch.float32, "cpu")
    for args, message in (
        ((query[0], key, cos, sin), r"query must be \[B, heads, S, D\]"),
        ((query, key[:, :, :2], cos, sin), r"key must be \[2, heads, 3, 8\]"),
        ((query, key, cos[:, :2], sin[:, :2]), r"cos and sin must be \[1 or 2, 3, R/2\]"),
        ((query, key, torch.ones(1, 3, 5), torch.ones(1, 3, 5)), "at most half as wide as a head"),
        ((query, key, cos.clone().requires_grad_(), sin), "must not require a gradient"),
    ):
        with pytest.raises(ValueError, match=message):
            qk_norm_rope(*args)
    with pytest.raises(ValueError, match="both be given or neither"):
        qk_norm_rope(query, key, cos, sin, query_weight=torch.ones(8))
    with pytest.raises(ValueError, match="sections must be one a axis with sum 4"):
        rope_tables(torch.zeros(3, 1, 2), torch.ones(4), sections=[1, 1, 1])
