import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmlm_fast import testing
from mmlm_fast.ops import merge_embeddings, scatter_features
from mmlm_fast.ops.merge_embeddings import merge_embeddings_ref, scatter_features_ref
from mmlm_fast.ops.paths import Path, forced
from support.kernel_path import PATHS, PATHS_AND_DTYPES, saved_numbers

merge = importlib.import_module("mmlm_fast.ops.merge_embeddings")
IMAGE, AUDIO = 17, -200  # one placeholder in the vocabulary, one outside, as LLaVA's


def draw(dtype, device, shape=(2, 30), size=33, vocabulary=20):
    ids = torch.randint(0, 17, shape, device=device)
    ids[..., 3:9] = IMAGE
    ids[..., ::7] = AUDIO
    features = {t: torch.randn(int((ids == t).sum()), size, dtype=dtype, device=device) for t in (IMAGE, AUDIO)}
    return ids, torch.randn(vocabulary, size, dtype=dtype, device=device), features


@pytest.mark.parametrize(("path", "dtype"), PATHS_AND_DTYPES)
@pytest.mark.parametrize("size", [33, 1030])
def test_close_to_reference(path, dtype, size, take, device):
    take(path)
    ids, table, features = draw(dtype, device, size=size)
    rows = tuple(features.values())
    for scale, padding in ((1.0, None), (5.5, 3)):

        def fast(table, a, b, scale=scale, padding=padding):
            return merge_embeddings(ids, table, {IMAGE: a, AUDIO: b}, scale=scale, padding_idx=padding)

        def ref(table, a, b, scale=scale, padding=padding):
            return merge_embeddings_ref(ids, table, {IMAGE: a, AUDIO: b}, scale, padding)

        testing.assert_close_to_reference(fast(table, *rows), ref, table, *rows)
        testing.assert_gradients_close_to_reference(fast, ref, table, *rows)
    embeds = torch.randn(*ids.shape, size, dtype=dtype, device=device)
    for add in (False, True):

        def fast(embeds, a, b, add=add):
            return scatter_features(embeds, ids, {IMAGE: a, AUDIO: b}, add=add)

        def ref(embeds, a, b, add=add):
            return scatter_features_ref(embeds, ids, {IMAGE: a, AUDIO: b}, add)

        testing.assert_close_to_reference(fast(embeds, *rows), ref, embeds, *rows)
        testing.assert_gradients_close_to_reference(fast, ref, embeds, *rows)


@pytest.mark.parametrize(("path", "dtype"), PATHS_AND_DTYPES)
@pytest.mark.parametrize("add", [False, True])
def test_rows_to_spare(path, dtype, add, take, device):
    """As with masked_scatter, the last ones are not used, and get a gradient of 0; too few are an error still."""
    take(path)
    ids, table, features = draw(dtype, device)
    spare = [torch.cat([f, torch.full((3, 33), torch.nan, dtype=dtype, device=device)]) for f in features.values()]
    embeds = table[ids.clamp(0, 16)].requires_grad_()
    grads = []
    for rows in (list(features.values()), spare):
        leaves = [r.clone().requires_grad_() for r in rows]
        out = scatter_features(embeds, ids, dict(zip(features, leaves, strict=True)), add=add, spare=True)
        torch.empty(64, 33, dtype=dtype, device=device).fill_(torch.nan)  # for memory that nobody writes
        grads.append((out, *torch.autograd.grad(out, [embeds, *leaves], torch.ones_like(out))))
    assert grads[0][0].equal(grads[1][0])
    assert grads[0][1].equal(grads[1][1])
    for few, many in zip(grads[0][2:], grads[1][2:], strict=True):
        assert many[:-3].equal(few)
        assert (many[-3:] == 0).all()
    with pytest.raises(ValueError, match="rows for"):
        scatter_features(embeds, ids, {IMAGE: features[IMAGE][1:]}, spare=True)
    with pytest.raises(ValueError, match="rows for"):
        scatter_features(embeds, ids, dict(zip(features, spare, strict=True)))


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.lists(st.sampled_from([0, 1, 2, 3]), min_size=0, max_size=12), min_size=1, max_size=4),
    st.integers(1, 20),
)
def test_is_masked_scatter(rows, size):
    """Any placement of two placeholders; equal bits, since rows are copied."""
    width = max(map(len, rows))
    ids = torch.tensor([r + [0] * (width - len(r)) for r in rows], dtype=torch.int32).view(len(rows), width)
    table = torch.randn(2, size)
    features = {t: torch.randn(int((ids == t).sum()), size) for t in (2, 3)}
    with forced(Path.NATIVE):
        out = merge_embeddings(ids, table, features)
    assert out.equal(merge_embeddings_ref(ids, table, features))


@pytest.mark.parametrize("path", PATHS)
def test_features_of_any_shape_and_no_features(path, take, device):
    take(path)
    ids, table, features = draw(torch.float32, device)
    shaped = {IMAGE: features[IMAGE].view(2, -1, 33), AUDIO: features[AUDIO].t().contiguous().t()}
    assert merge_embeddings(ids, table, shaped).equal(merge_embeddings_ref(ids, table, features))
    text = ids.clamp(0, 16)
    assert merge_embeddings(text, table, {}).equal(table[text])
    assert merge_embeddings(text, table, {IMAGE: table[:0]}).equal(table[text])
    assert merge_embeddings(text[:, :0], table, {}).shape == (2, 0, 33)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("tokens", [[7], [0], [1, -200, 7], [151_655, 3]], ids=str)
@pytest.mark.parametrize("num_tokens", [1, 5, 1023, 1024, 1025, 3000])
def test_where_rows_come_from(num_tokens, tokens, dtype, device):
    """The kernels beside the formula: blocks of tokens, with and without a table, counts too small and too large."""
    from mmlm_kernels.merge_embeddings import merge_embeddings_sources

    ids = torch.randint(-3, 60, (num_tokens,), device=device).to(dtype)
    for token in tokens:
        ids[torch.rand(num_tokens, device=device) < 0.2] = token
    for num_ids in (-1, 50, 200_000):
        counts = [max(0, int((ids == t).sum()) + more) for t, more in zip(tokens, (0, 2, -1), strict=False)]
        found = merge_embeddings_sources(ids, tokens, counts, num_ids)
        expected = merge._portable_sources(ids, tokens, counts, num_ids)
        assert found[0].equal(expected[0]), num_ids
        assert found[1].equal(expected[1]), num_ids


@pytest.mark.parametrize("path", PATHS)
def test_counts_that_differ_are_never_silent(path, take):
    take(path)
    ids, table, features = draw(torch.float32, "cpu")
    short = {IMAGE: features[IMAGE][1:], AUDIO: features[AUDIO]}
    for check in (None, True):
        with pytest.raises(ValueError, match="features of token 17: 9 rows for 10 placeholders in input_ids"):
            merge_embeddings(ids, table, short, check=check)
    with pytest.raises(ValueError, match="features of token -200: 0 rows for 10 placeholders"):
        scatter_features(table[ids.clamp(0)], ids, {AUDIO: table[:0]})
    # What CUDA does by default: an assertion on the device, here on the host.
    with pytest.raises(RuntimeError, match="features of token 17: 9 rows for another number of placeholders"):
        merge_embeddings(ids, table, short, check=False)
    with pytest.raises(ValueError, match=r"input_ids must be in \[0, 20\) or placeholders, got 1 outside"):
        merge_embeddings(torch.tensor([[1, 20]]), table, {})


@pytest.mark.parametrize("path", PATHS)
def test_counts_that_differ_stay_in_bounds(path, monkeypatch, take, device):
    """The assertion may come late: until then nothing out of range is read."""
    take(path)
    monkeypatch.setattr(torch, "_assert_async", lambda *_: None)
    ids, table, features = draw(torch.float32, device)
    for count in (1, 0):
        out = merge_embeddings(ids, table, {t: f[:count] for t, f in features.items()}, check=False)
        assert out.shape == (2, 30, 33)
        if count:  # nor a row of another modality
            assert all(out[ids == t].equal(f[:1].expand(int((ids == t).sum()), -1)) for t, f in features.items())


def test_transients_are_of_the_order_of_the_tokens(take):
    from mmlm_benchmarks.harness import peak_memory_mib

    take("native")
    ids, table, features = draw(torch.float32, "cpu", (4, 1024), 2048)
    out_mib = 4 * 1024 * 2048 * 4 / 2**20

    def peak(function):  # of the process, which may grow for reasons of its own: the least of a few
        return min(peak_memory_mib(lambda: function(ids, table, features), ()) for _ in range(4))

    with torch.no_grad():
        assert peak(merge_embeddings) < 1.1 * out_mib
        assert peak(merge_embeddings_ref) > 2 * out_mib


def test_keeps_one_integer_a_token(take):
    take("native")
    ids, table, features = draw(torch.float32, "cpu", (2, 300))
    table.requires_grad_()
    assert saved_numbers(lambda: merge_embeddings(ids, table, features)) == 600 * 8


def test_registration():
    source = torch.tensor([0, -1, 1, -2])
    table, features = torch.randn(3, 5), [torch.randn(1, 5), torch.randn(1, 5)]
    for mode in ("embed", "replace", "add"):
        base = table if mode == "embed" else torch.randn(4, 5)
        torch.library.opcheck(torch.ops.mmlm_fast.merge_embeddings_fwd.default, (source, base, features, mode, 1.0))
    torch.library.opcheck(torch.ops.mmlm_fast.merge_embeddings_bwd.default, (torch.randn(4, 5), source, [1, 1]))


def test_compiles_in_one_graph_with_dynamic_shapes():
    compiled = torch.compile(
        lambda ids, table, rows: merge_embeddings(ids, table, {IMAGE: rows}),
        fullgraph=True, dynamic=True, backend="aot_eager",
    )  # fmt: skip
    for length in (12, 20):
        ids = torch.randint(0, 17, (2, length))
        ids[:, 3:9] = IMAGE
        table, rows = torch.randn(20, 6, requires_grad=True), torch.randn(12, 6, requires_grad=True)
        out, expected = compiled(ids, table, rows), merge_embeddings_ref(ids, table, {IMAGE: rows})
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(*(torch.autograd.grad(o.square().sum(), [table, rows]) for o in (out, expected)))


def test_errors():
    ids, table, features = draw(torch.float32, "cpu")
    with pytest.raises(ValueError, match="input_ids must be int64 or int32"):
        merge_embeddings(ids.float(), table, features)
    with pytest.raises(ValueError, match=r"features\[17\] must be \[..., 33\]"):
        merge_embeddings(ids, table, {IMAGE: torch.zeros(12, 4)})
    with pytest.raises(ValueError, match=r"features\[17\] must be torch.float32"):
        merge_embeddings(ids, table, {IMAGE: torch.zeros(12, 33, dtype=torch.float16)})
    with pytest.raises(ValueError, match="features must map placeholder tokens"):
        merge_embeddings(ids, table, [features[IMAGE]])
    with pytest.raises(ValueError, match=r"input_ids must be \(2, 30\)"):
        scatter_features(torch.zeros(2, 30, 33), ids[:1], features)
    with pytest.raises(ValueError, match=r"padding_idx must be in \[0, 20\)"):
        merge_embeddings(ids, table, features, padding_idx=20)
