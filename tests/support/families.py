"""What `accelerate` replaces in each family of models, as a table: ``python -m support.families --write``."""

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import transformers

import mmlm_fast
from support import tiny_models
from support.tiny_families import FAMILIES

FILE = Path(__file__).parents[2] / "docs" / "families.json"
PAGE = Path(__file__).parents[2] / "docs" / "accelerate.md"
BEGIN, END = "<!-- families -->\n", "<!-- /families -->"
MODELS = tiny_models.MODELS | FAMILIES
SHORT = {
    "language-model head": "head",
    "RMS norm": "norms",
    "sum and norm": "sums",
    "rotary embedding": "rotations",
    "gated MLP": "MLPs",
    "placeholder merge": "merge",
    "patch convolution": "patches",
    "M-RoPE positions": "M-RoPE",
    "pixel shuffle": "shuffle",
    "patch merger": "merger",
    "contrastive loss": "contrastive",
}


def found(name: str) -> dict[str, Any]:
    """Counts of a family's tiny model by kind: replaced, and left by reason. Its equality is what the tests prove."""
    with tiny_models.quiet():
        tiny = MODELS[name]()
        done = mmlm_fast.accelerate(tiny.build("sdpa"), strict=False, quiet=True)
    left: dict[str, dict[str, int]] = {}
    for refused in done.refused:
        reasons = left.setdefault(refused.kind, {})
        reasons[refused.reason] = reasons.get(refused.reason, 0) + 1
    return {"class": tiny.cls.__name__, "replaced": dict(Counter(r.kind for r in done.replaced)), "left": left}


def table(known: dict[str, Any]) -> str:
    """Markdown of the newest version, with what differs in the others."""
    newest, *others = sorted(known, key=lambda v: tuple(map(int, v.split(".")[:3])), reverse=True)
    kinds = list(dict.fromkeys(k for row in known[newest].values() for k in row["replaced"]))
    lines = [f"| model | {' | '.join(SHORT.get(k, k) for k in kinds)} | left |", "|---|" + "---|" * (len(kinds) + 1)]
    for row in known[newest].values():
        counts = [str(row["replaced"].get(kind, "")) for kind in kinds]
        left = "; ".join(f"{SHORT.get(k, k)}: {reason}" for k, reasons in row["left"].items() for reason in reasons)
        lines.append(f"| `{row['class']}` | {' | '.join(counts)} | {left} |")
    for version in others:
        different = [name for name, row in known[version].items() if row != known[newest].get(name)]
        names = ", ".join(f"`{known[version][n]['class']}` ({_change(known, newest, version, n)})" for n in different)
        lines += ["", f"Under transformers {version} the same" + (f", but for {names}." if names else ".")]
    return f"Under transformers {newest}, in models of two layers:\n\n" + "\n".join(lines) + "\n"


def _change(known: dict[str, Any], newest: str, version: str, name: str) -> str:
    old, new = (known[v].get(name, {"replaced": {}}) for v in (version, newest))
    kinds = {**old["replaced"], **new["replaced"]}
    changes = [k for k in kinds if old["replaced"].get(k, 0) != new["replaced"].get(k, 0)]
    return ", ".join(f"{SHORT.get(k, k)}: {old['replaced'].get(k, 0)}" for k in changes) or "for another reason"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m support.families", description=__doc__)
    parser.add_argument("--write", action="store_true", help="into docs/, beside the other versions of transformers")
    args = parser.parse_args(argv)
    known = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    known[transformers.__version__] = {name: found(name) for name in MODELS}
    if args.write:
        FILE.write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        page = PAGE.read_text(encoding="utf-8")
        head, _, rest = page.partition(BEGIN)
        PAGE.write_text(head + BEGIN + table(known) + END + rest.partition(END)[2], encoding="utf-8")
    else:
        print(table(known))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
