"""Several processes over Gloo, started by torchrun."""

import functools
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from mmlm_fast import distributed, ops

WORKER = Path(__file__).with_name("support") / "contrastive_worker.py"


def torchrun(count: int, *names: str, options: tuple[str, ...] = (), **environment: str) -> subprocess.CompletedProcess:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = ["-P", "-m", "torch.distributed.run", f"--nproc-per-node={count}", f"--master-port={port}"]
    return subprocess.run(
        [sys.executable, *command, *options, str(WORKER), *names],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )


OTHERS = ["half", "gather", "training"]


@pytest.mark.parametrize(
    ("count", "more"),
    [
        pytest.param(1, [*OTHERS, "derivatives"], marks=pytest.mark.slow),
        (2, [*OTHERS, "derivatives", "compiled"]),
        (3, []),  # one of them without a row
        pytest.param(3, OTHERS, marks=pytest.mark.slow),
        pytest.param(4, OTHERS, marks=pytest.mark.slow),
    ],
    ids=["one", "two", "three", "three, others", "four"],
)
def test_equals_one_process_on_the_whole_batch(count, more):
    """Value and gradients to 1e-6, batches of different sizes (one empty), both exchanges; parameters under DDP.

    More: derivatives of each kind, and a compiled function.
    """
    done = torchrun(count, "losses", "ring", *more)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_dead_process_ends_the_job():
    """The others have time to say it before torchrun ends them, on a busy machine too."""
    start = time.perf_counter()
    run = functools.partial(torchrun, 3, "dead", options=("--monitor-interval=5",))
    with ThreadPoolExecutor() as pool:  # most of it is waiting
        jobs = [pool.submit(run, EXCHANGE=exchange) for exchange in ("gather", "ring")]
        for done in [job.result() for job in jobs]:
            assert done.returncode != 0
            assert "lost the others in an exchange of features: a process died" in done.stderr
    assert time.perf_counter() - start < 60


def test_a_process_that_does_not_take_part():
    start = time.perf_counter()
    done = torchrun(2, "asleep")
    assert done.returncode != 0
    assert "did not make the same call in time" in done.stdout
    assert time.perf_counter() - start < 40


def test_one_process_without_a_group_and_errors():
    x = torch.nn.functional.normalize(torch.randn(5, 4), dim=1)
    torch.testing.assert_close(distributed.clip_loss(x, x, 3.0), ops.clip_loss(x, x, 3.0))
    torch.testing.assert_close(distributed.siglip_loss(x, x, 3.0, -1.0), ops.siglip_loss(x, x, 3.0, -1.0))
    assert distributed.gather_with_gradients(x) is x
    with pytest.raises(ValueError, match="exchange must be one of gather, ring, got 'all'"):
        distributed.clip_loss(x, x, 3.0, exchange="all")
    with pytest.raises(ValueError, match="timeout_seconds must be positive or None, got 0"):
        distributed.clip_loss(x, x, 3.0, timeout_seconds=0)
    with pytest.raises(ValueError, match="x must be a tensor"):
        distributed.gather_with_gradients(3)
