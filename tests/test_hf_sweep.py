"""`accelerate` on every model class of transformers: never worse than refused."""

import json

import pytest
import transformers

from support import sweep


def test_the_committed_tables_have_no_failure():
    """`make sweep`, under each version of transformers that docs/sweep names."""
    tables = list(sweep.FOLDER.glob("*.json"))
    assert tables
    for table in tables:
        rows = json.loads(table.read_text(encoding="utf-8"))
        assert len(rows) > 1000
        assert not [m for m, row in rows.items() if "failed" in row or row.get("forward", "").startswith("differs")]
        assert sum(row.get("forward") == "equal" for row in rows.values()) > 150


@pytest.mark.slow
def test_every_class():
    """A quarter of an hour."""
    assert sweep.main([]) == 0


@pytest.mark.parametrize(
    "name",
    ["OPTModel", "DogeModel", pytest.param("T5ForConditionalGeneration", marks=pytest.mark.slow), "ElectraModel"],
)
def test_some_classes(name, capsys):
    """Of one that reads its attention mask, a decoder, an encoder, and one of both."""
    if not hasattr(transformers, name):
        pytest.skip(f"this version has no {name}")
    assert sweep.main([name]) == 0, capsys.readouterr().out
