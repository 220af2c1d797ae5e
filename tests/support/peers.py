"""Libraries that the tests compare with, where they are installed (see PEERS in .ci/bootstrap.py)."""

import importlib
import importlib.util
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from support.speech import SPEECH


def need(name: str):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except (ImportError, OSError) as error:
        pytest.skip(f"{name} is not installed here (see PEERS in .ci/bootstrap.py): {error}")


def open_clip_losses():
    """open_clip's file of losses, without the rest of it and its dependencies."""
    package = importlib.util.find_spec("open_clip")
    if package is None:
        pytest.skip("open_clip_torch is not installed here (see .ci/bootstrap.py)")
    spec = importlib.util.spec_from_file_location("open_clip_loss", Path(package.origin).with_name("loss.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def signals() -> dict[str, torch.Tensor]:
    """Speech in three languages, noise, silence around speech, clicks, full-scale clipping."""
    generator = np.random.default_rng(0)
    made = {f"speech_{s.language}": s.waveform for s in SPEECH}
    made["noise"] = generator.standard_normal(48000).astype(np.float32) * 0.1
    made["padded"] = np.concatenate([np.zeros(8000, np.float32), made["speech_en"][:20000], np.zeros(8000, np.float32)])
    clicks = np.zeros(20000, np.float32)
    clicks[[0, 7000, 19999]] = 1.0
    made["clicks"] = clicks
    made["clipped"] = np.clip(generator.standard_normal(30000) * 2, -1, 1).astype(np.float32)
    return {name: torch.from_numpy(x) for name, x in made.items()}


def errors(ours, theirs, exact) -> tuple[torch.Tensor, torch.Tensor]:
    """Absolute errors of both against float64, where the exact result is finite."""
    ours, theirs, exact = (torch.as_tensor(np.asarray(x)).double() for x in (ours, theirs, exact))
    assert ours.shape == exact.shape == theirs.shape, (ours.shape, theirs.shape, exact.shape)
    keep = exact.isfinite()
    assert torch.equal(ours.isfinite(), keep)
    return (ours - exact)[keep].abs().flatten(), (theirs - exact)[keep].abs().flatten()


def assert_no_worse(pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Mean error over all signals no larger than the peer's, and no more than chance beyond its 99.9th percentile.

    Both compute in float32, and the single largest error sits in whichever bin cancels most. Two transforms that err
    alike have 0.1 % of their errors beyond that percentile, give or take the square root of their number: three of
    these are allowed (of 90,000 numbers, errors 5 % larger there are always seen). The caller divides errors by each
    signal's largest exact value.
    """
    ours, theirs = (torch.cat(part) for part in zip(*pairs.values(), strict=True))
    summary = {name: (f"{a.mean():.2e}", f"{b.mean():.2e}") for name, (a, b) in pairs.items()}
    assert ours.mean() <= theirs.mean(), summary
    most = max(1, int(0.999 * len(ours)))
    beyond, expected = (ours > theirs.kthvalue(most).values).sum().item(), len(ours) - most
    assert beyond <= expected + 3 * expected**0.5, (beyond, expected, summary)
