"""Write index.html, report.md and results.json of results."""

import json
import os
from pathlib import Path

from mmlm_benchmarks.learning import section
from mmlm_benchmarks.report import findings
from mmlm_benchmarks.report.page import GROUPS, METHOD, environment_lines, gpu_lines, page
from mmlm_benchmarks.report.schema import Results, Row
from mmlm_benchmarks.tables import markdown_table, or_dash

COLUMNS = ("case", "by", "median ms", "p20 – p80 ms", "ours is faster (95 %)", "peak MiB", "error", "of limit")


def write_report(results: Results, out: Path) -> None:
    """Write results.json, report.md and index.html into `out`, each whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    texts = {
        "results.json": json.dumps(results, indent=1, ensure_ascii=False) + "\n",
        "report.md": markdown(results),
        "index.html": page(results),
    }
    for name, text in texts.items():
        part = out / f".{name}.part"
        part.write_text(text, encoding="utf-8")
        os.replace(part, out / name)


def _cells(r: Row) -> tuple[str, ...]:
    faster = (
        f"{r['ours_faster']:.2f}× ({r['ours_faster_low']:.2f} – {r['ours_faster_high']:.2f})" if not r["ours"] else ""
    )
    return (
        r["case"],
        r["provider"],
        or_dash(r["median_ms"], ".3f"),
        f"{r['p20_ms']:.3f} – {r['p80_ms']:.3f}",
        faster,
        or_dash(r["peak_mib"], ".1f"),
        or_dash(r["relative_error"], ".1e"),
        or_dash(r["fraction_of_limit"], ".0%"),
    )


def markdown(results: Results) -> str:
    """Write the report as text that is fit for a pull request."""
    parts = ["# mmlm-fast report", ""]
    why = findings.busy(results)
    if not results["finished"]:
        parts += ["**This run was cut off; what follows is what was measured.**", ""]
    if why:
        parts += [f"**This machine was busy: {'; '.join(why)}.**", ""]
    elif findings.tiles(results):
        parts += [*(f"- **{number}** {what}" for number, what in findings.tiles(results)), ""]
    parts += [*(f"- {line}" for line in findings.sentences(results)), ""]
    if results.get("own"):
        own = results["own"]
        parts += [f"## {own['class']}", "", *(f"- {line}" for line in [*own["notes"], *own["accelerate"]]), ""]
        shares = [(s["what"], str(s["modules"]), f"{s['time']:.0%}", f"{s['memory']:.0%}") for s in own["shares"]]
        parts += [markdown_table(("what a module is", "modules", "time forward", "memory kept"), shares), ""]
    for group, title in GROUPS.items():
        rows = [r for r in results["rows"] if r["group"] == group]
        if rows:
            parts += [f"## {title}", "", f"Sizes: {'; '.join(dict.fromkeys(r['shape_from'] for r in rows))}.", ""]
            parts += [markdown_table(COLUMNS, [_cells(r) for r in rows]), ""]
    if results.get("learning"):
        parts += section.markdown_parts(results["learning"])
    if results["failures"]:
        parts += ["## Failures", "", *(f"- {f['case']}: {f['error']}" for f in results["failures"]), ""]
    if results["skipped"]:
        lines = [f"- {s['case']}: `{s['command']}`" for s in results["skipped"]]
        parts += ["## Not run for want of time", "", *lines, ""]
    if results["not_measured"]:
        first, *rest = gpu_lines(results)
        parts += ["## On a GPU", "", first, "", *(f"- {line}" for line in rest), ""]
    parts += ["## Machine", "", markdown_table(("what", "found"), environment_lines(results)), ""]
    parts += ["## How it is measured", "", METHOD, ""]
    return "\n".join(parts)
