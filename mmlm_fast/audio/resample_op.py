"""The op behind `resample`: reference, native CPU core, PyTorch on CUDA."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmlm_fast.audio.device_tables import kept_tables
from mmlm_fast.audio.plain import address_of, autograd_within_an_op, without_autocast
from mmlm_fast.audio.sinc import METHODS, Filter, num_resampled, read, taps_of
from mmlm_fast.audio.tensors import TENSORS, as_float
from mmlm_fast.audio.waveforms import Clips
from mmlm_fast.ops.parts import Op, differentiable, register_op
from mmlm_fast.ops.paths import using_reference

OP = Op("resample", native=(torch.float32, torch.float64, torch.int16), kernel=(), functions=("audio.resample",))
_MAX_DENSE = 2**20  # numbers of the reference's convolution
_BLOCK = 2**18  # products at a time in the reference without a table


def resample_ref(
    waveform: Tensor,
    orig_freq: int,
    new_freq: int,
    width: int = 6,
    rolloff: float = 0.99,
    method: str = METHODS[0],
    beta: float = 0.0,
) -> Tensor:
    """Resample by the definition, in plain PyTorch and in the waveform's dtype: ``[*batch, N]`` to ``[*batch, M]``."""
    if orig_freq == new_freq:
        return waveform
    f = Filter.between(orig_freq, new_freq, width, rolloff, method, beta)
    num_samples = waveform.shape[-1]
    wanted = num_resampled(num_samples, orig_freq, new_freq)
    if not _is_dense(f):
        parts = [block for _, block in _blocks(f, waveform, wanted)]
        return torch.cat(parts, -1) if parts else waveform.new_zeros(*waveform.shape[:-1], wanted)
    kernel = kept_tables(("resample", f), lambda: [_dense(f)], waveform.dtype, waveform)[0][:, None]
    rows = waveform.reshape(math.prod(waveform.shape[:-1]), 1, num_samples)
    padded = torch.nn.functional.pad(rows, (f.before, f.before + f.old))
    with without_autocast(padded):
        phases = torch.nn.functional.conv1d(padded, kernel, stride=f.old)  # [B, new, j]
    return phases.transpose(1, 2).flatten(1)[:, :wanted].reshape(*waveform.shape[:-1], wanted)


def _is_dense(f: Filter) -> bool:
    # A compiler traces no table of numpy's: it gets the formula without one.
    return f.has_table and f.new * (2 * f.before + f.old) <= _MAX_DENSE and not torch.compiler.is_compiling()


def _dense(f: Filter) -> np.ndarray:
    """Return the taps ``[new, 2 * before + old]``, those of sample ``old * j + k - before`` in column k."""
    taps, first = taps_of(f)
    dense = np.zeros((f.new, 2 * f.before + f.old + 2))
    columns = first[:, None] + f.before + 1 + np.arange(taps.shape[1])
    inside = columns < dense.shape[1]
    dense[np.nonzero(inside)[0], columns[inside]] = taps[inside]
    return dense[:, 1:-1]


def _blocks(f: Filter, waveform: Tensor, wanted: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield the outputs a block at a time, with taps made for each: as many as outputs, however many phases."""
    num_samples, rows = waveform.shape[-1], math.prod(waveform.shape[:-1])
    if rows == 0 or num_samples == 0:
        return
    count = 2 * f.before + 2
    size = max(1, _BLOCK // (min(count, num_samples) * rows))
    for at in range(0, wanted, size):
        output = torch.arange(at, min(at + size, wanted), device=waveform.device)
        phase, start = (output % f.new * f.old)[:, None], (output // f.new * f.old)[:, None]
        if count < num_samples:
            k = phase // f.new - f.before + torch.arange(count, device=waveform.device)
        else:
            k = torch.arange(num_samples, device=waveform.device) - start
        taps, sample = _taps_at(f, k * f.new - phase), start + k
        taps = torch.where((sample >= 0) & (sample < num_samples), taps, 0.0).to(waveform.dtype)
        yield slice(at, at + size), (waveform[..., sample.clamp(0, num_samples - 1)] * taps).sum(-1)


def _taps_at(f: Filter, distance: Tensor) -> Tensor:
    """Return sinc times window in float64, `distance` in units of ``1 / (old * new)``."""
    t = (distance.double() * (f.base / (f.old * f.new))).clamp(-f.width, f.width)
    if f.method == METHODS[0]:
        window = (t * (math.pi / f.width / 2)).cos().square()
    else:
        window = torch.special.i0(f.beta * (1 - (t / f.width).square()).clamp(min=0).sqrt())
        window = window / torch.special.i0(torch.full((), f.beta, dtype=t.dtype, device=t.device))
    return torch.where(t.abs() < f.width, torch.sinc(t) * window * (f.base / f.old), 0.0)


def _cpu(
    waveforms: list[Tensor], orig_freq: int, new_freq: int, width: int, rolloff: float, method: str, beta: float
) -> Tensor:
    lengths = [num_resampled(w.shape[-1], orig_freq, new_freq) for w in waveforms]
    dtype = _dtype_of(waveforms)
    out = torch.empty(sum(lengths), dtype=dtype, device="cpu")
    start = address_of(out, dtype, sum(lengths))
    options = (width, rolloff, method, beta)
    read(TENSORS, waveforms, orig_freq, new_freq, options, lengths, start, dtype == torch.float64)
    return out


def _dtype_of(waveforms: list[Tensor]) -> torch.dtype:
    return torch.float64 if waveforms[0].dtype == torch.float64 else torch.float32


def _cuda(
    waveforms: list[Tensor], orig_freq: int, new_freq: int, width: int, rolloff: float, method: str, beta: float
) -> Tensor:
    dtype, options = _dtype_of(waveforms), (width, rolloff, method, beta)
    return torch.cat([resample_ref(as_float(w, dtype), orig_freq, new_freq, *options) for w in waveforms])


def _backward(
    grad: Tensor,
    waveforms: list[Tensor],
    orig_freq: int,
    new_freq: int,
    width: int,
    rolloff: float,
    method: str,
    beta: float,
) -> list[Tensor]:
    """Return gradients of the waveforms, through the reference run again, a block at a time where it has no table."""
    f, dtype = Filter.between(orig_freq, new_freq, width, rolloff, method, beta), _dtype_of(waveforms)
    grads, start = [], 0
    for waveform in waveforms:
        wanted = num_resampled(waveform.shape[-1], orig_freq, new_freq)
        part, start = grad[start : start + wanted], start + wanted
        with autograd_within_an_op(), without_autocast(waveform):
            x = waveform.detach().requires_grad_()
            total = torch.zeros_like(x)
            if orig_freq != new_freq and not _is_dense(f):
                for place, block in _blocks(f, as_float(x, dtype), wanted):
                    total += torch.autograd.grad(block, x, part[place], retain_graph=True)[0]
            elif wanted:
                options = (width, rolloff, method, beta)
                total = torch.autograd.grad(resample_ref(as_float(x, dtype), orig_freq, new_freq, *options), x, part)[0]
            grads.append(total)
    return grads


_fwd = register_op(
    "resample",
    native=_cpu,
    kernel="mmlm_fast.audio.resample_op:_cuda",
    fake=lambda waveforms, orig_freq, new_freq, width, rolloff, method, beta: waveforms[0].new_empty(
        (sum(num_resampled(w.shape[-1], orig_freq, new_freq) for w in waveforms),), dtype=_dtype_of(waveforms)
    ),
)
_bwd = register_op(
    "resample_bwd",
    portable=_backward,
    kernel="mmlm_fast.audio.resample_op:_backward",
    fake=lambda grad, waveforms, *_: [torch.empty_like(w) for w in waveforms],
)


def _again(ctx: Any, grads: tuple, *waveforms: Tensor) -> tuple:
    dtype = _dtype_of(list(waveforms))
    parts = [resample_ref(as_float(w, dtype), *ctx.arguments) for w in waveforms]
    return (torch.cat(parts),), (None, *waveforms)


class _Resample(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, arguments: tuple, *waveforms: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*waveforms)
        ctx.arguments = arguments
        return _fwd(list(waveforms), *arguments)

    @staticmethod
    @differentiable(_again)
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return None, *_bwd(grad.contiguous(), list(ctx.saved_tensors), *ctx.arguments)


def resample_tensors(clips: Clips, orig_freq: int, new_freq: int, options: tuple) -> Tensor | list[Tensor]:
    """Resample checked clips: ``[*batch, M]``, or a list where a sequence of clips came."""
    if not clips.waveforms:
        if clips.batch is None:
            return []
        shape = (*clips.batch, num_resampled(clips.num_samples, orig_freq, new_freq))
        return torch.empty(shape, dtype=torch.float64 if clips.is_double else torch.float32, device=clips.device)
    if using_reference():
        dtype = _dtype_of(clips.waveforms)
        parts = [resample_ref(as_float(w, dtype), orig_freq, new_freq, *options) for w in clips.waveforms]
        return parts if clips.batch is None else torch.stack(parts).reshape(*clips.batch, parts[0].shape[-1])
    if torch.is_grad_enabled() and any(w.requires_grad for w in clips.waveforms):
        flat = _Resample.apply((orig_freq, new_freq, *options), *clips.waveforms)
    else:
        flat = _fwd(clips.waveforms, orig_freq, new_freq, *options)
    if clips.batch is not None:
        wanted = num_resampled(clips.waveforms[0].shape[-1], orig_freq, new_freq)
        return flat.reshape(*clips.batch, wanted)
    return list(flat.split([num_resampled(w.shape[-1], orig_freq, new_freq) for w in clips.waveforms]))
