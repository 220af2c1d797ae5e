"""Short-time spectral features, one op for every family: reference, native CPU core, CUDA kernel.

A `SpectralSpec` says what is computed: framing, window, DFT, filters, logarithm, cosine transform. Families
(`log_mel`, `mel_spectrogram`, `kaldi_fbank`, …) only make specs.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmlm_fast import _C
from mmlm_fast.audio.plain import address_of, autograd_within_an_op, without_autocast
from mmlm_fast.audio.resample import native_resampler, num_resampled, resample_ref
from mmlm_fast.audio.tables import ByteCache, kept_tables, kept_within
from mmlm_fast.audio.waveforms import SAMPLE_TYPES, Clips, as_float, native_format
from mmlm_fast.ops.parts import Op, differentiable, register_op
from mmlm_fast.ops.paths import using_reference

OP = Op(
    "spectral_features",
    native=(torch.float32, torch.float64, torch.int16),
    kernel=(),
    has_cuda_core=True,
    functions=("audio.log_mel", "audio.kaldi_fbank", "audio.mfcc", "audio.mel_spectrogram", "audio.spectrogram"),
)


class Layout(NamedTuple):
    """What a call needs to know of a spec; plain numbers, so that Dynamo can work with them."""

    num_out: int
    hop_length: int
    pad_total: int
    span: int
    drop: int
    min_samples: int
    bins_first: bool
    sampling_rate: int

    def num_frames(self, num_samples: int) -> int:
        return max(0, 1 + (num_samples + self.pad_total - self.span) // self.hop_length - self.drop)

    def check_length(self, num_samples: int) -> None:
        if num_samples < self.min_samples:
            raise ValueError(
                f"a clip needs at least {self.min_samples} samples after padding, got {num_samples}: pad it, or pass "
                f"num_samples where there is such an argument"
            )

    def shape(self, num_frames: int) -> tuple[int, int]:
        return (self.num_out, num_frames) if self.bins_first else (num_frames, self.num_out)


@dataclass(frozen=True, eq=False)
class SpectralSpec:
    """Everything that defines a family's features; see csrc/audio/spectral.h for the options."""

    key: str  # JSON of the family's name and arguments: the op's argument, from which the spec can be made again
    sampling_rate: int
    window: np.ndarray  # [frame_length], float64
    hop_length: int
    n_fft: int
    filters: np.ndarray | None = None  # [num_filters, n_fft // 2 + 1], float64
    dct: np.ndarray | None = None  # [num_ceps, num_filters]
    # Number of frames of n samples: 1 + (n + pad_total - span) // hop_length - drop.
    offset: int = 0
    pad_total: int = 0
    span: int = 0
    drop: int = 0
    min_samples: int = 0
    bins_first: bool = True
    dtype: torch.dtype = torch.float32  # of the result; arithmetic is in float64 for float64, else in float32
    options: dict[str, Any] = field(default_factory=dict)
    frame_length: int = field(init=False)
    num_out: int = field(init=False)
    _native: list = field(default_factory=list, repr=False)
    _lock: Any = field(default_factory=Lock, repr=False)

    def __post_init__(self) -> None:
        rows = self.n_fft // 2 + 1 if self.filters is None else self.filters.shape[0]
        rows = rows if self.dct is None else self.dct.shape[0]
        object.__setattr__(self, "frame_length", len(self.window))
        object.__setattr__(self, "num_out", rows + (self.options.get("energy") in ("first", "last")))

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def plan(self) -> "_C.SpectralPlan":
        if not self._native:
            with self._lock:
                if not self._native:
                    self._native.append(self.native_plan())
        return self._native[0]

    def native_plan(self, **changes: Any) -> "_C.SpectralPlan":
        double = self.dtype == torch.float64
        # The core's float32 transforms of lengths with large prime factors err more than torch's.
        exact = double or not _is_smooth(self.n_fft)
        options = {
            "frame_length": self.frame_length,
            "hop_length": self.hop_length,
            "n_fft": self.n_fft,
            "offset": self.offset,
            "bins_first": self.bins_first,
            "double_precision": exact,
            "double_output": double,
        }
        return _C.SpectralPlan(options | self.options | changes, self.window, self.filters, self.dct)

    @cached_property
    def layout(self) -> Layout:
        return Layout(**{name: getattr(self, name) for name in Layout._fields})


def _is_smooth(n: int) -> bool:
    """Even, and without prime factors above 5."""
    if n % 2:
        return False
    for prime in (2, 3, 5):
        while n % prime == 0:
            n //= prime
    return n == 1


def constant_in_graphs(function: Callable) -> Callable:
    """Dynamo calls the plain function while tracing and takes its result as a constant: no table is made in a graph.

    What `torch.compiler.assume_constant_result` does, which would import Dynamo, two seconds, with this package.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def plain_float(value: float) -> float:
    """A float that Dynamo takes for a constant: it traces arguments, defaults too, as symbols otherwise."""
    return float(value).__float__()


def _bytes_of(spec: SpectralSpec) -> int:
    """With the plan that it makes on its first call."""
    arrays = (spec.window, spec.filters, spec.dct)
    return 4096 + len(spec.key) + sum(2 * a.nbytes for a in arrays if a is not None) + 128 * spec.n_fft


_SPECS: ByteCache[SpectralSpec] = ByteCache(64 * 2**20, _bytes_of)
_FAMILIES: dict[str, Callable[..., dict]] = {}


def family(name: str) -> Callable[[Callable[..., dict]], Callable[..., str]]:
    """Make a function from plain keyword arguments to `SpectralSpec`'s fields one to the key of the spec."""

    def decorate(fields: Callable[..., dict]) -> Callable[..., str]:
        @kept_within(4 * 2**20, lambda key: 4 * len(key) + 1024)
        def cached(**arguments: Any) -> str:
            key = json.dumps([name, arguments])
            spec_of(key)  # bad arguments are the caller's error, not the op's
            return key

        @constant_in_graphs
        def key_of(**arguments: Any) -> str:
            return cached(**arguments)

        _FAMILIES[name] = fields
        return key_of

    return decorate


def spec_of(key: str) -> SpectralSpec:
    """The spec of a key; made where it is not known yet, as in another process than the one that traced the call."""

    def make() -> SpectralSpec:
        name, arguments = json.loads(key)
        plain = {k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()}
        fields: dict[str, Any] = _FAMILIES[name](**plain)
        return SpectralSpec(key=key, **fields)

    return _SPECS.get(key, make)


@constant_in_graphs
def _layout_of(key: str) -> tuple:
    return tuple(spec_of(key).layout)


@constant_in_graphs
def _dtype_of(key: str) -> torch.dtype:
    return spec_of(key).dtype


def dtype_name(dtype: torch.dtype) -> str:
    if dtype not in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        raise ValueError(f"dtype must be torch.float32, float64, float16 or bfloat16, got {dtype}")
    return str(dtype).removeprefix("torch.")


# ---- reference ----------------------------------------------------------------------------------------------------


def _folded(index: Tensor, num_samples: int, repeats_ends: bool) -> Tensor:
    """Indices beyond the ends, mirrored about the first and last sample, or with these repeated."""
    period = max(2 * num_samples - 2 + 2 * repeats_ends, 1)
    inside = index % period
    return torch.where(inside >= num_samples, period - repeats_ends - inside, inside)


def frames_ref(spec: SpectralSpec, waveform: Tensor, num_frames: int) -> Tensor:
    """Frames ``[*batch, num_frames, frame_length]`` of ``[*batch, N]``, scaled, with samples made up at the edges."""
    x = waveform * spec.options.get("scale", 1.0)
    if emphasis := spec.options.get("signal_preemphasis", 0.0):
        x = torch.cat([x[..., :1], x[..., 1:] - emphasis * x[..., :-1]], -1)
    num_samples = x.shape[-1]
    needed = (num_frames - 1) * spec.hop_length + spec.frame_length
    edge = spec.options.get("edge", "none")
    if edge in ("reflect", "mirror"):
        index = torch.arange(spec.offset, spec.offset + needed, device=x.device)
        x = x[..., _folded(index, num_samples, edge == "mirror")]
    else:
        x = torch.nn.functional.pad(x, (-spec.offset, spec.offset + needed - num_samples))
    return x.unfold(-1, spec.frame_length, spec.hop_length)


def spectral_ref(spec: SpectralSpec, waveform: Tensor, num_frames: int) -> Tensor:
    """The definition in plain PyTorch, in the waveform's dtype: ``[*batch, N]`` to ``[*batch, *layout.shape(F)]``."""
    if num_frames == 0:
        return waveform.new_zeros(*waveform.shape[:-1], *spec.layout.shape(0))
    out = spectrum_ref(spec, frames_ref(spec, waveform, num_frames))
    return out.transpose(-1, -2) if spec.bins_first else out


def spectrum_ref(spec: SpectralSpec, frames: Tensor) -> Tensor:
    """Features ``[*batch, num_frames, num_out]`` of frames ``[*batch, num_frames, frame_length]``."""
    with without_autocast(frames):
        return _spectrum_ref(spec, frames)


def _spectrum_ref(spec: SpectralSpec, frames: Tensor) -> Tensor:
    o = spec.options
    dtype = frames.dtype

    def table(name: str, array: np.ndarray) -> Tensor:
        return kept_tables((spec.key, name), lambda: [array], dtype, frames)[0]

    if o.get("remove_dc_offset"):
        frames = frames - frames.mean(-1, keepdim=True)
    raw = frames
    if emphasis := o.get("frame_preemphasis", 0.0):
        frames = frames - emphasis * torch.cat([frames[..., :1], frames[..., :-1]], -1)
    windowed = frames * table("window", spec.window)
    spectrum = torch.fft.rfft(windowed, n=spec.n_fft)
    if o.get("round_spectrum") and dtype == torch.float64:
        spectrum = spectrum.to(torch.complex64).to(torch.complex128)
    power = torch.view_as_real(spectrum).square().sum(-1)
    if "power_add" in o:
        power = power + o["power_add"]
    if "power_floor" in o:
        power = power.clamp(min=o["power_floor"])
    exponent = o.get("exponent", 2.0)
    if exponent == 1:
        # The gradient of |X| at 0 is taken as 0, as torch's abs of complex numbers does.
        power = torch.where(power > 0, power, 1).sqrt() * (power > 0)
    elif exponent != 2:
        power = power.pow(exponent / 2)
    out = power if spec.filters is None else power @ table("filters", spec.filters.T)
    if "add" in o:
        out = out + o["add"]
    if "floor" in o:
        out = out.clamp(min=o["floor"])
    if o.get("log", "none") != "none":
        out = out.log() if o["log"] == "natural" else out.log10()
    out = out * o.get("multiply", 1.0) + o.get("shift", 0.0)
    if spec.dct is not None:
        out = out @ table("dct", spec.dct.T)
    if o.get("energy", "none") != "none":
        energy = (raw if o.get("raw_energy", True) else windowed).square().sum(-1, keepdim=True)
        energy = energy.clamp(min=max(o.get("energy_floor", 0.0), 1.1920928955078125e-07)).log()
        if o["energy"].startswith("replace"):
            out = out[..., 1:] if o["energy"] == "replace_first" else out[..., :-1]
        out = torch.cat([energy, out] if o["energy"].endswith("first") else [out, energy], -1)
    if limit := o.get("dynamic_range", 0.0):
        out = torch.maximum(out, out.amax((-2, -1), keepdim=True) - limit)
    return out


# ---- the op -------------------------------------------------------------------------------------------------------


def raise_if_not_finite(bad: Sequence[int]) -> None:
    if bad:
        raise ValueError(
            f"waveform must be finite and not too large for its squares, got NaN, infinity or an overflow in clip"
            f"{'s' if len(bad) > 1 else ''} {', '.join(map(str, bad[:10]))}{' …' if len(bad) > 10 else ''}"
        )


def offsets_of(sizes: Sequence[int]) -> list[int]:
    offsets = [0]
    for size in sizes:
        offsets.append(offsets[-1] + size)
    return offsets


def _cpu(waveforms: list[Tensor], spec: str, num_samples: list[int], orig_freq: int) -> Tensor:
    parsed = spec_of(spec)
    frames = [parsed.layout.num_frames(n) for n in num_samples]
    sizes = [parsed.num_out * f for f in frames]
    offsets = offsets_of(sizes)
    out = torch.empty(offsets[-1], dtype=parsed.compute_dtype, device="cpu")
    stride = parsed.num_out
    if parsed.bins_first:
        stride = max(frames, default=0)
        if min(frames, default=0) != stride:  # rows of different lengths: a call each
            for i, waveform in enumerate(waveforms):
                part = _cpu([waveform], spec, [num_samples[i]], orig_freq)
                out[offsets[i] : offsets[i + 1]] = part
            return out.to(parsed.dtype)
    format = native_format(waveforms, native_resampler(orig_freq, parsed.sampling_rate))
    start, size = address_of(out, parsed.compute_dtype, offsets[-1]), out.element_size()
    bad = parsed.plan.run(
        format,
        [address_of(w) for w in waveforms],
        [w.shape[-1] for w in waveforms],
        num_samples,
        frames,
        [start + size * offset for offset in offsets[:-1]],
        stride,
        torch.get_num_threads(),
    )
    raise_if_not_finite(bad)
    return out.to(parsed.dtype)


def _cuda(waveforms: list[Tensor], key: str, num_samples: list[int], orig_freq: int) -> Tensor:
    from mmlm_fast.audio import cuda

    return cuda.spectral(spec_of(key), waveforms, num_samples, orig_freq)


def _backward(grad: Tensor, waveforms: list[Tensor], spec: str, num_samples: list[int], orig_freq: int) -> list[Tensor]:
    """Gradients of the waveforms, through the reference run again: nothing but the waveforms is kept for it."""
    parsed = spec_of(spec)
    layout = parsed.layout
    grads, start = [], 0
    for waveform, n in zip(waveforms, num_samples, strict=True):
        shape = layout.shape(layout.num_frames(n))
        part = grad[start : start + math.prod(shape)].view(shape)
        start += math.prod(shape)
        with autograd_within_an_op(), without_autocast(waveform):
            x = waveform.detach().requires_grad_()
            out = _by_reference(parsed, x, n, orig_freq)
            grads.append(torch.autograd.grad(out, x, part)[0] if out.numel() else torch.zeros_like(x))
    return grads


def _fake(waveforms: list[Tensor], spec: str, num_samples: list[int], orig_freq: int) -> Tensor:
    layout = spec_of(spec).layout
    total = sum(layout.num_out * layout.num_frames(n) for n in num_samples)
    return waveforms[0].new_empty((total,), dtype=spec_of(spec).dtype)


_fwd = register_op(
    "spectral_features",
    native=_cpu,
    kernel="mmlm_fast.audio.spectral:_cuda",
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
    parts = [
        _by_reference(spec, w, n, ctx.orig_freq).flatten() for w, n in zip(waveforms, ctx.num_samples, strict=True)
    ]
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


def features_of(key: str, clips: Clips, num_samples: int | None = None) -> Tensor | list[Tensor]:
    """Features of checked clips: ``[*batch, *layout.shape(frames)]``, or a list where a sequence of clips came.

    With `num_samples`, every clip is padded with zeros to that length.
    """
    layout = Layout(*_layout_of(key))
    lengths = [num_resampled(w.shape[-1], clips.orig_freq, layout.sampling_rate) for w in clips.waveforms]
    if num_samples is not None:
        for n in lengths:
            if n > num_samples:
                raise ValueError(f"clips must have at most num_samples={num_samples} samples, got {n}: cut them first")
        lengths = [num_samples] * len(lengths)
    if not lengths and num_samples is not None:
        layout.check_length(num_samples)
    for n in lengths:
        layout.check_length(n)
    if not clips.waveforms:
        if clips.batch is None:
            return []
        empty = layout.num_frames(num_samples if num_samples is not None else clips.num_samples)
        return torch.empty(*clips.batch, *layout.shape(empty), dtype=_dtype_of(key), device=clips.device)
    if using_reference():
        spec = spec_of(key)
        parts = [_by_reference(spec, w, n, clips.orig_freq) for w, n in zip(clips.waveforms, lengths, strict=True)]
        return parts if clips.batch is None else torch.stack(parts).reshape(*clips.batch, *parts[0].shape)
    if torch.is_grad_enabled() and any(w.requires_grad for w in clips.waveforms):
        flat = _SpectralFeatures.apply(key, lengths, clips.orig_freq, *clips.waveforms)
    else:
        flat = _fwd(clips.waveforms, key, lengths, clips.orig_freq)
    shapes = [layout.shape(layout.num_frames(n)) for n in lengths]
    if clips.batch is not None:
        return flat.reshape(*clips.batch, *shapes[0])
    return [part.view(shape) for part, shape in zip(flat.split([math.prod(s) for s in shapes]), shapes, strict=True)]


def _by_reference(spec: SpectralSpec, waveform: Tensor, num_samples: int, orig_freq: int) -> Tensor:
    x = as_float(waveform, spec.compute_dtype)
    if orig_freq and orig_freq != spec.sampling_rate:
        x = resample_ref(x, orig_freq, spec.sampling_rate)
    x = torch.nn.functional.pad(x, (0, num_samples - x.shape[-1]))
    return spectral_ref(spec, x, spec.layout.num_frames(num_samples)).to(spec.dtype)


def run_native(
    plan: "_C.SpectralPlan",
    clips: Sequence[np.ndarray],
    num_samples: list[int],
    num_frames: list[int],
    out: Tensor | np.ndarray,
) -> None:
    """Features of dense 1-D clips of one dtype, each with zeros up to `num_samples`, into `out`.

    `out`: ``[num_clips, rows, columns]``, bins and frames in the plan's order, with room for `num_frames` of each clip.
    """
    dtype = torch.float64 if plan.double_output else torch.float32
    needed = plan.num_out if plan.bins_first else max(num_frames, default=0)
    if out.ndim != 3 or len(out) != len(clips) or out.shape[1] < needed:
        raise ValueError(f"out must be [{len(clips)}, at least {needed}, …], got {tuple(out.shape)}")
    row = out.shape[1] * out.shape[2]
    start, step = address_of(out, dtype, len(clips) * row), row * dtype.itemsize
    bad = plan.run(
        _C.Format(SAMPLE_TYPES[clips[0].dtype], 1, 0, 1, None),
        [address_of(c) for c in clips],
        [len(c) for c in clips],
        num_samples,
        num_frames,
        [start + i * step for i in range(len(clips))],
        out.shape[2],
        torch.get_num_threads(),
    )
    raise_if_not_finite(bad)
