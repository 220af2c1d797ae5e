"""A stream that gets 100 ms at a time: filter bank frames as they are complete."""

from collections.abc import Callable
from importlib.util import find_spec

import numpy as np

from mmlm_benchmarks.audio.speech import RATE, speech
from mmlm_benchmarks.harness import OWN_FORMULA, Case
from mmlm_fast.audio import StreamingFbank, kaldi_fbank


def _native() -> Callable:
    import kaldi_native_fbank as knf

    options = knf.FbankOptions()
    options.frame_opts.dither = 0
    options.mel_opts.num_bins = 80
    state = {"stream": knf.OnlineFbank(options), "given": 0}

    def call(chunk: np.ndarray) -> np.ndarray:
        stream = state["stream"]
        stream.accept_waveform(RATE, chunk)
        frames = [stream.get_frame(i) for i in range(state["given"], stream.num_frames_ready)]
        state["given"] = stream.num_frames_ready
        return np.stack(frames) if frames else np.empty((0, 80), np.float32)

    return call


def _recomputing() -> Callable:
    """Without a streaming library: features of the last frames' samples, computed again with each chunk."""
    import torch

    state = {"tail": np.empty(0, np.float32)}

    def call(chunk: np.ndarray) -> object:
        samples = np.concatenate([state["tail"], chunk])
        state["tail"] = samples[-240:]
        return kaldi_fbank(torch.from_numpy(samples), num_mel_bins=80)

    return call


def cases(device: str) -> list[Case]:
    """CPU only, one thread. That streams have the bits of the whole signal is tests/test_audio_streaming.py's."""
    if device != "cpu":
        return []
    first = ("kaldi-native-fbank", _native) if find_spec("kaldi_native_fbank") else (OWN_FORMULA, _recomputing)
    stream = StreamingFbank(num_mel_bins=80)
    return [
        Case(
            group="audio",
            name="streaming filter bank, 100 ms at a time",
            shape_from="80 mel bins, ten frames a call, one thread",
            inputs=lambda: [(clip * 32768,) for clip in speech(RATE // 10)],
            providers={first[0]: first[1](), "mmlm_fast": stream.accept},
            check=lambda providers, args: {},
            bytes_moved=4 * (RATE // 10 + 80 * 10),
            flops=13000 * 10,
        )
    ]
