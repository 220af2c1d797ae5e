"""Committed ratios of a kind of machine, which `mmlm-fast report --against` compares with.

python -m mmlm_benchmarks.report.baseline report/results.json    # keeps a report's ratios as the baseline
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from mmlm_benchmarks.report.measure import RESULTS

FOLDER = RESULTS / "baselines"
KEPT = ("device", "device_type", "threads", "isa", "date", "commit", "packages", "load_average", "others_load")


def ratios(results: dict[str, Any]) -> dict[str, Any]:
    """What `findings.slower_than` asks for, and where it is from.

    Raises:
        ValueError: where a case failed, or the report did not end.
    """
    if results["failures"] or not results["finished"]:
        raise ValueError("a report that did not end, or with cases that failed, is no baseline")
    rows = [
        {"case": r["case"], "provider": r["provider"], "ours": False, "ours_faster": round(r["ours_faster"], 3)}
        for r in results["rows"]
        if not r["ours"]
    ]
    accelerated = [
        {"case": r["case"], "shape": r["shape"], "speedup": round(r["speedup"], 3)} for r in results["accelerated"]
    ]
    environment = {key: results["environment"].get(key) for key in KEPT}
    return {"environment": environment, "rows": rows, "accelerated": accelerated}


def committed(environment: dict[str, Any], folder: Path = FOLDER) -> Path:
    """The newest file of a machine like this.

    Raises:
        ValueError: where there is none.
    """
    found = [
        (path, json.loads(path.read_text(encoding="utf-8"))["environment"]) for path in sorted(folder.glob("*.json"))
    ]
    here = [(e["date"], path) for path, e in found if _kind(e) == _kind(environment)]
    if not here:
        others = "; ".join(sorted({"{} with {} threads".format(*_kind(e)) for _, e in found})) or "none at all"
        raise ValueError(
            "no committed baseline is of {} with {} threads ({}): give --against a results.json of this machine".format(
                *_kind(environment), others
            )
        )
    return max(here)[1]


def _kind(environment: dict[str, Any]) -> tuple[str, int]:
    return environment["device"], environment["threads"]


def main(argv: list[str] | None = None) -> int:
    """Write the baseline of a report; returns 0."""
    parser = argparse.ArgumentParser(prog="python -m mmlm_benchmarks.report.baseline", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("results", type=Path, help="results.json of a report, better of one with all cases")
    kept = ratios(json.loads(parser.parse_args(argv).results.read_text(encoding="utf-8")))
    name = re.sub(r"[^a-z0-9]+", "-", kept["environment"]["device"].lower()).strip("-")
    path = FOLDER / f"{name}-{kept['environment']['threads']}-threads.json"
    path.parent.mkdir(exist_ok=True)
    lines = [f'"environment": {json.dumps(kept["environment"])}']
    for part in ("rows", "accelerated"):  # one line a case, so that a change reads as one
        lines.append(f'"{part}": [\n' + ",\n".join(f"  {json.dumps(row)}" for row in kept[part]) + "\n]")
    path.write_text("{" + ",\n".join(lines) + "}\n", encoding="utf-8")
    print(f"{path}: {len(kept['rows'])} ratios")
    return 0


if __name__ == "__main__":
    sys.exit(main())
