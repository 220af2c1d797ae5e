"""Rotary embedding with and without the norm of heads, against transformers' functions."""

import torch

from mmlm_benchmarks.harness import Case
from mmlm_benchmarks.ops import op_case
from mmlm_fast.ops import qk_norm_rope, rope_tables
from mmlm_fast.ops.qk_norm_rope import qk_norm_rope_ref

EPS = 1e-6
# name, where the shape is from, batch, tokens, heads, key heads, head size, norm, dtype
SIZES = {
    "cpu": [
        ("rope", "Qwen2.5-VL-3B", 1, 2048, 16, 2, 128, False, torch.float32),
        ("rope", "Qwen2.5-VL-3B", 1, 2048, 16, 2, 128, False, torch.bfloat16),
        ("rope, vision head of 80", "Qwen2.5-VL vision", 1, 1024, 16, 16, 80, False, torch.float32),
        ("qk_norm + rope", "Qwen3-VL-2B", 1, 2048, 16, 8, 128, True, torch.bfloat16),
    ],
    "tiny": [("qk_norm + rope", "none", 1, 5, 4, 2, 16, True, torch.bfloat16)],
    "cuda": [
        ("rope", "Qwen2.5-VL-7B", 2, 8192, 28, 4, 128, False, torch.bfloat16),
        ("rope, vision head of 80", "Qwen2.5-VL vision", 1, 16384, 16, 16, 80, False, torch.bfloat16),
        ("qk_norm + rope", "Qwen3-VL-8B", 2, 8192, 32, 8, 128, True, torch.bfloat16),
    ],
}


def _rotate_half(x):
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def _rms(x, weight):
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * wide.to(x.dtype)


def eager(query, key, cos, sin, query_weight=None, key_weight=None):
    """As transformers' attention: q_norm and k_norm where there are, then apply_rotary_pos_emb."""
    cos, sin = cos[:, None], sin[:, None]
    if query_weight is not None:
        query, key = _rms(query, query_weight), _rms(key, key_weight)
    return query * cos + _rotate_half(query) * sin, key * cos + _rotate_half(key) * sin


def tables(tokens: int, size: int, device: str, dtype: torch.dtype) -> tuple[tuple, tuple]:
    """(cos, sin) at half width and at full width, rounded to the model's dtype as transformers does: everybody's."""
    inv_freq = 1e6 ** -(torch.arange(0, size, 2, device=device) / size)
    half = tuple(t.to(dtype) for t in rope_tables(torch.arange(tokens, device=device)[None], inv_freq))
    return half, tuple(torch.cat((t, t), dim=-1) for t in half)


def cases(device: str, sizes: str | None = None) -> list[Case]:
    made = []
    for name, source, batch, tokens, heads, kv_heads, size, norm, dtype in SIZES[sizes or device]:
        held: dict[str, tuple] = {}

        def draw(dtype, batch=batch, tokens=tokens, heads=heads, kv_heads=kv_heads, size=size, norm=norm, held=held):
            if not held:
                held["half"], held["full"] = tables(tokens, size, device, dtype)
            query, key = (
                torch.randn(batch, tokens, h, size, device=device, dtype=dtype).transpose(1, 2)
                for h in (heads, kv_heads)
            )
            return query, key, *(torch.randn(size, device=device, dtype=dtype) for _ in range(2 if norm else 0))

        def reference(query, key, *weights, held=held):
            return eager(query, key, *held["full"], *weights)

        def exact(query, key, *weights, held=held):
            return qk_norm_rope_ref(query, key, *held["half"], *(weights or (None, None)), EPS)

        def fast(query, key, *weights, held=held):
            named = dict(zip(("query_weight", "key_weight"), weights, strict=False))
            return qk_norm_rope(query, key, *held["half"], **named, eps=EPS)

        made += op_case(
            "qk_norm_rope",
            f"{name} {str(dtype).removeprefix('torch.')}",
            source,
            device,
            draw,
            reference=reference,
            fast=fast,
            exact=exact,
            values_moved=2 * batch * tokens * (heads + kv_heads) * size,
            flops=0,
            backward_flops=0,
            dtype=dtype,
        )
    return made
