"""Features of a signal that arrives in pieces. A frame comes out as soon as its samples are there, with the bits that
the function on the whole signal gives it."""

from threading import Lock
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from mmlm_fast import _C
from mmlm_fast.audio import kaldi
from mmlm_fast.audio.log_mel import DYNAMIC_RANGE, checked_key
from mmlm_fast.audio.plain import address_of, in_plain_torch
from mmlm_fast.audio.spectral import SpectralSpec, spec_of
from mmlm_fast.audio.waveforms import SAMPLE_TYPES


class _Stream:
    """Memory is bounded by about two frames of samples. Pickles and copies with everything it has yet to give.

    A stream serves one signal at a time; calls from several threads on one stream are serialised. Different streams
    run in parallel and share their tables.
    """

    _spec: SpectralSpec
    _stream: "_C.SpectralStream"

    def _start(self, spec: SpectralSpec, settings: dict[str, Any]) -> None:
        if spec.dtype != spec.compute_dtype:
            raise ValueError(f"dtype must be torch.float32 or torch.float64, got {spec.dtype}")
        self._spec, self._settings, self._flushed = spec, settings, False
        self._dtype = spec.dtype
        self._stream = _C.SpectralStream(spec.plan)
        self._lock = Lock()

    @property
    def num_samples(self) -> int:
        """Samples accepted so far."""
        return self._stream.num_received

    @property
    def num_frames(self) -> int:
        """Frames given out so far."""
        return self._stream.next_frame

    @in_plain_torch
    def accept(self, waveform: Tensor | np.ndarray) -> Tensor:
        """Take the next samples, any number of them, and return the frames that are complete.

        Args:
            waveform: ``[N]``, a CPU tensor or an array: float samples in [-1, 1], or int16 or int32 ones, which are
                scaled to [-1, 1).

        Raises:
            ValueError: for other shapes and dtypes, NaN or infinite samples (then nothing is taken), and after `flush`.
        """
        array = waveform.detach().numpy() if isinstance(waveform, Tensor) else waveform
        kind = SAMPLE_TYPES.get(array.dtype) if isinstance(array, np.ndarray) else None
        if kind is None or array.ndim != 1:
            raise ValueError(
                f"samples must be a 1-D tensor or array of int16, int32, float32 or float64, got "
                f"{getattr(waveform, 'dtype', type(waveform).__name__)} of shape {getattr(waveform, 'shape', '?')}"
            )
        if array.shape[0] > 1 and array.strides[0] != array.itemsize:
            array = np.ascontiguousarray(array)
        with self._lock:
            if self._flushed:
                raise ValueError("the stream was flushed: reset() it to start another signal")
            return self._pull(self._stream.push(address_of(array), kind, array.shape[0]))

    __call__ = accept

    @in_plain_torch
    def flush(self) -> Tensor:
        """End the signal and return its last frames, which the edge is made up for as on the whole signal.

        Raises:
            ValueError: where the whole signal would be too short for the function, and when flushed already.
        """
        with self._lock:
            if self._flushed:
                raise ValueError("the stream was flushed already: reset() it to start another signal")
            if self.num_samples > 0:
                self._spec.layout.check_length(self.num_samples)
            self._flushed = True
            total = self._spec.layout.num_frames(self.num_samples) if self.num_samples else 0
            return self._pull(self._stream.finish(total))

    def reset(self) -> None:
        """Forget everything: the next samples start another signal."""
        self._start(self._spec, self._settings)

    def _pull(self, frames: int) -> Tensor:
        out = torch.empty(self._spec.layout.shape(frames), dtype=self._dtype, device="cpu")
        if frames and not self._stream.pull(address_of(out, self._dtype), out.shape[1], frames):
            raise ValueError("samples must not be too large for their squares, got an overflow")
        return out

    def __getstate__(self) -> dict[str, Any]:
        return {"settings": self._settings, "flushed": self._flushed, "state": self._stream.state()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        type(self).__init__(self, **state["settings"])
        self._stream.set_state(*state["state"])
        self._flushed = state["flushed"]

    def __copy__(self) -> Self:
        return self.__deepcopy__({})

    def __deepcopy__(self, memo: dict) -> Self:
        twin = type(self).__new__(type(self))
        twin.__setstate__(self.__getstate__())
        return twin


def _refuse(settings: dict[str, Any], *names: str) -> None:
    for name in names:
        if settings.get(name):
            raise ValueError(f"{name} needs the whole signal, got {name}={settings[name]!r}")


class StreamingFbank(_Stream):
    """`kaldi_fbank` of a signal that arrives in pieces, bit by bit the same.

    Args:
        settings: `kaldi_fbank`'s keywords but `subtract_mean`, `dither`, `channel`, `channel_dim`, `min_duration` and
            `orig_freq`.

    Example::

        stream = StreamingFbank(num_mel_bins=80)
        for chunk in microphone:
            frames = stream.accept(chunk)  # [frames, 80], maybe none
        rest = stream.flush()
    """

    def __init__(self, **settings: Any) -> None:
        _refuse(settings, "subtract_mean", "dither", "num_ceps")
        self._start(spec_of(kaldi.checked_key(**_known(settings, "num_ceps", "cepstral_lifter"))), settings)


class StreamingMfcc(_Stream):
    """`mfcc` (Kaldi's) of a signal that arrives in pieces, bit by bit the same; keywords as in `StreamingFbank`."""

    def __init__(self, *, num_ceps: int = 13, cepstral_lifter: float = 22.0, **settings: Any) -> None:
        _refuse(settings, "subtract_mean", "dither")
        if num_ceps < 1:
            raise ValueError(f"num_ceps must be at least 1, got {num_ceps}")
        key = kaldi.checked_key(num_ceps=num_ceps, cepstral_lifter=cepstral_lifter, **_known(settings, "use_power"))
        self._start(spec_of(key), settings | dict(num_ceps=num_ceps, cepstral_lifter=cepstral_lifter))


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
    """

    def __init__(
        self, *, num_mel_bins: int = 80, log_mel_max: float | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        self._start(
            spec_of(checked_key(num_mel_bins, log_mel_max, dtype)),
            dict(num_mel_bins=num_mel_bins, log_mel_max=log_mel_max, dtype=dtype),
        )

    def _start(self, spec: SpectralSpec, settings: dict[str, Any]) -> None:
        super()._start(spec, settings)
        self._largest: float | None = None if settings["log_mel_max"] is None else np.inf

    def _pull(self, frames: int) -> Tensor:
        out = super()._pull(frames)
        if frames and self._largest != np.inf:
            largest = float(out.max())
            self._largest = largest if self._largest is None else max(self._largest, largest)
            out.clamp_(min=self._largest - DYNAMIC_RANGE / 4)
        return out

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"largest": self._largest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._largest = state["largest"]
