"""Polyphase resampling with a windowed sinc: torchaudio's definition, in the native core."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmlm_fast import _C
from mmlm_fast.audio.arguments import whole
from mmlm_fast.audio.plain import address_of, autograd_within_an_op, without_autocast
from mmlm_fast.audio.tables import kept_tables, kept_within
from mmlm_fast.audio.waveforms import SAMPLE_TYPES, Clips, Waveform, as_float, clips_of, native_format
from mmlm_fast.ops.parts import Op, differentiable, register_op
from mmlm_fast.ops.paths import using_reference

OP = Op("resample", native=(torch.float32, torch.float64, torch.int16), kernel=(), functions=("audio.resample",))
_METHODS = ("sinc_interp_hann", "sinc_interp_kaiser")
_KAISER_BETA = 14.769656459379492
MAX_RATE = 2**31 - 1
# Beyond these a table of all phases is larger than what most clips need of it: the taps are made with every output,
# which costs five times as much. All rates that audio comes in are below.
_MAX_TAPS, _MAX_OLD_RATE = 2**18, 2048
_MAX_DENSE = 2**20  # numbers of the reference's convolution
_BLOCK = 2**18  # products at a time in the reference without a table


class _Filter(NamedTuple):
    """A windowed sinc between coprime rates: its value at ``t = base * (k / old - p / new)``, for ``|t| < width``."""

    old: int
    new: int
    width: int = 6
    rolloff: float = 0.99
    method: str = _METHODS[0]
    beta: float = 0.0

    @property
    def base(self) -> float:
        return min(self.old, self.new) * self.rolloff

    @property
    def before(self) -> int:
        """Samples that an output needs on each side of it."""
        return math.ceil(self.width * self.old / self.base)

    @property
    def has_table(self) -> bool:
        return self.old <= _MAX_OLD_RATE and self.new * (2 * self.before + 3) <= _MAX_TAPS


def _filter(orig_freq: int, new_freq: int, *options: Any) -> _Filter:
    common = math.gcd(orig_freq, new_freq)
    return _Filter(orig_freq // common, new_freq // common, *options)


def _table(f: _Filter) -> tuple[np.ndarray, np.ndarray]:
    """Taps ``[new, num_taps]`` in float64 and the first sample of each phase ``[new]``.

    Output ``new * j + p`` is the sum of ``taps[p, k] * x[old * j + first[p] + k]``.

    Source: torchaudio ``functional._get_sinc_resample_kernel``; Smith, Digital Audio Resampling (2002).
    """
    count = 2 * f.before + 3
    first = np.arange(f.new) * f.old // f.new - f.before - 1
    taps = np.empty((f.new, count))
    step = max(1, 2**14 // count)
    for p in range(0, f.new, step):  # in blocks: temporaries of a few hundred KiB
        k = first[p : p + step, None] + np.arange(count)
        t = np.clip((k / f.old - np.arange(p, min(p + step, f.new))[:, None] / f.new) * f.base, -f.width, f.width)
        if f.method == _METHODS[0]:
            window = np.cos(t * np.pi / f.width / 2) ** 2
        else:
            window = np.i0(f.beta * np.sqrt(1 - (t / f.width) ** 2)) / np.i0(f.beta)
        block = np.sinc(t) * window * (f.base / f.old)
        block[np.abs(t) >= f.width] = 0.0  # the sinc's zero, but for rounding
        taps[p : p + step] = block
    return taps, first


def num_resampled(num_samples: int, orig_freq: int, new_freq: int) -> int:
    """Samples after resampling; an `orig_freq` of 0 means the rate is `new_freq` already."""
    if not orig_freq or orig_freq == new_freq:
        return num_samples
    common = math.gcd(orig_freq, new_freq)
    return -(-num_samples * (new_freq // common) // (orig_freq // common))


def native_resampler(
    orig_freq: int, new_freq: int, width: int = 6, rolloff: float = 0.99, method: str = _METHODS[0], beta: float = 0.0
) -> "_C.Resampler | None":
    if not orig_freq or orig_freq == new_freq:
        return None
    return _native(_filter(orig_freq, new_freq, width, rolloff, method, beta))


# Taps in float32 and float64, with what phases have beside them.
@kept_within(16 * 2**20, lambda resampler: resampler.num_bytes)
def _native(f: _Filter) -> "_C.Resampler":
    if f.has_table:
        return _C.Resampler(f.old, f.new, *_table(f))
    return _C.Resampler(f.old, f.new, f.width, f.rolloff, -1.0 if f.method == _METHODS[0] else f.beta)


def resample_ref(
    waveform: Tensor,
    orig_freq: int,
    new_freq: int,
    width: int = 6,
    rolloff: float = 0.99,
    method: str = _METHODS[0],
    beta: float = 0.0,
) -> Tensor:
    """The definition, in plain PyTorch and in the waveform's dtype: ``[*batch, N]`` to ``[*batch, M]``."""
    if orig_freq == new_freq:
        return waveform
    f = _filter(orig_freq, new_freq, width, rolloff, method, beta)
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


def _is_dense(f: _Filter) -> bool:
    # A compiler traces no table of numpy's: it gets the formula without one.
    return f.has_table and f.new * (2 * f.before + f.old) <= _MAX_DENSE and not torch.compiler.is_compiling()


def _dense(f: _Filter) -> np.ndarray:
    """The taps ``[new, 2 * before + old]``, those of sample ``old * j + k - before`` in column k."""
    taps, first = _table(f)
    dense = np.zeros((f.new, 2 * f.before + f.old + 2))
    columns = first[:, None] + f.before + 1 + np.arange(taps.shape[1])
    inside = columns < dense.shape[1]
    dense[np.nonzero(inside)[0], columns[inside]] = taps[inside]
    return dense[:, 1:-1]


def _blocks(f: _Filter, waveform: Tensor, wanted: int) -> Iterator[tuple[slice, Tensor]]:
    """The outputs, a block at a time, with taps made for each: as many as there are outputs, however many phases."""
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


def _taps_at(f: _Filter, distance: Tensor) -> Tensor:
    """Sinc and window in float64, `distance` in units of ``1 / (old * new)``."""
    t = (distance.double() * (f.base / (f.old * f.new))).clamp(-f.width, f.width)
    if f.method == _METHODS[0]:
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
    starts, size = [address_of(out, dtype, sum(lengths))], out.element_size()
    for n in lengths[:-1]:
        starts.append(starts[-1] + n * size)
    format = native_format(waveforms, native_resampler(orig_freq, new_freq, width, rolloff, method, beta))
    _C.read_samples(
        format,
        [address_of(w) for w in waveforms],
        [w.shape[-1] for w in waveforms],
        starts,
        dtype == torch.float64,
        torch.get_num_threads(),
    )
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
    """Gradients of the waveforms, through the reference run again, a block at a time where it has no table."""
    f, dtype = _filter(orig_freq, new_freq, width, rolloff, method, beta), _dtype_of(waveforms)
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
    kernel="mmlm_fast.audio.resample:_cuda",
    fake=lambda waveforms, orig_freq, new_freq, width, rolloff, method, beta: waveforms[0].new_empty(
        (sum(num_resampled(w.shape[-1], orig_freq, new_freq) for w in waveforms),), dtype=_dtype_of(waveforms)
    ),
)
_bwd = register_op(
    "resample_bwd",
    portable=_backward,
    kernel="mmlm_fast.audio.resample:_backward",
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


def checked_rates(orig_freq: Any, new_freq: Any) -> tuple[int, int]:
    what = "a positive whole number of hertz"
    return whole("orig_freq", orig_freq, 1, MAX_RATE, what), whole("new_freq", new_freq, 1, MAX_RATE, what)


def checked_options(
    width: Any = 6, rolloff: float = 0.99, method: str = _METHODS[0], beta: float | None = None
) -> tuple[int, float, str, float]:
    if method not in _METHODS:
        raise ValueError(f"resampling_method must be among {', '.join(_METHODS)}, got {method!r}")
    width, rolloff = whole("lowpass_filter_width", width, 1, 2**16), float(rolloff).__float__()
    if not 0 < rolloff <= 1:
        raise ValueError(f"rolloff must be in (0, 1], got {rolloff}")
    if method == _METHODS[0]:
        return width, rolloff, method, 0.0
    beta = _KAISER_BETA if beta is None else float(beta).__float__()
    if not 0 <= beta <= 700:
        raise ValueError(f"beta must be from 0 to 700, got {beta}")
    return width, rolloff, method, beta


def resample(
    waveform: Waveform,
    orig_freq: int,
    new_freq: int,
    lowpass_filter_width: int = 6,
    rolloff: float = 0.99,
    resampling_method: str = "sinc_interp_hann",
    beta: float | None = None,
    *,
    channel_dim: int | None = None,
) -> Tensor | list[Tensor]:
    """Resample by a windowed sinc, with conversion to float and mixing down in the same pass.

    Any two rates do: where they have so little in common that a table of the filters would be large (none that audio
    comes in), the taps are made with each output, in no more memory than the clip's.

    Args:
        waveform: ``[*batch, N]``, or a sequence of 1-D tensors; arrays likewise. float16, bfloat16, float32 and float64
            samples, or int16 and int32 ones, which are scaled to [-1, 1).
        orig_freq: Rate of the samples in whole hertz.
        new_freq: Rate wanted, in whole hertz.
        lowpass_filter_width: Zero crossings of the sinc on each side; more is sharper and dearer.
        rolloff: Cut-off as a fraction of the lower Nyquist frequency, in (0, 1].
        resampling_method: "sinc_interp_hann" or "sinc_interp_kaiser".
        beta: Shape of the Kaiser window; default 14.77.
        channel_dim: Dimension that holds channels, which are averaged; by default there is none.

    Returns:
        ``[*batch, ceil(N * new_freq / orig_freq)]`` in float32 (float64 for float64 samples), sums accumulated in that
        dtype; a list where a sequence came. With equal rates only conversion and mixing are done. Differentiable.

    Raises:
        ValueError: for rates that are not positive whole numbers, or options out of range.

    Source: torchaudio ``functional.resample``, whose filters these are, made in float64.
    """
    old, new = checked_rates(orig_freq, new_freq)
    options = checked_options(lowpass_filter_width, rolloff, resampling_method, beta)
    return _resampled(clips_of(waveform, channel_dim=channel_dim, orig_freq=old), old, new, options)


def _resampled(clips: Clips, orig_freq: int, new_freq: int, options: tuple) -> Tensor | list[Tensor]:
    if not clips.waveforms:
        if clips.batch is None:
            return []
        shape = (*clips.batch, num_resampled(clips.num_samples, orig_freq, new_freq))
        return torch.empty(shape, dtype=clips.dtype, device=clips.device)
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


class ResampledSignal:
    """What `resample` makes of one signal that arrives in pieces, bit by bit; keeps two filters' lengths of samples.

    Args:
        arguments: Rates and options, checked.
        is_double: In float64.
        largest: Largest sample that is taken.
    """

    def __init__(self, arguments: tuple, is_double: bool, largest: float = math.inf) -> None:
        self._arguments, self._largest = arguments, largest
        self._filter = _filter(*arguments)
        self._resampler = native_resampler(*arguments)
        self._dtype = torch.float64 if is_double else torch.float32
        kind = np.dtype(np.float64 if is_double else np.float32)
        self._format = _C.Format(SAMPLE_TYPES[kind], 1, 0, 1, self._resampler)
        self.num_received = self.num_given = self._first = 0
        self._kept = np.empty(0, kind)

    def push(self, samples: np.ndarray) -> Tensor:
        """The outputs that are complete with these samples, 1-D and dense. Takes nothing where it raises."""
        chunk = np.empty(len(samples), self._kept.dtype)
        format = _C.Format(SAMPLE_TYPES[samples.dtype], 1, 0, 1, None)
        is_double = self._dtype == torch.float64
        _C.read_samples(format, [address_of(samples)], [len(samples)], [address_of(chunk)], is_double, 1)
        raise_if_bad(chunk, self._largest)
        self._kept = np.concatenate([self._kept, chunk])
        self.num_received += len(chunk)
        f, complete = self._filter, self.num_received
        if self._resampler is not None:  # output i needs the samples up to floor(i * old / new) + before + 1
            complete = max(0, -(-(complete - f.before - 1) * f.new // f.old))
        return self._pull(complete)

    def finish(self) -> Tensor:
        """The outputs that are left, with zeros behind the end."""
        return self._pull(self.num_total)

    @property
    def num_total(self) -> int:
        """Outputs of the signal if it ends here."""
        return num_resampled(self.num_received, *self._arguments[:2])

    def _pull(self, complete: int) -> Tensor:
        count, f = max(0, complete - self.num_given), self._filter
        out = torch.empty(count, dtype=self._dtype, device="cpu")
        place = self._first, len(self._kept), self.num_given, count
        is_double = self._dtype == torch.float64
        if count:
            threads = torch.get_num_threads()
            _C.read_range(self._format, address_of(self._kept), *place, address_of(out), is_double, threads)
        self.num_given += count
        before = 0 if self._resampler is None else f.before
        first = min(max(0, self.num_given * f.old // f.new - before), self.num_received)
        self._kept, self._first = self._kept[first - self._first :].copy(), first
        return out

    def state(self) -> tuple[int, int, int, np.ndarray]:
        return self.num_received, self.num_given, self._first, self._kept.copy()

    def set_state(self, received: int, given: int, first: int, kept: np.ndarray) -> None:
        if not 0 <= first <= received or first + len(kept) != received:
            raise ValueError("not the state of a stream")
        self.num_received, self.num_given, self._first, self._kept = received, given, first, kept.copy()


def raise_if_bad(samples: np.ndarray, largest: float) -> None:
    """Refuse samples that are not finite, or beyond `largest`."""
    with np.errstate(over="ignore", invalid="ignore"):
        most = float(np.abs(samples).max(initial=0.0))
    if not math.isfinite(most):
        raise ValueError("samples must be finite, got NaN or infinity")
    if most > largest:
        raise ValueError("samples must not be too large for their squares, got an overflow")
