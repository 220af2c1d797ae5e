"""Keep ratios of a kind of machine, which `mmlm-fast report --against` compares with.

python -m mmlm_benchmarks.report.baseline report/results.json    # keeps a report's ratios as the baseline
"""

import argparse
import json
import re
import sys
from pathlib import Path

from mmlm_benchmarks.report.findings import gain
from mmlm_benchmarks.report.measure import RESULTS
from mmlm_benchmarks.report.schema import (
    Baseline,
    BaselineAccelerated,
    BaselineEnvironment,
    BaselineRow,
    Environment,
    Results,
)

FOLDER = RESULTS / "baselines"


def ratios(results: Results) -> Baseline:
    """Return what `findings.slower_than` asks for, and where it is from.

    Raises:
        ValueError: where a case failed, or the report did not end.
    """
    if results["failures"] or not results["finished"]:
        raise ValueError("a report that did not end, or with cases that failed, is no baseline")
    rows: list[BaselineRow] = [
        {"case": r["case"], "provider": r["provider"], "ours": False, "ours_faster": round(gain(r), 3)}
        for r in results["rows"]
        if not r["ours"]
    ]
    accelerated: list[BaselineAccelerated] = [
        {"case": r["case"], "shape": r["shape"], "speedup": round(r["speedup"], 3)} for r in results["accelerated"]
    ]
    e = results["environment"]
    environment: BaselineEnvironment = {
        "device": e["device"],
        "device_type": e["device_type"],
        "threads": e["threads"],
        "isa": e["isa"],
        "date": e["date"],
        "commit": e["commit"],
        "packages": e["packages"],
        "load_average": e["load_average"],
        "others_load": e.get("others_load"),
    }
    return {"environment": environment, "rows": rows, "accelerated": accelerated}


def committed(environment: Environment, folder: Path = FOLDER) -> Path:
    """Find the newest file of a machine like this.

    Raises:
        ValueError: where there is none.
    """
    environments: dict[Path, BaselineEnvironment] = {
        path: json.loads(path.read_text(encoding="utf-8"))["environment"] for path in sorted(folder.glob("*.json"))
    }
    alike = [(e["date"], path) for path, e in environments.items() if _kind(e) == _kind(environment)]
    if not alike:
        kinds = sorted({"{} with {} threads".format(*_kind(e)) for e in environments.values()})
        others = "; ".join(kinds) or "none at all"
        raise ValueError(
            "no committed baseline is of {} with {} threads ({}): give --against a results.json of this machine".format(
                *_kind(environment), others
            )
        )
    return max(alike)[1]


def _kind(environment: Environment | BaselineEnvironment) -> tuple[str, int]:
    return environment["device"], environment["threads"]


def main(argv: list[str] | None = None) -> int:
    """Write the baseline of a report; returns 0."""
    parser = argparse.ArgumentParser(prog="python -m mmlm_benchmarks.report.baseline", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("results", type=Path, help="results.json of a report, better of one with all cases")
    baseline = ratios(json.loads(parser.parse_args(argv).results.read_text(encoding="utf-8")))
    name = re.sub(r"[^a-z0-9]+", "-", baseline["environment"]["device"].lower()).strip("-")
    path = FOLDER / f"{name}-{baseline['environment']['threads']}-threads.json"
    path.parent.mkdir(exist_ok=True)
    lines = [f'"environment": {json.dumps(baseline["environment"])}']
    for part, rows in (("rows", baseline["rows"]), ("accelerated", baseline["accelerated"])):
        one_a_line = ",\n".join(f"  {json.dumps(row)}" for row in rows)  # so that a change reads as one
        lines.append(f'"{part}": [\n{one_a_line}\n]')
    path.write_text("{" + ",\n".join(lines) + "}\n", encoding="utf-8")
    print(f"{path}: {len(baseline['rows'])} ratios")
    return 0


if __name__ == "__main__":
    sys.exit(main())
