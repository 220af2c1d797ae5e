"""Triton kernels for `fuse_modalities`: Σ aₘ·xₘ and the gated mix. Contract: mmlm_fast/ops/fuse_modalities.py.

Memory-bound. Floor forward: k features read once, the output written once; attention reads the features a second
time, from L2, since a row's weights need all of its scores first. Backward: k features and the gradient read, k
gradients written (attention adds one pass over the features for the query's gradient).

Legend: R rows (batch × tokens), K modalities, H hidden size.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmlm_kernels.launch import ceil_div, kernel, next_power_of_2

MODES = {"mean": 0, "weighted": 1, "attention": 2}
MAX_BLOCK_H = 1024
TILE_VALUES = 2048  # values of one modality a program holds
MAX_ROW_SPLITS = 128  # of the reduction over rows in the query's gradient
ROWS_QUERY_GRAD = 32
BLOCK_MIX = 1024
MAX_REGISTERS = 128  # unless told so, ptxas stops at 56 for sm_80 and spills


@triton.jit
def _load_feature(x_ptr, rows, columns, mask, H, tokens, BROADCAST: tl.constexpr, present):
    """Rows of one modality in float32, zero where it is missing."""
    source = rows // tokens if BROADCAST else rows
    x = tl.load(x_ptr + source[:, None] * H + columns[None, :], mask=mask & (present != 0)[:, None], other=0.0)
    return x.to(tl.float32)


@triton.jit
def _load_present(present_ptr, rows, row_mask, m: tl.constexpr, K: tl.constexpr, HAS_PRESENT: tl.constexpr):
    if HAS_PRESENT:
        return tl.load(present_ptr + rows * K + m, mask=row_mask, other=0).to(tl.int32)
    else:
        return row_mask.to(tl.int32)


@kernel(do_not_specialize=["R", "tokens"])
def _fwd_kernel(xs, weight_ptr, present_ptr, out_ptr, weights_ptr, R, H, tokens, scale,
                MODE: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BROADCAST: tl.constexpr,
                HAS_PRESENT: tl.constexpr, ROWS: tl.constexpr, BLOCK_H: tl.constexpr):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_mask = rows < R
    modality = tl.arange(0, KP)

    # scores [ROWS, KP], -inf where missing
    scores = tl.zeros((ROWS, KP), tl.float32)
    if MODE == 1:
        scores += tl.load(weight_ptr + modality, mask=modality < K, other=0.0).to(tl.float32)[None, :]
    there = tl.zeros((ROWS, KP), tl.int32)
    for m in tl.static_range(K):
        present = _load_present(present_ptr, rows, row_mask, m, K, HAS_PRESENT)
        there = tl.where((modality == m)[None, :], present[:, None], there)
        if MODE == 2:
            score = tl.zeros((ROWS,), tl.float32)
            for h in range(0, H, BLOCK_H):
                columns = h + tl.arange(0, BLOCK_H)
                mask = row_mask[:, None] & (columns < H)[None, :]
                query = tl.load(weight_ptr + columns, mask=columns < H, other=0.0).to(tl.float32)
                x = _load_feature(xs[m], rows, columns, mask, H, tokens, (BROADCAST >> m) & 1, present)
                score += tl.sum(x * query[None, :], axis=1)
            scores = tl.where((modality == m)[None, :], score[:, None] * scale, scores)
    scores = tl.where(there != 0, scores, float("-inf"))
    largest = tl.max(scores, axis=1)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    weights = tl.exp(scores - largest[:, None])
    total = tl.sum(weights, axis=1)
    weights = weights / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(weights_ptr + rows[:, None] * K + modality[None, :], weights,
             mask=row_mask[:, None] & (modality < K)[None, :])  # fmt: skip

    for h in range(0, H, BLOCK_H):
        columns = h + tl.arange(0, BLOCK_H)
        mask = row_mask[:, None] & (columns < H)[None, :]
        acc = tl.zeros((ROWS, BLOCK_H), tl.float32)
        for m in tl.static_range(K):
            present = _load_present(present_ptr, rows, row_mask, m, K, HAS_PRESENT)
            a = tl.sum(tl.where((modality == m)[None, :], weights, 0.0), axis=1)
            acc += a[:, None] * _load_feature(xs[m], rows, columns, mask, H, tokens, (BROADCAST >> m) & 1, present)
        tl.store(out_ptr + rows[:, None] * H + columns[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)


@kernel(do_not_specialize=["R", "tokens"])
def _bwd_kernel(grad_ptr, xs, weight_ptr, weights_ptr, present_ptr,
                dxs, dscores_ptr, R, H, tokens, scale,
                MODE: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BROADCAST: tl.constexpr,
                HAS_PRESENT: tl.constexpr, ROWS: tl.constexpr, BLOCK_H: tl.constexpr):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_mask = rows < R
    modality = tl.arange(0, KP)
    weight_mask = row_mask[:, None] & (modality < K)[None, :]
    weights = tl.load(weights_ptr + rows[:, None] * K + modality[None, :], mask=weight_mask, other=0.0)

    dscores = tl.zeros((ROWS, KP), tl.float32)
    if MODE != 0:
        for m in tl.static_range(K):
            present = _load_present(present_ptr, rows, row_mask, m, K, HAS_PRESENT)
            da = tl.zeros((ROWS,), tl.float32)
            for h in range(0, H, BLOCK_H):
                columns = h + tl.arange(0, BLOCK_H)
                mask = row_mask[:, None] & (columns < H)[None, :]
                grad = tl.load(grad_ptr + rows[:, None] * H + columns[None, :], mask=mask, other=0.0).to(tl.float32)
                x = _load_feature(xs[m], rows, columns, mask, H, tokens, (BROADCAST >> m) & 1, present)
                da += tl.sum(grad * x, axis=1)
            dscores = tl.where((modality == m)[None, :], da[:, None], dscores)
        dscores = weights * (dscores - tl.sum(weights * dscores, axis=1)[:, None])
        tl.store(dscores_ptr + rows[:, None] * K + modality[None, :], dscores, mask=weight_mask)

    for h in range(0, H, BLOCK_H):
        columns = h + tl.arange(0, BLOCK_H)
        mask = row_mask[:, None] & (columns < H)[None, :]
        grad = tl.load(grad_ptr + rows[:, None] * H + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        for m in tl.static_range(K):
            pick = (modality == m)[None, :]
            dx = tl.sum(tl.where(pick, weights, 0.0), axis=1)[:, None] * grad
            if MODE == 2:
                query = tl.load(weight_ptr + columns, mask=columns < H, other=0.0).to(tl.float32)
                dx += tl.sum(tl.where(pick, dscores, 0.0), axis=1)[:, None] * (scale * query)[None, :]
            tl.store(dxs[m] + rows[:, None] * H + columns[None, :], dx.to(dxs[m].dtype.element_ty), mask=mask)


@kernel(do_not_specialize=["R", "tokens", "rows_per_split"])
def _query_grad_kernel(xs, dscores_ptr, present_ptr, partial_ptr, R, H, tokens,
                       rows_per_split, scale, K: tl.constexpr, BROADCAST: tl.constexpr, HAS_PRESENT: tl.constexpr,
                       ROWS: tl.constexpr, BLOCK_H: tl.constexpr):  # fmt: skip
    """partial[split] = scale · Σ over the split's rows and modalities of dscore · x."""
    columns = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    split = tl.program_id(1).to(tl.int64)
    first = split * rows_per_split
    last = tl.minimum(first + rows_per_split, R)
    acc = tl.zeros((BLOCK_H,), tl.float32)
    for start in range(first, last, ROWS):
        rows = start + tl.arange(0, ROWS).to(tl.int64)
        row_mask = rows < last
        mask = row_mask[:, None] & (columns < H)[None, :]
        for m in tl.static_range(K):
            present = _load_present(present_ptr, rows, row_mask, m, K, HAS_PRESENT)
            dscore = tl.load(dscores_ptr + rows * K + m, mask=row_mask, other=0.0)
            x = _load_feature(xs[m], rows, columns, mask, H, tokens, (BROADCAST >> m) & 1, present)
            acc += tl.sum(dscore[:, None] * x, axis=0)
    tl.store(partial_ptr + split * H + columns, acc * scale, mask=columns < H)


@triton.jit
def _gate(logits_ptr, present_ptr, offsets, mask, H, HAS_PRESENT: tl.constexpr):
    """The gate in float32: σ(logits) where both are there, else 1 for the first alone, 0 otherwise."""
    gate = tl.sigmoid(tl.load(logits_ptr + offsets, mask=mask, other=0.0).to(tl.float32))
    if HAS_PRESENT:
        rows = offsets // H
        first = tl.load(present_ptr + rows * 2, mask=mask, other=0).to(tl.int32)
        second = tl.load(present_ptr + rows * 2 + 1, mask=mask, other=0).to(tl.int32)
        gate = tl.where((first != 0) & (second != 0), gate, tl.where(first != 0, 1.0, 0.0))
    return gate


@kernel(do_not_specialize=["units"])
def _mix_fwd_kernel(first_ptr, second_ptr, logits_ptr, present_ptr, out_ptr, gate_ptr, units, H,
                    UNIT: tl.constexpr, HAS_PRESENT: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """There are `units` times UNIT numbers, so that the mask is known to end where wide loads do."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < tl.cast(units, tl.int64) * UNIT
    gate = _gate(logits_ptr, present_ptr, offsets, mask, H, HAS_PRESENT)
    first = tl.load(first_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(second_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    out = gate * first + (1 - gate) * second
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(gate_ptr + offsets, gate.to(gate_ptr.dtype.element_ty), mask=mask)


@kernel(do_not_specialize=["units"])
def _mix_bwd_kernel(grad_ptr, first_ptr, second_ptr, logits_ptr, present_ptr, dfirst_ptr, dsecond_ptr, dlogits_ptr,
                    units, H, UNIT: tl.constexpr, HAS_PRESENT: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < tl.cast(units, tl.int64) * UNIT
    gate = _gate(logits_ptr, present_ptr, offsets, mask, H, HAS_PRESENT)
    grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    first = tl.load(first_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(second_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    dlogits = grad * (first - second) * gate * (1 - gate)
    tl.store(dfirst_ptr + offsets, (grad * gate).to(dfirst_ptr.dtype.element_ty), mask=mask)
    tl.store(dsecond_ptr + offsets, (grad * (1 - gate)).to(dsecond_ptr.dtype.element_ty), mask=mask)
    tl.store(dlogits_ptr + offsets, dlogits.to(dlogits_ptr.dtype.element_ty), mask=mask)


class _Plan:
    """What the launchers derive from the shapes."""

    def __init__(self, features: list[Tensor], present: Tensor | None) -> None:
        first = features[0]
        self.tokens = next((x.shape[-2] for x in features if x.shape[-2] != 1), 1)
        self.shape = (*first.shape[:-2], self.tokens, first.shape[-1])
        self.hidden_size = first.shape[-1]
        self.num_rows = first.numel() // max(1, first.shape[-2] * self.hidden_size) * self.tokens
        self.broadcast = sum(1 << m for m, x in enumerate(features) if x.shape[-2] != self.tokens)
        self.features = [x.reshape(-1, self.hidden_size).contiguous() for x in features]
        self.present = None if present is None else present.reshape(-1, len(features)).contiguous().view(torch.uint8)
        self.block_h = min(MAX_BLOCK_H, next_power_of_2(self.hidden_size))
        self.rows = max(1, TILE_VALUES // self.block_h)
        self.options = {
            "K": len(features),
            "BROADCAST": self.broadcast,
            "HAS_PRESENT": present is not None,
            "BLOCK_H": self.block_h,
        }

    @property
    def scale(self) -> float:
        return self.hidden_size**-0.5


def fuse_modalities_fwd(
    features: list[Tensor], mode: str, weight: Tensor | None, present: Tensor | None
) -> tuple[Tensor, Tensor]:
    p = _Plan(features, present)
    out = features[0].new_empty(p.shape)
    weights = torch.empty(*p.shape[:-1], len(features), dtype=torch.float32, device=out.device)
    if p.num_rows and p.hidden_size:
        anything = p.features[0]
        _fwd_kernel[(ceil_div(p.num_rows, p.rows),)](
            tuple(p.features),
            anything if weight is None else weight.contiguous(),
            anything if p.present is None else p.present,
            out,
            weights,
            p.num_rows,
            p.hidden_size,
            p.tokens,
            p.scale,
            MODE=MODES[mode],
            KP=next_power_of_2(len(features)),
            ROWS=p.rows,
            maxnreg=MAX_REGISTERS,
            **p.options,
        )
    return out, weights


def fuse_modalities_bwd(
    grad: Tensor, features: list[Tensor], weight: Tensor | None, weights: Tensor, present: Tensor | None, mode: str
) -> list[Tensor]:
    p = _Plan(features, present)
    grad = grad.contiguous()
    dfeatures = [torch.empty(p.shape, dtype=x.dtype, device=x.device) for x in features]
    dscores = torch.empty(p.num_rows, len(features), dtype=torch.float32, device=grad.device)
    anything = p.features[0]
    if p.num_rows and p.hidden_size:
        _bwd_kernel[(ceil_div(p.num_rows, p.rows),)](
            grad,
            tuple(p.features),
            anything if weight is None else weight.contiguous(),
            weights,
            anything if p.present is None else p.present,
            tuple(dfeatures),
            dscores,
            p.num_rows,
            p.hidden_size,
            p.tokens,
            p.scale,
            MODE=MODES[mode],
            KP=next_power_of_2(len(features)),
            ROWS=p.rows,
            maxnreg=MAX_REGISTERS,
            **p.options,
        )
    if mode == "attention":
        dweight = _query_grad(p, dscores).to(grad.dtype)
    elif mode == "weighted":
        dweight = dscores.sum(0).to(grad.dtype)
    else:
        dweight = grad.new_empty(0)
    dfeatures = [
        dx if x.shape[-2] == p.tokens else dx.sum(-2, keepdim=True) for dx, x in zip(dfeatures, features, strict=True)
    ]
    return [dweight, *dfeatures]


def _query_grad(p: _Plan, dscores: Tensor) -> Tensor:
    if not p.num_rows:
        return torch.zeros(p.hidden_size, dtype=torch.float32, device=dscores.device)
    rows_per_split = max(ROWS_QUERY_GRAD, ceil_div(p.num_rows, MAX_ROW_SPLITS))
    splits = ceil_div(p.num_rows, rows_per_split)
    block_h = min(64, p.block_h)
    partial = torch.empty(splits, p.hidden_size, dtype=torch.float32, device=dscores.device)
    _query_grad_kernel[(ceil_div(p.hidden_size, block_h), splits)](
        tuple(p.features),
        dscores,
        p.features[0] if p.present is None else p.present,
        partial,
        p.num_rows,
        p.hidden_size,
        p.tokens,
        rows_per_split,
        p.scale,
        ROWS=ROWS_QUERY_GRAD,
        **(p.options | {"BLOCK_H": block_h}),
    )
    return partial.sum(0)


def _pair_rows(present: Tensor | None, anything: Tensor) -> Tensor:
    return anything if present is None else present.reshape(-1, 2).contiguous().view(torch.uint8)


def gated_mix_fwd(first: Tensor, second: Tensor, logits: Tensor, present: Tensor | None) -> tuple[Tensor, Tensor]:
    first, second, logits = first.contiguous(), second.contiguous(), logits.contiguous()
    out, gate = torch.empty_like(logits), torch.empty_like(logits)
    numel, unit = logits.numel(), math.gcd(logits.shape[-1], 16)
    if numel:
        _mix_fwd_kernel[(ceil_div(numel, BLOCK_MIX),)](
            first, second, logits, _pair_rows(present, logits), out, gate, numel // unit, logits.shape[-1],
            UNIT=unit, HAS_PRESENT=present is not None, BLOCK=BLOCK_MIX,
        )  # fmt: skip
    return out, gate


def gated_mix_bwd(
    grad: Tensor, first: Tensor, second: Tensor, logits: Tensor, present: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    grad, first, second, logits = (t.contiguous() for t in (grad, first, second, logits))
    dfirst, dsecond, dlogits = (torch.empty_like(logits) for _ in range(3))
    numel, unit = logits.numel(), math.gcd(logits.shape[-1], 16)
    if numel:
        _mix_bwd_kernel[(ceil_div(numel, BLOCK_MIX),)](
            grad, first, second, logits, _pair_rows(present, logits), dfirst, dsecond, dlogits,
            numel // unit, logits.shape[-1], UNIT=unit, HAS_PRESENT=present is not None, BLOCK=BLOCK_MIX,
        )  # fmt: skip
    return dfirst, dsecond, dlogits
