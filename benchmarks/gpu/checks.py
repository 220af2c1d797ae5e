"""What is checked of each op on the device: its public function at a real shape and at an awkward one.

A job is a function of the device and whether shapes are tiny (rehearsals run in Triton's interpreter); it gives checks.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmlm_benchmarks.ops import OPS, examples
from mmlm_benchmarks.ops.interval_attention import image_ids
from mmlm_fast import ops
from mmlm_fast.masks import IntervalMask
from mmlm_fast.ops.add_norm import MAX_KERNEL_SIZE, add_norm_ref
from mmlm_fast.ops.clip_loss import clip_loss_ref
from mmlm_fast.ops.concat_linear import concat_linear_ref
from mmlm_fast.ops.fuse_modalities import MODES, fuse_modalities_ref
from mmlm_fast.ops.gated_add import gated_add_ref
from mmlm_fast.ops.glu import bias_act_ref, glu_ref
from mmlm_fast.ops.interval_attention import interval_attention_ref
from mmlm_fast.ops.linear_cross_entropy import linear_cross_entropy_ref
from mmlm_fast.ops.merge_embeddings import merge_embeddings_ref, scatter_features_ref
from mmlm_fast.ops.norm_pixel_shuffle import norm_pixel_shuffle_ref
from mmlm_fast.ops.patch_embed import patch_embed_ref
from mmlm_fast.ops.qk_norm_rope import qk_norm_rope_ref, rope_tables
from mmlm_fast.ops.siglip_loss import siglip_loss_ref
from mmlm_fast.testing import GPU_FLOAT32_ATTENTION_FACTOR

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Check:
    """One function at one shape; every floating-point tensor that `draw` gives takes a gradient."""

    name: str
    draw: Callable[[torch.dtype], tuple]
    fast: Callable
    reference: Callable
    dtypes: tuple[torch.dtype, ...] = DTYPES
    grads: bool = True
    modes: bool = False  # also compiled, under autocast, on a side stream, in a CUDA graph
    has_kernel: bool = True  # of ours; elsewhere torch's are called on purpose
    float32_factor: float = 1.0  # what float32 may err, as a multiple of what the accuracy rule allows


Checks = Iterator[Check]


def _normal(device: str, dtype: torch.dtype, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, device=device, dtype=dtype) * scale


def add_norm(device: str, tiny: bool) -> Checks:
    shapes = [("tiny", (2, 3, 40))] if tiny else [("Qwen2.5-VL-7B", (2, 1024, 3584)), ("prime", (3, 7, 1151))]
    for kind in ("rms", "layer"):
        for label, shape in shapes:
            yield Check(
                f"{kind}, {label}",
                lambda dtype, s=shape, n=1 if kind == "rms" else 2: (
                    *(_normal(device, dtype, *s) for _ in range(2)),
                    *(_normal(device, dtype, s[-1]) for _ in range(n)),
                ),
                partial(ops.add_norm, kind=kind),
                partial(add_norm_ref, kind=kind),
                modes=label == shapes[0][0],
            )


def glu(device: str, tiny: bool) -> Checks:
    shapes = [("tiny", (3, 40))] if tiny else [("Qwen2.5-VL-7B", (1024, 18944)), ("prime", (5, 1151))]
    for activation in ("silu", "gelu_tanh", "gelu"):
        for label, shape in shapes:
            yield Check(
                f"glu {activation}, {label}",
                lambda dtype, s=shape: tuple(_normal(device, dtype, *s) for _ in range(2)),
                partial(ops.glu, activation=activation),
                partial(glu_ref, activation=activation),
                modes=activation == "silu" and label == shapes[0][0],
            )
    yield Check(
        "bias_act quick_gelu",
        lambda dtype, s=shapes[-1][1]: (_normal(device, dtype, *s), _normal(device, dtype, s[-1])),
        partial(ops.bias_act, activation="quick_gelu"),
        partial(bias_act_ref, activation="quick_gelu"),
    )


def gated_add(device: str, tiny: bool) -> Checks:
    for label, shape in (
        [("tiny", (2, 3, 40))] if tiny else [("Llama-3.2-Vision", (2, 1024, 4096)), ("prime", (3, 7, 1151))]
    ):
        keep = torch.rand(shape[:-1], device=device) < 0.9
        yield Check(
            label,
            lambda dtype, s=shape: (
                *(_normal(device, dtype, *s) for _ in range(2)),
                torch.full((1,), 0.5, device=device, dtype=dtype),
            ),
            partial(ops.gated_add, keep=keep),
            partial(gated_add_ref, keep=keep),
            modes=label != "prime",
        )


def qk_norm_rope(device: str, tiny: bool) -> Checks:
    """Heads of 128 with and without the norm, and of 80 as vision towers have them."""
    shapes = [("tiny", 1, 5, 4, 2, 16, True)] if tiny else [
        ("Qwen2.5-VL-7B", 2, 1024, 28, 4, 128, False),
        ("Qwen3-VL-8B", 2, 1021, 32, 8, 128, True),
        ("vision, heads of 80", 1, 1021, 16, 16, 80, False),
    ]  # fmt: skip
    for label, batch, tokens, heads, kv_heads, size, norm in shapes:
        inv_freq = 1e6 ** -(torch.arange(0, size, 2, device=device) / size)
        tables = rope_tables(torch.arange(tokens, device=device)[None], inv_freq)

        def draw(dtype, batch=batch, tokens=tokens, heads=heads, kv_heads=kv_heads, size=size, norm=norm):
            qk = (_normal(device, dtype, batch, tokens, h, size).transpose(1, 2) for h in (heads, kv_heads))
            return *qk, *(_normal(device, dtype, size) for _ in range(2 if norm else 0))

        def fast(query, key, *weights, tables=tables):
            named = dict(zip(("query_weight", "key_weight"), weights, strict=False))
            return ops.qk_norm_rope(query, key, *tables, **named)

        def reference(query, key, *weights, tables=tables):
            return qk_norm_rope_ref(query, key, *(t.to(torch.promote_types(query.dtype, t.dtype)) for t in tables),
                                    *(weights or (None, None)))  # fmt: skip

        yield Check(label, draw, fast, reference, modes=label in ("tiny", "Qwen3-VL-8B"))


def merge_embeddings(device: str, tiny: bool) -> Checks:
    vocabulary, batch, tokens, size, rows = (50, 2, 9, 24, 3) if tiny else (32000, 2, 1021, 3584, 576)
    ids = torch.randint(8, vocabulary, (batch, tokens), device=device)
    ids[:, 2 : 2 + rows] = 7

    def draw(dtype):
        return _normal(device, dtype, vocabulary, size), _normal(device, dtype, batch, rows, size)

    def draw_embeds(dtype):
        return _normal(device, dtype, batch, tokens, size), _normal(device, dtype, batch, rows, size)

    yield Check(
        "one modality",
        draw,
        lambda table, features: ops.merge_embeddings(ids, table, {7: features}),
        lambda table, features: merge_embeddings_ref(ids, table, {7: features}),
        modes=True,
    )
    yield Check(
        "deepstack add",
        draw_embeds,
        lambda embeds, features: ops.scatter_features(embeds, ids, {7: features}, add=True),
        lambda embeds, features: scatter_features_ref(embeds, ids, {7: features}, True),
    )


def norm_pixel_shuffle(device: str, tiny: bool) -> Checks:
    sizes = [("tiny", 2, 4, 16, 2)] if tiny else [("InternVL3", 4, 32, 1024, 2), ("SmolVLM", 3, 32, 768, 4)]
    for label, batch, side, size, factor in sizes:
        for norm in (None, "layer"):

            def draw(dtype, batch=batch, side=side, size=size, factor=factor, norm=norm):
                wide = size * factor**2
                parameters = (_normal(device, dtype, wide) for _ in range(2 if norm else 0))
                return _normal(device, dtype, batch, side, side, size), *parameters

            options = {"norm": norm, "norm_at": "after"}
            yield Check(
                f"{label}, norm {norm}",
                draw,
                lambda x, weight=None, bias=None, f=factor, o=options: ops.norm_pixel_shuffle(
                    x, f, weight=weight, bias=bias, **o
                ),
                lambda x, weight=None, bias=None, f=factor, o=options: norm_pixel_shuffle_ref(x, f, weight, bias, **o),
                modes=label == sizes[0][0] and norm == "layer",
                has_kernel=norm is None or size * factor**2 <= MAX_KERNEL_SIZE,
            )


def patch_embed(device: str, tiny: bool) -> Checks:
    """A convolution over one frame, and over two that are the same picture."""
    mean, std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    for label, batch, side, width, frames in [("tiny", 1, 28, 8, (2,))] if tiny else [
        ("CLIP-L/14-336", 4, 336, 1024, ()), ("Qwen2.5-VL", 2, 448, 1280, (2,))
    ]:  # fmt: skip
        pixels = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8, device=device)

        def draw(dtype, width=width, frames=frames):
            return _normal(device, dtype, width, 3, *frames, 14, 14, scale=588**-0.5), _normal(device, dtype, width)

        yield Check(
            label,
            draw,
            lambda weight, bias, pixels=pixels: ops.patch_embed(pixels, weight, bias, mean=mean, std=std),
            lambda weight, bias, pixels=pixels: patch_embed_ref(pixels, weight, bias, mean, std, 1 / 255),
            modes=bool(frames),
        )


def concat_linear(device: str, tiny: bool) -> Checks:
    shapes = [("tiny", 2, 5, [(24, 0), (16, 1)], 20)] if tiny else [
        ("pooled image and audio", 4, 512, [(3584, 0), (1152, 1), (1280, 1)], 3584),
        ("two sequences, prime", 2, 127, [(1021, 0), (509, 0)], 1151),
    ]  # fmt: skip
    for label, batch, tokens, sizes, num_out in shapes:
        total = sum(k for k, _ in sizes)

        def draw(dtype, batch=batch, tokens=tokens, sizes=sizes, num_out=num_out, total=total):
            inputs = [_normal(device, dtype, batch, 1 if pooled else tokens, k) for k, pooled in sizes]
            return inputs, _normal(device, dtype, num_out, total, scale=total**-0.5), _normal(device, dtype, num_out)

        for activation in ("none", "gelu"):
            yield Check(
                f"{label}, {activation}",
                draw,
                partial(ops.concat_linear, activation=activation),
                partial(concat_linear_ref, activation=activation),
                modes=label == shapes[0][0] and activation == "gelu",
                has_kernel=any(pooled for _, pooled in sizes),
            )


def fuse_modalities(device: str, tiny: bool) -> Checks:
    batch, tokens, size = (2, 3, 24) if tiny else (4, 511, 3584)
    for mode in MODES:
        num = 2 if mode == "gated" else 3
        shape = {"mean": None, "weighted": (num,), "attention": (size,), "gated": (size, 2 * size)}[mode]
        there = torch.rand(batch, tokens, num, device=device) < 0.8

        def draw(dtype, mode=mode, num=num, shape=shape):
            features = [_normal(device, dtype, batch, tokens, size) for _ in range(num)]
            weight = () if shape is None else (_normal(device, dtype, *shape, scale=shape[-1] ** -0.5),)
            return features, *weight, *((_normal(device, dtype, size),) if mode == "gated" else ())

        yield Check(
            mode,
            draw,
            lambda features, weight=None, bias=None, m=mode, t=there: ops.fuse_modalities(
                features, m, weight=weight, bias=bias, present=t
            ),
            lambda features, weight=None, bias=None, m=mode, t=there: fuse_modalities_ref(features, m, weight, bias, t)[
                0
            ],
            modes=mode == "attention",
        )


def linear_cross_entropy(device: str, tiny: bool) -> Checks:
    tokens, size, vocabulary = (9, 24, 50) if tiny else (509, 1024, 32003)
    target = torch.randint(0, vocabulary, (tokens,), device=device)
    some = torch.where(torch.rand(tokens, device=device) < 0.5, target, -100)

    def draw(dtype):
        return _normal(device, dtype, tokens, size), _normal(device, dtype, vocabulary, size, scale=size**-0.5)

    for label, labels, options in (
        ("all rows", target, {"ignore_index": None}),
        ("half of the rows", some, {}),
        ("soft cap, z-loss, smoothing", some, {"softcap": 30.0, "z_loss": 1e-4, "label_smoothing": 0.1}),
    ):
        yield Check(
            label,
            draw,
            lambda hidden, weight, y=labels, o=options: ops.linear_cross_entropy(hidden, weight, y, **o),
            lambda hidden, weight, y=labels, o=options: linear_cross_entropy_ref(hidden, weight, y, **o),
            modes=label == "half of the rows",
        )


def _features(device: str, dtype: torch.dtype, tiny: bool, scalars: tuple[float, ...]) -> tuple[Tensor, ...]:
    num, size = (9, 16) if tiny else (1021, 768)
    x, y = (F.normalize(_normal(device, torch.float32, num, size), dim=1).to(dtype) for _ in range(2))
    return x, y, *(torch.tensor(s, device=device, dtype=dtype) for s in scalars)


def clip_loss(device: str, tiny: bool) -> Checks:
    yield Check(
        "diagonal", lambda dtype: _features(device, dtype, tiny, (14.3,)), ops.clip_loss, clip_loss_ref, modes=True
    )


def siglip_loss(device: str, tiny: bool) -> Checks:
    draw = partial(_features, device, tiny=tiny, scalars=(10.0, -10.0))
    yield Check("diagonal", lambda dtype: draw(dtype=dtype), ops.siglip_loss, siglip_loss_ref, modes=True)


# ---- attention: a job for each family of head sizes, so that one that crashes costs its own --------------------------


def _heads(device: str, dtype: torch.dtype, batch: int, heads: int, kv_heads: int, q_len: int, kv_len: int, size: int):
    shapes = ((q_len, heads), (kv_len, kv_heads), (kv_len, kv_heads))
    return tuple(_normal(device, dtype, batch, n, h, size).transpose(1, 2) for n, h in shapes)


def _attention(name: str, draw: Callable, mask: IntervalMask | None, **more: Any) -> Check:
    return Check(
        name,
        draw,
        lambda q, k, v, *sinks: ops.interval_attention(q, k, v, mask, sinks=sinks[0] if sinks else None, **more),
        lambda q, k, v, *sinks: interval_attention_ref(q, k, v, mask, sinks=sinks[0] if sinks else None, **more),
        float32_factor=GPU_FLOAT32_ATTENTION_FACTOR,
    )


def attention(device: str, tiny: bool, size: int) -> Checks:
    """Masks of real models over one head size, grouped and not, at a length that ends inside a tile."""
    length, batch = (21, 1) if tiny else (509, 2)
    blocks = image_ids(length, 3, length // 8)
    starts = torch.tensor([0, length // 5, length // 2, length - 3])
    masks = {
        "image blocks in a window": IntervalMask.image_blocks(blocks, window=length // 3),
        "causal": IntervalMask.causal(length),
        "packed, leftovers see nothing": IntervalMask.packed(starts, length),
    }
    # float16 differs from bfloat16 in rounding alone: where it is rare its compilations are not waited for.
    dtypes = {64: DTYPES, 128: DTYPES}.get(size, (torch.bfloat16, torch.float32) if size < 128 else (torch.bfloat16,))
    for label, mask in masks.items():
        for heads, kv_heads in ((8, 2), (2, 2)):
            check = _attention(
                f"{label}, heads of {size}, {heads}/{kv_heads}",
                lambda dtype, h=heads, kv=kv_heads: _heads(device, dtype, batch, h, kv, length, length, size),
                IntervalMask(mask.lo, mask.hi).to(device),  # without its kind: not given to torch
            )
            modes = label == "image blocks in a window" and heads != kv_heads
            yield replace(check, modes=modes, dtypes=dtypes)
            if tiny:
                return


def attention_decode(device: str, tiny: bool, sizes: tuple[int, ...] = (64, 128)) -> Checks:
    """One query a sample over a cache of its own length; sinks and a soft cap."""
    room = 40 if tiny else 4093
    used = torch.tensor([room - 1, room // 3])
    for size in (16,) if tiny else sizes:
        for label, options, has_sinks in (("plain", {}, False), ("cap and sinks", {"softcap": 50.0}, True)):

            def draw(dtype, size=size, has_sinks=has_sinks):
                qkv = _heads(device, dtype, 2, 8, 2, 1, room, size)
                return *qkv, *((_normal(device, dtype, 8),) if has_sinks else ())

            mask = IntervalMask.causal(1, room, q_offset=used).to(device)
            check = _attention(f"{label}, heads of {size}", draw, mask, **options)
            dtypes = (torch.bfloat16, torch.float32) if size <= 128 else (torch.bfloat16,)
            yield replace(check, modes=label == "plain" and size in (16, 128), dtypes=dtypes)


def attention_dead(device: str, tiny: bool) -> Checks:
    """Queries that see nothing and whose unseen scores would overflow the exponential: zeros, and no gradient."""
    length = 37 if tiny else 300
    media = torch.zeros(1, length, dtype=torch.bool)
    media[0, length // 2] = True
    mask = IntervalMask.latest_image(media, length // 2, num_images=1).to(device)

    dead = length // 2

    def loud(dtype):
        q, k, v = _heads(device, dtype, 1, 4, 2, length, length // 2, 64)
        return torch.cat([100 * q[:, :, :dead], q[:, :, dead:]], dim=2), k, v

    yield _attention("text before the first picture, unseen scores above 88", loud, mask)


def attention_full(device: str, tiny: bool) -> Checks:
    """Without a mask, where torch's kernels are called: shapes that only its math path takes, too."""
    length = 37 if tiny else 515
    for size, heads, kv_heads in ((64, 4, 4), (128, 8, 2), (80, 8, 2), (512, 4, 1)) if not tiny else ((16, 4, 2),):
        for label, mask in (("full", None), ("causal", IntervalMask.causal(length).to(device))):
            check = _attention(
                f"{label}, heads of {size}, {heads}/{kv_heads}",
                lambda dtype, n=size, h=heads, kv=kv_heads: _heads(device, dtype, 2, h, kv, length, length, n),
                mask,
            )
            yield replace(check, has_kernel=False, dtypes=DTYPES if size <= 128 else DTYPES[:2])
    if not tiny:
        yield _settled(device)


def _settled(device: str) -> Check:
    """A causal shape that has come often enough for cuDNN: what a training run gets from its second step on."""
    mask, calls = IntervalMask.causal(1024).to(device), 130

    def fast(q, k, v):
        for _ in range(calls):
            out = ops.interval_attention(q, k, v, mask)
        return out

    check = _attention(
        "causal, heads of 128, settled",
        lambda dtype: _heads(device, dtype, 2, 8, 2, 1024, 1024, 128),
        mask,
    )
    return replace(check, fast=fast, has_kernel=False, dtypes=DTYPES[:2])


def of_cases(device: str, tiny: bool, op: str) -> Checks:
    """What is timed of an op for which nothing more is written here."""
    for example in examples(op, device, "tiny" if tiny else None):
        yield Check(example.name, example.draw, example.fast, example.reference, modes=True)


ATTENTION_SIZES = (128, 64, 256, 80, 72, 88, 96, 104, 192)
JOBS: dict[str, Callable[[str, bool], Checks]] = {
    **{f"attention_{size}": partial(attention, size=size) for size in ATTENTION_SIZES},
    "attention_decode": attention_decode,
    "attention_decode_wide": partial(attention_decode, sizes=(96, 256)),
    "attention_dead": attention_dead,
    "attention_full": attention_full,
    "linear_cross_entropy": linear_cross_entropy,
    "clip_loss": clip_loss,
    "siglip_loss": siglip_loss,
    "merge_embeddings": merge_embeddings,
    "qk_norm_rope": qk_norm_rope,
    "add_norm": add_norm,
    "glu": glu,
    "concat_linear": concat_linear,
    "fuse_modalities": fuse_modalities,
    "gated_add": gated_add,
    "norm_pixel_shuffle": norm_pixel_shuffle,
    "patch_embed": patch_embed,
}
JOBS |= {op: partial(of_cases, op=op) for op in OPS if op not in JOBS and op != "interval_attention"}
