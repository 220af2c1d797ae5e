"""What a server and a training job do to the audio front end: workers, threads, long clips, cold starts."""

import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
import transformers

from mmlm_fast.audio import kaldi_fbank, log_mel
from support.front_end import CALLS, TAPE, Clips


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_data_loader_workers_after_use_in_the_parent(start_method):
    # The NaN fill of torch.empty runs on torch's OpenMP pool, which hangs in a forked child. Not ours to test.
    torch.use_deterministic_algorithms(False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        clips = Clips()
        expected = [clips[i] for i in range(len(clips))]
        for call in CALLS.values():
            call(TAPE)  # long enough for threads
        loader = torch.utils.data.DataLoader(
            clips, batch_size=None, num_workers=2, multiprocessing_context=start_method, timeout=120
        )
        for ours, theirs in zip(loader, expected, strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", CALLS)
def test_eight_threads_on_one_plan_give_the_same_bits(name):
    call, results = CALLS[name], [None] * 8
    expected = call(TAPE)

    def work(i):
        results[i] = [call(TAPE) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(out, expected) for outs in results for out in outs)


def test_the_gil_is_released():
    """Python goes on while the core works: two threads of long calls overlap with a counting one."""
    long = TAPE.repeat(20)
    counted, done = [0], threading.Event()

    def count():
        while not done.is_set():
            counted[0] += 1

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    counter = threading.Thread(target=count)
    counter.start()
    try:
        start = counted[0]
        kaldi_fbank(long, num_mel_bins=80)
        progress = counted[0] - start
    finally:
        done.set()
        counter.join()
        torch.set_num_threads(before)
    assert progress > 1000


def test_ten_minutes():
    """Frames of a long clip are those of its parts, on one thread and on two."""
    long = TAPE.repeat(-(-600 * 16000 // len(TAPE)))[: 600 * 16000]
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            whole = kaldi_fbank(long, num_mel_bins=80)
            assert whole.shape == (59998, 80)
            for start in (0, 12345, 59900):
                part = kaldi_fbank(long[start * 160 : start * 160 + 16000], num_mel_bins=80)
                assert torch.equal(whole[start : start + len(part)], part)
            features = log_mel(long, log_mel_max=1.5)
            assert features.shape == (80, 60000)
            part = log_mel(long[160 * 300 : 160 * 400], log_mel_max=1.5)
            assert torch.equal(features[:, 302:398], part[:, 2:98])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("num_samples", [1, 2, 100, 159, 160])
def test_shortest_clips_as_whisper_pads_them(num_samples):
    clip = TAPE[30000 : 30000 + num_samples]
    theirs = transformers.WhisperFeatureExtractor()(clip.numpy(), sampling_rate=16000, return_tensors="pt")
    ours = log_mel(clip, num_samples=480000)
    torch.testing.assert_close(ours, theirs.input_features[0], rtol=0, atol=7e-5)


def test_log_mel_gradcheck():
    x = torch.randn(420, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: log_mel(x, num_mel_bins=5, dtype=torch.float64), x)


def test_cold_start():
    """Import under 0.3 s beyond torch's, first calls under 50 ms, of CPU time: the machine is shared."""
    code = """
import time, torch
start = time.process_time()
import mmlm_fast.audio as audio
imported = time.process_time()
x = torch.randn(16000)
audio.log_mel(x)
first = time.process_time()
audio.kaldi_fbank(x)
print(imported - start, first - imported, time.process_time() - first)
"""
    runs = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
        runs.append([float(t) for t in done.stdout.split()])
    imported, first, second = (min(times) for times in zip(*runs, strict=True))
    assert imported < 0.3
    assert first < 0.05
    assert second < 0.05
