"""The report: run everything on real input, check, time, and write index.html, report.md and results.json."""

from mmlm_benchmarks.report.measure import Options, collect
from mmlm_benchmarks.report.render import write_report

__all__ = ["Options", "collect", "write_report"]
