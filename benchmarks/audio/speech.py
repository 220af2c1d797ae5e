"""Real speech for the audio benchmarks, and how their results are checked."""

from collections.abc import Callable

import numpy as np
import torch

from mmlm_fast.data import load_speech
from mmlm_fast.testing import Difference

RATE = 16000
NUM_CLIPS = 16  # rotating, so that no clip stays in a cache


def speech(num_samples: int, num_clips: int = NUM_CLIPS) -> list[np.ndarray]:
    """Different clips of one length, cut from the three recordings put end to end."""
    tape = np.concatenate([s.waveform for s in load_speech()])
    tape = np.tile(tape, 2 + num_samples // len(tape))
    starts = np.linspace(0, len(tape) - num_samples, num_clips).astype(int)
    return [np.ascontiguousarray(tape[s : s + num_samples]) for s in starts]


def difference(actual: object, exact: torch.Tensor, allowed: float) -> Difference:
    """Absolute errors summed: in a norm the few bins that nearly cancel would decide, and which they are is luck."""
    tensor = torch.as_tensor(actual).double().reshape(exact.shape)
    return Difference((tensor - exact).abs().sum().item(), allowed, exact.abs().sum().item())


def against_float64(exact_of: Callable, baseline: str, skip: tuple[str, ...] = ()) -> Callable:
    """Check every provider's error against float64; ours is held to the baseline's own, without a factor.

    `skip` names providers that compute something else by definition.
    """

    def check(providers: dict[str, Callable], args: tuple) -> dict[str, list[Difference]]:
        exact = exact_of(*args)
        allowed = difference(providers[baseline](*args), exact, 0.0).error
        return {
            name: [] if name in skip else [difference(call(*args), exact, allowed)] for name, call in providers.items()
        }

    return check
