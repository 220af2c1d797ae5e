"""Facts: JSON lines, each appended in one write the moment it is known, so that a kill at any time loses none."""

import json
import math
import os
import time
from pathlib import Path
from typing import Any

START = "MMLM_GPU_START"  # environment: when the suite began, seconds since the epoch


class Facts:
    """Appends facts to a file that other processes append to as well."""

    def __init__(self, path: str | Path, **always: Any) -> None:
        self.path = Path(path)
        self.always = always
        self.start = float(os.environ.get(START, time.time()))
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        if not _ends_a_line(self.path):  # the last writer was killed in the middle: its line must not swallow ours
            os.write(self._file, b"\n")

    def write(self, kind: str, **fields: Any) -> dict[str, Any]:
        """Append one fact: its kind, the second of the suite, what the writer always says, and `fields`."""
        fact = {"kind": kind, "second": round(time.time() - self.start, 2), **self.always, **fields}
        line = json.dumps(_plain(fact), allow_nan=False)
        os.write(self._file, f"{line}\n".encode())
        return fact


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return True
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _plain(value: Any) -> Any:
    """JSON knows neither NaN nor infinity: they become words."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if isinstance(value, str | int | bool | type(None)) else str(value)


def read(path: str | Path) -> list[dict[str, Any]]:
    """Return all facts of a file; a line that a kill cut off is passed over.

    Raises:
        ValueError: if the file holds not a single fact.
    """
    facts = []
    for line in Path(path).read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            fact = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(fact, dict) and "kind" in fact:
            facts.append(fact)
    if not facts:
        raise ValueError(f"{path} holds no fact: expected JSON lines as `benchmarks/gpu_suite.sh` writes them")
    return facts
