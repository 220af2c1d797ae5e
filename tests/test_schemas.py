"""What exported graphs and saved programs name: every op, with its schema, as it was released.

`make schemas` adds the lines of new ops to the list; it changes and drops none.
"""

import subprocess
import sys
from pathlib import Path

SCHEMAS = Path(__file__).with_name("schemas.txt")

PRINT = """
import torch, mmlm_fast.audio, mmlm_fast.hf, mmlm_fast.models, mmlm_fast.nn, mmlm_fast.ops
for name in sorted(n for n in torch._C._dispatch_get_all_op_names() if n.startswith("mmlm_fast::")):
    print(torch._C._get_schema(name.partition(".")[0], name.partition(".")[2]))
"""


def registered() -> list[str]:
    done = subprocess.run([sys.executable, "-P", "-c", PRINT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [line for line in done.stdout.splitlines() if line.startswith("mmlm_fast::")]


def test_schemas_are_those_of_the_list():
    """A change here breaks who has exported a model: add an op of another name instead, and `make schemas`."""
    assert registered() == SCHEMAS.read_text(encoding="utf-8").splitlines()


def main() -> None:
    known = SCHEMAS.read_text(encoding="utf-8").splitlines()
    names = {line.partition("(")[0] for line in known}
    new = [line for line in registered() if line.partition("(")[0] not in names]
    SCHEMAS.write_text("".join(f"{line}\n" for line in sorted([*known, *new])), encoding="utf-8")
    print("\n".join(new) or "no new op")


if __name__ == "__main__":
    main()
