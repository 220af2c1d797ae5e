"""A default device or dtype, modes, transforms and numpy's error state change no result, and nothing of them stays.

Every function in every state, see `support/global_state.py`: the result is that without the state, bit for bit, and it
is after it; where torch refuses the input in that state (a real tensor among fake ones), an exception comes, never a
crash.
"""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from support.global_state import ALL_STATES, ORDERS

# Casting is what ops do under autocast.
STATES_OF = {"audio": ALL_STATES, "ops": tuple(s for s in ALL_STATES if s != "autocast")}


@functools.cache
def found():
    script = Path(__file__).parent / "support/global_state.py"
    command = [sys.executable, "-P", str(script), json.dumps(STATES_OF)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("what", STATES_OF)
def test_functions_run(what):
    assert not found()[what]["without"]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("what", "state"), [(w, s) for w, states in STATES_OF.items() for s in states])
def test_state(what, state, order):
    wrong = found()[what][f"{state} {order}"]
    assert not wrong, "\n".join(f"{name}: {told}" for name, told in wrong.items())
