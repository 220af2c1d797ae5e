"""What was broken on purpose: tests/mutations.toml applies to the code as it is, and its tool tells the truth."""

import re
from dataclasses import replace

import pytest

from support import mutations
from support.mutations import Mutation

PASSES = "tests/test_paths.py -k what_is_no_path"
MESSAGE = Mutation(
    "forced: its message",
    "mmlm_fast/ops/paths.py",
    'raise ValueError(f"path must be one of',
    'raise ValueError(f"way must be one of',
    PASSES,
    {},
)


def test_every_mutation_still_applies(capsys):
    assert mutations.main(["--check"]) == 0, capsys.readouterr().out


@pytest.mark.slow
def test_what_is_seen_and_what_survives(capsys):
    """A survivor, a test that is red without it, one that picks nothing, one that does not apply any more."""
    chosen = [
        MESSAGE,
        replace(MESSAGE, name="survivor", find="None: each op's own choice", replace="None: each op's choice"),
        replace(MESSAGE, name="picks nothing", test="tests/test_paths.py -k nothing_of_the_kind"),
        replace(MESSAGE, name="stale", find="raise NoSuchError("),
    ]
    assert mutations.run(chosen) == 3
    told = re.sub(r" in \d+ s", "", capsys.readouterr().out)
    assert "[1/4] seen: forced: its message" in told
    assert "[2/4] survived: survivor" in told
    assert "[3/4] RED WITHOUT IT: picks nothing" in told
    assert "[4/4] STALE: stale" in told
    assert told.endswith("1 of 4 mutations were seen\n")


def test_names_differ(tmp_path):
    table = tmp_path / "table.toml"
    entry = '[[mutation]]\nname = "a"\nfile = "b"\nfind = "c"\nreplace = "d"\ntest = "e"\n'
    table.write_text(2 * entry)
    with pytest.raises(ValueError, match="names must differ, got twice: a"):
        mutations.mutations(table)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"file": "mmlm_fast/none.py"}, "mmlm_fast/none.py does not exist"),
        ({"find": "def "}, "holds the text [0-9]+ times, wanted once"),
        ({"replace": MESSAGE.find}, "it changes nothing"),
        ({"test": "tests/test_none.py::test_a"}, "no such test: tests/test_none.py::test_a"),
    ],
)
def test_faults(change, fault):
    assert MESSAGE.fault() == ""
    assert re.search(fault, replace(MESSAGE, **change).fault())
