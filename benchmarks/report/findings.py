"""What results say: each case against its best alternative, what lost, what was not compared, how busy it was."""

from collections.abc import Iterator
from statistics import median
from typing import Any, NamedTuple

from mmlm_benchmarks.harness import OWN_FORMULA
from mmlm_benchmarks.report.measure import BUSY, DRIFT

Row = dict[str, Any]
Results = dict[str, Any]
NOISE = 0.05  # of a ratio: within it nothing is called faster or slower


class Compared(NamedTuple):
    """One of our cases beside the fastest alternative to it."""

    ours: Row
    best: Row

    @property
    def ratio(self) -> float:
        """The alternative's time over ours."""
        return self.best["ours_faster"]

    @property
    def interval(self) -> tuple[float, float]:
        """Of that median, 95 %."""
        return self.best["ours_faster_low"], self.best["ours_faster_high"]

    @property
    def is_slower(self) -> bool:
        """Whether ours is slower beyond noise."""
        return self.interval[1] < 1 and self.ratio < 1 - NOISE

    @property
    def is_faster(self) -> bool:
        """Whether ours is faster beyond noise."""
        return self.interval[0] > 1 and self.ratio > 1 + NOISE

    @property
    def memory(self) -> float | None:
        """The alternative's peak memory over ours; None where either is not known, or less than a MiB."""
        pair = self.best["peak_mib"], self.ours["peak_mib"]
        return None if None in pair or max(pair) < 1 else max(pair[0], 0.1) / max(pair[1], 0.1)


def compared(results: Results) -> list[Compared]:
    """Every case that a headline may count, worst first: with an alternative that is not a formula of our own."""
    found = []
    for ours in (r for r in results["rows"] if r["ours"]):
        others = [r for r in results["rows"] if r["case"] == ours["case"] and not r["ours"]]
        others = [r for r in others if r["provider"] != OWN_FORMULA]
        if others:
            found.append(Compared(ours, min(others, key=lambda r: r["ours_faster"])))
    return sorted(found, key=lambda c: c.ratio)


def busy(results: Results) -> list[str]:
    """Why the numbers of this run are not to be trusted; empty where they are."""
    told = []
    load = results["environment"].get("others_load")
    if load is not None and load > BUSY:
        told.append(f"at the start other programs took {load:.0%} of the cores")
    rates = results.get("rates", [])
    if len(rates) > 1:
        for what, place in (("copies", 0), ("matrix products", 1)):
            ratios = [max(a[place], b[place]) / min(a[place], b[place]) for a, b in _both(rates[0], rates[-1])]
            if ratios and max(ratios) > DRIFT:
                told.append(f"the machine's rate of {what} changed by {max(ratios) - 1:.0%} between start and end")
    return told


def _both(first: dict[str, list[float]], last: dict[str, list[float]]) -> Iterator[tuple[list[float], list[float]]]:
    return ((first[count], last[count]) for count in first if count in last)


def sentences(results: Results) -> list[str]:
    """What a reader in a hurry needs, losses included."""
    if results.get("own"):
        return [*_accelerated(results), *_shortcomings(results)]
    found = compared(results)
    told = [
        f"{len(found)} cases against the best alternative that runs here, each checked against float64 before it was "
        f"timed; {len(results['failures'])} failed."
    ]
    if found:
        faster, slower = [c for c in found if c.is_faster], [c for c in found if c.is_slower]
        even = len(found) - len(faster) - len(slower)
        told.append(f"Faster in {len(faster)}, slower in {len(slower)}, within noise in {even}.")
        told += [f"Slower: {c.ours['case']}, {c.ratio:.2f}× as fast as {c.best['provider']}." for c in slower]
    told += _accelerated(results)
    if results["generation"]:
        same_tokens = sum(g["equal"] for g in results["generation"])
        total = len(results["generation"])
        told.append(f"Greedy generation, fast against reference: {same_tokens} of {total} identical token by token.")
    return told + _shortcomings(results)


def _accelerated(results: Results) -> list[str]:
    told = []
    for row in results["accelerated"]:
        gain = f"{row['speedup']:.2f}× ({row['speedup_low']:.2f} – {row['speedup_high']:.2f}) as fast accelerated"
        told.append(f"{row['case']}: {gain}, {difference(row)}. {row['shape']}.")
    return told


def difference(row: Row) -> str:
    """How far results of a model before and after lie apart, in words."""
    if "equal" in row:
        return "the same tokens" if row["equal"] else "OTHER TOKENS"
    if "gradients_difference" in row:
        return f"loss {_apart(row['difference'])}, gradients {_apart(row['gradients_difference'])}"
    return f"results {_apart(row['difference'])}"


def _apart(value: float) -> str:
    return f"differ by {value:.0e}" if value else "the same to the bit"


def _shortcomings(results: Results) -> list[str]:
    told = []
    own = sorted({r["case"] for r in results["rows"] if r["provider"] == OWN_FORMULA})
    if own:
        told.append(f"Compared with our own formula alone, so in no headline: {', '.join(own)}.")
    if results["missing_peers"] and results["rows"]:
        told.append(f"Not installed, not compared: {', '.join(results['missing_peers'])}.")
    if results["skipped"]:
        count = len(results["skipped"])
        told.append(f"{count} cases did not fit into the time; the commands that run them are listed below.")
    return told


def tiles(results: Results) -> list[tuple[str, str]]:
    """Up to five numbers, each with what it is of: the worst that it stands for comes first."""
    found, made = compared(results), []
    whose = "your model, accelerated" if results.get("own") else "an accelerated Hugging Face model"
    for row in results["accelerated"] if results.get("own") else results["accelerated"][:1]:
        around = f"{row['speedup_low']:.2f} – {row['speedup_high']:.2f}"
        made.append((f"{row['speedup']:.2f}×", f"{row['case']} of {whose} ({around})"))
    for group, what in (("audio", "audio features"), ("model", "the thin model"), (None, "ops")):
        chosen = [c for c in found if (c.ours["group"] == group if group else _is_op(c.ours))]
        if chosen:
            ratios = [c.ratio for c in chosen]
            many = len(chosen) > 1
            value = f"{min(ratios):.2f} – {max(ratios):.1f}×" if many else f"{ratios[0]:.2f}×"
            told = f", typically {median(ratios):.1f}×" if many else ""
            made.append((value, f"{what}: against the best alternative of {len(chosen)}{told}"))
    memory = [c.memory for c in found if c.memory is not None]
    if memory:
        value = f"{min(memory):.1f} – {max(memory):.0f}×"
        made.append((value, f"less peak memory than that alternative, typically {median(memory):.1f}×"))
    return made


def _is_op(row: Row) -> bool:
    return row["group"] not in ("audio", "model")
