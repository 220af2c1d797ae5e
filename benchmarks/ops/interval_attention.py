"""Attention under multimodal masks, against torch's with a dense mask and transformers' loop over pieces."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmlm_benchmarks.harness import Case
from mmlm_fast.masks import IntervalMask
from mmlm_fast.ops import interval_attention, interval_attention_varlen
from mmlm_fast.ops.interval_attention import interval_attention_ref
from mmlm_fast.testing import Difference, difference

sdpa = nn.functional.scaled_dot_product_attention
CHECKED_ROWS = 64  # of a long sequence, against float64
TELLING = "attention, image blocks, 4 images of 256 in 2,048 tokens, forward + backward"


def cases(device: str, sizes: str | None = None) -> list[Case]:
    sizes = sizes or device
    return [*masked(device, sizes), *packed(device, sizes), *decoding(device, sizes)]


def _inputs(device: str, batch: int, heads: int, kv_heads: int, q_len: int, kv_len: int, size: int) -> list[Tensor]:
    """Heads last in memory, as linear layers leave them."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    shapes = ((q_len, heads), (kv_len, kv_heads), (kv_len, kv_heads))
    return [torch.randn(batch, n, h, size, device=device, dtype=dtype).transpose(1, 2) for n, h in shapes]


def _visible(mask: IntervalMask, batch: int) -> int:
    """Pairs of a query and a key it sees, over the batch."""
    return int((mask.hi - mask.lo).clamp(min=0).sum()) * (batch if mask.batch_size == 1 else 1)


def _check_rows(providers: dict[str, Callable], args: tuple) -> dict[str, list[Difference]]:
    """A run of rows in the middle, of every provider, against float64."""
    q, k, v, mask = args[:4]
    start = max(0, (q.shape[2] - CHECKED_ROWS) // 2)
    rows = slice(start, start + CHECKED_ROWS)
    part = mask.rows(rows.start, rows.stop)
    exact = interval_attention_ref(q[:, :, rows].double(), k.double(), v.double(), part)
    twin = interval_attention_ref(q[:, :, rows], k, v, part)
    return {name: [difference(call(*args)[:, :, rows], twin, exact)] for name, call in providers.items()}


def _no_grad(f: Callable) -> Callable:
    def call(*args: Any) -> Tensor:
        with torch.no_grad():
            return f(*args)

    return call


def _step(f: Callable) -> Callable:
    def call(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> None:
        out = f(q, k, v, *rest)
        torch.autograd.grad(out, [q, k, v], torch.ones_like(out))

    return call


def _repeated(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As transformers' sdpa_attention_forward has it wherever there is a mask: torch has no kernel for both."""
    groups = q.shape[1] // k.shape[1]
    return q, *(x[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2) if groups > 1 else x for x in (k, v))


def dense_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask, dense: Tensor) -> Tensor:
    return sdpa(*_repeated(q, k, v), attn_mask=dense)


def ours(q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask, dense: Tensor | None = None) -> Tensor:
    return interval_attention(q, k, v, mask)


def _causal_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask, dense: Tensor | None = None) -> Tensor:
    return sdpa(*_repeated(q, k, v), is_causal=True)


def _cudnn(q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask, dense: Tensor | None = None) -> Tensor:
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
        return _causal_sdpa(q, k, v, mask)


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask, dense: Tensor | None = None) -> Tensor:
    return _compiled_flex()(q, k, v, block_mask=_block_mask(mask, k.shape[2]), enable_gqa=q.shape[1] != k.shape[1])


_KEPT: dict[Any, Any] = {}


def _compiled_flex() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    if "flex" not in _KEPT:
        # A graph a shape, and an error where there is none: beyond 8 it would run eagerly, without a word.
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        _KEPT["flex"] = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    return _KEPT["flex"]


def _block_mask(mask: IntervalMask, kv_len: int) -> Any:
    """Built once per mask, outside what is timed."""
    from torch.nn.attention.flex_attention import create_block_mask

    key = (mask.lo.data_ptr(), kv_len)
    if key not in _KEPT:
        lo, hi = mask.lo, mask.hi

        def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            row = b if lo.shape[0] > 1 else b * 0
            return (k >= lo[row, q]) & (k < hi[row, q])

        _KEPT[key] = create_block_mask(visible, lo.shape[0], None, mask.q_len, kv_len, device=lo.device)
    return _KEPT[key]


def image_ids(length: int, images: int, tokens: int) -> Tensor:
    ids = torch.full((1, length), -1)
    for n in range(images):
        begin = (n + 1) * length // (images + 2)
        ids[0, begin : begin + tokens] = n
    return ids


def _padded_left(length: int) -> IntervalMask:
    lengths = torch.tensor([length, length * 3 // 4, length // 2, length - 7])
    return IntervalMask.causal(length) & IntervalMask.padded(lengths, length, side="left")


def _latest_image(length: int, images: int, tokens: int) -> IntervalMask:
    media = torch.zeros(1, length, dtype=torch.bool)
    media[0, 1 :: length // images] = True
    return IntervalMask.latest_image(media, tokens, num_images=images)


def specs(sizes: str) -> list[tuple]:
    """name, where from, batch, heads, key heads, queries, keys or None, head size, mask, with backward."""
    causal, blocks = IntervalMask.causal, IntervalMask.image_blocks
    if sizes == "tiny":
        return [
            ("causal", "none", 1, 4, 2, 21, None, 16, causal(21), True),
            ("latest of 2 images", "none", 1, 4, 4, 12, 8, 16, _latest_image(12, 2, 4), True),
        ]
    if sizes == "cpu":
        return [
            ("causal", "Qwen2.5-0.5B", 1, 14, 2, 2048, None, 64, causal(2048), True),
            ("left padding, 4 samples", "Qwen2.5-0.5B", 4, 14, 2, 512, None, 64, _padded_left(512), True),
            ("image blocks, 4 images of 256 in 2,048 tokens", "Gemma 3 4B", 1, 8, 4, 2048, None, 256,
             blocks(image_ids(2048, 4, 256)), True),
            ("image blocks and a window of 1,024 in 4,096 tokens", "Gemma 3 4B, half its heads", 1, 4, 2, 4096, None,
             256, blocks(image_ids(4096, 8, 256), window=1024), False),
            ("image blocks in 16,384 tokens", "32 images of 256, heads of 64", 1, 4, 1, 16384, None, 64,
             blocks(image_ids(16384, 32, 256)), False),
            ("gated cross-attention, latest of 4 images", "Flamingo, 64 tokens an image of 256", 1, 8, 8, 1024, 1024,
             64, _latest_image(1024, 4, 256), True),
        ]  # fmt: skip
    return [  # the order in which they are measured where time is short
        ("left padding, 4 samples of 2,048", "Qwen2.5-VL-7B", 4, 28, 4, 2048, None, 128, _padded_left(2048), True),
        ("causal, 8,192 tokens", "Qwen2.5-VL-7B", 1, 28, 4, 8192, None, 128, causal(8192), True),
        ("image blocks, 16 images of 256 in 8,192 tokens", "Gemma 3 12B", 1, 16, 8, 8192, None, 256,
         blocks(image_ids(8192, 16, 256)), True),
        ("image blocks and a window of 1,024 in 8,192 tokens", "Gemma 3 12B", 1, 16, 8, 8192, None, 256,
         blocks(image_ids(8192, 16, 256), window=1024), True),
        ("causal, 8,192 tokens, heads of 64", "Qwen2.5-0.5B", 1, 14, 2, 8192, None, 64, causal(8192), True),
        ("image blocks in 16,384 tokens", "32 images of 256, heads of 64", 1, 32, 1, 16384, None, 64,
         blocks(image_ids(16384, 32, 256)), False),
        ("gated cross-attention, latest of 4 images", "Flamingo, 64 tokens an image of 256", 1, 8, 8, 4096, 1024, 64,
         _latest_image(4096, 4, 256), True),
    ]  # fmt: skip


def masked(device: str, sizes: str) -> list[Case]:
    gpu = device == "cuda"
    made = []
    for name, source, batch, heads, kv_heads, q_len, kv_len, size, mask, backward in specs(sizes):
        kv_len = q_len if kv_len is None else kv_len
        flops = 4 * size * heads * _visible(mask, batch)

        def draw(grad: bool, shape=(batch, heads, kv_heads, q_len, kv_len, size), mask=mask) -> list[tuple]:
            torch.manual_seed(0)
            mask = mask.to(device)
            dense = mask.dense(shape[4])[:, None]
            drawn = [_inputs(device, *shape) for _ in range(1 if shape[3] > 8192 else 2)]
            return [(*(x.requires_grad_(grad) for x in qkv), mask, dense) for qkv in drawn]

        providers: dict[str, Callable] = {"SDPA, repeated keys, dense mask": dense_sdpa}
        if name.startswith("causal"):
            providers["SDPA, repeated keys, is_causal"] = _causal_sdpa
        if gpu and name.startswith("causal"):
            providers["cuDNN, is_causal"] = _cudnn
        if gpu:
            providers["FlexAttention"] = _flex
        providers["mmlm_fast"] = ours
        shape = f"{source}, {'bfloat16' if gpu else 'float32'}"
        moved = batch * (2 * heads * q_len + 2 * kv_heads * kv_len) * size * (2 if gpu else 4)
        for kind, wrap in (("forward", _no_grad), ("forward + backward", _step))[: 1 + backward]:
            made.append(
                Case(
                    group="interval_attention",
                    name=f"attention, {name}, {kind}",
                    shape_from=shape,
                    inputs=partial(draw, wrap is _step),
                    providers={p: wrap(f) for p, f in providers.items()},
                    check=lambda calls, args, fs=providers: _check_rows({p: _no_grad(f) for p, f in fs.items()}, args),
                    bytes_moved=moved * (1 if wrap is _no_grad else 3),
                    flops=int(flops * (1 if wrap is _no_grad else 3.5)),
                )
            )
    return made


class _Module(nn.Module):
    """What transformers' attention function looks at."""

    is_causal = False


def _loop(implementation: Callable) -> Callable:
    """As the vision towers of Qwen2.5-VL and 32 other models do without flash attention."""
    module = _Module()

    def call(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
        query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        lengths = cu_seqlens[1:] - cu_seqlens[:-1]
        splits = [torch.split(x, lengths.tolist(), dim=2) for x in (query, key, value)]
        outs = [
            implementation(module, *qkv, attention_mask=None, is_causal=False)[0] for qkv in zip(*splits, strict=True)
        ]
        return torch.cat(outs, dim=1)[0]

    return call


def _eager(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, **_: Any) -> tuple[Tensor]:
    weights = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1, dtype=torch.float32).to(q.dtype)
    return ((weights @ v).transpose(1, 2).contiguous(),)


def packed(device: str, sizes: str) -> list[Case]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward  # seconds to import

    gpu = device == "cuda"
    made = []
    real = (
        ("12,900 patches in windows of 64", "Qwen2.5-VL", 12900, 64, 16, 80),
        ("8 images of 1,024 patches", "Qwen3-VL", 8192, 1024, 16, 72),
    )
    for name, source, patches, piece, heads, size in real if sizes != "tiny" else (("tiny", "none", 30, 8, 2, 24),):
        cu_seqlens = torch.tensor([*range(0, patches, piece), patches], dtype=torch.int32)

        def draw(patches=patches, heads=heads, size=size, cu_seqlens=cu_seqlens) -> list[tuple]:
            torch.manual_seed(0)
            dtype = torch.bfloat16 if gpu else torch.float32
            qkv = [torch.randn(patches, heads, size, device=device, dtype=dtype) for _ in range(3)]
            return [(*qkv, cu_seqlens.to(device))]

        def check(providers: dict[str, Callable], args: tuple) -> dict[str, list[Difference]]:
            q, k, v, cu_seqlens = args
            mask = IntervalMask.packed(cu_seqlens, q.shape[0])
            heads_first = [x.transpose(0, 1)[None] for x in (q, k, v)]
            calls = {name: (lambda *_, f=f: f(*args).transpose(0, 1)[None]) for name, f in providers.items()}
            return _check_rows(calls, (*heads_first, mask))

        lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
        providers = {
            "transformers' loop, sdpa": _no_grad(_loop(sdpa_attention_forward)),
            "transformers' loop, eager": _no_grad(_loop(_eager)),
            "mmlm_fast": _no_grad(interval_attention_varlen),
        }
        made.append(
            Case(
                group="interval_attention",
                name=f"packed vision attention, {name}",
                shape_from=f"{source}, {'bfloat16' if gpu else 'float32'}",
                inputs=draw,
                providers=providers,
                check=check,
                bytes_moved=4 * patches * heads * size * (2 if gpu else 4),
                flops=4 * size * heads * int((lengths * lengths).sum()),
            )
        )
    return made


def decoding(device: str, sizes: str) -> list[Case]:
    gpu = device == "cuda"
    shapes = {"cuda": (8, 28, 4, 16384, 128), "cpu": (4, 14, 2, 2048, 64), "tiny": (2, 4, 2, 40, 16)}
    batch, heads, kv_heads, room, size = shapes[sizes]
    used = torch.tensor([room * (n + 1) // batch - 1 for n in range(batch)])
    mask = IntervalMask.causal(1, room, q_offset=used)

    def draw() -> list[tuple]:
        torch.manual_seed(0)
        here = mask.to(device)
        return [(*_inputs(device, batch, heads, kv_heads, 1, room, size), here, here.dense(room)[:, None])
                for _ in range(4)]  # fmt: skip

    moved = 2 * int((used + 1).sum()) * kv_heads * size * (2 if gpu else 4)
    providers = {"SDPA, repeated keys, dense mask": _no_grad(dense_sdpa), "mmlm_fast": _no_grad(ours)}
    source = "Qwen2.5-7B" if gpu else "Qwen2.5-0.5B"
    return [
        Case(
            group="interval_attention",
            name=f"decoding, a static cache of {room:,}, {batch} samples of their own lengths",
            shape_from=f"{source}, {'bfloat16' if gpu else 'float32'}",
            inputs=draw,
            providers=providers,
            check=_check_rows,
            bytes_moved=moved,
            flops=4 * size * heads * int((used + 1).sum()),
        )
    ]
