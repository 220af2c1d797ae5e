"""Every public op of `mmlm_fast.ops` on inputs of a given width, and a fence around what they allocate."""

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from mmlm_benchmarks.ops import OPS, examples
from mmlm_fast import ops
from mmlm_fast.masks import IntervalMask

EVERY_OP = sorted(n for n in ops.__all__ if inspect.isfunction(getattr(ops, n)))


class Call(NamedTuple):
    op: str  # in EVERY_OP
    name: str
    function: Callable
    inputs: list[Tensor]  # floating-point ones; gradients flow to all


def calls(width: int, dtype: torch.dtype, rows: int = 5) -> Iterator[Call]:
    """Those written below, and of other ops what is timed, whatever the width."""
    yield from written(width, dtype, rows)
    for op in OPS:
        for example in examples(op) if op not in named() else ():
            torch.manual_seed(width)  # the same inputs, whatever was drawn between two calls
            yield Call(op, example.name, *example.of_floats(dtype))


@functools.cache
def named() -> set[str]:
    return {call.op for call in written(8, torch.float32, 5)}


def written(width: int, dtype: torch.dtype, rows: int) -> Iterator[Call]:
    """Rows of `width` numbers for what works row by row; as many keys, pairs or classes for what works on these."""
    torch.manual_seed(width)

    def draw(*shape: int, like: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape).to(like)

    x, y = draw(rows, width), draw(rows, width)
    weight, bias = draw(width), draw(width)
    for kind in ("rms", "layer"):
        yield Call("add_norm", f"{kind} sum", lambda *a, k=kind: ops.add_norm(*a, kind=k), [x, y, weight, bias])
        yield Call("add_norm", kind, lambda a, w, k=kind: ops.add_norm(a, None, w, kind=k)[0], [x, weight])
    for activation in ("silu", "gelu", "gelu_tanh", "quick_gelu", "relu"):
        yield Call("glu", activation, lambda *a, k=activation: ops.glu(*a, activation=k), [x, y])
        yield Call("bias_act", activation, lambda *a, k=activation: ops.bias_act(*a, activation=k), [x, bias])
    yield Call("glu", "packed", lambda a: ops.glu(a), [torch.cat([x, y], -1)])
    keep = torch.arange(rows) != 1
    yield Call("gated_add", "keep", lambda *a: ops.gated_add(*a, keep=keep), [x, y, weight])
    yield Call("gated_add", "", lambda *a: ops.gated_add(*a), [x, y, draw(1)])

    head, key = draw(2, 3, rows, 2 * width), draw(2, 1, rows, 2 * width)
    inverse = 1.0 / 100 ** (torch.arange(width) / width)
    cos, sin = ops.rope_tables(torch.arange(rows)[None], inverse)
    for pairs in (False, True):
        yield Call("qk_norm_rope", f"norm {pairs}", lambda q, k, a, b, i=pairs: ops.qk_norm_rope(
            q, k, cos, sin, query_weight=a, key_weight=b, interleaved=i),
                   [head, key, draw(2 * width), draw(2 * width)])  # fmt: skip
        yield Call("qk_norm_rope", f"{pairs}", lambda q, i=pairs: ops.qk_norm_rope(q, None, cos, sin, interleaved=i)[0],
                   [draw(2, 3, rows, 2 * width + 3)])  # fmt: skip

    ids = torch.tensor([[0, 9, 3, 9, 1], [8, 2, 8, 8, 4]])
    table, sound, image = draw(6, width), draw(2, width), draw(3, width)
    yield Call("merge_embeddings", "", lambda t, a, b: ops.merge_embeddings(ids, t, {9: a, 8: b}, scale=1.5),
               [table, sound, image])  # fmt: skip
    for add in (False, True):
        yield Call("scatter_features", f"{add}", lambda t, a, b, add=add: ops.scatter_features(
            t, ids, {9: a, 8: b}, add=add), [draw(2, 5, width), sound, image])  # fmt: skip

    features = [draw(2, rows, width), draw(2, 1, width), draw(2, rows, width)]
    present = torch.rand(2, rows, 3) < 0.7
    for mode, parameter in (("mean", []), ("weighted", [draw(3)]), ("attention", [weight])):
        yield Call("fuse_modalities", mode, lambda a, b, c, *w, m=mode: ops.fuse_modalities(
            [a, b, c], m, weight=w[0] if w else None, present=present), [*features, *parameter])  # fmt: skip
    yield Call("fuse_modalities", "gated", lambda a, b, w, c: ops.fuse_modalities(
        [a, b], "gated", weight=w, bias=c, present=present[..., :2]),
               [*features[:2], draw(width, 2 * width), bias])  # fmt: skip
    yield Call("concat_linear", "", lambda a, b, w, c: ops.concat_linear([a, b], w, c, activation="gelu"),
               [*features[:2], draw(7, 2 * width), draw(7)])  # fmt: skip

    grid = draw(2, 4, 4, width)
    for at, first in (("before", False), ("after", False), ("before", True), ("after", True)):
        size = width if at == "before" else 4 * width
        options = dict(norm="layer", norm_at=at, channels_first=first)
        yield Call("norm_pixel_shuffle", f"{at} {first}", lambda a, w, b, o=options: ops.norm_pixel_shuffle(
            a, 2, weight=w, bias=b, **o), [grid, draw(size), draw(size)])  # fmt: skip
    yield Call("patch_merge", "", lambda a, w: ops.patch_merge(a, 2, [(4, 2), (2, 2)], weight=w, norm="rms"),
               [draw(12, width), weight])  # fmt: skip
    if width <= 64:  # from here on as many of them as `width`
        pixels = torch.randint(0, 256, (2, 3, 2 * width, width), dtype=torch.uint8)
        mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
        for last in (False, True):
            images = pixels.permute(0, 2, 3, 1).contiguous() if last else pixels
            options = dict(mean=mean, std=std, channels_last=last)
            yield Call("patchify", f"{last}", lambda i=images, o=options: ops.patchify(
                i, width, temporal_patch_size=2, dtype=dtype, **o), [])  # fmt: skip
            yield Call("patch_embed", f"{last}", lambda w, b, i=images, o=options: ops.patch_embed(i, w, b, **o),
                       [draw(5, 3, width, width), draw(5)])  # fmt: skip

        target = torch.randint(0, width, (rows,))
        target[1] = -100
        hidden, classes = draw(rows, 24), draw(width, 24)
        for options in ({}, dict(label_smoothing=0.1, z_loss=1e-3, softcap=3.0)):
            yield Call("linear_cross_entropy", str(len(options)), lambda *a, o=options: ops.linear_cross_entropy(
                a[0], a[1], target, a[2], **o), [hidden, classes, draw(width)])  # fmt: skip
        one, two = (F.normalize(torch.randn(width + k, 12), dim=-1).to(dtype) for k in (0, 2))
        scale, shift = draw(1, like=torch.float32)[0].exp(), draw(1, like=torch.float32)[0]
        identities = torch.randint(0, 3, (width,)), torch.randint(0, 3, (width + 2,))
        weights = torch.rand(width, width + 2)
        for name, options in (("diagonal", dict(offset=1)), ("ids", dict(positive_ids=identities)),
                              ("targets", dict(targets=weights))):  # fmt: skip
            yield Call("clip_loss", name, lambda *a, o=options: ops.clip_loss(*a, **o), [one, two, scale])
            yield Call("siglip_loss", name, lambda *a, o=options: ops.siglip_loss(*a, **o), [one, two, scale, shift])

        for q_len, kv_len, size in ((2, width, 24), (33, width, width), (width, 19, 24), (40, 140, width)):
            q, k, v = draw(2, 4, q_len, size), draw(2, 2, kv_len, size), draw(2, 2, kv_len, size + 3)
            mask = IntervalMask.sliding_window(q_len, kv_len, window=11)
            yield Call("interval_attention", f"{q_len} {kv_len} {size}", lambda *a, m=mask: ops.interval_attention(
                *a[:3], m, sinks=a[3], softcap=2.0), [q, k, v, draw(4, like=torch.float32)])  # fmt: skip
            full = IntervalMask.full(q_len, kv_len)
            yield Call("interval_attention", f"lse {q_len} {kv_len} {size}", lambda *a, m=full: ops.interval_attention(
                *a, m, return_lse=True), [q, k, v])  # fmt: skip
        lengths = torch.tensor([0, width, width + 3], dtype=torch.int32)
        packed = [draw(width + 3, heads, 24) for heads in (4, 2, 2)]
        yield Call("interval_attention_varlen", "", lambda *a: ops.interval_attention_varlen(
            *a, lengths, is_causal=True), packed)  # fmt: skip


class Fence:
    """Between two fences of known bytes lies every CPU tensor that is allocated here; at the end they must stand."""

    ROOM, BYTE = 256, 0xA5

    def __enter__(self) -> None:
        self.fenced: list[tuple[Tensor, int]] = []
        self.patches = [
            patch.object(owner, name, self.around(getattr(owner, name)))
            for owner, names in ((torch, ("empty", "zeros")), (Tensor, ("new_empty", "new_zeros")))
            for name in (*names, *(f"{n}_like" for n in names if owner is torch))
        ]
        for one in self.patches:
            one.start()

    def around(self, make: Callable) -> Callable:
        empty = torch.empty

        def fenced(*args: Any, **kwargs: Any) -> Tensor:
            made = make(*args, **kwargs)
            if made.device.type != "cpu" or made.numel() == 0:
                return made
            size = made.untyped_storage().nbytes()
            around = empty(self.ROOM + size + self.ROOM, dtype=torch.uint8).fill_(self.BYTE)
            around[self.ROOM : -self.ROOM] = empty(0, dtype=torch.uint8).set_(made.untyped_storage())
            self.fenced.append((around, size))
            return made.set_(around.untyped_storage(), self.ROOM // made.element_size(), made.shape, made.stride())

        return fenced

    def __exit__(self, *raised: object) -> None:
        for one in self.patches:
            one.stop()
        for around, size in self.fenced:
            assert (around[: self.ROOM] == self.BYTE).all(), f"written before an allocation of {size} bytes"
            assert (around[self.ROOM + size :] == self.BYTE).all(), f"written behind an allocation of {size} bytes"
