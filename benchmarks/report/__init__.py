"""Run everything on real input, check, time, and write index.html, report.md and results.json."""
