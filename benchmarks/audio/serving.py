"""Latency of audio features in a server: threads that call as fast as they can, with clips of 1 s and of 30 s.

python -P -m mmlm_benchmarks.audio.serving --workers 8 --seconds 5
python -P -m mmlm_benchmarks.audio.serving --api numpy --clips long --pause 0.01
"""

import argparse
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from mmlm_fast.audio import log_mel
from mmlm_fast.audio.spec import num_threads

RATE = 16000
CLIPS = {"short": RATE, "long": 30 * RATE}
APIS = ("drop-in", "tensor", "numpy")


def caller(api: str) -> Callable[[np.ndarray], Any]:
    """Return what a worker calls with each clip."""
    if api == "numpy":
        return log_mel
    if api == "tensor":
        import torch

        return lambda clip: log_mel(torch.from_numpy(clip))
    from mmlm_fast.audio import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor()
    return lambda clip: extractor(clip, sampling_rate=RATE, padding="longest", return_tensors="np")


def latencies(
    call: Callable[[np.ndarray], Any], kinds: list[str], workers: int, seconds: float, pause: float
) -> dict[str, np.ndarray]:
    """Return the seconds that each call took, by kind of clip.

    Args:
        kinds: Of `CLIPS`, drawn at random by each worker.
        pause: Mean seconds between a worker's calls, exponentially distributed; 0 for none.
    """
    rng = np.random.default_rng(0)
    tape = (0.1 * rng.standard_normal(60 * RATE)).astype(np.float32)
    samples: dict[str, list[float]] = {kind: [] for kind in kinds}
    for kind in kinds:
        call(tape[: CLIPS[kind]])
    stop = time.monotonic() + seconds

    def work(seed: int) -> None:
        own = np.random.default_rng(seed)
        while time.monotonic() < stop:
            kind = kinds[own.integers(len(kinds))]
            clip = tape[(start := int(own.integers(RATE))) : start + CLIPS[kind]]
            if pause:
                time.sleep(own.exponential(pause))
            before = time.perf_counter()
            call(clip)
            samples[kind].append(time.perf_counter() - before)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {kind: np.array(found) for kind, found in samples.items()}


def main() -> None:
    """Print median, p90 and p99 of each kind of clip, and of all calls."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=8, help="threads that call (default: 8)")
    parser.add_argument("--seconds", type=float, default=5.0, help="how long (default: 5)")
    parser.add_argument("--api", choices=APIS, default="drop-in", help="what they call (default: drop-in)")
    parser.add_argument("--clips", choices=("mixed", *CLIPS), default="mixed", help="of 1 s, of 30 s, or either")
    parser.add_argument("--pause", type=float, default=0.0, help="mean seconds between a worker's calls (default: 0)")
    arguments = parser.parse_args()
    kinds = list(CLIPS) if arguments.clips == "mixed" else [arguments.clips]
    found = latencies(caller(arguments.api), kinds, arguments.workers, arguments.seconds, arguments.pause)
    found["all"] = np.concatenate(list(found.values()))
    load = os.getloadavg()[0]
    print(f"{arguments.workers} workers, {num_threads()} threads a call at most, load {load:.1f} at the end")
    for kind, seconds in found.items():
        median, p90, p99 = (float(np.quantile(seconds, q)) * 1e3 for q in (0.5, 0.9, 0.99))
        print(
            f"{kind:6} {len(seconds) / arguments.seconds:8.0f} calls/s  median {median:7.2f}  p90 {p90:7.2f}  "
            f"p99 {p99:7.2f} ms  p99 / median {p99 / median:5.1f}"
        )


if __name__ == "__main__":
    main()
