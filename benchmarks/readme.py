"""README's tables from committed results: `python -m mmlm_benchmarks.readme` rewrites them, a test compares."""

import json
import re
import sys
from pathlib import Path
from typing import Any

from mmlm_benchmarks.learning import section
from mmlm_benchmarks.report.measure import RESULTS
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


def newest(
    device_type: str, having: str = "rows", folder: Path | None = None
) -> tuple[str, dict[str, Any]] | None:  # fmt: skip
    """File name and content of the newest results in a folder, of a kind of device, that have this."""
    paths = sorted((folder or RESULTS).glob("*.json"))
    found = [(path.name, json.loads(path.read_text(encoding="utf-8"))) for path in paths]
    found = [(name, r) for name, r in found if r["environment"]["device_type"] == device_type and r.get(having)]
    return max(found, key=lambda item: item[1]["environment"]["date"], default=None)


def lines(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """One line for each alternative to each of our cases, losses included."""
    out = []
    for ours in (r for r in results["rows"] if r["ours"]):
        others = [r for r in results["rows"] if r["case"] == ours["case"] and not r["ours"]]
        for other in others:
            out.append(
                (
                    ours["case"] if other is others[0] else "",
                    other["provider"],
                    f"{other['median_ms']:.3g}",
                    f"{ours['median_ms']:.3g}",
                    f"{other['ours_faster']:.2f}×",
                    f"{other['ours_faster_p20']:.2f} – {other['ours_faster_p80']:.2f}",
                    f"{or_dash(other['peak_mib'], '.1f')} / {or_dash(ours['peak_mib'], '.1f')}",
                    *_last_columns(ours, other, results["environment"]["device_type"]),
                )
            )
    return out


def _last_columns(ours: dict[str, Any], other: dict[str, Any], device_type: str) -> tuple[str, ...]:
    if device_type == "cuda":
        host = f"{or_dash(other.get('host_us'), '.0f')} / {or_dash(ours.get('host_us'), '.0f')}"
        return or_dash(ours.get("fraction_of_limit"), ".0%"), host
    return (f"{or_dash(other['relative_error'], '.1e')} / {or_dash(ours['relative_error'], '.1e')}",)


def table(device_type: str, folder: Path | None = None) -> str:
    found = newest(device_type, folder=folder)
    if found is None:
        return "Not measured yet, nor has any kernel run on a GPU." if device_type == "cuda" else "Not measured yet."
    name, results = found
    e = results["environment"]
    packages = ", ".join(f"{k} {v}" for k, v in e["packages"].items())
    commits = ", ".join(sorted({str(r.get("commit", e["commit"])) for r in results["rows"]}))
    if device_type == "cuda":
        told = f"{e['device']}; {e['date']}, commit {commits}; {packages}. From `benchmarks/results/{name}`."
        told += "".join(f"\n- {text}" for text in broken(results))
        return f"{told}\n\n{markdown_table(GPU_COLUMNS, lines(results))}"
    told = (
        f"{e['device']}, {e['cores']} cores, {e['threads']} threads (audio: one), {e['isa']}, load {e['load_average']} "
        f"at the start; {e['date']}, commit {commits}; {packages}. From `benchmarks/results/{name}`."
    )
    return f"{told}\n\n{markdown_table(COLUMNS, lines(results))}"


def broken(results: dict[str, Any]) -> list[str]:
    """What held and what broke on a GPU; a test counts once, whatever its parameters."""
    checks, tests = results.get("checks", []), results.get("tests")
    told = [f"{sum(bool(c['ok']) for c in checks)} of {len(checks)} checks hold"] if checks else []
    if tests:
        told.append(f"{tests['passed']} tests pass, {tests['failed']} fail{'' if tests['finished'] else ', cut off'}")
    names = [re.sub(r"(TEST +[^ \[]+).*", r"\1", text, flags=re.DOTALL) for text in results.get("failures", [])]
    return told + [
        f"{name[:160]}{f' ({n} cases)' if (n := names.count(name)) > 1 else ''}" for name in dict.fromkeys(names)
    ]


def memory_curve() -> str:
    """Of the contrastive losses on a CPU, from the newest committed results that have it."""
    found = newest("cpu", "memory")
    if found is None:
        return "Not measured yet."
    name, results = found
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
    """What the presets learn, from the newest committed results that have it."""
    found = newest("cpu", "learning")
    if found is None:
        return "Not measured yet."
    name, results = found
    told = [*section.sentences(results["learning"]), f"From `benchmarks/results/{name}`."]
    return "\n\n".join([*told, section.markdown(results["learning"])])


def accelerated() -> str:
    """Hugging Face models before and after `accelerate`, from the newest committed results that have them."""
    found = newest("cpu", "accelerated")
    if found is None:
        return "Not measured yet."
    name, results = found
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
    """Every feature extractor of transformers: the drop-ins, and those left as they are."""
    rows = [(f"`{name}`", f"replaced: {entry.computes}") for name, entry in EXTRACTORS.items()]
    rows += [(f"`{name}`", f"not replaced: {reason}") for name, reason in NOT_REPLACED.items()]
    return markdown_table(("class of transformers", "status"), rows)


def with_tables(text: str, folder: Path | None = None) -> str:
    """README text with the tables between its markers made anew; results of a GPU from `folder`, if it is given."""
    text = re.sub(
        r"(<!-- extractors -->\n).*?(<!-- end -->)", lambda m: m[1] + extractors() + "\n" + m[2], text, flags=re.S
    )
    text = re.sub(
        r"(<!-- memory curve -->\n).*?(\n<!-- end -->)", lambda m: m[1] + memory_curve() + m[2], text, flags=re.S
    )
    text = re.sub(
        r"(<!-- learning -->\n).*?(\n?<!-- end -->)", lambda m: m[1] + learning() + "\n<!-- end -->", text, flags=re.S
    )
    text = re.sub(
        r"(<!-- accelerated -->\n).*?(\n?<!-- end -->)",
        lambda m: m[1] + accelerated() + "\n<!-- end -->",
        text,
        flags=re.S,
    )
    for device_type in ("cpu", "cuda"):
        pattern = rf"(<!-- {device_type} results -->\n).*?(\n<!-- end -->)"
        assert re.search(pattern, text, re.S), f"README.md has no <!-- {device_type} results --> … <!-- end -->"
        made = table(device_type, folder if device_type == "cuda" else None)
        text = re.sub(pattern, lambda m, made=made: m[1] + made + m[2], text, flags=re.S)
    return text


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")
    sys.exit(0)
