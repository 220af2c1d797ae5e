"""`python -m mmlm_benchmarks.gpu FACTS`: what to mend; results and README's GPU table from facts of a GPU."""

import argparse
import json
import sys
from pathlib import Path

from mmlm_benchmarks import readme
from mmlm_benchmarks.gpu import summary
from mmlm_benchmarks.gpu.facts import read
from mmlm_benchmarks.report.measure import RESULTS


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns 0, or 1 where something broke on the GPU, or 2 where the facts cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m mmlm_benchmarks.gpu", description=__doc__)
    parser.add_argument(
        "facts", type=Path, nargs="+", help="facts.jsonl as the suite wrote it; of several calls, in their order"
    )
    parser.add_argument("--only-mend", action="store_true", help="print what to mend; write nothing")
    parser.add_argument("--onto", type=Path, help="earlier results of this card: what was not measured again stays")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)")
    parser.add_argument("--readme", type=Path, default=readme.README, help="whose GPU table is made anew")
    options = parser.parse_args(argv)
    try:
        facts = summary.merged([read(path) for path in options.facts])
        lines, good = summary.what_to_mend(facts)
        print("\n".join(lines))
        if not options.only_mend:
            results = summary.results_of_a_gpu(facts)
            if options.onto:
                results = summary.onto(json.loads(options.onto.read_text(encoding="utf-8")), results)
            # Before anything is written: an installed package has no README.
            text = options.readme.read_text(encoding="utf-8")
            path = summary.write_results(results, options.out)
            options.readme.write_text(readme.with_tables(text, options.out), encoding="utf-8")
            print(f"\n{path}\n{options.readme}: its tables are made anew")
    except (OSError, ValueError) as error:
        print(f"python -m mmlm_benchmarks.gpu: {error}", file=sys.stderr)
        return 2
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
