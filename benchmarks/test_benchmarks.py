"""Run the report's cases under pytest-benchmark: `pytest benchmarks --benchmark-only`, grouped by op."""

import pytest
import torch

from mmlm_benchmarks.audio import AUDIO
from mmlm_benchmarks.harness import threads
from mmlm_benchmarks.models import thin
from mmlm_benchmarks.ops import OPS
from mmlm_benchmarks.report.measure import audio_cases, op_cases

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def all_calls():
    cases = [case for op in OPS for case in op_cases(op, DEVICE)]
    cases += [case for family in AUDIO for case in audio_cases(family, DEVICE)] + thin.cases(DEVICE)
    for case in cases:
        for provider in case.providers:
            yield pytest.param(case, provider, id=f"{case.name} - {provider}")


@pytest.mark.parametrize(("case", "provider"), list(all_calls()))
def test_case(case, provider, benchmark):
    benchmark.group = case.name
    inputs = case.inputs()
    with threads(1 if case.group == "audio" else torch.get_num_threads()):
        if provider == case.ours:
            assert all(d.ok for d in case.check(case.providers, inputs[0]).get(provider, []))
        turn = iter(range(10**9))

        def call():
            return case.providers[provider](*inputs[next(turn) % len(inputs)])

        benchmark.pedantic(call, rounds=5, warmup_rounds=1)
