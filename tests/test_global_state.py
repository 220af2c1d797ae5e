"""A default device or dtype, modes, transforms and numpy's error state change no result, and nothing of them stays.

Every function in every state, see `global_state.py`: the result is that without the state, bit for bit, and it is after
it; where torch refuses the input in that state (a real tensor among fake ones), an exception comes, never a crash.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from global_state import ALL_STATES, ORDERS


@pytest.fixture(scope="module")
def found():
    script = Path(__file__).parent / "global_state.py"
    command = [sys.executable, "-P", str(script), "audio", *ALL_STATES]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_functions_run(found):
    assert not found["without"]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("state", ALL_STATES)
def test_audio(state, order, found):
    wrong = found[f"{state} {order}"]
    assert not wrong, "\n".join(f"{name}: {told}" for name, told in wrong.items())
