"""Make README's tables from committed results: `python -m mmlm_benchmarks.readme` rewrites them, a test compares."""

import json
import re
import sys
from pathlib import Path
from typing import Literal

from mmlm_benchmarks.learning import section
from mmlm_benchmarks.report.findings import gain
from mmlm_benchmarks.report.measure import RESULTS
from mmlm_benchmarks.report.schema import Committed, Row
from mmlm_benchmarks.tables import markdown_table, or_dash
from mmlm_fast.audio.extractors import EXTRACTORS, NOT_REPLACED

README = Path(__file__).parents[1] / "README.md"
COLUMNS = (
    "job",
    "against",
    "theirs, ms",
    "ours, ms",
    "speed-up",
    "p20 – p80",
    "peak MiB, theirs / ours",
    "error, theirs / ours",
)
# On a GPU errors are facts of their own, and what the host needs for a call is apart from the kernels' time.
GPU_COLUMNS = (*COLUMNS[:-1], "of the card's limit", "host µs, theirs / ours")


REQUIRED = ("cpu results", "cuda results")
Part = Literal["rows", "memory", "learning", "accelerated"]


def newest(device_type: str, having: Part = "rows", folder: Path | None = None) -> tuple[str, Committed] | None:
    """Return file name and content of the newest results in a folder, of a kind of device, that have this part."""
    suitable: list[tuple[str, Committed]] = []
    for path in sorted((folder or RESULTS).glob("*.json")):
        results: Committed = json.loads(path.read_text(encoding="utf-8"))
        if results["environment"]["device_type"] == device_type and results.get(having):
            suitable.append((path.name, results))
    return max(suitable, key=lambda item: item[1]["environment"]["date"], default=None)


def lines(results: Committed) -> list[tuple[str, ...]]:
    """Write one line for each alternative to each of our cases, losses included."""
    out: list[tuple[str, ...]] = []
    for ours in (r for r in results["rows"] if r["ours"]):
        others = [r for r in results["rows"] if r["case"] == ours["case"] and not r["ours"]]
        for other in others:
            out.append(
                (
                    ours["case"] if other is others[0] else "",
                    other["provider"],
                    f"{other['median_ms']:.3g}",
                    f"{ours['median_ms']:.3g}",
                    f"{gain(other):.2f}×",
                    f"{other['ours_faster_p20']:.2f} – {other['ours_faster_p80']:.2f}",
                    f"{or_dash(other['peak_mib'], '.1f')} / {or_dash(ours['peak_mib'], '.1f')}",
                    *_last_columns(ours, other, results["environment"]["device_type"]),
                )
            )
    return out


def _last_columns(ours: Row, other: Row, device_type: str) -> tuple[str, ...]:
    if device_type == "cuda":
        host = f"{or_dash(other.get('host_us'), '.0f')} / {or_dash(ours.get('host_us'), '.0f')}"
        return or_dash(ours.get("fraction_of_limit"), ".0%"), host
    return (f"{or_dash(other['relative_error'], '.1e')} / {or_dash(ours['relative_error'], '.1e')}",)


def table(device_type: str, folder: Path | None = None) -> str:
    """Write the table of a kind of device, and what it is from."""
    committed = newest(device_type, folder=folder)
    if committed is None:
        return "Not measured yet, nor has any kernel run on a GPU." if device_type == "cuda" else "Not measured yet."
    name, results = committed
    e = results["environment"]
    packages = ", ".join(f"{k} {v}" for k, v in e["packages"].items())
    commits = ", ".join(sorted({str(r.get("commit", e["commit"])) for r in results["rows"]}))
    if device_type == "cuda":
        source = f"{e['device']}; {e['date']}, commit {commits}; {packages}. From `benchmarks/results/{name}`."
        source += "".join(f"\n- {text}" for text in broken(results))
        return f"{source}\n\n{markdown_table(GPU_COLUMNS, lines(results))}"
    source = (
        f"{e['device']}, {e['cores']} cores, {e['threads']} threads (audio: one), {e['isa']}, load {e['load_average']} "
        f"at the start; {e['date']}, commit {commits}; {packages}. From `benchmarks/results/{name}`."
    )
    return f"{source}\n\n{markdown_table(COLUMNS, lines(results))}"


def broken(results: Committed) -> list[str]:
    """List what held and what broke on a GPU; a test counts once, whatever its parameters."""
    checks, tests = results.get("checks", []), results.get("tests")
    counts = [f"{sum(bool(c['ok']) for c in checks)} of {len(checks)} checks hold"] if checks else []
    if tests:
        counts.append(f"{tests['passed']} tests pass, {tests['failed']} fail{'' if tests['finished'] else ', cut off'}")
    names = [re.sub(r"(TEST +[^ \[]+).*", r"\1", text, flags=re.DOTALL) for text in results.get("failures", [])]
    return counts + [
        f"{name[:160]}{f' ({n} cases)' if (n := names.count(name)) > 1 else ''}" for name in dict.fromkeys(names)
    ]


def memory_curve() -> str:
    """Write the memory of contrastive losses on a CPU, from the newest committed results that have it."""
    committed = newest("cpu", "memory")
    if committed is None:
        return "Not measured yet."
    name, results = committed
    points = {(p["op"], p["provider"], p["batch"]): p["mib"] for p in results["memory"]}
    columns = [(op, provider) for op in ("clip_loss", "siglip_loss") for provider in ("eager", "mmlm_fast")]
    rows = [
        (f"{batch:,}", *(or_dash(points.get((*column, batch)), ".1f") for column in columns))
        for batch in sorted({p["batch"] for p in results["memory"]})
    ]
    titles = ("batch", *(f"{op}, {'ours' if provider == 'mmlm_fast' else provider}" for op, provider in columns))
    note = f"MiB beyond inputs and gradients, float32, 64 features. From `benchmarks/results/{name}`."
    return f"{note}\n\n{markdown_table(titles, rows)}"


def learning() -> str:
    """Write what the presets learn, from the newest committed results that have it."""
    committed = newest("cpu", "learning")
    if committed is None:
        return "Not measured yet."
    name, results = committed
    paragraphs = [*section.sentences(results["learning"]), f"From `benchmarks/results/{name}`."]
    return "\n\n".join([*paragraphs, section.markdown(results["learning"])])


def accelerated() -> str:
    """Compare Hugging Face models before and after `accelerate`, from the newest committed results that have them."""
    committed = newest("cpu", "accelerated")
    if committed is None:
        return "Not measured yet."
    name, results = committed
    rows = []
    for row in results["accelerated"]:
        same = ("equal" if row["equal"] else "not equal") if "equal" in row else f"{row['difference']:.0e}"
        memory = f"{row['stock_mib']:,.0f} / {row['ours_mib']:,.0f}"
        memory += f" (gradients: {row['gradients_mib']:,.0f})" if row["gradients_mib"] else ""
        rows.append(
            (
                row["case"],
                row["shape"],
                f"{row['stock_s']:.3g}",
                f"{row['ours_s']:.3g}",
                f"{row['speedup']:.2f}×",
                f"{row['speedup_p20']:.2f} – {row['speedup_p80']:.2f}",
                memory,
                same,
            )
        )
    e = results["environment"]
    titles = ("job", "sizes", "stock, s", "ours, s", "speed-up", "p20 – p80", "peak MiB, stock / ours", "error")
    note = (
        f"{e['device']}, {e['threads']} threads, {e['date']}; stock is sdpa. Errors are of tokens, or a norm over loss "
        f"and all gradients. From `benchmarks/results/{name}`; "
        "`python -m mmlm_benchmarks.models.accelerated --ladder` says what each kind gives."
    )
    return f"{note}\n\n{markdown_table(titles, rows)}"


def extractors() -> str:
    """List every feature extractor of transformers: the drop-ins, and those left as they are."""
    rows = [(f"`{name}`", f"replaced: {entry.computes}") for name, entry in EXTRACTORS.items()]
    rows += [(f"`{name}`", f"not replaced: {reason}") for name, reason in NOT_REPLACED.items()]
    return markdown_table(("class of transformers", "status"), rows)


def with_tables(text: str, folder: Path | None = None) -> str:
    """Make the tables between README's markers anew; results of a GPU from `folder`, if it is given."""
    texts = {
        "extractors": extractors(),
        "memory curve": memory_curve(),
        "learning": learning(),
        "accelerated": accelerated(),
        "cpu results": table("cpu"),
        "cuda results": table("cuda", folder),
    }
    for name, body in texts.items():
        pattern = rf"(<!-- {name} -->\n).*?(\n<!-- end -->)"
        if name in REQUIRED and not re.search(pattern, text, re.S):
            raise AssertionError(f"README.md has no <!-- {name} --> … <!-- end -->")
        escaped = body.replace("\\", r"\\")
        text = re.sub(pattern, rf"\g<1>{escaped}\g<2>", text, flags=re.S)
    return text


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")
    sys.exit(0)
