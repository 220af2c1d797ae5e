"""What results say: each case against its best alternative, what lost, what was not compared, how busy it was."""

from collections.abc import Iterator
from statistics import median
from typing import Any, NamedTuple

from mmlm_benchmarks.harness import OWN_FORMULA
from mmlm_benchmarks.report.measure import BUSY, DRIFT

Row = dict[str, Any]
Results = dict[str, Any]
NOISE = 0.05  # of a ratio: within it nothing is called faster or slower
SLOWER = 0.1  # of an earlier ratio: what a regression is beyond


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
        return f"loss: {_apart(row['difference'])}, gradients: {_apart(row['gradients_difference'])}"
    return f"results: {_apart(row['difference'])}"


def _apart(value: float) -> str:
    return f"{value:.0e} apart" if value else "the same to the bit"


def _shortcomings(results: Results) -> list[str]:
    told = []
    own = sorted({r["case"] for r in results["rows"] if r["provider"] == OWN_FORMULA})
    if own:
        told.append(f"Compared with our own formula alone, so in no headline: {', '.join(own)}.")
    if results["missing_peers"] and results["rows"]:
        told.append(f"Not compared: {', '.join(results['missing_peers'])}.")
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


def slower_than(results: Results, baseline: Results) -> list[str]:
    """Cases whose gain is clearly less than in earlier results: a check of our own code, on the same kind of machine.

    Ratios to other providers in the same run are compared, not times. Ours has become slower where the whole interval
    of now lies a tenth below the earlier ratio, for every provider of the case: one alone has become faster itself.

    Raises:
        ValueError: where the baseline is of another device, or holds none of the cases.
    """
    now, then = results["environment"], baseline["environment"]
    if now["device"] != then["device"] or now["threads"] != then["threads"]:
        raise ValueError(
            f"the baseline is of {then['device']} with {then['threads']} threads, this is {now['device']} with "
            f"{now['threads']}: ratios of another machine say nothing"
        )
    earlier = {(r["case"], r["provider"]): r["ours_faster"] for r in baseline["rows"] if not r["ours"]}
    earlier |= {(_sized(r), "stock"): r["speedup"] for r in baseline.get("accelerated", [])}
    found: dict[str, list[tuple[str, float, float, float]]] = {}
    for r in (r for r in results["rows"] if not r["ours"]):
        _put(found, earlier, r["case"], r["provider"], r["ours_faster"], r["ours_faster_high"])
    for r in results["accelerated"]:
        _put(found, earlier, _sized(r), "stock", r["speedup"], r["speedup_high"])
    if not found:
        raise ValueError("the baseline holds none of the cases that were measured")
    return [
        f"{case}: " + ", ".join(f"{new:.2f}× over {provider}, {old:.2f}× before" for provider, new, _, old in pairs)
        for case, pairs in found.items()
        if all(high < (1 - SLOWER) * old for _, _, high, old in pairs)
    ]


def _sized(row: dict[str, Any]) -> str:
    """Of accelerated models, which are measured at several sizes."""
    return f"{row['case']}, {row['shape']}"


def _put(
    found: dict[str, list[tuple[str, float, float, float]]], earlier: dict[tuple[str, str], float],
    case: str, provider: str, new: float, high: float,
) -> None:  # fmt: skip
    if (case, provider) in earlier:
        found.setdefault(case, []).append((provider, new, high, earlier[case, provider]))
