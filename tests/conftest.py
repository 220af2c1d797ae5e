import gc
import importlib.util
import os
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

if "MMLM_FAST_SANITIZED" in os.environ:  # `make sanitize`: this build of the native core in place of the installed one
    spec = importlib.util.spec_from_file_location("mmlm_fast._C", os.environ["MMLM_FAST_SANITIZED"])
    sys.modules["mmlm_fast._C"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["mmlm_fast._C"])

sys.path.append(str(Path(__file__).parent))  # for the package `support`; spawned workers get this path too

# Without a GPU the Triton kernels run in Triton's interpreter, on CPU tensors. Set before any kernel is imported.
INTERPRETED = not torch.cuda.is_available()
if INTERPRETED:
    os.environ["TRITON_INTERPRET"] = "1"
    from support import gpu_rounding, interpreter

    interpreter.install()
    if gpu_rounding.IS_ON:
        gpu_rounding.install()


# Begun first, so that no process of two is left alone with one of them at the end.
LONG = (
    "test_training_resume", "test_hf_whole_models", "test_audio_extractors", "test_interval_attention",
    "test_distributed", "test_second_turn", "test_global_state", "test_report", "test_presets", "test_adding_an_op",
)  # fmt: skip


@pytest.fixture
def device() -> str:
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture
def take():
    """A function that forces a path of the ops, by its name, for the rest of the test."""
    from mmlm_fast.ops.paths import Path, forced

    with ExitStack() as stack:
        yield lambda path: stack.enter_context(forced(Path[path.upper()]))


@pytest.fixture
def native(take):
    """However small inputs are, they take the native core: they would take plain PyTorch, and equal it by being it."""
    take("native")


@pytest.fixture(autouse=True)
def _seed_and_poison():
    """Fixed seed; torch.empty is filled with NaN, so an output left unwritten fails the test."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def pytest_addoption(parser):
    parser.addoption("--gpu-only", action="store_true", help="only tests that use the CUDA device, where there is one")


def pytest_report_header():
    missing = importlib.util.find_spec("soundfile") is None
    return "soundfile is not installed: synthetic voices in place of the recordings" if missing else None


def pytest_collection_finish(session):
    """What thousands of tests are made of stays to the end: each collection, such as Trainer's, need not look at it."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(config, items):
    if config.getoption("--gpu-only"):
        kept = [i for i in items if "device" in i.fixturenames or i.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=[i for i in items if i not in set(kept)])
        items[:] = kept
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
