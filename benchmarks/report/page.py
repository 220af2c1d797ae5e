"""Write the HTML page of a report: one file without outside references, for a phone, a laptop and a printer."""

import base64
import html
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any

from mmlm_benchmarks.learning import section
from mmlm_benchmarks.ops import OPS
from mmlm_benchmarks.report import findings
from mmlm_benchmarks.report.measure import sample_features
from mmlm_benchmarks.report.schema import Accelerated, Own, Results, Row
from mmlm_benchmarks.tables import or_dash, rounded
from mmlm_fast.data import load_image, load_prompts, load_speech

GROUPS = {"audio": "Audio features", "model": "The thin model", **{op: op for op in OPS}}
COLUMNS = (
    ("case", ""),
    ("by", "who computes it"),
    ("ms", "median of one call"),
    ("ours is faster", "the other's time over ours: median of neighbouring calls, 95 % interval of that median"),
    ("peak MiB", "memory of one call beyond what was held before it"),
    ("error", "against float64, relative"),
    ("of limit", "time that its bytes and flops need at this machine's rates, over the time taken"),
)
CSS = """
:root{--ink:#1b1b1b;--soft:#5a5a5a;--line:#d5d5d5;--paper:#fff;--ours:#0b6e4f;--lost:#b3261e;--tint:#e8f3ee;
--warn:#fff2cc}@media(prefers-color-scheme:dark){:root{--ink:#e8e8e8;--soft:#a8a8a8;--line:#444;--paper:#161616;
--ours:#46c39a;--lost:#ff8a80;--tint:#1d3229;--warn:#4a3c00}}*{box-sizing:border-box}body{
font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:1100px;margin:1.5rem auto;
padding:0 1rem}h1{margin:0;font-size:1.6rem}h2{margin:2.2rem 0 .6rem;font-size:1.25rem;
border-bottom:1px solid var(--line)}a{color:inherit}.soft{color:var(--soft);font-size:.9rem}.warn{
background:var(--warn);padding:.7rem 1rem;border-radius:6px;margin:1rem 0}.bad{color:var(--lost);
font-weight:600}.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(11rem,1fr));gap:.7rem;
margin:1rem 0}.tile{border:1px solid var(--line);border-radius:8px;padding:.6rem .8rem;font-size:.9rem}.tile b{
display:block;font-size:1.4rem}nav{font-size:.9rem;margin:.8rem 0}nav a{margin-right:.9rem;white-space:nowrap}
.bars{margin:.6rem 0}.bar{display:grid;grid-template-columns:minmax(9rem,21rem) 1fr 9rem;gap:.6rem;
align-items:center;font-size:.85rem;padding:.15rem 0;border-bottom:1px dotted var(--line)}.track{
position:relative;height:1.1rem}.track i,.track s,.track u{position:absolute;top:0;bottom:0;display:block;
text-decoration:none}.track i{background:var(--ours);border-radius:2px}.track i.lost{background:var(--lost)}
.track u{border-left:1.5px solid var(--ink)}.track s{top:.48rem;bottom:.48rem;background:var(--ink)}.bar b{
font-variant-numeric:tabular-nums;text-align:right}.wide{overflow-x:auto}table{border-collapse:collapse;
font-size:.85rem;width:100%}td,th{padding:.25rem .5rem;border-bottom:1px solid var(--line);text-align:left;
vertical-align:top}th[title]{cursor:pointer}td.n{text-align:right;font-variant-numeric:tabular-nums;
white-space:nowrap}td:first-child{min-width:11rem}td.text{min-width:7rem}tr.ours{background:var(--tint)}figure{
margin:1rem 0}img{max-width:100%;height:auto;background:#fff}code{font-size:.85em}figcaption{color:var(--soft);
font-size:.85rem}input{font:inherit;color:inherit;background:var(--paper);border:1px solid var(--line);
padding:.3rem .5rem;width:100%;max-width:20rem}@media(max-width:640px){.bar{grid-template-columns:1fr 4.8rem}
.bar .track{grid-row:2;grid-column:1/3}.bar b{grid-column:2}}@media print{body{max-width:none;font-size:11px;
margin:0}.wide{overflow:visible}input,nav{display:none}h2{break-after:avoid}tr,.bar,figure{break-inside:avoid}
details>*{display:block}}
"""
SCRIPT = """
document.querySelectorAll("table.data").forEach(t => {
  const body = t.tBodies[0];
  t.tHead.querySelectorAll("th").forEach((h, i) => h.onclick = () => {
    const value = r => r.cells[i].dataset.v === undefined ? r.cells[i].textContent : +r.cells[i].dataset.v;
    const up = h.dataset.up = h.dataset.up === "1" ? "-1" : "1";
    const order = (x, y) => (value(x) < value(y) ? -1 : value(x) > value(y) ? 1 : 0) * up;
    [...body.rows].sort(order).forEach(r => body.append(r));
  });
});
const find = document.querySelector("#find");
find.oninput = () => document.querySelectorAll("table.data tbody tr, .bar").forEach(r => {
  r.style.display = r.textContent.toLowerCase().includes(find.value.toLowerCase()) ? "" : "none";
});
"""
Bar = tuple[str, float, tuple[float, float] | None]  # label, ratio, its interval


def page(results: Results) -> str:
    """Write the whole report as one HTML file."""
    e = results["environment"]
    parts = [
        "<h1>mmlm-fast report</h1>",
        f"<p class=soft>{_text(e['device'])}, {e['threads']} threads, {e['date']}</p>",
    ]
    why = findings.busy(results)
    if not results["finished"]:
        parts.append(
            "<p class=warn>This run was cut off; here is what was measured. <code>--resume</code> goes on.</p>"
        )
    if why:
        parts.append(
            f"<p class=warn>This machine was busy: {_text('; '.join(why))}. Headlines are withheld; ratios below come "
            "from neighbouring calls, but their spread is large.</p>"
        )
    else:
        tiles = [f"<div class=tile><b>{_text(n)}</b>{_text(what)}</div>" for n, what in findings.tiles(results)]
        parts.append(f"<div class=tiles>{''.join(tiles)}</div>")
    parts.append(_list(findings.sentences(results)))
    if results["failures"]:
        failures = [f"{f['case']}: {f['error']}" for f in results["failures"]]
        parts.append(f"<h2 class=bad>Failures</h2>{_list(failures)}")
    sections = list(_sections(results))
    links = " ".join(f'<a href="#{_anchor(title)}">{_text(title)}</a>' for title, _ in sections)
    parts.append(
        f'<nav>{links}</nav><input id=find type=search placeholder="show rows with …" aria-label="filter rows">'
    )
    parts += [f'<h2 id="{_anchor(title)}">{_text(title)}</h2>{body}' for title, body in sections]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
    head += f"<title>mmlm-fast report</title><style>{CSS}</style>"
    body = "\n".join(parts)
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}<script>{SCRIPT}</script></body></html>\n'


def _sections(results: Results) -> Iterator[tuple[str, str]]:
    """Yield title and body of each section."""
    from mmlm_benchmarks.report import plots

    rows = results["rows"]
    if results.get("own"):
        yield from _own(results["own"])
    comparisons = findings.compared(results)
    if comparisons:
        bars = [(f"{c.ours['case']}, against {c.best['provider']}", c.ratio, c.interval) for c in comparisons]
        about = (
            "Times as fast as the best alternative, worst first, with the 95 % interval; left of the line it is slower."
        )
        yield "Every case", f"<p class=soft>{about}</p>{ratio_bars(bars)}"
    if results["accelerated"]:
        title = "Before and after" if results.get("own") else "Hugging Face model"
        yield title, _accelerated(results["accelerated"], bool(results.get("own")))
    for group, title in GROUPS.items():
        chosen = [r for r in rows if r["group"] == group]
        if chosen:
            sizes = "; ".join(dict.fromkeys(r["shape_from"] for r in chosen))
            yield title, f"<p class=soft>Sizes: {_text(sizes)}.</p>{_table(chosen)}{_reproduced(chosen)}"
    memory = list(_memory_bars(rows))
    if memory:
        about = "Peak memory of a call of each alternative over ours, least first; left of the line ours takes more."
        yield "Memory", f"<p class=soft>{about}</p>{ratio_bars(sorted(memory, key=lambda bar: bar[1]))}"
    if results["scaling"]:
        yield "Log-mel over clip length", _figure(plots.scaling(results["scaling"]), "From one second to ten minutes")
    for name in dict.fromkeys(p["curve"] for p in results["curves"]):
        points = [p for p in results["curves"] if p["curve"] == name]
        yield name.capitalize(), _figure(plots.curve(points), f"{name}: time and peak memory over {points[0]['along']}")
    if results["starts"]:
        starts = "".join(
            f"<tr><td>{_text(s['what'])}</td>{_cell(s['seconds'], rounded(s['seconds']))}</tr>"
            for s in results["starts"]
        )
        head = "<tr><th>a fresh process that does</th><th>seconds</th></tr>"
        yield "Cold start", f"<table>{head}{starts}</table>"
    if results["memory"]:
        caption = "Linear in the batch, where the formula is square"
        yield "Memory of the contrastive losses", _figure(plots.batch_memory(results["memory"]), caption)
    if results["learning"]:
        yield "What the presets learn", "".join(section.html_parts(results["learning"], _figure))
    if any(r["flops"] and r["bytes_moved"] for r in rows) and results.get("machine"):
        figure = plots.roofline(rows, results["machine"])
        yield "Roofline", _figure(figure, "Each case under the rates measured on this machine")
    if results["skipped"]:
        commands = dict.fromkeys(s["command"] for s in results["skipped"])
        cases = [f"{c}: {', '.join(s['case'] for s in results['skipped'] if s['command'] == c)}" for c in commands]
        yield "Not run for want of time", _list(cases)
    if results["not_measured"]:
        yield "On a GPU", _gpu(results)
    if not results.get("own"):
        yield "The input", _inputs(any(r["group"] == "audio" for r in rows), plots)
    machine = "".join(f"<tr><th>{a}</th><td>{_text(b)}</td></tr>" for a, b in environment_lines(results))
    yield "The machine", f"<div class=wide><table>{machine}</table></div>"
    yield "How it is measured", f"<p>{_text(METHOD)}</p>"


def _memory_bars(rows: list[Row]) -> Iterator[Bar]:
    """Yield a bar for every provider beside ours that takes a MiB or more, or where ours does."""
    ours = {r["case"]: r["peak_mib"] for r in rows if r["ours"]}
    for r in rows:
        own, theirs = ours.get(r["case"]), r["peak_mib"]
        if r["ours"] or own is None or theirs is None:
            continue
        ratio = findings.memory_ratio(theirs, own)
        if ratio is not None:
            yield f"{r['case']}: {rounded(theirs)} MiB by {r['provider']}, {rounded(own)} by ours", ratio, None


METHOD = (
    "First every provider's result is compared with the formula in float64: ours may err at most twice as much as"
    " the formula in its own precision, and on audio at most as much as the library compared with; a case that "
    "misses this is not timed. Then every other provider is timed in turn with ours, on rotating inputs: “ours is"
    " faster” is the median of the ratios of neighbouring calls, and its interval holds that median with 95 %; of"
    " fewer than six pairs, of what takes long, it is their range. Then one call's peak memory. “Of limit” is the"
    " time that bytes and flops of the job need at the rates measured here on as many threads, over the time "
    "taken; the rates are themselves a measurement, so it can pass 100 %."
)


def ratio_bars(bars: Sequence[Bar]) -> str:
    """Draw bars from 1 on a logarithmic axis, to the left where a ratio is below it."""
    ends = [n for _, value, around in bars for n in (value, *(around or ()))]
    low, high = math.log(min(0.5, *ends) if ends else 0.5), math.log(max(2.0, *ends) if ends else 2.0)

    def place(value: float) -> float:
        return 100 * (math.log(value) - low) / (high - low)

    lines, middle = [], place(1)
    for label, value, around in bars:
        at = place(value)
        lost = " class=lost" if value < 1 else ""
        marks = f'<i{lost} style="left:{min(at, middle):.1f}%;width:{abs(at - middle):.1f}%"></i>'
        number = f"{rounded(value)}×"
        if around:
            first, last = map(place, around)
            marks += f'<s style="left:{first:.1f}%;width:{max(last - first, 0.3):.1f}%"></s>'
            number += f" <small>{rounded(around[0])}–{rounded(around[1])}</small>"
        marks += f'<u style="left:{middle:.1f}%"></u>'
        track = f"<span class=track aria-hidden=true>{marks}</span>"
        lines.append(f"<div class=bar><span>{_text(label)}</span>{track}<b>{number}</b></div>")
    return f"<div class=bars>{''.join(lines)}</div>"


def _cell(value: float | None, text: str) -> str:
    """Write a cell that is sorted by its value."""
    return f'<td class=n data-v="{-1 if value is None else value:.6g}">{text}</td>'


def _table(rows: list[Row]) -> str:
    head = "".join(f'<th title="{_text(what or name)}">{name}</th>' for name, what in COLUMNS)
    lines = []
    for r in rows:
        around = "" if r["ours"] else f"{rounded(r['ours_faster_low'])}–{rounded(r['ours_faster_high'])}"
        faster = "" if r["ours"] else f"{rounded(r['ours_faster'])}× <small>{around}</small>"
        limit, error = r["fraction_of_limit"], r["relative_error"]
        passed = f"{rounded(r['median_ms'])} <small>{rounded(r['p20_ms'])}–{rounded(r['p80_ms'])}</small>"
        cells = [
            _cell(r["median_ms"], passed),
            _cell(r["ours_faster"], faster),
            _cell(r["peak_mib"], rounded(r["peak_mib"])),
            _cell(error, or_dash(error, ".0e")),
            _cell(limit, or_dash(limit, ".0%")),
        ]
        names = f"<td>{_text(r['case'])}</td><td>{_text(r['provider'])}</td>"
        lines.append(f"<tr{' class=ours' if r['ours'] else ''}>{names}{''.join(cells)}</tr>")
    return (
        f"<div class=wide><table class=data><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _reproduced(rows: list[Row]) -> str:
    jobs = " ".join(dict.fromkeys(r["job"] for r in rows))
    return f"<p class=soft>Again, with all its cases: <code>mmlm-fast report --ops {jobs}</code></p>"


def _accelerated(rows: list[Accelerated], is_own: bool) -> str:
    lines = []
    for r in rows:
        cells = (
            r["case"], r["shape"], f"{rounded(r['stock_s'])} / {rounded(r['ours_s'])}",
            f"{r['speedup']:.2f}× ({r['speedup_low']:.2f} – {r['speedup_high']:.2f})",
            f"{rounded(r['stock_mib'])} / {rounded(r['ours_mib'])}", findings.difference(r), ", ".join(r["kinds"]),
        )  # fmt: skip
        lines.append(f"<tr>{''.join(f'<td class=text>{_text(c)}</td>' for c in cells)}</tr>")
    titles = ("job", "sizes", "stock / ours, s", "speed-up (95 %)", "stock / ours, MiB", "difference", "replaced")
    head = "".join(f"<th>{t}</th>" for t in titles)
    about = "As transformers has it, with sdpa, and after mmlm_fast.accelerate(model): in turns, on shared weights."
    again = (
        "" if is_own else "<p class=soft>Of your own model: <code>mmlm-fast report --model FOLDER_OR_CONFIG</code></p>"
    )
    return f"<p class=soft>{about}</p><div class=wide><table><tr>{head}</tr>{''.join(lines)}</table></div>{again}"


def _own(own: Own) -> Iterator[tuple[str, str]]:
    """Yield the sections on a user's model beside its times."""
    about = f"{own['class']}, {own['parameters'] / 1e6:,.1f} million parameters, {own['dtype']}; {own['name']}."
    yield "Your model", f"<p>{_text(about)}</p>{_list(own['notes'])}{_list(own['accelerate'])}"
    titles = ("what a module is", "modules", "time of a forward pass", "memory kept for the backward pass", "MiB")
    lines = []
    for share in own["shares"]:
        cells = f"<td>{_text(share['what'])}</td>" + _cell(share["modules"], str(share["modules"]))
        cells += _cell(share["time"], f"{share['time']:.0%}") + _cell(share["memory"], f"{share['memory']:.0%}")
        lines.append(f"<tr>{cells}{_cell(share['mib'], rounded(share['mib']))}</tr>")
    head = "".join(f'<th title="{t}">{t}</th>' for t in titles)
    table = f"<table class=data><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    about = "As transformers has it. A module's time is what passes in it less what passes in the modules inside it."
    yield "Where its time and memory go", f"<p class=soft>{about}</p><div class=wide>{table}</div>"


def gpu_lines(results: Results) -> list[str]:
    """Name the newest committed result of a GPU, or say that there is none; then what would run on one here."""
    last = results.get("last_gpu_result")
    newest = "No GPU result is committed yet."
    if last:
        versions = ", ".join(
            f"{k} {v}" for k, v in last["packages"].items() if k in ("torch", "triton", "transformers")
        )
        newest = f"The last committed GPU result: {last['device']}, {last['date']}, {versions}, {last['file']}."
    return ["No GPU here, so nothing was measured on one. " + newest, *results["not_measured"]]


def _gpu(results: Results) -> str:
    first, *rest = gpu_lines(results)
    last = results.get("last_gpu_result")
    bars = [(f"{r['case']}, against {r['provider']}", r["ours_faster"], None) for r in (last["rows"] if last else [])]
    chart = ratio_bars(bars) if bars else ""
    return f"<p>{_text(first)}</p>{chart}<details><summary>what runs on a GPU</summary>{_list(rest)}</details>"


def _inputs(hears: bool, plots: Any) -> str:
    picture, caption = load_image()
    buffer = io.BytesIO()
    picture.resize((224, 224)).save(buffer, "PNG")
    parts = ["<p class=soft>Real speech, a real picture and real text, shipped with the package.</p>"]
    parts.append(_figure(buffer.getvalue(), f"{caption} (NASA, public domain)", "png"))
    if find_spec("soundfile"):  # jobs without audio are reported without it
        lines = "".join(
            f"<tr><td>{s.language}</td><td>{len(s.waveform) / s.sampling_rate:.1f} s</td><td>{_text(s.text)}</td></tr>"
            for s in load_speech()
        )
        parts.append(f"<table><tr><th>speech</th><th>length</th><th>transcript</th></tr>{lines}</table>")
        parts.append("<p class=soft>Speech: Asterisk core sounds, CC-BY-SA-3.0. Prompts:</p>")
    else:
        parts.append("<p>Prompts (soundfile, which reads the speech, is not installed):</p>")
    parts.append(_list(load_prompts()))
    if hears and find_spec("soundfile"):
        title = "Log-mel features from the native core, and their error"
        parts.append(_figure(plots.features(sample_features()), title, "png"))
    return "".join(parts)


def environment_lines(results: Results) -> list[tuple[str, str]]:
    """Describe the machine, as lines of a table."""
    e, machine = results["environment"], results.get("machine")
    load, rates = e.get("others_load"), "not measured"
    if machine:
        rates = f"copy {machine['copy_gb_per_s']} GB/s, matrix product {machine['matmul_gflop_per_s']} GFLOP/s"
    return [
        ("device", f"{e['device']}, {e['cores']} cores, {e['threads']} threads, {e['isa']}"),
        ("other programs at the start", "not told" if load is None else f"{load:.0%} of the cores"),
        ("rates measured", rates),
        ("date, commit", f"{e['date']}, {e['commit'] or 'unknown (an installed package)'}"),
        ("mmlm_fast, Python", f"{e['mmlm_fast']}, {e['python']}"),
        ("packages", ", ".join(f"{k} {v}" for k, v in e["packages"].items())),
    ]


def _text(value: object) -> str:
    return html.escape(str(value))


def _anchor(title: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in title.lower())


def _figure(image: bytes, caption: str, kind: str = "svg+xml") -> str:
    data, text = base64.b64encode(image).decode(), _text(caption)
    return f'<figure><img alt="{text}" src="data:image/{kind};base64,{data}"><figcaption>{text}</figcaption></figure>'


def _list(lines: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{_text(line)}</li>" for line in lines) + "</ul>"
