"""The op behind every family's features: native CPU core, CUDA kernel, gradients through the reference.

A `Spec` says what is computed; as the op's argument it is text, from which a graph in another process makes it again.
"""

import math
from typing import Any

import torch
from torch import Tensor

import mmlm_fast.audio.elementary_torch  # noqa: F401
from mmlm_fast.audio.features import checked_lengths, run_clips
from mmlm_fast.audio.plain import address_of, autograd_within_an_op, without_autocast
from mmlm_fast.audio.reference import by_reference
from mmlm_fast.audio.spec import Layout, constant_in_graphs, is_tracing, offsets_of, prepared, spec_of
from mmlm_fast.audio.tensors import TENSORS
from mmlm_fast.audio.waveforms import Clips
from mmlm_fast.ops.parts import Op, differentiable, register_op
from mmlm_fast.ops.paths import using_reference

OP = Op(
    "spectral_features",
    native=(torch.float32, torch.float64, torch.int16),
    kernel=(),
    has_cuda_core=True,
    functions=("audio.log_mel", "audio.kaldi_fbank", "audio.mfcc", "audio.mel_spectrogram", "audio.spectrogram"),
)


def _cpu(waveforms: list[Tensor], spec: str, num_samples: list[int], orig_freq: int) -> Tensor:
    wanted = spec_of(spec)
    made, compute_dtype = prepared(wanted), _torch_dtype(wanted.compute_dtype)
    frames = [made.layout.num_frames(n) for n in num_samples]
    offsets = offsets_of([made.num_out * f for f in frames])
    out = torch.empty(offsets[-1], dtype=compute_dtype, device="cpu")
    start, size = address_of(out, compute_dtype, offsets[-1]), out.element_size()
    clips = Clips(waveforms, None, orig_freq, False, TENSORS)
    run_clips(made, clips, num_samples, frames, [start + size * offset for offset in offsets[:-1]])
    return out if wanted.dtype == wanted.compute_dtype else out.to(_torch_dtype(wanted.dtype))


def _torch_dtype(name: str) -> torch.dtype:
    return getattr(torch, name)


def _backward(grad: Tensor, waveforms: list[Tensor], spec: str, num_samples: list[int], orig_freq: int) -> list[Tensor]:
    """Return gradients of the waveforms, through the reference run again: nothing but the waveforms is kept for it."""
    wanted = spec_of(spec)
    layout = prepared(wanted).layout
    grads, start = [], 0
    for waveform, n in zip(waveforms, num_samples, strict=True):
        shape = layout.shape(layout.num_frames(n))
        part = grad[start : start + math.prod(shape)].view(shape)
        start += math.prod(shape)
        with autograd_within_an_op(), without_autocast(waveform):
            x = waveform.detach().requires_grad_()
            out = by_reference(wanted, x, n, orig_freq)
            grads.append(torch.autograd.grad(out, x, part)[0] if out.numel() else torch.zeros_like(x))
    return grads


def _fake(waveforms: list[Tensor], spec: str, num_samples: list[int], orig_freq: int) -> Tensor:
    wanted = spec_of(spec)
    layout = prepared(wanted).layout
    total = sum(layout.num_out * layout.num_frames(n) for n in num_samples)
    return waveforms[0].new_empty((total,), dtype=_torch_dtype(wanted.dtype))


_fwd = register_op(
    "spectral_features",
    native=_cpu,
    kernel="mmlm_fast.audio.cuda:spectral_features",
    fake=_fake,
)
_bwd = register_op(
    "spectral_features_bwd",
    portable=_backward,
    kernel="mmlm_fast.audio.spectral:_backward",
    fake=lambda grad, waveforms, spec, num_samples, orig_freq: [torch.empty_like(w) for w in waveforms],
)


def _again(ctx: Any, grads: tuple, *waveforms: Tensor) -> tuple:
    spec = spec_of(ctx.key)
    parts = [by_reference(spec, w, n, ctx.orig_freq).flatten() for w, n in zip(waveforms, ctx.num_samples, strict=True)]
    return (torch.cat(parts),), (None, None, None, *waveforms)


class _SpectralFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, key: str, num_samples: list[int], orig_freq: int, *waveforms: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*waveforms)
        ctx.key, ctx.num_samples, ctx.orig_freq = key, num_samples, orig_freq
        return _fwd(list(waveforms), key, num_samples, orig_freq)

    @staticmethod
    @differentiable(_again)
    def backward(ctx: Any, grad: Tensor) -> tuple:
        grads = _bwd(grad.contiguous(), list(ctx.saved_tensors), ctx.key, ctx.num_samples, ctx.orig_freq)
        return None, None, None, *grads


@constant_in_graphs
def _layout_of(key: str) -> tuple:
    return tuple(prepared(spec_of(key)).layout)


@constant_in_graphs
def _dtype_of(key: str) -> torch.dtype:
    return _torch_dtype(spec_of(key).dtype)


def features_of_tensors(spec: Any, clips: Clips, num_samples: int | None = None) -> Tensor | list[Tensor]:
    """Compute features of clips of tensors; see `features.features_of`."""
    if is_tracing():
        key, layout = spec, Layout(*_layout_of(spec))
    else:
        key, layout = spec.key, prepared(spec).layout
    lengths = checked_lengths(layout, clips, num_samples)
    if not clips.waveforms:
        if clips.batch is None:
            return []
        empty = layout.num_frames(num_samples if num_samples is not None else clips.num_samples)
        return torch.empty(*clips.batch, *layout.shape(empty), dtype=_dtype_of(key), device=clips.device)
    if using_reference():
        wanted = spec_of(key)
        parts = [by_reference(wanted, w, n, clips.orig_freq) for w, n in zip(clips.waveforms, lengths, strict=True)]
        return parts if clips.batch is None else torch.stack(parts).reshape(*clips.batch, *parts[0].shape)
    if torch.is_grad_enabled() and any(w.requires_grad for w in clips.waveforms):
        flat = _SpectralFeatures.apply(key, lengths, clips.orig_freq, *clips.waveforms)
    else:
        flat = _fwd(clips.waveforms, key, lengths, clips.orig_freq)
    shapes = [layout.shape(layout.num_frames(n)) for n in lengths]
    if clips.batch is not None:
        return flat.reshape(*clips.batch, *shapes[0])
    return [part.view(shape) for part, shape in zip(flat.split([math.prod(s) for s in shapes]), shapes, strict=True)]
