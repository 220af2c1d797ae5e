"""Features of a signal that arrives in pieces. A frame comes out as soon as its samples are there, with the bits that
the function on the whole signal gives it."""

import sys
from threading import Lock
from typing import Any, Self

import numpy as np

from mmlm_fast import _C
from mmlm_fast.audio.arguments import float_name, whole
from mmlm_fast.audio.kaldi import SETTINGS, kaldi_spec
from mmlm_fast.audio.log_mel import DYNAMIC_RANGE, log_mel_spec
from mmlm_fast.audio.sinc import ResampledSignal, checked_options, checked_rates, mono_of
from mmlm_fast.audio.spec import Spec, prepared
from mmlm_fast.audio.waveforms import ARRAYS, SAMPLE_TYPES, Samples


class _Signal:
    """What all streams share: one signal at a time, calls from several threads on one stream serialised."""

    _settings: dict[str, Any]

    def _begin(self, settings: dict[str, Any], channel_dim: int | None) -> None:
        self._channel_dim = None if channel_dim is None else whole("channel_dim", channel_dim, -2, 1)
        self._settings = settings | dict(channel_dim=self._channel_dim)
        self._num_channels = 0  # none came yet
        self._gives_arrays: bool | None = None  # what came last
        self._flushed = False
        self._lock = Lock()

    def accept(self, waveform: Samples) -> Samples:
        """Take the next samples, any number of them, and return what is complete with them.

        Args:
            waveform: ``[N]``, or with `channel_dim` two dimensions, of which that one holds channels, to be averaged: a
                CPU tensor or an array of float samples in [-1, 1], or of int16 or int32 ones, which are scaled to
                [-1, 1).

        Returns:
            A tensor for a tensor, an array for an array.

        Raises:
            ValueError: for other shapes and dtypes, another number of channels than before, samples that are NaN,
                infinite or so large that a frame might overflow, tensors that need a gradient, which a stream does not
                give, and after `flush`. Then nothing is taken: the next samples follow those before.
        """
        samples, is_array = self._samples_of(waveform)
        with self._lock:
            if self._flushed:
                raise ValueError("the stream was flushed: reset() it to start another signal")
            num_channels = samples.shape[0] if samples.ndim == 2 else 1
            if self._num_channels not in (0, num_channels):
                raise ValueError(f"the signal has {self._num_channels} channels, got samples of {num_channels}")
            out = self._push(samples)
            self._num_channels, self._gives_arrays = num_channels, is_array
        return out if is_array else _as_tensor(out)  # type: ignore[return-value]

    __call__ = accept

    def flush(self) -> Any:
        """End the signal and return the remaining frames, padded at the end exactly as the offline function pads.

        Returns:
            What `accept` last returned: a tensor or an array. Where nothing came, a tensor if torch is loaded.

        Raises:
            ValueError: where the whole signal would be too short for the function, and when flushed already.
        """
        with self._lock:
            if self._flushed:
                raise ValueError("the stream was flushed already: reset() it to start another signal")
            self._check_end()
            self._flushed = True
            out = self._finish()
        is_array = "torch" not in sys.modules if self._gives_arrays is None else self._gives_arrays
        return out if is_array else _as_tensor(out)

    def _samples_of(self, waveform: Any) -> tuple[np.ndarray, bool]:
        """Return samples that the core reads, ``[N]`` or ``[channels, N]``, and whether they came as an array."""
        array, is_array = waveform, isinstance(waveform, np.ndarray)
        if hasattr(waveform, "untyped_storage"):
            from mmlm_fast.audio.plain import samples_in_memory

            array = samples_in_memory(waveform)
        ndim = 1 if self._channel_dim is None else 2
        if isinstance(array, np.ndarray) and array.ndim == ndim:
            array = ARRAYS.admit(array, "samples")
            if array.dtype == np.float16:
                array = array.astype(np.float32)
        if not isinstance(array, np.ndarray) or array.ndim != ndim or array.dtype not in SAMPLE_TYPES:
            wanted = "1-D" if ndim == 1 else f"2-D (channel_dim={self._channel_dim})"
            raise ValueError(
                f"samples must be a {wanted} tensor or array of int16, int32, float32 or float64, got "
                f"{getattr(waveform, 'dtype', type(waveform).__name__)} of shape {getattr(waveform, 'shape', '?')}"
            )
        if ndim == 2:
            array = np.moveaxis(array, self._channel_dim, 0)  # type: ignore[arg-type]
            if not len(array):
                raise ValueError(f"a signal needs at least one channel, got shape {tuple(waveform.shape)}")
            return array if len(array) > 1 else np.ascontiguousarray(array[0]), is_array
        return np.ascontiguousarray(array), is_array

    def _push(self, samples: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def _check_end(self) -> None:
        raise NotImplementedError

    def _finish(self) -> np.ndarray:
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
            shared = (self._flushed, self._num_channels, self._gives_arrays)
            return {"settings": self._settings, "shared": shared} | self._state()

    def __setstate__(self, state: dict[str, Any]) -> None:
        type(self).__init__(self, **state["settings"])
        self._set_state(state)
        self._flushed, self._num_channels, self._gives_arrays = state["shared"]

    def __copy__(self) -> Self:
        return self.__deepcopy__({})

    def __deepcopy__(self, memo: dict) -> Self:
        twin = type(self).__new__(type(self))
        twin.__setstate__(self.__getstate__())
        return twin


def _as_tensor(array: np.ndarray) -> Any:
    from mmlm_fast.audio.plain import as_plain_tensor

    return as_plain_tensor(array)


class _Stream(_Signal):
    """Compute features of a signal. Pickles and copies with everything it has yet to give.

    Memory is bounded by about two frames of samples, and two filters' lengths with `orig_freq`. Different streams run
    in parallel and share their tables.
    """

    _spec: Spec
    _stream: "_C.SpectralStream"

    def _start(self, spec: Spec, settings: dict[str, Any], orig_freq: Any, channel_dim: Any) -> None:
        if spec.dtype != spec.compute_dtype:
            raise ValueError(f"dtype must be torch.float32 or torch.float64, got {spec.dtype}")
        self._begin(settings | dict(orig_freq=orig_freq), channel_dim)
        self._spec, made = spec, prepared(spec)
        self._layout = made.layout
        self._stream = _C.SpectralStream(made.plan)
        self._resampled: ResampledSignal | None = None
        if orig_freq is not None:
            rates = checked_rates(orig_freq, made.layout.sampling_rate)
            # In the core's own precision, as on the whole signal. Sums of six zero crossings grow by 2.5 at most.
            largest = made.plan.largest_sample / 4
            self._resampled = ResampledSignal((*rates, *checked_options()), spec.is_exact, largest)

    @property
    def num_samples(self) -> int:
        """Samples accepted so far, at the rate that they came in."""
        return self._stream.num_received if self._resampled is None else self._resampled.num_received

    @property
    def num_frames(self) -> int:
        """Frames given out so far."""
        return self._stream.next_frame

    def _push(self, samples: np.ndarray) -> np.ndarray:
        if self._resampled is not None:
            samples = self._resampled.push(samples)
        elif samples.ndim == 2:
            samples = mono_of(samples, self._spec.is_exact)
        return self._pull(self._take(samples))

    def _take(self, samples: np.ndarray) -> int:
        return self._stream.push(ARRAYS.address(samples), SAMPLE_TYPES[samples.dtype], len(samples))

    def _check_end(self) -> None:
        if self.num_samples > 0:
            total = self._stream.num_received if self._resampled is None else self._resampled.num_total
            self._layout.check_length(total)

    def _finish(self) -> np.ndarray:
        if self._resampled is not None:
            self._take(self._resampled.finish())
        total = self._layout.num_frames(self._stream.num_received) if self.num_samples else 0
        return self._pull(self._stream.finish(total))

    def _pull(self, frames: int) -> np.ndarray:
        out = np.empty(self._layout.shape(frames), self._spec.dtype)
        if frames:
            finite = self._stream.pull(ARRAYS.address(out), out.shape[1], frames)
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
    """Resample a signal that arrives in pieces, with the bits of `resample`: ``[samples]`` a piece.

    Memory is bounded by two lengths of the filter. Pickles and copies.

    Args:
        orig_freq: Rate of the samples in whole hertz.
        new_freq: Rate wanted.
        lowpass_filter_width: As in `resample`; so are `rolloff`, `resampling_method` and `beta`.
        dtype: float32, or float64, which `resample` has for float64 samples.
        channel_dim: Dimension of pieces that holds channels, which are averaged; by default there is none.

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
        dtype: Any = "float32",
        channel_dim: int | None = None,
    ) -> None:
        rates = checked_rates(orig_freq, new_freq)
        dtype = float_name(dtype, among=("float32", "float64"))
        options = checked_options(lowpass_filter_width, rolloff, resampling_method, beta)
        self._resampled = ResampledSignal((*rates, *options), dtype == "float64")
        settings = dict(
            orig_freq=rates[0],
            new_freq=rates[1],
            lowpass_filter_width=options[0],
            rolloff=rolloff,
            resampling_method=resampling_method,
            beta=beta,
            dtype=dtype,
        )
        self._begin(settings, channel_dim)

    @property
    def num_samples(self) -> int:
        """Samples accepted so far."""
        return self._resampled.num_received

    @property
    def num_resampled(self) -> int:
        """Samples given out so far."""
        return self._resampled.num_given

    def _push(self, samples: np.ndarray) -> np.ndarray:
        return self._resampled.push(samples)

    def _check_end(self) -> None:
        pass

    def _finish(self) -> np.ndarray:
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
    """Compute `kaldi_fbank` of a signal that arrives in pieces, with the same bits.

    Args:
        orig_freq: Rate of the samples where it is not `sample_frequency`: they are resampled on the way.
        channel_dim: Dimension of pieces that holds channels, which are averaged; by default there is none.
        settings: `kaldi_fbank`'s other keywords but `subtract_mean`, `dither`, `channel` and `min_duration`.

    Example::

        stream = StreamingFbank(num_mel_bins=80)
        for chunk in microphone:
            frames = stream.accept(chunk)  # [frames, 80], maybe none
        rest = stream.flush()
    """

    def __init__(self, *, orig_freq: int | None = None, channel_dim: int | None = None, **settings: Any) -> None:
        _refuse(settings, "subtract_mean", "dither", "num_ceps")
        spec = kaldi_spec(**_known(settings, "num_ceps", "cepstral_lifter"))
        self._start(spec, settings, orig_freq, channel_dim)


class StreamingMfcc(_Stream):
    """Compute `mfcc` (Kaldi's) of a signal that arrives in pieces, with the same bits; see `StreamingFbank`."""

    def __init__(
        self,
        *,
        num_ceps: int = 13,
        cepstral_lifter: float = 22.0,
        orig_freq: int | None = None,
        channel_dim: int | None = None,
        **settings: Any,
    ) -> None:
        _refuse(settings, "subtract_mean", "dither")
        own = dict(num_ceps=whole("num_ceps", num_ceps), cepstral_lifter=cepstral_lifter)
        spec = kaldi_spec(**own, **_known(settings, "use_power"))
        self._start(spec, settings | own, orig_freq, channel_dim)


def _known(settings: dict[str, Any], *not_here: str) -> dict[str, Any]:
    known = SETTINGS - set(not_here)
    unknown = sorted(set(settings) - known - {"subtract_mean", "dither"})
    if unknown:
        raise ValueError(f"settings must be among {', '.join(sorted(known))}, got {', '.join(unknown)}")
    return {name: value for name, value in settings.items() if name in known}


class StreamingLogMel(_Stream):
    """Compute `log_mel` of a signal that arrives in pieces: ``[num_mel_bins, frames]`` a piece.

    Whisper clips at 8 below the loudest value of the whole clip, which a stream cannot know. With `log_mel_max` it
    clips below that constant, and the frames have the bits of ``log_mel(…, log_mel_max=…)``. Without, it clips below
    the loudest value so far: frames before the loudest one may lie lower than on the whole clip.

    Args:
        num_mel_bins: As in `log_mel`.
        log_mel_max: In log10 mel; 1.5 is Voxtral Realtime's.
        dtype: float32 or float64.
        orig_freq: Rate of the samples where it is not 16 kHz: they are resampled on the way.
        channel_dim: Dimension of pieces that holds channels, which are averaged; by default there is none.
    """

    def __init__(
        self,
        *,
        num_mel_bins: int = 80,
        log_mel_max: float | None = None,
        dtype: Any = "float32",
        orig_freq: int | None = None,
        channel_dim: int | None = None,
    ) -> None:
        settings = dict(num_mel_bins=num_mel_bins, log_mel_max=log_mel_max, dtype=float_name(dtype))
        self._start(
            log_mel_spec(num_mel_bins=num_mel_bins, log_mel_max=log_mel_max, dtype=dtype),
            settings,
            orig_freq,
            channel_dim,
        )
        self._largest: float | None = None if log_mel_max is None else np.inf

    def _pull(self, frames: int) -> np.ndarray:
        out = super()._pull(frames)
        if frames and self._largest != np.inf:
            largest = float(out.max())
            self._largest = largest if self._largest is None else max(self._largest, largest)
            np.maximum(out, out.dtype.type(self._largest - DYNAMIC_RANGE / 4), out=out)
        return out

    def _state(self) -> dict[str, Any]:
        return super()._state() | {"largest": self._largest}

    def _set_state(self, state: dict[str, Any]) -> None:
        super()._set_state(state)
        self._largest = state["largest"]
