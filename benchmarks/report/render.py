"""results.json to index.html (self-contained) and report.md."""

import base64
import html
import io
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmlm_benchmarks.learning import section
from mmlm_benchmarks.ops import OPS
from mmlm_benchmarks.report.measure import sample_features
from mmlm_fast.data import load_image, load_prompts, load_speech

GROUPS = {
    "audio": "Audio features",
    **{op: op for op in OPS},
    "model": "The thin model",
}
COLUMNS = ("case", "by", "median ms", "p20 – p80 ms", "speed-up", "ours is faster", "peak MiB", "error", "of limit")
CSS = """
body{font:16px/1.5 system-ui,sans-serif;color:#1b1b1b;max-width:1000px;margin:2rem auto;padding:0 1rem}
h1{margin-bottom:0}h2{margin-top:2.5rem;border-bottom:1px solid #ccc}table{border-collapse:collapse;font-size:14px}
td,th{padding:.25rem .6rem;border-bottom:1px solid #e3e3e3;text-align:left;vertical-align:top}
td.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}tr.ours{background:#e8f3ee;font-weight:600}
.wide{overflow-x:auto}img{max-width:100%;height:auto}figure{margin:1rem 0}figcaption{color:#555;font-size:14px}
.bad{color:#a40000;font-weight:600}.tiles{display:flex;flex-wrap:wrap;gap:1rem;margin:1rem 0}
.lines td{white-space:nowrap}
.gallery{display:flex;flex-wrap:wrap;gap:1rem}.gallery figure{width:9rem;margin:0}
.gallery img{width:64px;image-rendering:pixelated}
.tile{border:1px solid #ccc;border-radius:8px;padding:.6rem 1rem;min-width:9rem}.tile b{display:block;font-size:1.6rem}
"""
Rows = list[dict[str, Any]]


def write_report(results: dict[str, Any], out: Path) -> None:
    """Write results.json, report.md and index.html into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (out / "report.md").write_text(markdown(results), encoding="utf-8")
    (out / "index.html").write_text(page(results), encoding="utf-8")


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _range(r: dict[str, Any]) -> str:
    if r["ours"]:
        return ""
    return f"{r['ours_faster']:.2f}× ({r['ours_faster_p20']:.2f} – {r['ours_faster_p80']:.2f})"


def _cells(r: dict[str, Any]) -> tuple[str, ...]:
    return (
        r["case"],
        r["provider"],
        _number(r["median_ms"], ".3f"),
        f"{r['p20_ms']:.3f} – {r['p80_ms']:.3f}",
        f"{r['speedup']:.2f}×",
        _range(r),
        _number(r["peak_mib"], ".1f"),
        _number(r["relative_error"], ".1e"),
        _number(r["fraction_of_limit"], ".0%"),
    )


def markdown_table(header: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    rule = "|".join(["---", "---", *["---:"] * (len(header) - 2)])
    return "\n".join([f"| {' | '.join(header)} |", f"|{rule}|", *(f"| {' | '.join(line)} |" for line in lines)])


def summary(results: dict[str, Any]) -> list[str]:
    """Sentences that a reader in a hurry needs, losses included."""
    ours = [r for r in results["rows"] if r["ours"]]
    wins = [r for r in ours if r["speedup_p20"] > 1.05]
    losses = [r for r in ours if r["speedup_p80"] < 0.95]
    lines = [f"{len(ours)} cases, each checked against float64 before it was timed; {len(results['failures'])} failed."]
    if ours:
        even = len(ours) - len(wins) - len(losses)
        lines.append(f"Faster than the baseline in {len(wins)}, slower in {len(losses)}, within noise in {even}.")
    for r in sorted(losses, key=lambda r: r["speedup"]):
        lines.append(f"Slower: {r['case']}, {r['speedup']:.2f}×.")
    beaten = [
        f"{r['case']} ({r['provider']}, {1 / r['ours_faster']:.2f}× as fast as ours)"
        for r in results["rows"]
        if not r["ours"] and r["ours_faster_p80"] < 0.95
    ]
    if beaten:
        lines.append("An alternative is clearly faster in: " + "; ".join(beaten) + ".")
    if results["generation"]:
        same = sum(g["equal"] for g in results["generation"])
        total = len(results["generation"])
        lines.append(f"Greedy generation, fast against reference: {same} of {total} fusions identical token by token.")
    return lines


def environment_lines(results: dict[str, Any]) -> list[tuple[str, str]]:
    e = results["environment"]
    rates = results.get("machine", {})
    return [
        ("device", f"{e['device']}, {e['cores']} cores, {e['threads']} threads, {e['isa']}"),
        ("load average at the start", str(e["load_average"])),
        (
            "rates measured",
            f"copy {rates.get('copy_gb_per_s')} GB/s, matrix product {rates.get('matmul_gflop_per_s')} GFLOP/s",
        ),
        ("date, commit", f"{e['date']}, {e['commit']}"),
        ("mmlm_fast, Python", f"{e['mmlm_fast']}, {e['python']}"),
        ("packages", ", ".join(f"{k} {v}" for k, v in e["packages"].items())),
    ]


def gpu_lines(results: dict[str, Any]) -> list[str]:
    last = results.get("last_gpu_result")
    told = "No GPU result is committed yet."
    if last:
        told = f"The last committed GPU result: {last['device']}, {last['date']}, {last['file']}."
    return ["These rows need a GPU and were not measured here. " + told, *results["not_measured"]]


def markdown(results: dict[str, Any]) -> str:
    parts = ["# mmlm-fast report", "", *(f"- {line}" for line in summary(results)), ""]
    for group, title in GROUPS.items():
        rows = [r for r in results["rows"] if r["group"] == group]
        if rows:
            parts += [f"## {title}", "", f"Sizes: {'; '.join(dict.fromkeys(r['shape_from'] for r in rows))}.", ""]
            parts += [markdown_table(COLUMNS, [_cells(r) for r in rows]), ""]
    if results.get("learning"):
        parts += section.markdown_parts(results["learning"])
    if results["failures"]:
        parts += ["## Failures", "", *(f"- {f['case']}: {f['error']}" for f in results["failures"]), ""]
    if results["not_measured"]:
        first, *rest = gpu_lines(results)
        parts += ["## Needs a GPU", "", first, "", *(f"- {line}" for line in rest), ""]
    parts += ["## Machine", "", markdown_table(("what", "found"), environment_lines(results)), ""]
    return "\n".join(parts)


def _table(rows: Rows) -> str:
    head = "".join(f"<th>{c}</th>" for c in COLUMNS)
    body, last = [], None
    for r in rows:
        case, provider, *numbers = _cells(r)
        shown = html.escape(case) if case != last else ""
        last = case
        cells = "".join(f"<td class=n>{n}</td>" for n in numbers)
        body.append(
            f"<tr{' class=ours' if r['ours'] else ''}><td>{shown}</td><td>{html.escape(provider)}</td>{cells}</tr>"
        )
    return f"<div class=wide><table><tr>{head}</tr>{''.join(body)}</table></div>"


def _figure(png: bytes, caption: str) -> str:
    data = base64.b64encode(png).decode()
    text = html.escape(caption)
    return f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'


def _list(lines: list[str]) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"


def _inputs_section() -> str:
    from mmlm_benchmarks.report import plots

    picture, caption = load_image()
    buffer = io.BytesIO()
    picture.resize((224, 224)).save(buffer, "PNG")
    speech = features = ""
    if find_spec("soundfile"):  # jobs without audio are reported without it
        rows = "".join(
            f"<tr><td>{s.language}</td><td>{len(s.waveform) / s.sampling_rate:.1f} s</td>"
            f"<td>{html.escape(s.text)}</td></tr>"
            for s in load_speech()
        )
        speech = f"<table><tr><th>speech</th><th>length</th><th>transcript</th></tr>{rows}</table>"
        speech += "<p>Speech: Asterisk core sounds, CC-BY-SA-3.0. Prompts:</p>"
        features = _figure(plots.features(sample_features()), "Log-mel features from the native core, and their error")
    return (
        "<h2>The input</h2><p>Real speech, a real picture and real text, shipped with the package.</p>"
        + _figure(buffer.getvalue(), f"{caption} (NASA, public domain)")
        + (speech or "<p>Prompts (soundfile, which reads the speech, is not installed):</p>")
        + _list(load_prompts())
        + features
    )


def _tiles(results: dict[str, Any]) -> str:
    tiles = []
    for group, title in GROUPS.items():
        ours = [r for r in results["rows"] if r["group"] == group and r["ours"]]
        if ours:
            low, high = min(r["speedup"] for r in ours), max(r["speedup"] for r in ours)
            tiles.append(f"<div class=tile><b>{low:.1f} – {high:.1f}×</b>{title}, {len(ours)} cases</div>")
    return f"<div class=tiles>{''.join(tiles)}</div>"


def page(results: dict[str, Any]) -> str:
    """The whole report as one HTML file without outside references."""
    from mmlm_benchmarks.report import plots

    rows = results["rows"]
    parts = [
        "<h1>mmlm-fast report</h1>",
        f"<p>{html.escape(environment_lines(results)[0][1])}, {results['environment']['date']}</p>",
    ]
    parts += [_tiles(results), _list(summary(results))]
    if results["failures"]:
        failures = [f"{f['case']}: {f['error']}" for f in results["failures"]]
        parts.append(f"<h2 class=bad>Failures</h2>{_list(failures)}")
    parts.append(_inputs_section())
    audio, others = [r for r in rows if r["group"] == "audio"], [r for r in rows if r["group"] != "audio"]
    if audio:
        parts.append("<h2>Audio features</h2>")
        parts.append(_figure(plots.peers(audio), "Every peer that is installed, on the same clips in the same run"))
        if results["scaling"]:
            parts.append(_figure(plots.scaling(results["scaling"]), "From one second to ten minutes"))
        parts.append(_table(audio))
    for group, title in list(GROUPS.items())[1:]:
        chosen = [r for r in rows if r["group"] == group]
        if chosen:
            sizes = "; ".join(dict.fromkeys(r["shape_from"] for r in chosen))
            parts.append(f"<h2>{title}</h2><p>Sizes: {html.escape(sizes)}.</p>")
            parts.append(
                _figure(
                    plots.speedups(chosen, title),
                    "Median of paired ratios; whiskers from the 20th to the 80th percentile",
                )
            )
            parts.append(_table(chosen))
    if results.get("memory"):
        parts.append("<h2>Memory of the contrastive losses</h2>")
        parts.append(_figure(plots.batch_memory(results["memory"]), "Linear in the batch, where the formula is square"))
    if results["generation"]:
        lines = [f"fusion {g['fusion']}: {'identical' if g['equal'] else 'DIFFERENT'}" for g in results["generation"]]
        parts.append(f"<h3>Greedy generation, fast against reference</h3>{_list(lines)}")
    if results.get("learning"):
        parts += section.html_parts(results["learning"], _figure)
    if rows and results.get("machine"):
        parts.append("<h2>Limits and memory</h2>")
        if any(r["flops"] and r["bytes_moved"] for r in rows):
            parts.append(
                _figure(plots.roofline(rows, results["machine"]), "Each case under the rates measured on this machine")
            )
        if any(r["peak_mib"] is not None for r in rows):
            parts.append(_figure(plots.memory(audio + others), "Resident memory a call adds at its peak"))
    if results["not_measured"]:
        first, *rest = gpu_lines(results)
        parts.append(f"<h2>Needs a GPU</h2><p>{html.escape(first)}</p>{_list(rest)}")
    table = "".join(f"<tr><th>{a}</th><td>{html.escape(b)}</td></tr>" for a, b in environment_lines(results))
    parts.append(f"<h2>The machine</h2><table>{table}</table>")
    parts.append(
        "<h2>How it is measured</h2><p>First every provider's result is compared with the reference in float64: ours "
        "may err at most twice as much as the reference in its own precision, and on audio at most as much as "
        "transformers. Then every other provider is timed in turn with ours, on rotating inputs; “ours is faster” is "
        "the median of the ratios of neighbouring calls, with the 20th and 80th percentile. Then one call's peak "
        "memory. “Of limit” is the time that the bytes and flops of the job need at the rates measured here on as many "
        "threads, over the time taken; the rates are themselves a measurement, so it can pass 100 %.</p>"
    )
    body = "\n".join(parts)
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>mmlm-fast report</title>'
    return f'<!doctype html><html lang="en">{head}<style>{CSS}</style><body>{body}</body></html>\n'
