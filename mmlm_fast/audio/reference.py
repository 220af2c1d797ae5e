"""The definition of every family's features in plain PyTorch, differentiable, on any device."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmlm_fast.audio.device_tables import kept_tables
from mmlm_fast.audio.plain import address_of, has_memory, plain_torch, without_autocast
from mmlm_fast.audio.resample_op import resample_ref, resample_tensors
from mmlm_fast.audio.sinc import checked_options
from mmlm_fast.audio.spec import FLT_EPSILON, Cosines, Spec, constant_in_graphs, prepared
from mmlm_fast.audio.standardize import Statistics, standardize_rows
from mmlm_fast.audio.tensors import as_float
from mmlm_fast.audio.waveforms import clips_of
from mmlm_fast.ops.paths import using_reference


def _folded(index: Tensor, num_samples: int, repeats_ends: bool) -> Tensor:
    """Return indices beyond the ends mirrored about the first and last sample, or with these repeated."""
    period = max(2 * num_samples - 2 + 2 * repeats_ends, 1)
    inside = index % period
    return torch.where(inside >= num_samples, period - repeats_ends - inside, inside)


def frames_ref(spec: Spec, waveform: Tensor, num_frames: int) -> Tensor:
    """Cut frames ``[*batch, num_frames, frame_length]`` of ``[*batch, N]``, scaled, samples made up at the edges."""
    x, offset, edge = waveform * spec.scale, spec.framing.offset, spec.framing.edge
    if emphasis := spec.signal_preemphasis:
        x = torch.cat([x[..., :1], x[..., 1:] - emphasis * x[..., :-1]], -1)
    num_samples = x.shape[-1]
    needed = (num_frames - 1) * spec.hop_length + spec.frame_length
    if edge in ("reflect", "mirror"):
        index = torch.arange(offset, offset + needed, device=x.device)
        x = x[..., _folded(index, num_samples, edge == "mirror")]
    else:
        x = torch.nn.functional.pad(x, (-offset, offset + needed - num_samples))
    return x.unfold(-1, spec.frame_length, spec.hop_length)


def spectral_ref(spec: Spec, waveform: Tensor, num_frames: int) -> Tensor:
    """Compute features in plain PyTorch, in the waveform's dtype: ``[*batch, N]`` to ``[*batch, *layout.shape(F)]``."""
    if num_frames == 0:
        return waveform.new_zeros(*waveform.shape[:-1], *prepared(spec).layout.shape(0))
    out = spectrum_ref(spec, frames_ref(spec, waveform, num_frames))
    return out.transpose(-1, -2) if spec.bins_first else out


def spectrum_ref(spec: Spec, frames: Tensor) -> Tensor:
    """Compute features ``[*batch, num_frames, num_out]`` of frames ``[*batch, num_frames, frame_length]``."""
    with without_autocast(frames):
        return _spectrum_ref(spec, frames)


def _spectrum_ref(spec: Spec, frames: Tensor) -> Tensor:
    tables, dtype = prepared(spec), frames.dtype

    def table(name: str, array: np.ndarray) -> Tensor:
        return kept_tables((spec, name), lambda: [array], dtype, frames)[0]

    if spec.remove_dc_offset:
        frames = frames - frames.mean(-1, keepdim=True)
    raw = frames
    if emphasis := spec.frame_preemphasis:
        frames = frames - emphasis * torch.cat([frames[..., :1], frames[..., :-1]], -1)
    windowed = frames * table("window", tables.window)
    spectrum = torch.fft.rfft(windowed, n=spec.n_fft)
    if spec.round_spectrum and dtype == torch.float64:
        spectrum = spectrum.to(torch.complex64).to(torch.complex128)
    power = torch.view_as_real(spectrum).square().sum(-1)
    if spec.power_add:
        power = power + spec.power_add
    if spec.power_floor:
        power = power.clamp(min=spec.power_floor)
    if spec.exponent == 1:
        # The gradient of |X| at 0 is taken as 0, as torch's abs of complex numbers does.
        power = torch.where(power > 0, power, 1).sqrt() * (power > 0)
    elif spec.exponent != 2:
        power = power.pow(spec.exponent / 2)
    out = power if tables.filters is None else power @ table("filters", tables.filters.T)
    if spec.add:
        out = out + spec.add
    if spec.floor:
        out = out.clamp(min=spec.floor)
    if spec.log != "none":
        out = out.log() if spec.log == "natural" else out.log10()
    out = out * spec.multiply + spec.shift
    if tables.dct is not None:
        out = out @ table("dct", tables.dct.T)
    if spec.energy != "none":
        energy = (raw if spec.raw_energy else windowed).square().sum(-1, keepdim=True)
        energy = energy.clamp(min=max(spec.energy_floor, FLT_EPSILON)).log()
        if spec.energy.startswith("replace"):
            out = out[..., 1:] if spec.energy == "replace_first" else out[..., :-1]
        out = torch.cat([energy, out] if spec.energy.endswith("first") else [out, energy], -1)
    if spec.dynamic_range:
        out = torch.maximum(out, out.amax((-2, -1), keepdim=True) - spec.dynamic_range)
    return out


def by_reference(spec: Spec, waveform: Tensor, num_samples: int, orig_freq: int) -> Tensor:
    """Compute one clip's features from samples of any dtype, rate and channels, with zeros up to `num_samples`."""
    x = as_float(waveform, getattr(torch, spec.compute_dtype))
    if orig_freq and orig_freq != spec.sampling_rate:
        x = resample_ref(x, orig_freq, spec.sampling_rate)
    x = torch.nn.functional.pad(x, (0, num_samples - x.shape[-1]))
    num_frames = prepared(spec).layout.num_frames(num_samples)
    return spectral_ref(spec, x, num_frames).to(getattr(torch, spec.dtype))


def dithered(spec: Spec, waveform: Tensor, orig_freq: int, dither: float) -> Tensor:
    """Compute one clip's features with noise drawn per frame, as torchaudio draws it: frames are taken apart first."""
    x = as_float(waveform, getattr(torch, spec.compute_dtype))
    if orig_freq:
        x = resample_tensors(clips_of(x, orig_freq=orig_freq), orig_freq, int(spec.sampling_rate), checked_options())  # type: ignore[assignment]
    layout = prepared(spec).layout
    layout.check_length(x.shape[-1])
    frames = frames_ref(spec, x, layout.num_frames(x.shape[-1]))
    return spectrum_ref(spec, frames + torch.randn_like(frames) * dither).to(getattr(torch, spec.dtype))


@constant_in_graphs
def _rows_of(*arguments: Any) -> tuple[tuple[float, ...], ...]:
    *given, num_mel_bins = arguments
    return tuple(map(tuple, Cosines(*given).table(num_mel_bins).tolist()))


def transformed(cosines: Cosines, mel: Tensor) -> Tensor:
    """Transform ``[*batch, n_mels, frames]`` along its bins, in its own dtype."""
    arguments = (cosines.num_ceps, cosines.norm, cosines.lifter, cosines.computed_in, mel.shape[-2])
    rows = kept_tables(("dct", *arguments), lambda: [np.array(_rows_of(*arguments))], mel.dtype, mel)
    with without_autocast(mel):
        return rows[0] @ mel


def standardized(flat: Tensor, counts: list[int], per: str, how: Statistics) -> Tensor:
    """Standardise features ``[clips, frames, bins]``: in the core where it can, else by the formula."""
    by_formula = torch.compiler.is_compiling() or using_reference() or flat.requires_grad or per == "clip"
    if not by_formula:  # Dynamo cannot trace the look at memory
        by_formula = flat.device.type != "cpu" or flat.dtype not in (torch.float32, torch.float64)
        by_formula = by_formula or not has_memory(flat)
    if by_formula:
        with without_autocast(flat):
            return _standardized_by_formula(flat, counts, per, how)
    with plain_torch():
        out = flat.clone(memory_format=torch.contiguous_format)
    standardize_rows(address_of(out, out.dtype, out.numel()), out.shape, out.dtype == torch.float64, counts, how)
    return out


def _standardized_by_formula(flat: Tensor, counts: list[int], per: str, how: Statistics) -> Tensor:
    rows = []
    for clip, count in zip(flat, counts, strict=True):
        valid = clip[:count]
        over = (0,) if per == "bin" else (0, 1)
        number = count if per == "bin" else count * clip.shape[1]
        mean = valid.sum(over, keepdim=True) / number
        variance = (valid - mean).square().sum(over, keepdim=True) / (number - how.ddof)
        deviation = (variance + how.eps_inside).sqrt() + how.eps_outside
        centred = valid - mean if how.means else valid
        scaled = centred / deviation if how.variances else centred
        rows.append(torch.cat([scaled, torch.full_like(clip[count:], how.padding)]))
    return torch.stack(rows) if rows else flat.clone()
