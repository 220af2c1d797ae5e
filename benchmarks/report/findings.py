"""Say what results show: each case against its best alternative, what lost, what was not compared, how busy it was."""

from collections.abc import Iterator
from statistics import median
from typing import NamedTuple

from mmlm_benchmarks.harness import OWN_FORMULA, Interval
from mmlm_benchmarks.report.schema import Accelerated, Baseline, BaselineAccelerated, Results, Row

BUSY = 0.4  # of a core, by other programs
DRIFT = 1.25  # of the machine's rates, between the start and the end
NOISE = 0.05  # of a ratio: within it nothing is called faster or slower
SLOWER = 0.1  # of an earlier ratio: what a regression is beyond


def gain(row: Row) -> float:
    """Return how many times as fast as an alternative ours is, from the row of that alternative."""
    assert row["ours_faster"] is not None, f"{row['case']}: the row is of ours"
    return row["ours_faster"]


def gain_interval(row: Row) -> Interval:
    """Return the 95 % confidence interval of the gain over an alternative."""
    low, high = row["ours_faster_low"], row["ours_faster_high"]
    assert low is not None, f"{row['case']}: the row is of ours"
    assert high is not None, f"{row['case']}: the row is of ours"
    return Interval(low, high)


class Compared(NamedTuple):
    """Hold one of our cases beside the fastest alternative to it."""

    ours: Row
    best: Row

    @property
    def ratio(self) -> float:
        """Return the alternative's time over ours."""
        return gain(self.best)

    @property
    def interval(self) -> Interval:
        """Return the 95 % confidence interval of the ratio."""
        return gain_interval(self.best)

    @property
    def is_slower(self) -> bool:
        """Say whether ours is slower beyond noise."""
        return self.interval.high < 1 and self.ratio < 1 - NOISE

    @property
    def is_faster(self) -> bool:
        """Say whether ours is faster beyond noise."""
        return self.interval.low > 1 and self.ratio > 1 + NOISE

    @property
    def memory(self) -> float | None:
        """Return the alternative's peak memory over ours; None where either is not known, or both are below a MiB."""
        theirs, ours = self.best["peak_mib"], self.ours["peak_mib"]
        return None if theirs is None or ours is None else memory_ratio(theirs, ours)


def memory_ratio(theirs: float, ours: float) -> float | None:
    """Return how many times as much memory an alternative takes as ours; None where both take less than a MiB."""
    return None if max(theirs, ours) < 1 else max(theirs, 0.1) / max(ours, 0.1)


def compared(results: Results) -> list[Compared]:
    """Compare every case that a headline may count, worst first: with an alternative that is no formula of our own."""
    comparisons = []
    for ours in (r for r in results["rows"] if r["ours"]):
        others = [r for r in results["rows"] if r["case"] == ours["case"] and not r["ours"]]
        others = [r for r in others if r["provider"] != OWN_FORMULA]
        if others:
            comparisons.append(Compared(ours, min(others, key=gain)))
    return sorted(comparisons, key=lambda c: c.ratio)


def busy(results: Results) -> list[str]:
    """List why the numbers of this run are not to be trusted; empty where they are."""
    reasons = []
    load = results["environment"].get("others_load")
    if load is not None and load > BUSY:
        reasons.append(f"at the start other programs took {load:.0%} of the cores")
    rates = results.get("rates", [])
    if len(rates) > 1:
        for what, place in (("copies", 0), ("matrix products", 1)):
            ratios = [max(a[place], b[place]) / min(a[place], b[place]) for a, b in _both(rates[0], rates[-1])]
            if ratios and max(ratios) > DRIFT:
                change = f"{max(ratios) - 1:.0%}"
                reasons.append(f"the machine's rate of {what} changed by {change} between start and end")
    return reasons


def _both(first: dict[str, list[float]], last: dict[str, list[float]]) -> Iterator[tuple[list[float], list[float]]]:
    return ((first[count], last[count]) for count in first if count in last)


def sentences(results: Results) -> list[str]:
    """Write what a reader in a hurry needs, losses included."""
    if results.get("own"):
        return [*_accelerated(results), *_shortcomings(results)]
    comparisons = compared(results)
    lines = [
        f"{len(comparisons)} cases against the best alternative that runs here, each checked against float64 before it "
        f"was timed; {len(results['failures'])} failed."
    ]
    if comparisons:
        faster, slower = [c for c in comparisons if c.is_faster], [c for c in comparisons if c.is_slower]
        even = len(comparisons) - len(faster) - len(slower)
        lines.append(f"Faster in {len(faster)}, slower in {len(slower)}, within noise in {even}.")
        lines += [f"Slower: {c.ours['case']}, {c.ratio:.2f}× as fast as {c.best['provider']}." for c in slower]
    lines += _accelerated(results)
    if results["generation"]:
        same_tokens = sum(g["equal"] for g in results["generation"])
        total = len(results["generation"])
        lines.append(f"Greedy generation, fast against reference: {same_tokens} of {total} identical token by token.")
    return lines + _shortcomings(results)


def _accelerated(results: Results) -> list[str]:
    lines = []
    for row in results["accelerated"]:
        faster = f"{row['speedup']:.2f}× ({row['speedup_low']:.2f} – {row['speedup_high']:.2f}) as fast accelerated"
        lines.append(f"{row['case']}: {faster}, {difference(row)}. {row['shape']}.")
    return lines


def difference(row: Accelerated) -> str:
    """Say in words how far results of a model before and after lie apart."""
    if "equal" in row:
        return "the same tokens" if row["equal"] else "OTHER TOKENS"
    if "gradients_difference" in row:
        return f"loss: {_apart(row['difference'])}, gradients: {_apart(row['gradients_difference'])}"
    return f"results: {_apart(row['difference'])}"


def _apart(value: float) -> str:
    return f"{value:.0e} apart" if value else "the same to the bit"


def _shortcomings(results: Results) -> list[str]:
    lines = []
    own = sorted({r["case"] for r in results["rows"] if r["provider"] == OWN_FORMULA})
    if own:
        lines.append(f"Compared with our own formula alone, so in no headline: {', '.join(own)}.")
    if results["missing_peers"] and results["rows"]:
        lines.append(f"Not compared: {', '.join(results['missing_peers'])}.")
    if results["skipped"]:
        count = len(results["skipped"])
        lines.append(f"{count} cases did not fit into the time; the commands that run them are listed below.")
    return lines


def tiles(results: Results) -> list[tuple[str, str]]:
    """Give up to five numbers, each with what it is of: the worst that it stands for comes first."""
    comparisons, numbers = compared(results), []
    whose = "your model, accelerated" if results.get("own") else "an accelerated Hugging Face model"
    for row in results["accelerated"] if results.get("own") else results["accelerated"][:1]:
        around = f"{row['speedup_low']:.2f} – {row['speedup_high']:.2f}"
        numbers.append((f"{row['speedup']:.2f}×", f"{row['case']} of {whose} ({around})"))
    for group, what in (("audio", "audio features"), ("model", "the thin model"), (None, "ops")):
        chosen = [c for c in comparisons if (c.ours["group"] == group if group else _is_op(c.ours))]
        if chosen:
            ratios = [c.ratio for c in chosen]
            many = len(chosen) > 1
            value = f"{min(ratios):.2f} – {max(ratios):.1f}×" if many else f"{ratios[0]:.2f}×"
            typical = f", typically {median(ratios):.1f}×" if many else ""
            numbers.append((value, f"{what}: against the best alternative of {len(chosen)}{typical}"))
    memory = [c.memory for c in comparisons if c.memory is not None]
    if memory:
        value = f"{min(memory):.1f} – {max(memory):.0f}×"
        numbers.append((value, f"less peak memory than that alternative, typically {median(memory):.1f}×"))
    return numbers


def _is_op(row: Row) -> bool:
    return row["group"] not in ("audio", "model")


class Change(NamedTuple):
    """Hold the gain over a provider, of which the interval ends at `high`, beside that of an earlier report."""

    provider: str
    now: float
    high: float
    before: float


def slower_than(results: Results, baseline: Baseline | Results) -> list[str]:
    """List the cases whose gain is clearly less than in earlier results, of the same kind of machine.

    It is a check of our own code. Ratios to other providers in the same run are compared, not times. Ours has become
    slower where the whole interval of now lies a tenth below the earlier ratio, for every provider of the case: one
    alone has become faster itself.

    Raises:
        ValueError: where the baseline is of another device, or holds none of the cases.
    """
    now, then = results["environment"], baseline["environment"]
    if now["device"] != then["device"] or now["threads"] != then["threads"]:
        raise ValueError(
            f"the baseline is of {then['device']} with {then['threads']} threads, this is {now['device']} with "
            f"{now['threads']}: ratios of another machine say nothing"
        )
    earlier = {(r["case"], r["provider"]): r["ours_faster"] for r in baseline["rows"] if r["ours_faster"] is not None}
    earlier |= {(_sized(r), "stock"): r["speedup"] for r in baseline.get("accelerated", [])}
    gains = [(r["case"], r["provider"], gain(r), gain_interval(r).high) for r in results["rows"] if not r["ours"]]
    gains += [(_sized(r), "stock", r["speedup"], r["speedup_high"]) for r in results["accelerated"]]
    changes: dict[str, list[Change]] = {}
    for case, provider, value, high in gains:
        if (case, provider) in earlier:
            change = Change(provider=provider, now=value, high=high, before=earlier[case, provider])
            changes.setdefault(case, []).append(change)
    if not changes:
        raise ValueError("the baseline holds none of the cases that were measured")
    return [
        f"{case}: " + ", ".join(f"{c.now:.2f}× over {c.provider}, {c.before:.2f}× before" for c in of_case)
        for case, of_case in changes.items()
        if all(c.high < (1 - SLOWER) * c.before for c in of_case)
    ]


def _sized(row: Accelerated | BaselineAccelerated) -> str:
    """Name a case of accelerated models, which are measured at several sizes."""
    return f"{row['case']}, {row['shape']}"
