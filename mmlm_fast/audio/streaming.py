"""Features of a signal that arrives in pieces. A frame comes out as soon as its samples are there, with the bits that
the function on the whole signal gives it."""

from threading import Lock
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from mmlm_fast import _C
from mmlm_fast.audio import kaldi
from mmlm_fast.audio.arguments import whole
from mmlm_fast.audio.log_mel import DYNAMIC_RANGE, checked_key
from mmlm_fast.audio.plain import address_of, has_memory, in_plain_torch
from mmlm_fast.audio.resample import ResampledSignal, checked_options, checked_rates
from mmlm_fast.audio.spectral import SpectralSpec, spec_of
from mmlm_fast.audio.waveforms import SAMPLE_TYPES, tensor_of


class _Signal:
    """What all streams share: one signal at a time, calls from several threads on one stream serialised."""

    _settings: dict[str, Any]
    _flushed: bool
    _lock: Any

    def accept(self, waveform: Tensor | np.ndarray) -> Tensor:
        """Take the next samples, any number of them, and return what is complete with them.

        Args:
            waveform: ``[N]``, a CPU tensor or an array: float samples in [-1, 1], or int16 or int32 ones, which are
                scaled to [-1, 1).

        Raises:
            ValueError: for other shapes and dtypes, samples that are NaN, infinite or so large that a frame might
                overflow, tensors that need a gradient, which a stream does not give, and after `flush`. Then nothing
                is taken: the next samples follow those before.
        """
        if isinstance(waveform, Tensor):
            _refuse_derivatives(waveform)
        return self._accept(waveform)

    __call__ = accept

    @in_plain_torch
    def _accept(self, waveform: Tensor | np.ndarray) -> Tensor:
        array = _samples_of(waveform)
        with self._lock:
            if self._flushed:
                raise ValueError("the stream was flushed: reset() it to start another signal")
            return self._push(array)

    @in_plain_torch
    def flush(self) -> Tensor:
        """End the signal and return what is left, the edge made up as on the whole signal.

        Raises:
            ValueError: where the whole signal would be too short for the function, and when flushed already.
        """
        with self._lock:
            if self._flushed:
                raise ValueError("the stream was flushed already: reset() it to start another signal")
            self._check_end()
            self._flushed = True
            return self._finish()

    def _push(self, samples: np.ndarray) -> Tensor:
        raise NotImplementedError

    def _check_end(self) -> None:
        raise NotImplementedError

    def _finish(self) -> Tensor:
        raise NotImplementedError

    def _state(self) -> dict[str, Any]:
        raise NotImplementedError

    def _set_state(self, state: dict[str, Any]) -> None:
        raise NotImplementedError

    def reset(self) -> None:
        """Forget everything: the next samples start another signal."""
        type(self).__init__(self, **self._settings)

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            return {"settings": self._settings, "flushed": self._flushed} | self._state()

    def __setstate__(self, state: dict[str, Any]) -> None:
        type(self).__init__(self, **state["settings"])
        self._set_state(state)
        self._flushed = state["flushed"]

    def __copy__(self) -> Self:
        return self.__deepcopy__({})

    def __deepcopy__(self, memo: dict) -> Self:
        twin = type(self).__new__(type(self))
        twin.__setstate__(self.__getstate__())
        return twin


def _refuse_derivatives(waveform: Tensor) -> None:
    if not has_memory(waveform):
        raise ValueError(
            f"a stream takes samples, got a {type(waveform).__name__} within a transform or a mode that hides them"
        )
    has_tangent = forward_ad._current_level >= 0 and forward_ad.unpack_dual(waveform).tangent is not None
    if has_tangent or (waveform.requires_grad and torch.is_grad_enabled()):
        raise ValueError("a stream gives no derivatives: pass waveform.detach()")


def _samples_of(waveform: Any) -> np.ndarray:
    """Dense 1-D samples that the core reads, or ValueError."""
    if isinstance(waveform, Tensor) and waveform.dtype in (torch.float16, torch.bfloat16):
        waveform = waveform.float()
    array: Any = waveform
    is_here = not isinstance(waveform, Tensor) or waveform.device.type == "cpu"
    if isinstance(waveform, (Tensor, np.ndarray)) and waveform.ndim == 1 and is_here:
        array = tensor_of(waveform, "samples").detach().numpy()
        if array.dtype == np.float16:
            array = array.astype(np.float32)
    if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype not in SAMPLE_TYPES:
        raise ValueError(
            f"samples must be a 1-D tensor or array of int16, int32, float32 or float64, got "
            f"{getattr(waveform, 'dtype', type(waveform).__name__)} of shape {getattr(waveform, 'shape', '?')}"
        )
    return np.ascontiguousarray(array)


class _Stream(_Signal):
    """Features of a signal. Pickles and copies with everything it has yet to give.

    Memory is bounded by about two frames of samples, and two filters' lengths with `orig_freq`. Different streams run
    in parallel and share their tables.
    """

    _spec: SpectralSpec
    _stream: "_C.SpectralStream"

    def _start(self, spec: SpectralSpec, settings: dict[str, Any], orig_freq: Any) -> None:
        if spec.dtype != spec.compute_dtype:
            raise ValueError(f"dtype must be torch.float32 or torch.float64, got {spec.dtype}")
        self._spec, self._settings, self._flushed = spec, settings | dict(orig_freq=orig_freq), False
        self._dtype = spec.dtype
        self._stream = _C.SpectralStream(spec.plan)
        self._lock = Lock()
        self._resampled: ResampledSignal | None = None
        if orig_freq is not None:
            rates = checked_rates(orig_freq, spec.sampling_rate)
            # In the core's own precision, as on the whole signal. Sums of six zero crossings grow by 2.5 at most.
            largest = spec.plan.largest_sample / 4
            self._resampled = ResampledSignal((*rates, *checked_options()), spec.plan.double_precision, largest)

    @property
    def num_samples(self) -> int:
        """Samples accepted so far, at the rate that they came in."""
        return self._stream.num_received if self._resampled is None else self._resampled.num_received

    @property
    def num_frames(self) -> int:
        """Frames given out so far."""
        return self._stream.next_frame

    def _push(self, samples: np.ndarray) -> Tensor:
        if self._resampled is not None:
            samples = self._resampled.push(samples).numpy()
        return self._pull(self._take(samples))

    def _take(self, samples: np.ndarray) -> int:
        return self._stream.push(address_of(samples), SAMPLE_TYPES[samples.dtype], len(samples))

    def _check_end(self) -> None:
        if self.num_samples > 0:
            total = self._stream.num_received if self._resampled is None else self._resampled.num_total
            self._spec.layout.check_length(total)

    def _finish(self) -> Tensor:
        if self._resampled is not None:
            self._take(self._resampled.finish().numpy())
        total = self._spec.layout.num_frames(self._stream.num_received) if self.num_samples else 0
        return self._pull(self._stream.finish(total))

    def _pull(self, frames: int) -> Tensor:
        out = torch.empty(self._spec.layout.shape(frames), dtype=self._dtype, device="cpu")
        if frames:
            finite = self._stream.pull(address_of(out, self._dtype), out.shape[1], frames)
            assert finite, "samples that could overflow were taken"
        return out

    def _state(self) -> dict[str, Any]:
        resampled = None if self._resampled is None else self._resampled.state()
        return {"state": self._stream.state(), "resampled": resampled}

    def _set_state(self, state: dict[str, Any]) -> None:
        self._stream.set_state(*state["state"])
        if self._resampled is not None:
            self._resampled.set_state(*state["resampled"])


class StreamingResample(_Signal):
    """`resample` of a signal that arrives in pieces, bit by bit the same: ``[samples]`` a piece.

    Memory is bounded by two lengths of the filter. Pickles and copies.

    Args:
        orig_freq: Rate of the samples in whole hertz.
        new_freq: Rate wanted.
        lowpass_filter_width: As in `resample`; so are `rolloff`, `resampling_method` and `beta`.
        dtype: float32, or float64, which `resample` has for float64 samples.

    Example::

        stream = StreamingResample(44100, 16000)
        pieces = [stream.accept(chunk) for chunk in chunks] + [stream.flush()]  # torch.cat(pieces): resample's samples
    """

    def __init__(
        self,
        orig_freq: int,
        new_freq: int,
        lowpass_filter_width: int = 6,
        rolloff: float = 0.99,
        resampling_method: str = "sinc_interp_hann",
        beta: float | None = None,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        rates = checked_rates(orig_freq, new_freq)
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
        options = checked_options(lowpass_filter_width, rolloff, resampling_method, beta)
        self._resampled = ResampledSignal((*rates, *options), dtype == torch.float64)
        self._settings = dict(
            orig_freq=rates[0],
            new_freq=rates[1],
            lowpass_filter_width=options[0],
            rolloff=rolloff,
            resampling_method=resampling_method,
            beta=beta,
            dtype=dtype,
        )
        self._flushed, self._lock = False, Lock()

    @property
    def num_samples(self) -> int:
        """Samples accepted so far."""
        return self._resampled.num_received

    @property
    def num_resampled(self) -> int:
        """Samples given out so far."""
        return self._resampled.num_given

    def _push(self, samples: np.ndarray) -> Tensor:
        return self._resampled.push(samples)

    def _check_end(self) -> None:
        pass

    def _finish(self) -> Tensor:
        return self._resampled.finish()

    def _state(self) -> dict[str, Any]:
        return {"state": self._resampled.state()}

    def _set_state(self, state: dict[str, Any]) -> None:
        self._resampled.set_state(*state["state"])


def _refuse(settings: dict[str, Any], *names: str) -> None:
    for name in names:
        if settings.get(name):
            raise ValueError(f"{name} needs the whole signal, got {name}={settings[name]!r}")


class StreamingFbank(_Stream):
    """`kaldi_fbank` of a signal that arrives in pieces, bit by bit the same.

    Args:
        orig_freq: Rate of the samples where it is not `sample_frequency`: they are resampled on the way.
        settings: `kaldi_fbank`'s other keywords but `subtract_mean`, `dither`, `channel`, `channel_dim` and
            `min_duration`.

    Example::

        stream = StreamingFbank(num_mel_bins=80)
        for chunk in microphone:
            frames = stream.accept(chunk)  # [frames, 80], maybe none
        rest = stream.flush()
    """

    def __init__(self, *, orig_freq: int | None = None, **settings: Any) -> None:
        _refuse(settings, "subtract_mean", "dither", "num_ceps")
        self._start(spec_of(kaldi.checked_key(**_known(settings, "num_ceps", "cepstral_lifter"))), settings, orig_freq)


class StreamingMfcc(_Stream):
    """`mfcc` (Kaldi's) of a signal that arrives in pieces, bit by bit the same; keywords as in `StreamingFbank`."""

    def __init__(
        self, *, num_ceps: int = 13, cepstral_lifter: float = 22.0, orig_freq: int | None = None, **settings: Any
    ) -> None:
        _refuse(settings, "subtract_mean", "dither")
        num_ceps = whole("num_ceps", num_ceps)
        key = kaldi.checked_key(num_ceps=num_ceps, cepstral_lifter=cepstral_lifter, **_known(settings, "use_power"))
        self._start(spec_of(key), settings | dict(num_ceps=num_ceps, cepstral_lifter=cepstral_lifter), orig_freq)


def _known(settings: dict[str, Any], *not_here: str) -> dict[str, Any]:
    known = set(kaldi.checked_key.__kwdefaults__ or ()) - set(not_here)
    unknown = sorted(set(settings) - known - {"subtract_mean", "dither"})
    if unknown:
        raise ValueError(f"settings must be among {', '.join(sorted(known))}, got {', '.join(unknown)}")
    return {name: value for name, value in settings.items() if name in known}


class StreamingLogMel(_Stream):
    """`log_mel` of a signal that arrives in pieces: ``[num_mel_bins, frames]`` a piece.

    Whisper clips at 8 below the loudest value of the whole clip, which a stream cannot know. With `log_mel_max` it
    clips below that constant, and the frames have the bits of ``log_mel(…, log_mel_max=…)``. Without, it clips below
    the loudest value so far: frames before the loudest one may lie lower than on the whole clip.

    Args:
        num_mel_bins: As in `log_mel`.
        log_mel_max: In log10 mel; 1.5 is Voxtral Realtime's.
        dtype: float32 or float64.
        orig_freq: Rate of the samples where it is not 16 kHz: they are resampled on the way.
    """

    def __init__(
        self,
        *,
        num_mel_bins: int = 80,
        log_mel_max: float | None = None,
        dtype: torch.dtype = torch.float32,
        orig_freq: int | None = None,
    ) -> None:
        settings = dict(num_mel_bins=num_mel_bins, log_mel_max=log_mel_max, dtype=dtype)
        self._start(spec_of(checked_key(num_mel_bins, log_mel_max, dtype)), settings, orig_freq)
        self._largest: float | None = None if log_mel_max is None else np.inf

    def _pull(self, frames: int) -> Tensor:
        out = super()._pull(frames)
        if frames and self._largest != np.inf:
            largest = float(out.max())
            self._largest = largest if self._largest is None else max(self._largest, largest)
            out.clamp_(min=self._largest - DYNAMIC_RANGE / 4)
        return out

    def _state(self) -> dict[str, Any]:
        return super()._state() | {"largest": self._largest}

    def _set_state(self, state: dict[str, Any]) -> None:
        super()._set_state(state)
        self._largest = state["largest"]
