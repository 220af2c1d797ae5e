"""Run as a process: every function in every state that torch and numpy can be in, first in it and after it.

Each state has a process of its own, forked before any function was called, so that what crashes ends that one alone.
"""

import contextlib
import json
import os
import pickle
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

ORDERS = ("first", "warm")


class Dispatched(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def switched(switch: Callable, to: Any, back: Any) -> Iterator[None]:
    switch(to)
    try:
        yield
    finally:
        switch(back)


STATES: dict[str, Callable] = {
    "device": lambda: torch.device("meta"),
    "default_device": lambda: switched(torch.set_default_device, "meta", None),
    "float64": lambda: switched(torch.set_default_dtype, torch.float64, torch.float32),
    "bfloat16": lambda: switched(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "float16": lambda: switched(torch.set_default_dtype, torch.float16, torch.float32),
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "fake": FakeTensorMode,
    "dispatch": Dispatched,
    "function": Functions,
    "deterministic": lambda: switched(torch.use_deterministic_algorithms, True, False),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "numpy_errors": lambda: np.errstate(all="raise"),
}
TRANSFORMS = ("functionalize", "grad", "vmap")  # of torch.func
ALL_STATES = (*STATES, *TRANSFORMS)
# Where torch itself may refuse real tensors, or a custom op; it must be an exception.
MAY_REFUSE = ("fake", *TRANSFORMS)
DEVICES = ("device", "default_device")
HAVE_NO_GRADIENTS = ("inference", "no_grad", *MAY_REFUSE)


class Function(NamedTuple):
    call: Callable[[], Any]
    # "array": makes its tensors itself; "made": so, as torch's factories do, where a default device says; "tensor": is
    # given real ones; "gradient": and differentiates.
    kind: str


def plain(tree: Any) -> Any:
    """Arrays, dtypes included, of what a function returned."""

    def one(x: Any) -> Any:
        if isinstance(x, Tensor):
            assert type(x) is Tensor, type(x)
            if torch._is_functional_tensor(x):
                torch._sync(x)
                x = torch._from_functional_tensor(x)
            assert not torch._C._functorch.is_functorch_wrapped_tensor(x)
            assert x.device.type == "cpu", x.device
            x = x.detach()
            return str(x.dtype), x.double().numpy() if x.is_floating_point() else x.numpy()
        return (str(x.dtype), x) if isinstance(x, np.ndarray) else x

    return pytree.tree_leaves(pytree.tree_map(one, tree))


def same(a: Any, b: Any, nearly: bool = False) -> bool:
    """Bit for bit; nearly: as the reference, which transforms see through."""

    def one(x: Any, y: Any) -> bool:
        if not isinstance(x, np.ndarray) or not isinstance(y, np.ndarray):
            return type(x) is type(y) and bool(x == y)
        if x.dtype.kind == "f" and nearly:
            return x.shape == y.shape and np.allclose(x, y, rtol=2e-3, atol=2e-3, equal_nan=True)
        return np.array_equal(x, y, equal_nan=x.dtype.kind == "f")

    return len(a) == len(b) and all(map(one, a, b))


def outcome(function: Function, expected: Any, state: str | None) -> str:
    """What is wrong; empty where nothing is."""
    refused = (
        (state in MAY_REFUSE and function.kind != "array")
        or (state in HAVE_NO_GRADIENTS and function.kind == "gradient")
        or (state in DEVICES and function.kind == "made")
    )
    from mmlm_fast.audio.plain import plain_torch

    try:
        result = function.call()
        with plain_torch():
            found = plain(result)
    except Exception as error:
        return "" if refused else f"{type(error).__name__}: {str(error)[:200]}"
    nearly = state in TRANSFORMS and function.kind != "array"
    if same(found, expected, nearly):
        return ""
    pairs = [(x, y) for x, y in zip(found, expected, strict=False) if not same([x], [y], nearly)]
    told = [f"{x.shape} {y.shape} {np.abs(x - y).max() if x.shape == y.shape else ''}" if isinstance(x, np.ndarray)
            else f"{x} for {y}" for x, y in pairs[:3]]  # fmt: skip
    return f"another result: {'; '.join(told)}"


def run(functions: dict[str, Function], expected: dict, state: str, order: str, say: Callable) -> None:
    def all_of(label: str, within: str | None) -> None:
        for name, function in functions.items():
            if name in expected:
                say(f"{name}, {label}", None)
                say(f"{name}, {label}", outcome(function, expected[name], within))

    if order == "warm":
        all_of("before", None)
    if state in TRANSFORMS:

        def inside(x: Tensor) -> Tensor:
            all_of("inside", state)
            return x.sum()

        getattr(torch.func, state)(inside)(torch.ones(2, dtype=torch.float32))
    else:
        with STATES[state]():
            all_of("inside", state)
    all_of("after", None)


def in_a_fork(work: Callable[[Callable], None]) -> tuple[list, int]:
    """What `work` says, and how its process ended."""
    with tempfile.TemporaryFile() as file:
        pid = os.fork()
        if pid == 0:
            try:
                work(lambda *said: (pickle.dump(said, file), file.flush()))
                os._exit(0)
            except BaseException as error:
                pickle.dump(("the process", f"{type(error).__name__}: {error}"), file)
                file.flush()
                os._exit(1)
        _, status = os.waitpid(pid, 0)
        file.seek(0)
        said = []
        with contextlib.suppress(EOFError):
            while True:
                said.append(pickle.load(file))
    return said, os.waitstatus_to_exitcode(status)


def found(functions: dict[str, Function], states: list[str]) -> dict:
    """What is wrong, by state and order, and without any."""

    def alone(say: Callable) -> None:
        for name, function in functions.items():
            try:
                say(name, plain(function.call()))
            except Exception as error:
                say(name, f"{type(error).__name__}: {error}")

    said, code = in_a_fork(alone)
    assert code == 0, said[-1:]
    results: dict = {"without": {k: v for k, v in said if isinstance(v, str)}}
    expected = {k: v for k, v in said if not isinstance(v, str)}
    for state in states:
        for order in ORDERS:
            said, code = in_a_fork(lambda say, s=state, o=order: run(functions, expected, s, o, say))
            wrong = {name: told for name, told in said if told}
            if code != 0:
                wrong[said[-1][0] if said else "?"] = f"the process ended with {code}"
            results[f"{state} {order}"] = wrong
    return results


# ---- audio ----------------------------------------------------------------------------------------------------------


def audio_functions(folder: str) -> dict[str, Function]:
    import soundfile
    from test_audio_extractors import call

    import mmlm_fast.audio as audio
    from mmlm_fast import reference
    from mmlm_fast.audio.extractors import EXTRACTORS, drop_in
    from mmlm_fast.audio.plain import plain_torch

    wave = (np.random.default_rng(0).standard_normal(9600) * 0.05).astype(np.float32)
    x = torch.from_numpy(wave.copy())
    functions: dict[str, Function] = {}

    def add(name: str, call: Callable, kind: str = "tensor") -> None:
        functions[name] = Function(call, kind)

    add("log_mel", lambda: audio.log_mel(x))
    add("log_mel, list", lambda: audio.log_mel([x, x[:4000]], num_samples=16000))
    add("log_mel, none", lambda: audio.log_mel([], num_samples=16000))
    add("log_mel, float16", lambda: audio.log_mel(x, dtype=torch.float16, orig_freq=8000))
    add("mel_spectrogram", lambda: audio.mel_spectrogram(x, log="dB", top_db=80.0))
    add("mel_spectrogram, librosa", lambda: audio.mel_spectrogram([x, x[:4000]], convention="librosa"))
    add("mel_spectrogram, pad", lambda: audio.mel_spectrogram(x, pad=9, orig_freq=8000))
    for window in ("hamming", torch.hann_window, [0.5] * 200, torch.ones(200) / 3):
        add(f"spectrogram, {str(window)[:20]}", lambda w=window: audio.spectrogram(
            x, n_fft=300, win_length=200, window_fn=w, power=1.0))  # fmt: skip
    add("mel_mfcc", lambda: audio.mel_mfcc(x))
    add("mel_mfcc, log", lambda: audio.mel_mfcc(x, log_mels=True))
    add("kaldi_fbank", lambda: audio.kaldi_fbank(x, window_type="hamming", vtln_warp=1.1))
    add("kaldi_fbank, float64", lambda: audio.kaldi_fbank(x.double(), dtype=torch.float64, use_energy=True))
    add("kaldi_fbank, short", lambda: audio.kaldi_fbank(x, min_duration=60.0))
    add("mfcc", lambda: audio.mfcc(x, subtract_mean=True))
    add("nemo_log_mel", lambda: audio.nemo_log_mel(x))
    add("standardize", lambda: audio.standardize(x.view(1, 60, 160), 50))
    add("resample", lambda: audio.resample(x, 44100, 16000))
    add("resample, int16", lambda: audio.resample((x * 9999).to(torch.int16).view(2, -1), 3, 1, channel_dim=0))
    add("resample, none", lambda: audio.resample(x.view(1, -1)[:0], 3, 1))

    def by_reference(function: Callable) -> Callable:
        def run() -> Any:
            with reference():
                return function()

        return run

    for name in ("log_mel", "mel_mfcc", "kaldi_fbank", "mfcc", "nemo_log_mel", "resample"):
        add(f"reference of {name}", by_reference(functions[name].call))

    def gradient(function: Callable, within: bool = True) -> Callable:
        """`within` autocast, where that is on: torch's own products have gradients of bfloat16 there."""

        def run() -> Any:
            y = x.clone().requires_grad_()
            out = function(y)
            with contextlib.nullcontext() if within else torch.autocast("cpu", enabled=False):
                return out, torch.autograd.grad(out.sum(), y)

        return run

    add("gradient of log_mel", gradient(audio.log_mel), "gradient")
    add("gradient of kaldi_fbank", gradient(lambda y: audio.kaldi_fbank(y, window_type="hamming")), "gradient")
    add("gradient of mel_mfcc", gradient(audio.mel_mfcc, within=False), "gradient")
    add("gradient of resample", gradient(lambda y: audio.resample(y, 3, 1)), "gradient")

    for cls in (audio.StreamingFbank, audio.StreamingMfcc, audio.StreamingLogMel):
        for given in (wave, x):

            def stream(cls=cls, parts=(given[:5000], given[5000:])) -> Any:
                live = cls()
                return [*map(live.accept, parts), live.flush()]

            add(f"{cls.__name__} of {type(given).__name__}", stream, "array")
    path = os.path.join(folder, "clip.wav")
    soundfile.write(path, wave[:8000].reshape(-1, 2), 22050, subtype="PCM_16")
    add("read_audio", lambda: audio.read_audio(path, sampling_rate=16000), "array")
    add("read_audio, channels", lambda: audio.read_audio(path, mono=False), "array")
    add("read_audio_files", lambda: audio.read_audio_files([path], sampling_rate=8000).waveforms, "array")

    for name in EXTRACTORS:
        try:
            made = drop_in(name)()
        except Exception:  # this transformers has no such class, or it lacks a library
            continue

        def extract(extractor: Any, name: str = name) -> Any:
            if name.startswith("Pop2Piano"):  # its call needs essentia
                return plain_torch()(extractor.mel_spectrogram)(wave[None])
            result = call(extractor, wave)
            return {k: result[k] for k in sorted(result)}

        add(name, lambda name=name, extract=extract: extract(drop_in(name)()), "array")
        add(f"{name} made before", lambda made=made, extract=extract: extract(made), "array")
    return functions


# ---- ops ------------------------------------------------------------------------------------------------------------


def op_functions(folder: str) -> dict[str, Function]:
    from mmlm_fast.masks import IntervalMask
    from mmlm_fast.ops import rope_tables
    from support.op_calls import calls

    functions: dict[str, Function] = {}
    for call in calls(17, torch.float32):

        def forward(call=call) -> Any:
            return call.function(*call.inputs)

        def gradient(call=call) -> Any:
            inputs = [x.clone().requires_grad_() for x in call.inputs]
            outputs = [x for x in pytree.tree_leaves(call.function(*inputs)) if x is not None and x.requires_grad]
            assert outputs, "no gradients here"
            return torch.autograd.grad([x.sum() for x in outputs], inputs, allow_unused=True)

        functions[f"{call.op} {call.name}"] = Function(forward, "tensor")
        if call.inputs:
            functions[f"gradient of {call.op} {call.name}"] = Function(gradient, "gradient")
    counts, starts = torch.tensor([3, 5]), torch.tensor([0, 4, 9], dtype=torch.int32)
    blocks = torch.tensor([[-1, 0, 0, -1, 1, 1]])
    places = torch.tensor([[True, False, False, True, False]])
    dense = IntervalMask.causal(5, 9).dense(9)
    masks: dict[str, Callable] = {
        "full": lambda: IntervalMask.full(5, 9),
        "causal": lambda: IntervalMask.causal(5, 9),
        "causal, offsets": lambda: IntervalMask.causal(5, 9, q_offset=counts),
        "sliding_window": lambda: IntervalMask.sliding_window(5, 9, window=3),
        "chunked": lambda: IntervalMask.chunked(9, chunk_size=4),
        "packed": lambda: IntervalMask.packed(starts, 9, is_causal=True),
        "padded": lambda: IntervalMask.padded(counts, 9, q_len=5),
        "prefix": lambda: IntervalMask.prefix(counts, 9),
        "image_blocks": lambda: IntervalMask.image_blocks(blocks),
        "latest_image": lambda: IntervalMask.latest_image(places, 4),
        "from_dense": lambda: IntervalMask.from_dense(dense),
        "and": lambda: IntervalMask.causal(9) & IntervalMask.padded(counts, 9),
        "batch": lambda: IntervalMask.batch([IntervalMask.full(5, 9), IntervalMask.causal(5, 9)]),
    }
    # Made of numbers alone, these follow a default device, as torch's own factories do.
    for name, make in masks.items():
        is_given = name in ("packed", "padded", "prefix", "image_blocks", "latest_image", "from_dense")
        functions[f"mask {name}"] = Function(lambda make=make: (make().lo, make().hi), "tensor" if is_given else "made")
    positions, inverse = torch.arange(7)[None], 1.0 / 10 ** torch.arange(5, dtype=torch.float32)
    functions["rope_tables"] = Function(lambda: rope_tables(positions, inverse), "tensor")
    return functions


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    if "MMLM_FAST_SANITIZED" in os.environ:
        import conftest  # noqa: F401
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        made = {"audio": audio_functions(folder), "ops": op_functions(folder)}
        results = {what: found(made[what], states) for what, states in json.loads(sys.argv[1]).items()}
    json.dump(results, sys.stdout)
