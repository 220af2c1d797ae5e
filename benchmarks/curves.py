"""Measure how time and memory grow over sequence length, tokens, batch, threads, and what a cold start costs."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmlm_benchmarks import contrastive, harness
from mmlm_benchmarks.audio.speech import RATE, speech
from mmlm_benchmarks.ops import clip_loss, interval_attention, linear_cross_entropy
from mmlm_benchmarks.report import schema
from mmlm_fast import ops
from mmlm_fast.audio import log_mel
from mmlm_fast.masks import IntervalMask

Providers = dict[str, Callable[..., Any]]


class Curve(NamedTuple):
    """Describe one curve.

    Args:
        name: What is measured, in words.
        along: What changes from point to point.
        points: The values of that.
        at: Gives for a value the inputs, and who computes what of them; "mmlm_fast" is ours.
    """

    name: str
    along: str
    points: tuple[int, ...]
    at: Callable[[int], tuple[tuple, Providers]]


def _attention(length: int) -> tuple[tuple, Providers]:
    """Draw pictures of 256 tokens that see themselves whole, in causal text; 8 heads of 128, 2 of keys."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, length, 128) for heads in (8, 2, 2))
    mask = IntervalMask.image_blocks(interval_attention.image_ids(length, length // 512, 256))
    return (q, k, v, mask, mask.dense(length)[:, None]), {
        "SDPA, repeated keys, dense mask": _without_gradients(interval_attention.dense_sdpa),
        "mmlm_fast": _without_gradients(interval_attention.ours),
    }


def _without_gradients(call: Callable) -> Callable:
    @torch.no_grad()
    def quietly(*args: Any) -> Any:
        return call(*args)

    return quietly


def _cross_entropy(tokens: int) -> tuple[tuple, Providers]:
    """Draw for SmolLM2-135M's head: 576 features, 49,152 classes; a training step."""
    torch.manual_seed(0)
    hidden = torch.randn(tokens, 576).requires_grad_()
    weight = (torch.randn(49_152, 576) / 24).requires_grad_()
    target = torch.randint(0, 49_152, (tokens,))

    def step(function: Callable) -> Callable:
        def call(hidden: Tensor, weight: Tensor, target: Tensor) -> None:
            torch.autograd.grad(function(hidden, weight, target), (hidden, weight))

        return call

    return (hidden, weight, target), {
        "eager": step(linear_cross_entropy.eager),
        "mmlm_fast": step(ops.linear_cross_entropy),
    }


def _negatives(batch: int) -> tuple[tuple, Providers]:
    """Draw pairs of 512 features; a training step."""
    torch.manual_seed(0)
    features = contrastive.draw_features(batch, 512, "cpu", torch.float32)
    leaves = tuple(t.detach().requires_grad_() for t in (*features, torch.tensor(14.3)))
    return leaves, {"eager": contrastive.step(clip_loss.eager), "mmlm_fast": contrastive.step(ops.clip_loss)}


def _threads(count: int) -> tuple[tuple, Providers]:
    """Cut eight clips of 30 s, for all at once."""
    from mmlm_benchmarks.audio.log_mel import stft_chain

    clips = torch.stack([torch.from_numpy(clip) for clip in speech(30 * RATE, 8)[:8]])

    def on_threads(call: Callable) -> Callable:
        def counted(x: Tensor) -> Any:
            with harness.threads(count):
                return call(x)

        return counted

    return (clips,), {"torch.stft chain": on_threads(stft_chain), "mmlm_fast": on_threads(lambda x: log_mel(x))}


def curves(cores: int) -> list[Curve]:
    """Return all curves that are measured on a machine of so many cores."""
    counts = tuple(n for n in (1, 2, 4, 8, 16) if n <= cores)
    return [
        Curve("attention with picture blocks, forward", "tokens", (512, 1024, 2048, 4096), _attention),
        Curve("linear cross-entropy, training step", "tokens that count", (64, 256, 1024, 2048), _cross_entropy),
        Curve("CLIP's loss, training step", "pairs", (256, 1024, 4096), _negatives),
        Curve("log-mel of 8 clips of 30 s", "threads", counts, _threads),
    ]


def measure(curve: Curve, seconds: float) -> Iterator[schema.CurvePoint]:
    """Yield a row for each provider at each point: times in turns, and peak memory."""
    for x in curve.points:
        args, providers = curve.at(x)
        samples = harness.time_pairs(providers, "mmlm_fast", [args], seconds)
        theirs = {p: [t for t, _ in pairs] for p, pairs in samples.items()}
        ours = [own for pairs in samples.values() for _, own in pairs]
        for provider, times in {**theirs, "mmlm_fast": ours}.items():
            peak = harness.peak_memory_mib(providers[provider], args)
            passed = harness.spread(times)
            yield {
                "curve": curve.name,
                "along": curve.along,
                "x": x,
                "provider": provider,
                "ms": round(1e3 * passed.median, 4),
                "p20_ms": round(1e3 * passed.p20, 4),
                "p80_ms": round(1e3 * passed.p80, 4),
                "peak_mib": None if peak is None else round(peak, 2),
            }


STARTS = {
    "import torch": "import torch",
    "import torch and mmlm_fast": "import torch, mmlm_fast",
    "import transformers": "import transformers",
    "the first log-mel": "import torch, mmlm_fast.audio; mmlm_fast.audio.log_mel(torch.zeros(16000))",
    "the first op": "import torch, mmlm_fast; mmlm_fast.ops.add_norm(torch.ones(4, 8), None, torch.ones(8))",
    "import of accelerate": "import mmlm_fast.hf",
}


def cold_starts(repeats: int = 3) -> list[schema.Start]:
    """Time fresh processes, by turns; the first turn, which reads files from the disk, is left out."""
    passed: dict[str, list[float]] = {name: [] for name in STARTS}
    for turn in range(repeats + 1):
        for name, code in STARTS.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-P", "-c", code], check=True, capture_output=True)
            if turn:
                passed[name].append(time.perf_counter() - start)
    return [{"what": name, "seconds": round(median(times), 3)} for name, times in passed.items()]
