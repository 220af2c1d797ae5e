"""Triton kernels for `concat_linear`: out = act([x_1 … x_k] Wᵀ + b). Contract: mmlm_fast/ops/concat_linear.py.

A GEMM whose reduction walks through the inputs one after the other, so the concatenation is never written. An
input that broadcasts over tokens is multiplied once per sample into a float32 addend that the epilogue reads.
Floor: 2·M·N·ΣK flops over the inputs with all tokens, each input, the weight and the output moved once.

Legend: M rows (batch × tokens), N outputs, K an input's size, G samples, T tokens a sample.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmlm_kernels.launch import ceil_div, kernel
from mmlm_kernels.tiles import precision, product_tiles

ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}
GROUP_M = 8  # row tiles that share their weight tiles in L2


@triton.jit
def _activation(z, KIND: tl.constexpr):
    if KIND == 1:
        # As torch: NaN stays NaN.
        z = tl.where(z < 0, 0.0, z)
    if KIND == 2:
        z = 0.5 * z * (1 + tl.math.erf(z * 0.7071067811865476))
    if KIND == 3:
        z = z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    if KIND == 4:
        z = z * tl.sigmoid(z)
    return z


@triton.jit
def _tile(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Row and column tile of this program, in groups of row tiles that reuse the weight in L2."""
    num_m, num_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    per_group = GROUP * num_n
    first = pid // per_group * GROUP
    size = tl.minimum(num_m - first, GROUP)
    return first + pid % per_group % size, pid % per_group // size


@triton.jit
def _accumulate(acc, a_ptr, stride_am, stride_ak, b_ptr, stride_bk, stride_bn, rows, row_mask, columns, column_mask,
                first, last, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """acc += A[rows, first:last] B[first:last, columns]."""
    ks = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + rows[:, None].to(tl.int64) * stride_am + (first + ks)[None, :].to(tl.int64) * stride_ak
    b_ptrs = b_ptr + (first + ks)[:, None].to(tl.int64) * stride_bk + columns[None, :].to(tl.int64) * stride_bn
    for k in range(first, last, BLOCK_K):
        inside = k + ks < last
        a = tl.load(a_ptrs, mask=row_mask[:, None] & inside[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=inside[:, None] & column_mask[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        a_ptrs += BLOCK_K * stride_ak
        b_ptrs += BLOCK_K * stride_bk
    return acc


@kernel(do_not_specialize=["M", "tokens"])
def _fwd_kernel(xs, sizes, offsets, weight_ptr, bias_ptr, addend_ptr, out_ptr, z_ptr, M, N, stride_wn, tokens,
                NUM: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ADDEND: tl.constexpr, SAVE_Z: tl.constexpr,
                ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, GROUP: tl.constexpr,
                BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """Input i is [M, sizes[i]], contiguous, and meets the weight's columns from offsets[i] on."""
    tile_m, tile_n = _tile(M, N, BLOCK_M, BLOCK_N, GROUP)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, column_mask = rows < M, columns < N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in tl.static_range(NUM):
        acc = _accumulate(acc, xs[i], sizes[i], 1, weight_ptr + offsets[i], 1, stride_wn, rows, row_mask, columns,
                          column_mask, 0, sizes[i], BLOCK_K, PRECISION)  # fmt: skip
    if HAS_BIAS:
        acc += tl.load(bias_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    if HAS_ADDEND:
        samples = (rows // tokens).to(tl.int64)
        acc += tl.load(addend_ptr + samples[:, None] * N + columns[None, :], mask=mask, other=0.0)
    places = rows[:, None].to(tl.int64) * N + columns[None, :]
    if SAVE_Z:
        tl.store(z_ptr + places, acc.to(z_ptr.dtype.element_ty), mask=mask)
    tl.store(out_ptr + places, _activation(acc, ACTIVATION).to(out_ptr.dtype.element_ty), mask=mask)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


def _grid(num_rows: int, num_columns: int, tiles: dict[str, int]) -> int:
    return ceil_div(num_rows, tiles["BLOCK_M"]) * ceil_div(num_columns, tiles["BLOCK_N"])


def _gemm_segments(segments, weight, bias, addend, tokens, out, z, activation):
    """out (and z) from pairs (rows [M, K], first weight column)."""
    num_rows, num_out = out.shape
    tiles = product_tiles(weight.dtype, has_few_rows=num_rows <= 32)
    _fwd_kernel[(_grid(num_rows, num_out, tiles),)](
        tuple(x for x, _ in segments),
        tuple(x.shape[1] for x, _ in segments),
        tuple(offset for _, offset in segments),
        weight,
        weight if bias is None else bias.contiguous(),
        out if addend is None else addend,
        out,
        out if z is None else z,
        num_rows,
        num_out,
        weight.stride(0),
        tokens,
        NUM=len(segments),
        HAS_BIAS=bias is not None,
        HAS_ADDEND=addend is not None,
        SAVE_Z=z is not None,
        ACTIVATION=ACTIVATIONS[activation],
        PRECISION=precision(),
        GROUP=GROUP_M,
        **tiles,
    )


def concat_linear_fwd(
    inputs: list[Tensor], weight: Tensor, bias: Tensor | None, activation: str, save_preactivation: bool
) -> tuple[Tensor, Tensor]:
    num_tokens = next((x.shape[-2] for x in inputs if x.shape[-2] != 1), 1)
    num_out = weight.shape[0]
    out = inputs[0].new_empty((*inputs[0].shape[:-2], num_tokens, num_out))
    keeps = save_preactivation and activation != "none"
    z = torch.empty_like(out) if keeps else out.new_empty(0)
    if out.numel() == 0:
        return out, z
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    full, pooled, offset = [], [], 0
    for x in inputs:
        (full if x.shape[-2] == num_tokens else pooled).append((_rows(x), offset))
        offset += x.shape[-1]
    flat, addend = out.view(-1, num_out), None
    if pooled:
        addend = torch.empty(flat.shape[0] // num_tokens, num_out, dtype=torch.float32, device=out.device)
        _gemm_segments(pooled, weight, None, None, 1, addend, None, "none")
    _gemm_segments(full, weight, bias, addend, num_tokens, flat, z.view(-1, num_out) if keeps else None, activation)
    return out, z
