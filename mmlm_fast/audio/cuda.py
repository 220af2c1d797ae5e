"""Spectral features of tensors on a GPU: the native core's fused kernel, or plain PyTorch where it does not apply."""

import json
import re
import warnings
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from mmlm_fast import _C
from mmlm_fast.audio.plain import address_of
from mmlm_fast.audio.resample import resample_ref
from mmlm_fast.audio.spectral import SpectralSpec, offsets_of, spec_of, spectral_ref
from mmlm_fast.audio.tables import kept_tables, kept_within
from mmlm_fast.audio.waveforms import as_float

_OUT_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# What every supported architecture has (sm_120 least); longer transforms run in plain PyTorch.
_MAX_SHARED_BYTES = 96 * 1024
_MIN_N_FFT = 16


def covers(archs: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether code for `archs`, as MMLM_FAST_CUDA_ARCHS names them, runs on a device of this compute capability."""
    for arch in archs:
        number, exact, ptx = re.fullmatch(r"(\d+)([a-z]?)(\+PTX)?", arch).groups()  # type: ignore[union-attr]
        built = divmod(int(number), 10)
        if built == capability or (not exact and built <= capability and (built[0] == capability[0] or ptx)):
            return True
    return False


@cache
def why_plain(index: int) -> str:
    """Why the fused kernel cannot run on a CUDA device that torch can use; empty where it can."""
    status, build = _C.cuda_status(), json.loads(_C.build_info_json())
    if not status["compiled"]:
        return "core built without nvcc"
    if not status["num_devices"]:  # the core has a CUDA runtime of its own, which may need a newer driver than torch's
        return f"{status['message']} (CUDA {build['nvcc']})"
    major, minor = torch.cuda.get_device_capability(index)
    if not covers(build["cuda_archs"], (major, minor)):
        return f"core built for sm_{', sm_'.join(build['cuda_archs'])}, this device is sm_{major}{minor}"
    return ""


@cache
def _has_kernel(index: int) -> bool:
    reason = why_plain(index)
    if reason and _C.cuda_status()["compiled"]:
        warnings.warn(f"mmlm_fast: audio features on cuda:{index} run in plain PyTorch: {reason}", stacklevel=4)
    return not reason


@kept_within(16 * 2**20, lambda plan: plan.num_bytes)
def device_plan(key: str) -> "_C.SpectralPlan":
    return spec_of(key).native_plan(double_precision=False, double_output=False, prime_factor_400=False)


def is_covered(spec: SpectralSpec) -> bool:
    """float64, and transforms that do not fit a block's shared memory, run in plain PyTorch."""
    if spec.dtype == torch.float64 or spec.n_fft < _MIN_N_FFT:
        return False
    return device_plan(spec.key).device_bytes() <= _MAX_SHARED_BYTES


def spectral(spec: SpectralSpec, waveforms: list[Tensor], num_samples: list[int], orig_freq: int) -> Tensor:
    """The flat features of the op, on the waveforms' device and its current stream.

    Nothing waits for the device but the first call of a spec, which copies its tables there: make it before a CUDA
    graph is captured.
    """
    if orig_freq and orig_freq != spec.sampling_rate:
        resampled = [as_float(w, torch.float32) for w in waveforms]
        waveforms = [resample_ref(w, orig_freq, spec.sampling_rate) for w in resampled]
    layout = spec.layout
    frames = [layout.num_frames(n) for n in num_samples]
    first = waveforms[0]
    if not _has_kernel(first.device.index) or not is_covered(spec):
        compute = torch.float64 if spec.dtype == torch.float64 else torch.float32
        parts = []
        for waveform, n, f in zip(waveforms, num_samples, frames, strict=True):
            x = torch.nn.functional.pad(as_float(waveform, compute), (0, n - waveform.shape[-1]))
            parts.append(spectral_ref(spec, x, f).to(spec.dtype).flatten())
        return torch.cat(parts)
    if first.dim() != 1 or first.dtype not in (torch.int16, torch.float32):
        waveforms = [as_float(w, torch.float32) for w in waveforms]
        first = waveforms[0]
    starts = offsets_of([spec.num_out * f for f in frames])
    out = torch.empty(starts[-1], dtype=spec.dtype, device=first.device)
    clip_max = torch.empty(len(waveforms), dtype=torch.int32, device=first.device)
    tables = kept_tables((spec.key, "cuda"), device_plan(spec.key).device_tables, None, first)
    start = address_of(out, spec.dtype, starts[-1], first.device)
    stream = torch.cuda.current_stream(first.device).cuda_stream
    # Clips of one length go in one launch of up to 64; rows of other lengths have another stride, a launch each.
    groups = (
        [range(len(waveforms))] if len(set(frames)) == 1 or not spec.bins_first else [[i] for i in range(len(frames))]
    )
    for group in groups:
        device_plan(spec.key).run_device(
            [address_of(t, t.dtype, device=first.device) for t in tables],
            [address_of(waveforms[i], device=first.device) for i in group],
            [waveforms[i].shape[-1] for i in group],
            [num_samples[i] for i in group],
            [frames[i] for i in group],
            [start + starts[i] * out.element_size() for i in group],
            first.stride(0) if first.shape[0] > 1 else 1,
            first.dtype == torch.int16,
            _OUT_TYPES[spec.dtype],
            frames[group[0]] if spec.bins_first else spec.num_out,
            address_of(clip_max, torch.int32, len(waveforms), first.device),
            stream,
            first.device.index,
            False,
        )
    return out
