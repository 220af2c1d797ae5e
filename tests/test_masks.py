"""Every builder against the same mask written as a predicate on (sample, query, key), random shapes and bounds."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from mmlm_fast.masks import IntervalMask

MANY = settings(max_examples=60, deadline=None, derandomize=True)
SIZE = st.integers(0, 13)


def dense(predicate, batch, q_len, kv_len):
    out = torch.zeros(batch, q_len, kv_len, dtype=torch.bool)
    for b in range(batch):
        for i in range(q_len):
            for j in range(kv_len):
                out[b, i, j] = predicate(b, i, j)
    return out


def check(mask, predicate, batch, q_len, kv_len):
    expected = dense(predicate, batch, q_len, kv_len)
    assert torch.equal(mask.dense(kv_len).expand(batch, -1, -1), expected)
    assert mask.lo.dtype == mask.hi.dtype == torch.int32
    assert (mask.lo <= mask.hi).all()
    assert ((mask.lo >= 0) & (mask.hi <= kv_len)).all()
    again = IntervalMask.from_dense(expected)
    assert torch.equal(again.dense(kv_len), expected)


@MANY
@given(SIZE, SIZE, st.one_of(st.none(), st.integers(-3, 15)), st.integers(1, 9), st.booleans(), st.booleans())
def test_causal_windows_and_chunks(q_len, kv_len, q_offset, width, bidirectional, per_sample):
    offset = kv_len - q_len if q_offset is None else q_offset
    given_offset = torch.tensor([offset, offset + 2]) if per_sample else q_offset
    first = [offset, offset + 2] if per_sample else [offset, offset]
    check(
        IntervalMask.causal(q_len, kv_len, q_offset=given_offset),
        lambda b, i, j: j <= i + first[b], 2, q_len, kv_len,
    )  # fmt: skip

    def window(b, i, j):
        p = i + first[b]
        return abs(j - p) <= width if bidirectional else p - width < j <= p

    check(
        IntervalMask.sliding_window(q_len, kv_len, window=width, bidirectional=bidirectional, q_offset=given_offset),
        window, 2, q_len, kv_len,
    )  # fmt: skip
    padding = torch.tensor([0, 3])

    def chunk(b, i, j):
        p = i + first[b]
        return j <= p and (j - int(padding[b])) // width == (p - int(padding[b])) // width

    check(
        IntervalMask.chunked(q_len, kv_len, chunk_size=width, left_padding=padding, q_offset=given_offset),
        chunk, 2, q_len, kv_len,
    )  # fmt: skip


@MANY
@given(SIZE, SIZE)
def test_full(q_len, kv_len):
    mask = IntervalMask.full(q_len, kv_len)
    check(mask, lambda b, i, j: True, 1, q_len, kv_len)
    for twin in (mask, mask.expand(2), mask.to("cpu"), pickle.loads(pickle.dumps(mask))):
        assert [twin.kind_for(n) for n in (0, kv_len, kv_len + 1)] == ["full", "full", None]


@MANY
@given(st.lists(st.tuples(SIZE, SIZE), max_size=4), st.booleans(), st.booleans(), st.integers(0, 3), st.booleans())
def test_packed(lengths, is_causal, cross, rest, int32):
    dtype = torch.int32 if int32 else torch.int64
    lengths = [(q, k if cross else q) for q, k in lengths]
    cu_q = torch.tensor([0, *(q for q, _ in lengths)]).cumsum(0).to(dtype)
    cu_k = torch.tensor([0, *(k for _, k in lengths)]).cumsum(0).to(dtype)
    q_len, kv_len = int(cu_q[-1]) + rest, int(cu_k[-1]) + rest

    def visible(b, i, j):
        for s in range(len(lengths)):
            if cu_q[s] <= i < cu_q[s + 1] and cu_k[s] <= j < cu_k[s + 1]:
                return not is_causal or cu_k[s + 1] - j >= cu_q[s + 1] - i
        return False

    options = dict(cu_seqlens_k=cu_k, kv_len=kv_len) if cross else {}
    check(IntervalMask.packed(cu_q, q_len, is_causal=is_causal, **options), visible, 1, q_len, kv_len)


@MANY
@given(st.lists(SIZE, min_size=1, max_size=3), SIZE, SIZE, st.sampled_from(["left", "right"]))
def test_padding_alone_and_with_others(lengths, q_len, kv_len, side):
    n = torch.tensor(lengths)

    def there(b, j):
        return j < n[b] if side == "right" else j >= kv_len - n[b]

    padding = IntervalMask.padded(n, kv_len, q_len=q_len, side=side)
    check(padding, lambda b, i, j: there(b, j), len(lengths), q_len, kv_len)
    causal = IntervalMask.sliding_window(q_len, kv_len, window=4)
    shift = kv_len - q_len
    check(
        causal & padding,
        lambda b, i, j: i + shift - 4 < j <= i + shift and there(b, j), len(lengths), q_len, kv_len,
    )  # fmt: skip


@MANY
@given(st.lists(st.integers(0, 15), min_size=1, max_size=3), SIZE, SIZE)
def test_prefix(prefixes, q_len, kv_len):
    shift = kv_len - q_len
    check(
        IntervalMask.prefix(torch.tensor(prefixes), q_len, kv_len),
        lambda b, i, j: j <= i + shift or j < prefixes[b], len(prefixes), q_len, kv_len,
    )  # fmt: skip


BLOCKS = st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=6)


@MANY
@given(BLOCKS, st.one_of(st.none(), st.integers(1, 6)), SIZE)
def test_image_blocks(blocks, window, q_len):
    ids = torch.tensor([[n if image else -1 for n, (length, image) in enumerate(blocks) for _ in range(length)]])
    ids = ids.to(torch.int64).reshape(1, -1)
    kv_len = ids.shape[1]
    q_len = min(q_len, kv_len)
    shift = kv_len - q_len

    def visible(b, i, j):
        p = i + shift
        seen = j <= p or (ids[0, j] == ids[0, p] and ids[0, p] >= 0)
        return seen and (window is None or j > p - window)

    check(IntervalMask.image_blocks(ids, window=window, q_len=q_len), visible, 1, q_len, kv_len)


def test_image_id_in_two_places_is_an_error():
    with pytest.raises(ValueError, match="an id of an image stands in two places"):
        IntervalMask.image_blocks(torch.tensor([[-1, 3, 3, -1, 3]]))
    with pytest.raises(ValueError, match="two places"):
        IntervalMask.image_blocks(torch.tensor([[0, 0, 1, 1], [0, 1, 0, 1]]))
    assert IntervalMask.image_blocks(torch.tensor([[5, 5, 0, -1, 2**40]])).hi.tolist() == [[2, 2, 3, 4, 5]]


@MANY
@given(st.lists(st.booleans(), max_size=9), st.integers(0, 3), st.booleans(), st.integers(0, 4))
def test_latest_image(media, tokens, only, num_images):
    locations = torch.tensor([media], dtype=torch.bool).reshape(1, -1)

    def visible(b, i, j):
        count = sum(media[: i + 1])
        return j < count * tokens and (not only or j >= (count - 1) * tokens)

    mask = IntervalMask.latest_image(locations, tokens, num_images=num_images, only=only)
    check(mask, visible, 1, len(media), num_images * tokens)


@MANY
@given(st.data(), SIZE, SIZE)
def test_union_and_intersection(data, q_len, kv_len):
    def draw():
        ends = st.integers(0, max(kv_len, 1))
        pairs = [(data.draw(ends), data.draw(ends)) for _ in range(q_len)]
        lo, hi = (torch.tensor([p[i] for p in pairs], dtype=torch.int32).reshape(1, -1) for i in (0, 1))
        return IntervalMask(lo, hi)

    a, b = draw(), draw()
    both, either = a.dense(kv_len) & b.dense(kv_len), a.dense(kv_len) | b.dense(kv_len)
    assert torch.equal((a & b).dense(kv_len), both)
    try:
        IntervalMask.from_dense(either)
    except ValueError:
        with pytest.raises(ValueError, match="union of masks"):
            a | b
    else:
        try:
            union = a | b
        except ValueError:  # a gap only beyond the keys at hand
            cut = [(m.lo.clamp(max=kv_len), m.hi.clamp(max=kv_len)) for m in (a, b)]
            assert any((hi > lo).any() and (m.hi > kv_len).any() for (lo, hi), m in zip(cut, (a, b), strict=True))
        else:
            assert torch.equal(union.dense(kv_len), either)


def test_from_dense_names_the_row():
    mask = torch.ones(2, 3, 4, dtype=torch.bool)
    mask[1, 2, 1] = False
    with pytest.raises(ValueError, match="not one interval of keys in row 2 of sample 1"):
        IntervalMask.from_dense(mask)
    assert IntervalMask.from_dense(torch.zeros(0, 5, 0, dtype=torch.bool)).lo.shape == (0, 5)
    assert IntervalMask.from_dense(torch.ones(2, 1, 3, 4, dtype=torch.bool)).hi.tolist() == [[4] * 3] * 2


def test_batching_moves_copies():
    a, b = IntervalMask.causal(3), IntervalMask.full(3, 3)
    assert (a.kind, (a & b).kind, a.to("cpu").kind) == ("causal", None, "causal")
    assert IntervalMask.causal(3, 5).kind is None
    both = IntervalMask.batch([a, b, a])
    assert (both.batch_size, both.q_len) == (3, 3)
    assert torch.equal(both.dense(3), torch.cat([a.dense(3), b.dense(3), a.dense(3)]))
    assert a.expand(4).lo.shape == (4, 3)
    assert torch.equal(a.rows(1, 3).hi, a.hi[:, 1:3])
    for twin in (pickle.loads(pickle.dumps(both)), copy.deepcopy(both), pytree.tree_map(lambda x: x, both)):
        assert isinstance(twin, IntervalMask)
        assert torch.equal(twin.lo, both.lo)
    assert a.to("meta").device.type == "meta"
    assert repr(a) == "IntervalMask(batch_size=1, q_len=3, device=cpu, causal)"


def test_memory_is_linear():
    """Two int32 a query, whatever the number of keys."""
    mask = IntervalMask.image_blocks(torch.full((1, 200_000), -1))
    assert mask.lo.untyped_storage().nbytes() + mask.hi.untyped_storage().nbytes() <= 2 * 4 * 200_000


def test_compiles_without_recompiling_for_new_bounds():
    from torch._dynamo.testing import CompileCounter

    count = CompileCounter()

    @torch.compile(backend=count, fullgraph=True)
    def visible(mask, other):
        return (mask & other).dense(9).sum()

    padding = [IntervalMask.padded(torch.tensor([n]), 9) for n in (3, 5, 8)]
    for mask in padding:
        assert int(visible(IntervalMask.causal(9), mask)) == int((IntervalMask.causal(9) & mask).dense(9).sum())
    assert count.frame_count == 1

    def build(lengths, ids):
        return (IntervalMask.padded(lengths, 9) & IntervalMask.image_blocks(ids)).dense(9)

    ids = torch.tensor([[-1, 0, 0, -1, 1, 1, 1, -1, -1]])
    built = torch.compile(build, backend="aot_eager", fullgraph=True)(torch.tensor([7]), ids)
    assert torch.equal(built, build(torch.tensor([7]), ids))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: IntervalMask(torch.zeros(1, 2), torch.zeros(1, 2)), r"lo must be int32 \[B or 1, Sq\], got torch.f"),
        (lambda: IntervalMask(torch.zeros(2).int(), torch.zeros(2).int()), r"got torch.int32 \(2,\)"),
        (lambda: IntervalMask([1], [2]), "lo must be a tensor, got list"),
        (lambda: IntervalMask(torch.zeros(1, 2).int(), torch.zeros(1, 3).int()), "lo and hi must agree"),
        (lambda: IntervalMask(*[torch.zeros(1, 2).int()] * 2, "all"), "kind must be .* or None, got 'all'"),
        (lambda: IntervalMask(*[torch.zeros(1, 2).int()] * 2, "full"), "kv_len must be given with kind full"),
        (lambda: IntervalMask.packed(torch.tensor([[0, 3]]), 3), r"1-D integer tensor, got torch.int64 \(1, 2\)"),
        (lambda: IntervalMask.packed(torch.tensor([0, 4]), 3), r"at most 3 \(the tokens\), got \[0, 4\]"),
        (lambda: IntervalMask.packed(torch.tensor([1] * 20), 3), r"got \[1, 1, 1, 1, 1, 1, 1, 1, …\]"),
        (lambda: IntervalMask.causal(-1), "q_len must be from 0"),
        (lambda: IntervalMask.causal(torch.tensor(3)), "q_len must be an int, got a tensor"),
        (lambda: IntervalMask.causal(3, q_offset=torch.tensor(0.5)), "q_offset must be a 1-D integer tensor"),
        (lambda: IntervalMask.sliding_window(3, window=0), "window must be at least 1, got 0"),
        (lambda: IntervalMask.chunked(3, chunk_size=0), "chunk_size must be at least 1, got 0"),
        (lambda: IntervalMask.packed(torch.tensor([0.0, 1]), 3), "cu_seqlens must be a 1-D integer tensor"),
        (lambda: IntervalMask.packed(torch.tensor([0, 3]), 3, cu_seqlens_k=torch.tensor([0, 3])), "kv_len must be"),
        (lambda: IntervalMask.packed(torch.tensor([0, 3]), 3, cu_seqlens_k=torch.tensor([0]), kv_len=3), "the same"),
        (lambda: IntervalMask.padded(torch.tensor([1]), 3, side="up"), "side must be left or right, got 'up'"),
        (lambda: IntervalMask.image_blocks(torch.zeros(3).long()), "block_ids must be a 2-D integer tensor"),
        (lambda: IntervalMask.latest_image(torch.zeros(1, 3), 4), "media_locations must be bool"),
        (lambda: IntervalMask.from_dense(torch.zeros(3, 3)), "mask must be bool"),
        (lambda: IntervalMask.from_dense(torch.zeros(2, 2, 3, 3, dtype=torch.bool)), "the same for all heads"),
        (lambda: IntervalMask.batch([]), "at least one mask"),
        (lambda: IntervalMask.batch([IntervalMask.causal(2), IntervalMask.causal(3)]), r"got \[2, 3\]"),
    ],
)  # fmt: skip
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
