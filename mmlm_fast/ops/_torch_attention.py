"""torch's own attention, for no mask or a causal one: which calls it takes, and with which of its kernels."""

import threading
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from mmlm_fast.masks import IntervalMask
from mmlm_fast.ops._op import HAS_TRITON
from mmlm_fast.ops._registry import on_device

# cuDNN builds a plan for each shape, which takes as long as hundreds of calls (0.02 to 1 s): for queries that make it
# worth while, of shapes that come again. A pass through a model calls a shape once a layer: a few calls do not say so.
CUDNN_QUERIES, CUDNN_CALLS = 512, 128
# Shapes that are counted, and shapes that get a plan, of each thread.
COUNTED_SHAPES, PLANNED_SHAPES = 256, 32


class Call(NamedTuple):
    """What decides which kernel a call takes: plain facts, so that a test can cross them without a GPU."""

    device: str
    capability: int  # major one, of a CUDA device
    dtype: torch.dtype
    kind: str | None  # of the mask
    grouped: bool
    q_len: int
    kv_len: int
    size: int
    value_size: int
    scores: int
    is_compiling: bool = False
    has_triton: bool = True
    flash_allowed: bool = True
    cudnn_allowed: bool = True


def facts(query: Tensor, key: Tensor, value: Tensor, mask: IntervalMask | None) -> Call:
    (batch, heads, q_len, size), (kv_heads, kv_len, value_size) = query.shape, value.shape[1:]
    is_compiling, on_cuda = torch.compiler.is_compiling(), query.is_cuda
    return Call(
        device=query.device.type,
        capability=_capability(query.device.index) if on_cuda else 0,
        dtype=query.dtype,
        kind="full" if mask is None else mask.kind_for(kv_len),
        grouped=True if heads != kv_heads else False,  # noqa: SIM210  a symbol under dynamic shapes
        q_len=q_len,
        kv_len=kv_len,
        size=size,
        value_size=value_size,
        scores=batch * heads * q_len * kv_len,
        is_compiling=is_compiling,
        has_triton=HAS_TRITON,
        flash_allowed=on_cuda and _flash_allowed(),
        # What is counted must be a shape: of plain tensors, not of symbols.
        cudnn_allowed=on_cuda
        and not is_compiling
        and type(query) in (Tensor, torch.nn.Parameter)
        and torch.backends.cuda.cudnn_sdp_enabled(),
    )


@cache
def _capability_of(index: int) -> int:
    return torch.cuda.get_device_capability(index)[0] if torch.cuda.is_available() else 0


def _capability(index: int) -> int:
    return _capability_of(index)


def _flash_allowed() -> bool:
    return torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.is_flash_attention_available()


# While tracing Dynamo calls these two, and takes what they say for constants.
_capability._dynamo_marked_constant = True  # type: ignore[attr-defined]
_flash_allowed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def has_flash(call: Call) -> bool:
    """What torch's flash attention takes, grouped heads too."""
    if call.dtype not in (torch.float16, torch.bfloat16) or call.capability < 8 or not call.flash_allowed:
        return False
    return call.size == call.value_size and call.size <= 256 and (call.kind != "causal" or call.q_len == call.kv_len)


def has_efficient(call: Call) -> bool:
    """What torch's memory-efficient attention takes. Where neither does, its math path holds all scores."""
    unit = 4 if call.dtype == torch.float32 else 8
    rows_aligned = call.size % unit == 0 and call.value_size % unit == 0
    return not call.grouped and call.dtype != torch.float64 and rows_aligned


def torch_kernel(call: Call) -> str:
    """Which of torch's kernels takes a call.

    Returns:
        "cudnn"; "flash"; "sdpa": as `scaled_dot_product_attention` chooses; "packed", "repeated": it chooses too, but
        for grouped heads without a kernel of their own, which would take its math path, so that the queries of a group
        are made rows of one head, or where a causal mask tells rows apart, keys and values repeated.
    """
    if call.device != "cuda":
        return "sdpa"
    if not has_flash(call):
        return "sdpa" if not call.grouped else "packed" if call.kind == "full" else "repeated"
    # From 2.11 on torch itself takes cuDNN first on these two: a plan for each new length, while decoding each token.
    # A compiled graph has one shape, unless it decodes.
    if call.capability not in (9, 10) or (call.is_compiling and call.q_len != 1):
        return "sdpa"
    if call.size % 8 or call.scores == 0:  # it pads heads, and knows what to do with nothing
        return "sdpa"
    if call.capability == 9 and call.cudnn_allowed and call.q_len >= CUDNN_QUERIES:  # on Blackwell it is the slower one
        return "cudnn"
    return "flash"


def sdpa(query: Tensor, key: Tensor, value: Tensor, call: Call, scale: float) -> Tensor:
    is_causal = call.kind == "causal"
    if call.device == "cuda" and not call.is_compiling:  # rows that are not dense are the math path's
        query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    kernel = torch_kernel(call)
    if kernel == "cudnn":
        wants_lse = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
        if _cudnn_takes(query, key, value, is_causal, wants_lse):
            return torch.ops.aten._scaled_dot_product_cudnn_attention(
                query, key, value, None, wants_lse, 0.0, is_causal, False, scale=scale
            )[0]
        kernel = torch_kernel(call._replace(cudnn_allowed=False))
    if kernel == "flash":
        return torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, 0.0, is_causal, False, scale=scale
        )[0]
    attend, groups = torch.nn.functional.scaled_dot_product_attention, query.shape[1] // key.shape[1]
    if kernel == "packed":
        rows = query.unflatten(1, (key.shape[1], groups)).flatten(2, 3)  # [B, Hkv, G·Sq, D]
        out = attend(rows, key, value, scale=scale)
        return out.unflatten(2, (groups, query.shape[2])).flatten(1, 2)
    if kernel == "repeated":
        key, value = (x[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2) for x in (key, value))
        return attend(query, key, value, is_causal=is_causal, scale=scale)
    return attend(query, key, value, is_causal=is_causal, scale=scale, enable_gqa=call.grouped)


class _Shapes(threading.local):
    """Shapes that cuDNN could take: how often they came, and those it has been given. torch's plans are a thread's."""

    def __init__(self) -> None:
        self.counts: dict[tuple, int] = {}
        self.planned: set[tuple] = set()


_shapes = _Shapes()


def _comes_again(key: tuple) -> bool:
    """Whether a shape has come often enough, this time included, for a plan; shapes long not seen are forgotten."""
    if key in _shapes.planned:
        return True
    counts = _shapes.counts
    count = counts.pop(key, 0) + 1
    if count >= CUDNN_CALLS and len(_shapes.planned) < PLANNED_SHAPES:
        _shapes.planned.add(key)
        return True
    counts[key] = count
    if len(counts) > COUNTED_SHAPES:
        del counts[next(iter(counts))]
    return False


def _cudnn_takes(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, wants_lse: bool) -> bool:
    # What torch finds a plan by: batch, heads, lengths, sizes, strides, and whether a backward pass follows.
    shape = tuple((*x.shape, *x.stride()) for x in (query, key, value))
    if not _comes_again((query.device.index, query.dtype, is_causal, wants_lse, shape)):
        return False
    parameters = torch.backends.cuda.SDPAParams(query, key, value, None, 0.0, is_causal, query.shape[1] != key.shape[1])
    with on_device(query.device.index):  # torch looks at the current device
        return torch.backends.cuda.can_use_cudnn_attention(parameters)
