"""Calls from more threads than there are CPUs: each right, none left waiting, one thread to each."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from mmlm_fast import _C
from mmlm_fast.audio import kaldi_fbank, log_mel, resample
from mmlm_fast.audio.log_mel import WHISPER
from mmlm_fast.audio.spec import prepared
from support.speech import WAVEFORMS

TAPE = np.tile(np.concatenate(WAVEFORMS), 3)
CLIPS = [TAPE[: 30 * 16000], TAPE[5000:21000], TAPE[40000 : 40000 + 22 * 16000], TAPE[100:900]]
CALLS = [log_mel, kaldi_fbank, lambda x: resample(x, 48000, 16000), lambda x: log_mel(torch.from_numpy(x))]


def test_each_gets_what_it_would_alone():
    jobs = [(call, clip) for _ in range(12) for call in CALLS for clip in CLIPS]
    alone = {(i, j): np.asarray(CALLS[i](CLIPS[j])) for i in range(len(CALLS)) for j in range(len(CLIPS))}
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda job: np.asarray(job[0](job[1])), jobs))
    for n, result in enumerate(results):
        expected = alone[n // len(CLIPS) % len(CALLS), n % len(CLIPS)]
        assert np.array_equal(result, expected)


def test_a_call_that_fails_gives_its_turn_away():
    bad = TAPE[:16000].copy()
    bad[100] = np.nan

    def call(i):
        try:
            return log_mel(bad if i % 2 else CLIPS[1]) is not None
        except ValueError:
            return False

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(call, range(400))) == [i % 2 == 0 for i in range(400)]


def test_a_child_forked_in_the_midst_of_calls_goes_on():
    stop, expected = threading.Event(), log_mel(CLIPS[1])

    def busy():
        while not stop.is_set():
            log_mel(CLIPS[0])

    threads = [threading.Thread(target=busy) for _ in range(8)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(20):
            pid = os.fork()
            if pid == 0:
                os._exit(0 if all(np.array_equal(log_mel(CLIPS[1]), expected) for _ in range(3)) else 1)
            deadline = time.monotonic() + 30
            while (done := os.waitpid(pid, os.WNOHANG))[0] == 0:
                if time.monotonic() > deadline:
                    os.kill(pid, 9)
                    os.waitpid(pid, 0)
                    pytest.fail("the child waits for ever")
                time.sleep(0.001)
            assert os.waitstatus_to_exitcode(done[1]) == 0
    finally:
        stop.set()
        for thread in threads:
            thread.join()


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
def test_helpers_are_for_who_is_alone():
    """A large call takes the threads it may; with others under way it takes none."""
    clip, plan = TAPE[: 30 * 16000], prepared(WHISPER).plan

    def calls(count):
        out = np.empty((1, 80, 3000), np.float32)
        for _ in range(count):
            plan.run_rows([clip], [len(clip)], [3000], out, 2)

    before = _C.turns()
    calls(10)
    alone = {name: count - before[name] for name, count in _C.turns().items()}
    assert alone == {"running": 0, "taken": 10, "waited": 0, "helped": 10}
    before = _C.turns()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(calls, [50] * 8))
    together = {name: count - before[name] for name, count in _C.turns().items()}
    assert (together["running"], together["taken"]) == (0, 400)
    assert together["waited"] > 200
    assert together["helped"] < 100  # when they begin and end


def test_small_calls_never_take_helpers():
    clip, out, before = TAPE[:16000], np.empty((1, 80, 100), np.float32), _C.turns()
    prepared(WHISPER).plan.run_rows([clip], [len(clip)], [100], out, 8)
    assert _C.turns()["helped"] == before["helped"]
