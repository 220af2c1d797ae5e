"""Spectral features of tensors on a GPU: the native core's fused kernel, or plain PyTorch where it does not apply."""

import json
import re
import warnings
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from mmlm_fast import _C
from mmlm_fast.audio.device_tables import kept_tables
from mmlm_fast.audio.plain import address_of
from mmlm_fast.audio.reference import by_reference
from mmlm_fast.audio.resample_op import resample_ref
from mmlm_fast.audio.spec import Spec, offsets_of, prepared, spec_of
from mmlm_fast.audio.tensors import as_float

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


def is_covered(spec: Spec) -> bool:
    """Return whether the kernel takes a spec: not float64, nor transforms beyond a block's shared memory."""
    if spec.dtype == "float64" or spec.n_fft < _MIN_N_FFT:
        return False
    return prepared(spec).device_plan.device_bytes() <= _MAX_SHARED_BYTES


def spectral_features(waveforms: list[Tensor], spec: str, num_samples: list[int], orig_freq: int) -> Tensor:
    """Compute the flat features of the op, on the waveforms' device and its current stream.

    Nothing waits for the device but the first call of a spec, which copies its tables there: make it before a CUDA
    graph is captured.
    """
    wanted, first = spec_of(spec), waveforms[0]
    made, dtype = prepared(wanted), getattr(torch, wanted.dtype)
    if not _has_kernel(first.device.index) or not is_covered(wanted):
        parts = [by_reference(wanted, w, n, orig_freq) for w, n in zip(waveforms, num_samples, strict=True)]
        return torch.cat([part.flatten() for part in parts])
    if orig_freq and orig_freq != wanted.sampling_rate:
        rates = orig_freq, made.layout.sampling_rate
        waveforms = [resample_ref(as_float(w, torch.float32), *rates) for w in waveforms]
        first = waveforms[0]
    frames = [made.layout.num_frames(n) for n in num_samples]
    if first.dim() != 1 or first.dtype not in (torch.int16, torch.float32):
        waveforms = [as_float(w, torch.float32) for w in waveforms]
        first = waveforms[0]
    starts = offsets_of([made.num_out * f for f in frames])
    out = torch.empty(starts[-1], dtype=dtype, device=first.device)
    clip_max = torch.empty(len(waveforms), dtype=torch.int32, device=first.device)
    tables = kept_tables((wanted, "cuda"), made.device_plan.device_tables, None, first)
    start = address_of(out, dtype, starts[-1], first.device)
    stream = torch.cuda.current_stream(first.device).cuda_stream
    # Clips of one length go in one launch of up to 64; rows of other lengths have another stride, a launch each.
    groups = (
        [range(len(waveforms))] if len(set(frames)) == 1 or not wanted.bins_first else [[i] for i in range(len(frames))]
    )
    for group in groups:
        made.device_plan.run_device(
            [address_of(t, t.dtype, device=first.device) for t in tables],
            [address_of(waveforms[i], device=first.device) for i in group],
            [waveforms[i].shape[-1] for i in group],
            [num_samples[i] for i in group],
            [frames[i] for i in group],
            [start + starts[i] * out.element_size() for i in group],
            first.stride(0) if first.shape[0] > 1 else 1,
            first.dtype == torch.int16,
            _OUT_TYPES[dtype],
            frames[group[0]] if wanted.bins_first else made.num_out,
            address_of(clip_max, torch.int32, len(waveforms), first.device),
            stream,
            first.device.index,
            False,
        )
    return out
